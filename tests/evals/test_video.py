"""Video: J and F against brute force, labels carried as published, and the command on a square that moves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.morphology import dilation, disk

from dinov2.exits import UserError
from dinov2.export import save_backbone
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from evals import propagation
from evals.__main__ import main
from evals.propagation import Propagator
from evals.video_metrics import contour, contour_accuracy, mean_recall_decay, region_similarity


def blobs(seed: int, shape: tuple[int, int] = (60, 90)) -> np.ndarray:
    """A few random rectangles: contours with corners, holes and touching edges."""
    draw = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=bool)
    for _ in range(4):
        top, left = draw.integers(0, shape[0] - 5), draw.integers(0, shape[1] - 5)
        mask[top : top + draw.integers(3, 30), left : left + draw.integers(3, 40)] ^= True
    return mask


def contour_by_definition(mask: np.ndarray) -> np.ndarray:
    edge = np.zeros_like(mask)
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            below, beside = min(y + 1, height - 1), min(x + 1, width - 1)
            edge[y, x] = mask[y, x] != mask[y, beside] or mask[y, x] != mask[below, x]
            edge[y, x] |= mask[y, x] != mask[below, beside] and below > y and beside > x
    return edge


@pytest.mark.parametrize("seed", range(4))
def test_f_is_that_of_dilated_contours(seed):
    truth, answer = blobs(seed), np.roll(blobs(seed), (seed, 1), (0, 1)) ^ (blobs(seed + 9) & (seed > 1))
    ours, theirs = contour_by_definition(answer), contour_by_definition(truth)
    assert np.array_equal(contour(answer), ours)
    radius = int(np.ceil(0.008 * np.sqrt(60**2 + 90**2)))
    near = [dilation(edge.astype(np.uint8), disk(radius)).astype(bool) for edge in (theirs, ours)]
    precision, recall = (ours & near[0]).sum() / ours.sum(), (theirs & near[1]).sum() / theirs.sum()
    assert contour_accuracy(truth, answer) == pytest.approx(2 * precision * recall / (precision + recall))
    both = {(y, x) for y, x in np.argwhere(truth)}, {(y, x) for y, x in np.argwhere(answer)}
    assert region_similarity(truth, answer) == len(both[0] & both[1]) / len(both[0] | both[1])


def test_degenerate_masks():
    nothing, all_of_it, some = np.zeros((30, 40), bool), np.ones((30, 40), bool), blobs(0, (30, 40))
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == 1
    assert region_similarity(some, nothing) == contour_accuracy(some, nothing) == 0
    assert region_similarity(nothing, some) == contour_accuracy(nothing, some) == 0
    assert contour_accuracy(all_of_it, all_of_it) == 1  # no contour in either
    assert region_similarity(some, some) == contour_accuracy(some, some) == 1
    assert region_similarity(some, ~some, counted=nothing) == 1
    far = np.zeros((30, 40), bool)
    far[0, 0] = far[29, 39] = True
    assert contour_accuracy(far & (np.arange(40) < 20), far & (np.arange(40) > 20)) == 0


def test_mean_recall_and_decay_are_daviss():
    values = np.linspace(1, 0, 10)
    mean, recall, decay = mean_recall_decay(values)
    assert (mean, recall) == (pytest.approx(0.5), 0.5)
    # Quarters of ten frames end at frames 1, 3, 6, 8, 10 (3.25, 5.5 and 7.75 rounded), the ends shared.
    assert decay == pytest.approx(values[0:3].mean() - values[7:10].mean())
    assert mean_recall_decay(np.array([0.7])) == (0.7, 1.0, 0.0)


def carried_by_definition(frames, labels, context, top, reach, temperature):
    """Frame by frame, patch by patch, as the protocol says it; soft labels are carried on."""
    frames = frames / frames.norm(dim=3, keepdim=True)
    known = [labels]
    for now in range(1, len(frames)):
        sources = [0, *range(max(1, now - context), now)]
        result = torch.zeros_like(labels)
        for y in range(frames.shape[1]):
            for x in range(frames.shape[2]):
                found = [
                    (float(frames[now, y, x] @ frames[source, v, u]), source, v, u)
                    for source in sources
                    for v in range(frames.shape[1])
                    for u in range(frames.shape[2])
                    if abs(v - y) <= reach and abs(u - x) <= reach
                ]
                best = sorted(found, reverse=True)[:top]
                weights = np.exp(np.array([one[0] for one in best]) / temperature)
                for weight, (_, source, v, u) in zip(weights / weights.sum(), best, strict=True):
                    result[:, y, x] += weight * known[source][:, v, u]
        known.append(result)
    return torch.stack(known[1:])


@pytest.mark.parametrize(("context", "top", "reach"), [(2, 3, 1), (7, 5, 12), (0, 1, 0)])
@pytest.mark.parametrize("room", [1 << 24, 40])
def test_labels_are_carried_as_published(monkeypatch, context, top, reach, room):
    monkeypatch.setattr(propagation, "SIMILARITIES", room)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(5, 3, 4, 6, generator=generator, dtype=torch.float64)
    labels = torch.rand(3, 3, 4, generator=generator, dtype=torch.float64).softmax(0)
    propagator = Propagator(frames[0], labels, context=context, top=top, reach=reach, temperature=0.1)
    found = torch.stack([propagator.step(frame) for frame in frames[1:]])
    torch.testing.assert_close(found, carried_by_definition(frames, labels, context, top, reach, 0.1))
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that sees colours, and DAVIS's folders: a square moves, in one video two of them."""
    root = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)
    vit = VisionTransformer(
        vit_config("vit_tiny", dim=48, heads=3, depth=1, patch=8, image_size=32, layer_scale=1e-5)
    )
    assert vit.pos_embed is not None
    torch.nn.init.zeros_(vit.pos_embed)
    mean, std = vit.normalisation
    save_backbone(vit, None, root / "backbone", mean=mean, std=std, card={})
    draw = np.random.default_rng(0)
    for name, squares in (("one", 1), ("two", 2)):
        for frame in range(8):
            pixels = draw.integers(90, 110, (48, 64, 3), dtype=np.uint8)
            mask = np.zeros((48, 64), np.uint8)
            for number in range(squares):
                left = 8 * number * 4 + 2 * frame
                pixels[16:32, left : left + 16] = [(250, 20, 20), (20, 20, 250)][number]
                mask[16:32, left : left + 16] = 255 if squares == 1 else number + 1
            for folder, values, kind in (("JPEGImages", pixels, "jpg"), ("Annotations", mask, "png")):
                path = root / "davis" / folder / "480p" / name / f"{frame:05d}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path, quality=98)
    return root


