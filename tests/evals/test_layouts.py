"""Each of the field's folder layouts, made small: what is found, how it is read, and what does not fit."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.exits import UserError
from evals.dense_data import IGNORED, DensePart, LayoutConfig, labelled_parts, measured_parts, open_part
from evals.layouts import TEST, TRAIN, davis, open_layout

SIZE = (12, 8)  # width, height


def save(path: Path, values: np.ndarray | None = None, palette: bool = False) -> None:
    """A picture, or the values as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.random.default_rng(len(str(path))).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    if palette:
        image.putpalette([number % 256 for number in range(768)])
    image.save(path)


def ids(*values: int, dtype: type = np.uint8) -> np.ndarray:
    """A mask or depth whose first row begins with these values; the rest is the first."""
    mask = np.full((SIZE[1], SIZE[0]), values[0], dtype=dtype)
    mask[0, : len(values)] = values
    return mask


def config(root: Path, **settings) -> LayoutConfig:
    return LayoutConfig(backbone="b", output="o", data=str(root), **settings)


def test_ade20k(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save(base / "images" / part / f"{name}.jpg")
        save(base / "annotations" / part / f"{name}.png", ids(1, 0, 150))
    lines = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        *(f"{n}\t.1\t1\t1\t0\tthing {n}, other" for n in range(1, 151)),
    ]
    (base / "objectInfo150.txt").write_text("\n".join(lines))
    parts = labelled_parts(config(tmp_path), [], None)
    assert parts.classes[:2] == ("thing 1", "thing 2") and len(parts.classes) == 150
    assert parts.test.mask(0, SIZE)[0, :3].tolist() == [0, IGNORED, 149]


def test_cityscapes(tmp_path):
    for part in ("train", "val"):
        for city in ("aachen", "bochum"):
            save(tmp_path / "leftImg8bit" / part / city / f"{city}_000000_000019_leftImg8bit.png")
            mask = tmp_path / "gtFine" / part / city / f"{city}_000000_000019_gtFine_labelIds.png"
            save(mask, ids(7, 0, 33, 255, 8, 29))
    parts = labelled_parts(config(tmp_path), [], None)
    assert len(parts.train) == 2 and parts.classes[0] == "road" and len(parts.classes) == 19
    assert parts.train.mask(1, SIZE)[0, :6].tolist() == [0, IGNORED, 18, IGNORED, 1, IGNORED]


