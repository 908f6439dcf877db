"""Metrics of segmentation and depth against torchmetrics and plain loops, on random and degenerate inputs."""

from typing import Any

import dinov2.vision_ops  # noqa: F401  # for what its import does: torchmetrics imports torchvision

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from evals.bootstrap import of_sums
from evals.confusion import confusion, iou_of_classes, mean_accuracy, mean_iou, overlaps, pixel_accuracy
from evals.dense_data import IGNORED
from evals.depth_metrics import CROPS, METRICS, counted, errors


def test_iou_and_accuracies_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 5, (3, 20, 30), generator=generator)
    answer = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth.clamp(min=0), 2)
    sums = sum(overlaps(confusion(*pair, 5)) for pair in zip(truth, answer, strict=True))
    assert isinstance(sums, torch.Tensor)
    options: dict[str, Any] = {"num_classes": 5, "ignore_index": IGNORED}
    assert mean_iou(sums) == pytest.approx(float(multiclass_jaccard_index(answer, truth, **options)))
    each = multiclass_jaccard_index(answer, truth, average="none", **options)
    torch.testing.assert_close(iou_of_classes(sums).float(), each)
    assert mean_accuracy(sums) == pytest.approx(float(multiclass_accuracy(answer, truth, **options)))
    micro = multiclass_accuracy(answer, truth, average="micro", **options)
    assert pixel_accuracy(sums) == pytest.approx(float(micro))


def test_degenerate_masks():
    ignored = torch.full((4, 4), IGNORED)
    nothing = overlaps(confusion(ignored, torch.zeros(4, 4, dtype=torch.long), 3))
    assert not nothing.any() and np.isnan(mean_iou(nothing))
    # A class that neither has does not count; one that is only answered is wrong.
    truth, answer = torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 0, 2])
    sums = overlaps(confusion(truth, answer, 3))
    assert mean_iou(sums) == pytest.approx((3 / 4 + 0) / 2)
    assert mean_accuracy(sums) == 3 / 4


def test_the_interval_of_miou_is_that_of_drawing_pictures_again():
    generator = np.random.default_rng(0)
    truth = torch.from_numpy(generator.integers(0, 3, (40, 50)))
    answer = torch.where(torch.from_numpy(generator.random((40, 50)) < generator.random((40, 1))), truth, 1)
    sums = torch.stack([overlaps(confusion(*pair, 3)) for pair in zip(truth, answer, strict=True)])
    found = of_sums(sums.numpy(), lambda some: mean_iou(torch.from_numpy(some)))
    drawn = [generator.integers(0, 40, 40) for _ in range(400)]
    matrices = [confusion(truth[rows], answer[rows], 3).numpy() for rows in drawn]
    ious = [(np.diag(m) / (m.sum(0) + m.sum(1) - np.diag(m))).mean() for m in matrices]
    assert found == pytest.approx(tuple(np.percentile(ious, [2.5, 97.5])), abs=0.02)


def test_depth_errors_equal_their_sums():
    generator = np.random.default_rng(0)
    truth = generator.uniform(0, 12, (9, 7)).astype(np.float32)
    answer = generator.uniform(0.1, 10, (9, 7)).astype(np.float32)
    where = counted(truth, far=10, crop="none")
    pairs = [(float(t), float(a)) for t, a in zip(truth.flat, answer.flat, strict=True) if 1e-3 < t < 10]
    count = len(pairs)
    reference = [
        (sum((t - a) ** 2 for t, a in pairs) / count) ** 0.5,
        sum(abs(t - a) / t for t, a in pairs) / count,
        sum(abs(np.log10(t) - np.log10(a)) for t, a in pairs) / count,
        *(sum(max(t / a, a / t) < 1.25**power for t, a in pairs) / count for power in (1, 2, 3)),
    ]
    assert errors(truth, answer, where).tolist() == pytest.approx(reference)
    assert np.isnan(errors(truth, answer, np.zeros_like(where))).all()
    perfect = dict(zip(METRICS, errors(answer, answer, where), strict=True))
    assert perfect["rmse"] == perfect["abs_rel"] == 0 and perfect["delta1"] == 1


def test_published_crops():
    nyu = counted(np.ones((480, 640)), far=10, crop="eigen")
    rows, columns = np.flatnonzero(nyu.any(1)), np.flatnonzero(nyu.any(0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (45, 471, 41, 601)
    kitti = counted(np.ones((375, 1242)), far=80, crop="garg")
    rows, columns = np.flatnonzero(kitti.any(1)), np.flatnonzero(kitti.any(0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (153, 371, 44, 1197)
    assert counted(np.array([[0.0, 5.0, 10.0, 20.0]]), far=10, crop="none").tolist() == [
        [False, True, False, False]
    ]
    assert set(CROPS) == {"none", "eigen", "garg"}
