"""The grid of heads equals heads trained one by one by torch, and continues from its state."""

import numpy as np
import torch
import torch.nn.functional as F

from evals.crops import ASPECT, SCALE, _box, crop_batches, random_resized_crop
from evals.heads import INITIAL_STD, HeadGrid, Kind
from tests.pictures import class_folder, picture

KINDS = [Kind(1, False, slice(6, 12)), Kind(1, True, slice(6, 18)), Kind(4, True, slice(0, 18))]
RATES = [0.001, 0.03, 0.5]
STEPS, CLASSES = 30, 5


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (16,), generator=generator)
        yield torch.randn(16, 18, generator=generator) + labels[:, None], labels


def trained(kinds, rates, steps=STEPS):
    grid = HeadGrid(kinds, rates, CLASSES, iterations=STEPS, seed=3)
    for features, labels in batches(steps):
        grid.train_step(features, labels)
    return grid


def test_the_grid_equals_torchs_sgd_on_each_head():
    grid = trained(KINDS, RATES)
    start = HeadGrid(KINDS, RATES, CLASSES, iterations=STEPS, seed=3)
    for number, kind in enumerate(KINDS):
        for place, rate in enumerate(RATES):
            rows = slice(place * CLASSES, (place + 1) * CLASSES)
            head = torch.nn.Linear(kind.columns.stop - kind.columns.start, CLASSES)
            with torch.no_grad():
                head.weight.copy_(start.weights[number][rows, :-1])
                head.bias.copy_(start.weights[number][rows, -1])
            optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, weight_decay=0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS, eta_min=0)
            for features, labels in batches():
                optimiser.zero_grad()
                F.cross_entropy(head(features[:, kind.columns]), labels).backward()
                optimiser.step()
                schedule.step()
            weights = torch.cat([head.weight, head.bias[:, None]], dim=1)
            assert torch.allclose(grid.weights[number][rows], weights, atol=1e-5, rtol=1e-4)
    assert start.weights[0][:, :-1].std() < 2 * INITIAL_STD
    assert (start.weights[0][:, -1] == 0).all()


def test_a_head_does_not_depend_on_what_it_is_trained_beside():
    grid = trained(KINDS, RATES)
    alone = trained([KINDS[1]], [RATES[1]])
    assert torch.allclose(alone.weights[0], grid.weights[1][CLASSES : 2 * CLASSES], atol=1e-6)
    features, _ = next(batches())
    assert torch.equal(alone.predict(features)[0], grid.predict(features)[len(RATES) + 1])
    assert grid.describe(5) == {"blocks": 1, "mean_patch": True, "learning_rate": 0.5}


def test_training_continues_from_its_state():
    whole, half = trained(KINDS, RATES), trained(KINDS, RATES, steps=13)
    other = HeadGrid(KINDS, RATES, CLASSES, iterations=STEPS, seed=9)
    other.load_state({name: tensor.clone() for name, tensor in half.state().items()})
    for features, labels in list(batches())[other.step :]:
        other.train_step(features, labels)
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, other.weights, strict=True))


def test_a_head_that_diverges_answers_nothing_and_leaves_the_others_alone():
    grid = trained(KINDS, [0.03, 1e38])
    answers = grid.predict(torch.randn(7, 18))
    assert (answers[1::2] == -1).all()
    assert (answers[::2] >= 0).all()


def test_crops_have_the_published_areas_and_aspects():
    import random

    boxes = np.array([_box(random.Random(seed), 300, 200) for seed in range(2000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (left + width <= 300).all()
    assert (top >= 0).all() and (top + height <= 200).all()
    area, aspect = width * height / 60_000, width / height
    assert area.min() > SCALE[0] * 0.95 and area.max() <= SCALE[1]
    assert aspect.min() > ASPECT[0] * 0.95 and aspect.max() < ASPECT[1] * 1.05
    assert abs(np.log(aspect).mean()) < 0.03
    image = picture(0, 0)
    assert torch.equal(random_resized_crop(image, 32, 5), random_resized_crop(image, 32, 5))
    assert not torch.equal(random_resized_crop(image, 32, 5), random_resized_crop(image, 32, 6))
    assert random_resized_crop(picture(0, 0, (400, 3)), 32, 5).shape == (3, 32, 32)


def test_crop_batches_are_a_function_of_the_step(tmp_path):
    from dinov2.data.sources import open_source

    class_folder(tmp_path / "pictures", classes=2, each=5)
    (tmp_path / "pictures" / "class_0" / "broken.jpg").write_bytes(b"no picture")
    source = open_source(str(tmp_path / "pictures"), cache=tmp_path / "cache")
    labels = [int(str(name)[-1]) for name in source.labels()]
    settings = {"size": 16, "batch": 4, "seed": 1, "stop": 6}
    whole = list(crop_batches(source, labels, start=0, workers=0, **settings))
    rest = list(crop_batches(source, labels, start=3, workers=2, **settings))
    assert len(whole) == 6
    for (crops, truth), (others, same) in zip(whole[3:], rest, strict=True):
        assert torch.equal(crops, others)
        assert torch.equal(truth, same)
