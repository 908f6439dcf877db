"""Segmentation and depth: windows, probes against references, the command on what can be learnt."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LinearRegression, Ridge
from torch.nn.functional import cosine_similarity, interpolate

from dinov2.exits import UserError
from dinov2.export import save_backbone
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from evals.__main__ import main
from evals.bench import Bench
from evals.dense_data import IGNORED
from evals.dense_fit import by_patch
from evals.dense_probes import Bank, RidgeSums
from evals.patches import KeptTokens, PatchTokens, last_blocks
from evals.segmentation import ClassTarget, SegmentationConfig, data
from evals.windows import Tiler, best_class
from tests.faults import assert_survives, when
from tests.ranks import on_ranks

COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 210]])
SMALL = ["size=32", "batch=16"]
QUICK = ["probe=linear", "augment=false", "iterations=60", "batch_size=4", "learning_rate=0.01"]


def squares(folder: Path, count: int, seed: int) -> None:
    """Pictures of three noisy colours in blocks of 8 pixels, 56 x 40: masks say which, depths how blue."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        mask = draw.integers(0, 3, (5, 7)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        pixels = (COLOURS[mask] + draw.normal(0, 12, (40, 56, 3))).clip(0, 255).astype(np.uint8)
        for name, values in (
            ("images", pixels),
            ("masks", mask),
            ("depth", (1 + mask.astype(np.uint16)) * 2000),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    squares(root / "data" / "train", 10, seed=0)
    squares(root / "data" / "val", 5, seed=1)
    torch.manual_seed(0)
    vit = VisionTransformer(
        vit_config("vit_tiny", dim=48, heads=3, depth=4, patch=8, image_size=32, layer_scale=1.0)
    )
    mean, std = vit.normalisation
    save_backbone(vit, None, root / "backbone", mean=mean, std=std, card={})
    return root


def evaluated(place: Path, output: Path, *words: str) -> dict:
    """Run the command in this process, and read the one result that came."""
    before = set(output.glob("results/*.json"))
    main([str(place / "backbone"), *words, f"data={place / 'data'}", f"output={output}"])
    (path,) = set(output.glob("results/*.json")) - before
    return json.loads(path.read_text())


def tokens_of(place: Path, output: Path) -> tuple[PatchTokens, SegmentationConfig]:
    config = SegmentationConfig(
        backbone=str(place / "backbone"), data=str(place / "data"), output=str(output), size=32
    )
    return PatchTokens(Bench(config), config, blocks=[2, 3], cls=True), config


@pytest.mark.parametrize("size", [(56, 40), (40, 56), (33, 200), (32, 32), (500, 40)])
def test_windows_cover_a_picture_and_give_it_back(size):
    tiling = Tiler(32, 32, 8)(size)
    assert min(tiling.width, tiling.height) == 32 and tiling.window == (32, 32)
    across = np.diff(sorted({left for _, left in tiling.corners}))
    assert (across <= 32 * 2 / 3 + 1).all()
    picture = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    windows = tiling.cut(Image.fromarray(picture))
    whole = np.asarray(
        Image.fromarray(picture).resize((tiling.width, tiling.height), Image.Resampling.BICUBIC)
    )
    assert np.array_equal(tiling.stitch(windows.double()).round().byte().permute(1, 2, 0).numpy(), whole)
    truth = np.random.default_rng(1).integers(0, 9, size[::-1])
    resized = interpolate(
        torch.from_numpy(truth)[None, None].double(), (tiling.height, tiling.width), mode="nearest-exact"
    )
    under = tiling.cut_truth(truth)[-1]
    assert torch.equal(under.double(), resized[0, 0, -32:, -32:])


def test_small_pictures_are_whole_patches():
    tiling = Tiler(32, 32, 8)((100, 60), scale=0.5)
    assert (tiling.height, tiling.width, tiling.window) == (16, 27 // 8 * 8, (16, 24))


def test_strips_of_the_best_class_are_those_of_the_whole(monkeypatch):
    scores = torch.randn(4, 9, 13, generator=torch.Generator().manual_seed(0))
    whole = interpolate(scores[None].double(), size=(70, 50), mode="bilinear")[0].argmax(0)
    monkeypatch.setattr("evals.windows.STRIP", 4 * 50 * 8)
    assert torch.equal(best_class(scores.double(), (70, 50)), whole)


def test_tokens_are_the_backbones_and_are_kept(place, tmp_path):
    tokens, config = tokens_of(place, tmp_path)
    part = data(config).test
    kept = KeptTokens(tokens, part)
    row, tiling, found = list(kept.all())[3]
    windows = tiling.cut(part.image(row)).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in tokens.backbone.normalisation)
    with torch.no_grad():
        layers = tokens.backbone.get_intermediate_layers((windows - mean) / std, 2, return_class_token=True)
    for number, (patches, cls) in enumerate(layers):
        mine = found[:, :, 96 * number : 96 * (number + 1)]
        torch.testing.assert_close(mine[:, :, :48], patches, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(mine[:, 5, 48:], cls, atol=2e-3, rtol=2e-3)
    tokens.bench.store.limit = 1000
    unkept = KeptTokens(tokens, part)
    assert kept.kept and not unkept.kept
    torch.testing.assert_close(unkept.window(3, 1), kept.window(3, 1), atol=2e-3, rtol=2e-3)
    assert last_blocks(12, 4) == [8, 9, 10, 11] and last_blocks(12, 4, spread=True) == [2, 5, 8, 11]
    assert last_blocks(24, 4, spread=True) == [5, 11, 17, 23] and last_blocks(2, 4, spread=True) == [0, 1]


def test_ridge_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.rand(*shape, generator=generator) for shape in ((80, 6), (80, 3), (80,)))
    w[:20] = 0
    sums = RidgeSums(6, 3)
    for rows in torch.arange(80).split(30):
        sums.add(x[rows], y[rows], w[rows])
    centred = x - (w @ x) / w.sum()
    penalty = 0.1 * float((w @ centred.square()).mean())  # scikit-learn's is of sums, ours of means
    reference = Ridge(alpha=penalty).fit(x.numpy(), y.numpy(), sample_weight=w.numpy())
    np.testing.assert_allclose(sums.solve(0.1)(x), reference.predict(x.numpy()), atol=1e-5)
    plain = LinearRegression().fit(x.numpy(), y.numpy(), sample_weight=w.numpy())
    np.testing.assert_allclose(sums.solve(1e-9)(x), plain.predict(x.numpy()), atol=1e-4)
    with pytest.raises(UserError, match="no patch"):
        RidgeSums(6, 3).solve(1.0)


def test_neighbours_vote_as_defined():
    generator = torch.Generator().manual_seed(0)
    x, y, queries = (torch.randn(*shape, generator=generator) for shape in ((60, 5), (60, 2), (7, 5)))
    bank = Bank(40, 2, seed=0)
    weights = (torch.arange(60) % 3 > 0).float()
    bank.add(x[:30], y[:30], weights[:30])
    bank.add(x[30:], y[30:], weights[30:])
    drawn = torch.cat(bank.targets)
    assert len(drawn) == 40 and not any((y[::3] == row).all(1).any() for row in drawn)
    found = bank.probe(4, 0.1)(queries)
    for query, answer in zip(queries, found, strict=True):
        cosine = cosine_similarity(x[weights > 0], query[None])
        best = cosine.argsort(descending=True)[:4]
        votes = (cosine[best] / 0.1).exp()
        torch.testing.assert_close(answer, (votes[:, None] * y[weights > 0][best]).sum(0) / votes.sum())


def test_targets_of_patches_and_losses_leave_out_what_is_ignored():
    truth = torch.tensor([[0, 0, 1, IGNORED], [0, 1, IGNORED, IGNORED]])[None]
    shares, known = ClassTarget(2).of_patches(truth, 2)
    assert shares.tolist() == [[0.75, 0.25], [0, 1]] and known.tolist() == [1.0, 0.25]
    assert by_patch(truth, 2).tolist() == [[0, 0, 0, 1], [1, IGNORED, IGNORED, IGNORED]]
    scores = torch.randn(1, 2, 2, 4, requires_grad=True)
    nothing = ClassTarget(2).loss(scores, torch.full((1, 2, 4), IGNORED))
    nothing.backward()
    assert float(nothing.detach()) == 0 and scores.grad is not None and not scores.grad.any()
    some = ClassTarget(2).loss(scores, truth)
    where = truth[0] != IGNORED
    reference = torch.nn.functional.cross_entropy(scores[0].flatten(1).T[where.flatten()], truth[0][where])
    torch.testing.assert_close(some, reference)


@pytest.mark.parametrize(
    "words", [["probe=ridge"], ["probe=knn", "k=5"], QUICK, ["probe=ridge", "ms=true", "scales=[1.0,1.5]"]]
)
def test_segmentation_learns_what_can_be_seen(place, tmp_path, words):
    result = evaluated(place, tmp_path, "segmentation", *SMALL, *words)
    low, high = result["intervals"]["miou"]
    assert low <= result["metrics"]["miou"] <= high and result["metrics"]["miou"] > 50
    assert set(result["details"]["iou"]) == {"class 0", "class 1", "class 2"}
    assert result["details"]["blocks"] == ([0, 1, 2, 3] if "ms=true" in words else [3])


@pytest.mark.parametrize("words", [["probe=ridge"], ["probe=knn", "k=5"], [*QUICK, "blocks=4"]])
def test_depth_learns_what_can_be_seen(place, tmp_path, words):
    result = evaluated(place, tmp_path, "depth", *SMALL, *words)
    assert result["metrics"]["rmse"] < 1.4  # 1.63 m for the mean depth everywhere
    assert result["lower_is_better"] == ["abs_rel", "log10", "rmse"] and result["units"]["rmse"] == "m"


def test_random_windows_show_what_the_truth_says(place, tmp_path):
    from evals.dense_batches import _Crops

    part = data(tokens_of(place, tmp_path)[1]).train
    crops = _Crops(part, part.mask, Tiler(32, 32, 8), (0.5, 2.0), IGNORED, seed=0)
    shown, mirrored = 0, 0
    for position in range(24):
        item = crops[position]
        assert not isinstance(item, UserError)
        window, under = item
        known = under != IGNORED
        assert torch.equal(
            window[:, ~known],
            torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None].expand(-1, int((~known).sum())),
        )
        colours = torch.from_numpy(COLOURS)[under[known].long()]
        nearest = (
            (window[:, known].T[:, None].float() - torch.from_numpy(COLOURS)[None]).norm(dim=2).argmin(1)
        )
        shown += float((nearest == under[known]).float().mean()) / 24
        mirrored += bool((~known).any()) and bool((~known[:, 0]).all())
        assert len(colours)
    assert shown > 0.85  # but for blurred edges
    first, again = crops[7], crops[7]
    assert not isinstance(first, UserError) and not isinstance(again, UserError)
    assert torch.equal(first[0], again[0]) and mirrored > 0