def evaluated(place: Path, output: Path, *words: str) -> dict:
    before = set(output.glob("results/*.json"))
    main([str(place / "backbone"), *words, f"data={place / 'davis'}", f"output={output}"])
    (path,) = set(output.glob("results/*.json")) - before
    return json.loads(path.read_text())


def test_squares_are_followed(place, tmp_path):
    result = evaluated(place, tmp_path, "video", "size=48", "batch=3")
    metrics = result["metrics"]
    assert result["details"]["objects"] == 3 and result["details"]["frames"] == 16
    assert metrics["jf_mean"] == pytest.approx((metrics["j_mean"] + metrics["f_mean"]) / 2)
    assert metrics["j_mean"] > 60 and metrics["j_recall"] > 80
    assert set(result["lower_is_better"]) == {"j_decay", "f_decay"}
    page = next((tmp_path / "results").glob("*.html")).read_text()
    assert "principal components" in page and "The worst frames" in page
    merged = evaluated(place, tmp_path, "video", "size=48", "objects=one")
    assert merged["details"]["objects"] == 2


def test_what_cannot_be_followed_says_why(place, tmp_path):
    empty = tmp_path / "davis"
    for folder in ("JPEGImages", "Annotations"):
        for frame in range(3):
            path = empty / folder / "480p" / "dark" / f"{frame:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((16, 16), np.uint8)).save(path)
    words = [str(place / "backbone"), "video", f"output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"dark/00000\.png marks no object"):
        main([*words, f"data={empty}"])
    first = empty / "Annotations" / "480p" / "dark" / "00000.png"
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(first)
    Image.fromarray(np.zeros((16, 18), np.uint8)).save(empty / "JPEGImages" / "480p" / "dark" / "00002.png")
    with pytest.raises(UserError, match=r"dark/00002\.png is 18 x 16, the first of its sequence 16 x 16"):
        main([*words, f"data={empty}", "size=16"])
    with pytest.raises(UserError, match="choose from 2016, 2017"):
        main([*words, f"data={empty}", "year=1999"])