def test_voc_palettes_and_lists(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_000032", "2007_000033", "2007_000039"):
        save(base / "JPEGImages" / f"{name}.jpg")
    for name, part in (("2007_000032", "train"), ("2007_000033", "val")):
        save(base / "SegmentationClass" / f"{name}.png", ids(0, 15, 255), palette=True)
        (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(name + "\n")
    parts = labelled_parts(config(tmp_path), [], None)
    assert [len(parts.train), len(parts.test)] == [1, 1]
    mask = parts.test.mask(0, SIZE)
    assert mask[0, :3].tolist() == [0, 15, IGNORED] and parts.classes[15] == "person"


def test_nyuv2_and_kitti_depths_in_metres(tmp_path):
    nyu = tmp_path / "nyu"
    for place in ("sync/basement_0001a", "official_splits/test/bathroom"):
        save(nyu / place / "rgb_00045.jpg")
        save(nyu / place / "sync_depth_00045.png", ids(2500, 0, dtype=np.uint16))
    parts = measured_parts(config(nyu), None)
    depth = parts.test.depth(0, SIZE)
    assert depth[0, :2].tolist() == [2.5, 0.0]
    assert (parts.test.part.crop, parts.test.part.far) == ("eigen", 10.0)

    kitti, drive = tmp_path / "kitti", "2011_09_26_drive_0001_sync"
    for part, frame in (("train", "0000000005"), ("val", "0000000006")):
        save(
            kitti / part / drive / "proj_depth/groundtruth/image_02" / f"{frame}.png",
            ids(512, dtype=np.uint16),
        )
        save(kitti / "2011_09_26" / drive / "image_02/data" / f"{frame}.png")
    parts = measured_parts(config(kitti), None)
    assert parts.test.depth(0, SIZE)[0, 0] == 2.0 and parts.test.part.crop == "garg"
    selected = kitti / "depth_selection" / "val_selection_cropped"
    save(selected / "image" / f"{drive}_image_0000000002_image_02.png")
    save(
        selected / "groundtruth_depth" / f"{drive}_groundtruth_depth_0000000002_image_02.png",
        ids(256, dtype=np.uint16),
    )
    assert measured_parts(config(kitti), None).test.depth(0, SIZE)[0, 0] == 1.0


def test_camvid_with_ids_and_with_colours(tmp_path):
    for part in ("train", "val", "test"):
        save(tmp_path / "ids" / part / "0001TP_006690.png")
        save(tmp_path / "ids" / f"{part}annot" / "0001TP_006690.png", ids(0, 11, 10))
        save(tmp_path / "rgb" / part / "0001TP_006690.png")
        colours = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
        colours[0, :2] = (64, 128, 64), (192, 0, 128)
        save(tmp_path / "rgb" / f"{part}_labels" / "0001TP_006690_L.png", colours)
    table = "name,r,g,b\nAnimal,64,128,64\nVoid,0,0,0\nArchway,192,0,128\n"
    (tmp_path / "rgb" / "class_dict.csv").write_text(table)
    parts = labelled_parts(config(tmp_path / "ids"), [], None)
    assert parts.test.place.name == "ids" and parts.test.part.frames[0].image.parent.name == "test"
    assert parts.test.mask(0, SIZE)[0, :3].tolist() == [0, IGNORED, 10] and len(parts.classes) == 11
    parts = labelled_parts(config(tmp_path / "rgb"), [], None)
    assert parts.classes == ("Animal", "Archway")
    assert parts.test.mask(0, SIZE)[0, :3].tolist() == [0, 1, IGNORED]


def test_davis_lists_of_both_years(tmp_path):
    for name in ("bear", "camel", "dog"):
        for frame in ("00000", "00001"):
            save(tmp_path / "JPEGImages" / "480p" / name / f"{frame}.jpg")
            save(tmp_path / "Annotations" / "480p" / name / f"{frame}.png", ids(0, 1), palette=True)

    def sequences(part: str, year: str | None = None) -> list[str]:
        return [frame.image.parent.name for frame in davis.find(tmp_path, part, year).frames[::2]]

    assert sequences(TEST) == ["bear", "camel", "dog"]
    for year, names in (("2016", ["dog"]), ("2017", ["camel", "dog"])):
        (tmp_path / "ImageSets" / year).mkdir(parents=True)
        (tmp_path / "ImageSets" / year / "val.txt").write_text("\n".join(names))
    assert sequences(TEST) == ["camel", "dog"] and sequences(TEST, "2016") == ["dog"]
    lines = [f"/JPEGImages/480p/bear/{n}.jpg /Annotations/480p/bear/{n}.png" for n in ("00000", "00001")]
    (tmp_path / "ImageSets" / "2016" / "val.txt").write_text("\n".join(lines))
    assert sequences(TEST, "2016") == ["bear"]
    with pytest.raises(UserError, match="there is no list"):
        davis.find(tmp_path, TRAIN, "2017")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name in ("a", "b"):
            save(tmp_path / part / "images" / f"{part}{name}.jpg")
            save(tmp_path / part / "masks" / f"{part}{name}.png", ids(0, 1, 2, 255))
            save(tmp_path / part / "depth" / f"{part}{name}.png", ids(51, 0))
    return tmp_path


def test_any_pair_of_folders(pairs):
    parts = labelled_parts(config(pairs), [1], None)
    assert parts.classes == ("class 0", "class 1", "class 2")
    assert parts.train.mask(0, SIZE)[0, :4].tolist() == [0, IGNORED, 2, IGNORED]
    alone = LayoutConfig(backbone="b", output="o", train=str(pairs / "train"), test=str(pairs / "val"))
    assert labelled_parts(alone, [], 7).classes[-1] == "class 6"
    assert measured_parts(alone, 1 / 25.5).test.depth(0, SIZE)[0, 0] == pytest.approx(2.0)
    before = parts.train.fingerprint
    save(
        pairs / "train" / "masks" / "traina.png",
        np.random.default_rng(0).integers(0, 3, SIZE[::-1], dtype=np.uint8),
    )
    assert labelled_parts(config(pairs), [1], None).train.fingerprint != before


def first_mask(root: Path, **settings) -> np.ndarray:
    part: DensePart = labelled_parts(config(root, **settings), [], 3).train
    return part.mask(0, part.image(0).size)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root: (root / "train/masks/traina.png").unlink(), r"traina\.jpg has no mask"),
        (
            lambda root: (root / "train/images/traina.jpg").unlink(),
            r"1 of the masks in .* have no picture, traina",
        ),
        (
            lambda root: save(root / "train/masks/traina.png", ids(0, 3)),
            r"traina\.png has the id 3, beyond the 3",
        ),
        (
            lambda root: save(root / "train/masks/traina.png", ids(0, 40000, dtype=np.uint16)),
            "has the id 40000",
        ),
        (
            lambda root: save(root / "train/masks/traina.png", np.zeros((5, 5), np.uint8)),
            r"traina\.png is 5 x 5",
        ),
        (lambda root: save(root / "train/masks/traina.png", np.zeros((8, 12, 3), np.uint8)), "is in colour"),
        (lambda root: (root / "train/masks/traina.png").write_bytes(b"no"), r"traina\.png cannot be read"),
        (lambda root: (root / "train/images/traina.jpg").write_bytes(b"no"), r"traina\.jpg cannot be read"),
        (lambda root: (root / "train").rename(root / "other"), "has no folder train/images"),
    ],
)
def test_what_does_not_fit_is_named(pairs, harm, said):
    harm(pairs)
    with pytest.raises(UserError, match=said):
        first_mask(pairs)


def test_what_cannot_be_opened_says_why(pairs, tmp_path):
    with pytest.raises(UserError, match="8 bits: say by metres="):
        part = measured_parts(config(pairs), None).train
        part.depth(0, SIZE)
    with pytest.raises(UserError, match="looks like none of"):
        open_layout(pairs / "train" / "masks", TEST)
    with pytest.raises(UserError, match="did you mean 'voc'"):
        config(pairs, layout="voca")
    with pytest.raises(UserError, match="share pictures"):
        both = LayoutConfig(backbone="b", output="o", train=str(pairs / "val"), test=str(pairs / "val"))
        labelled_parts(both, [], 3)
    with pytest.raises(UserError, match="not both"):
        open_part(LayoutConfig(backbone="b", output="o", data="x", test="y"), TEST, "mask")
    cityscapes = tmp_path / "city"
    save(cityscapes / "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png")
    (cityscapes / "gtFine").mkdir()
    with pytest.raises(UserError, match=r"ulm_1_leftImg8bit\.png has no mask: .*ulm_1_gtFine_labelIds\.png"):
        open_layout(cityscapes, TRAIN)