@pytest.mark.long  # a killed suite is among the quick ones
@pytest.mark.parametrize("augment", ["false", "true"])
def test_a_killed_segmentation_continues_to_the_same_numbers(place, tmp_path, augment):
    def numbers(path: Path):
        result = json.loads(path.read_text())
        return {key: value for key, value in result.items() if key != "seconds"}

    words = [*SMALL, *QUICK, f"augment={augment}", "iterations=40", "save_every=10", f"data={place / 'data'}"]
    assert_survives(
        [sys.executable, "-m", "evals", str(place / "backbone"), "segmentation", *words, "output=out"],
        tmp_path,
        results=["out/results/*.json"],
        read={"out/results/*.json": numbers},
        moments=[when("out/features/*/patches/000003.npy"), when("out/work/*/head.safetensors")],
        env={"OMP_NUM_THREADS": "1"},
    )


def evaluate_each(commands: list[list[str]]) -> None:
    """On each rank: run the commands."""
    for words in commands:
        main(words)


def test_two_ranks_give_what_one_gives(place, tmp_path):
    """More pictures than one rank computes at a time."""
    squares(tmp_path / "data" / "train", 70, seed=0)
    squares(tmp_path / "data" / "val", 66, seed=1)
    tasks = [["segmentation", "probe=ridge"], ["attention"]]

    def commands(output):
        settings = ["size=32", f"data={tmp_path / 'data'}", f"output={tmp_path / output}"]
        return [[str(place / "backbone"), *words, *settings] for words in tasks]

    evaluate_each(commands("one"))
    on_ranks(2, evaluate_each, commands("two"))
    found = []
    for output in ("one", "two"):
        results = [
            json.loads(path.read_text()) for path in sorted((tmp_path / output / "results").glob("*.json"))
        ]
        found.append([{key: one[key] for key in one.keys() - {"seconds"}} for one in results])
    assert found[0] == found[1] and len(found[0]) == 2
    kept = sorted((tmp_path / "one").glob("features/*/patches/*.npy"))
    assert len(kept) == 136
    for path in kept:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
