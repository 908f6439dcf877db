"""Pictures over a classifier's limit go, faces are blurred, and nothing else is touched."""

import hashlib
from pathlib import Path
from typing import Any

import dinov2.vision_ops  # noqa: F401  # before timm and transformers

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from curation.classify import Classifier
from curation.config import ClassifierConfig, FacesConfig
from curation.faces import faces_in
from dinov2.data.sources import open_source
from dinov2.exits import UserError
from dinov2.files import sha256_of
from tests.curation.pools import another, command, curate, decisions
from tests.faults import assert_survives, when

cv2 = pytest.importorskip("cv2")
data = pytest.importorskip("skimage.data")
if not hasattr(cv2, "CascadeClassifier"):
    pytest.skip("this OpenCV has no cascades", allow_module_level=True)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph with a face, as JPEG and as TIFF, and some without."""
    root = tmp_path_factory.mktemp("photographs")
    astronaut = Image.fromarray(data.astronaut())
    astronaut.save(root / "astronaut.jpg", quality=92)
    astronaut.crop((100, 0, 400, 300)).rotate(90, expand=True).save(
        root / "turned.tif", tiffinfo={274: 6}
    )  # upright by its orientation
    for name in ("coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(root / f"{name}.jpg")
    another(1, 2).save(root / "drawing.png")
    return root


def test_faces_are_blurred_and_all_else_keeps_its_bytes(pool: Path, tmp_path: Path) -> None:
    out = curate(
        f"pool={pool}", f"output={tmp_path}/out", "filters.faces.blur=true", "duplicates.enabled=false"
    )
    manifest = parquet.read_table(out / "manifest.parquet").to_pylist()
    blurred = {row["uri"] for row in manifest if "faces blurred" in row["flags"]}
    assert blurred == {"astronaut.jpg", "turned.tif"}
    written, steepest = open_source(str(out)), []
    for row in manifest:
        bytes_ = written.read(written.ids.index(row["id"]))
        assert hashlib.sha256(bytes_).hexdigest() == row["sha256"]
        assert (bytes_ == (pool / row["uri"]).read_bytes()) == (row["uri"] not in blurred)
        picture = out / f"seen.{row['format'].lower()}"
        picture.write_bytes(bytes_)
        image = Image.open(picture).convert("RGB")
        assert image.size == (row["width"], row["height"])
        if row["uri"] in blurred:
            steepest.append(_steepest(image))
    assert max(steepest) < 20 < 100 < min(_steepest(Image.open(pool / "astronaut.jpg")), 255)
    assert {row["uri"]: row["format"] for row in manifest}["turned.tif"] == "PNG"
    found = parquet.read_table(out / "stages/filters/pool").to_pylist()
    (face,) = next(
        row["faces"] for row in found if len(row["faces"]) and row["id"] == _id(manifest, "astronaut.jpg")
    )
    left, top, width, height = face
    assert left < 225 < left + width  # the astronaut's nose
    assert top < 120 < top + height


@pytest.mark.long
def test_killed_while_filtering_or_writing_it_ends_with_the_same_bytes(pool: Path, tmp_path: Path) -> None:
    words = [f"pool={pool}", "output=out", "filters.faces.blur=true", "workers=1", "stop_after=write"]
    assert_survives(
        command(*words, "ingest.piece=2", "write.shard=2"),
        tmp_path,
        results=[
            "out/manifest.parquet",
            "out/decisions.parquet",
            "out/shards/*",
            "out/stages/filters/*.parquet",
        ],
        moments=[when("out/stages/filters/pool/00001.parquet"), when("out/shards/000001.tar")],
        at_least=2,
        limit=240,
    )


def test_a_detector_by_path_has_the_hash_that_was_named(pool: Path, tmp_path: Path) -> None:
    path = Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml"
    words = [f"pool={pool}", f"output={tmp_path}/out", "filters.faces.blur=true"]
    by_path = [*words, f"filters.faces.detector={path}"]
    with pytest.raises(UserError, match="give the SHA-256"):
        curate(*by_path)
    with pytest.raises(UserError, match="another file, or damaged"):
        curate(*by_path, "filters.faces.sha256=00")
    broken = Path(data.lbp_frontal_face_cascade_filename())  # of a form that OpenCV does not read
    with pytest.raises(UserError, match="no cascade that OpenCV reads"):
        curate(*words, f"filters.faces.detector={broken}", f"filters.faces.sha256={sha256_of(broken)}")
    assert not (tmp_path / "out" / "stages" / "ingest").exists()
    boxes = faces_in(Image.open(pool / "astronaut.jpg"), FacesConfig(blur=True, detector=str(path)))
    assert any(left < 225 < left + width and top < 120 < top + height for left, top, width, height in boxes)


def test_a_classifier_of_transformers_scores_as_it_does_by_its_own_pipeline(
    pool: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = tmp_path / "model"
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=8, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1},
        initializer_range=1.0,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(model)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(model)
    digest = sha256_of(model / "model.safetensors")
    own = transformers.pipeline("image-classification", model=str(model), device="cpu")
    expected = {
        path.name: next(
            each["score"] for each in own(Image.open(path).convert("RGB")) if each["label"] == "unsafe"
        )
        for path in pool.glob("*.[jp]*")
    }
    key = "filters.classifiers.nsfw"
    words = [f"pool={pool}", f"output={tmp_path}/out", f"{key}.model={model}", f"{key}.label=unsafe"]
    with pytest.raises(UserError, match="damaged"):
        curate(*words, f"{key}.sha256={'0' * 64}")
    most = sorted(expected.values())[1] + 1e-3
    out = curate(*words, f"{key}.sha256={digest}", f"{key}.most={most}", "duplicates.enabled=false")
    rows = decisions(out)
    scores = {row["id"]: row["nsfw"] for row in parquet.read_table(out / "stages/filters/pool").to_pylist()}
    for name, score in expected.items():
        assert scores[rows[name]["id"]] == pytest.approx(score, abs=0.02)  # it resizes by other means
    gone = {uri for uri, row in rows.items() if row["dropped_by"] == "filters"}
    assert gone and gone == {uri for uri, row in rows.items() if scores[row["id"]] > most}
    assert all(rows[uri]["error"].startswith("nsfw: 0.") for uri in gone)
    before = [path.stat().st_mtime_ns for path in (out / "stages/filters/pool").iterdir()]
    curate(
        *words, f"{key}.sha256={digest}", f"{key}.most=1", "duplicates.enabled=false", "from_stage=filters"
    )
    assert not [uri for uri, row in decisions(out).items() if row["dropped_by"] == "filters"]
    assert [path.stat().st_mtime_ns for path in (out / "stages/filters/pool").iterdir()] == before


def test_timm_folders_and_torchscript_score_alike(pool: Path, tmp_path: Path) -> None:
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", num_classes=3).eval()
    save_for_hf(
        model, str(tmp_path / "timm"), model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True
    )
    side = model.pretrained_cfg["input_size"][-1]
    traced: Any = torch.jit.trace(model, torch.zeros(1, 3, side, side))
    traced.save(str(tmp_path / "script.pt"))
    pictures = [Image.open(path).convert("RGB").resize((side, side)) for path in sorted(pool.glob("*.jpg"))]
    mean, std = (list(model.pretrained_cfg[name]) for name in ("mean", "std"))
    folder = Classifier("x", ClassifierConfig(model=str(tmp_path / "timm"), label="b"), "cpu")(pictures)
    script = ClassifierConfig(model=str(tmp_path / "script.pt"), label="1", size=side, mean=mean, std=std)
    found = Classifier("x", script, "cpu")(pictures)
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = model(normal).softmax(1)[:, 1].numpy()
    assert np.allclose(found, expected, atol=1e-3)
    assert np.allclose(folder, expected, atol=0.05)  # its transform crops
    with pytest.raises(UserError, match="it has a, b, c"):
        Classifier("x", ClassifierConfig(model=str(tmp_path / "timm"), label="d"), "cpu")


def _steepest(image: Image.Image) -> int:
    """The largest step between neighbouring pixels in the middle of the largest face, in levels."""
    left, top, width, height = max(
        faces_in(Image.fromarray(data.astronaut()), FacesConfig()), key=lambda box: box[2]
    )
    if image.size != (512, 512):
        return 0
    grey = np.asarray(image.convert("L"), np.int64)[top + height // 4 : top + 3 * height // 4]
    return int(np.abs(np.diff(grey[:, left + width // 4 : left + 3 * width // 4], axis=1)).max())


def _id(manifest: list[dict], uri: str) -> str:
    return next(row["id"] for row in manifest if row["uri"] == uri)
