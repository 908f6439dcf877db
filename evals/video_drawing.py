"""Videos on a result's page: masks as they were carried along, where they failed, patches as colours."""

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.models.backbone import Backbone
from dinov2.pages import Card, Page, curve
from dinov2.pictures import patch_colours
from evals.dense_drawing import covered, palette
from evals.video_data import Sequence

SHOWN = 4  # sequences, the worst and the best of them
FRAMES = 6  # of each
SIDE = 150
FAILURES = 6
FIGURES = ("mean", "recall", "decay")


@dataclass(frozen=True)
class Carried:
    """What came of a sequence.

    Attributes:
        answers: the object's number at each pixel, [frames, height, width].
        values: J and F of each frame but the first and last, [objects, 2, frames - 2].
        table: mean, recall and decay of both, [objects, 2, 3].
    """

    sequence: Sequence
    answers: NDArray[np.uint8]
    values: NDArray[np.float64]
    table: NDArray[np.float64]


def draw_videos(page: Page, backbone: Backbone, found: List[Carried], size: int) -> None:
    """Tables and curves of all sequences; frames of some; the frames that failed."""
    page.heading("Sequences")
    columns = ["sequence", "object", *(f"{name} {figure}" for name in "JF" for figure in FIGURES)]
    rows = [
        [one.sequence.name, id_, *(f"{100 * value:.1f}%" for value in one.table[number].flat)]
        for one in found
        for number, id_ in enumerate(one.sequence.objects)
    ]
    page.table(columns, rows, caption="Of each object over its frames, without the first and the last.")
    order = sorted(found, key=lambda one: float(one.table[:, :, 0].mean()))
    shown = order if len(order) <= SHOWN else [*order[: SHOWN // 2], *order[-SHOWN // 2 :]]
    lines = {one.sequence.name: _mean_by_frame(one) for one in shown}
    page.figure(curve(lines, x="frame", y="mean of J and F"), "The mean over a sequence's objects.")
    for one in shown:
        _draw_frames(page, backbone, one, size)
    _draw_failures(page, found)


def _draw_frames(page: Page, backbone: Backbone, one: Carried, size: int) -> None:
    """One card of truth, one of answers, and one of the first three components of all patches together."""
    page.heading(one.sequence.name)
    frames = (
        np.linspace(0, len(one.sequence) - 1, min(FRAMES, len(one.sequence))).round().astype(int).tolist()
    )
    images = [one.sequence.image(frame) for frame in frames]
    truth = [_masked(image, one.sequence.numbers(frame)) for image, frame in zip(images, frames, strict=True)]
    answers = [_masked(image, one.answers[frame]) for image, frame in zip(images, frames, strict=True)]
    listed = ", ".join(map(str, frames))
    cards = [
        Card(truth, f"The truth in frames {listed}"),
        Card(answers, "What was carried from the first"),
        Card(
            patch_colours(backbone, images, size=size), "The first three principal components of all patches"
        ),
    ]
    page.gallery(cards, columns=1, side=SIDE)


def _draw_failures(page: Page, found: List[Carried]) -> None:
    """The frames with the least J and F, at most two of a sequence."""
    page.heading("The worst frames")
    worst = []
    for one in found:
        each = one.values.mean((0, 1))
        worst += [(float(each[frame]), int(frame) + 1, one) for frame in each.argsort(kind="stable")[:2]]
    cards = []
    for value, frame, one in sorted(worst, key=lambda item: item[:2])[:FAILURES]:
        image = one.sequence.image(frame)
        pictures = [image, _masked(image, one.sequence.numbers(frame)), _masked(image, one.answers[frame])]
        cards.append(Card(pictures, f"{one.sequence.name}, frame {frame}: {100 * value:.1f}%", tone="bad"))
    page.gallery(cards, "The frame, the truth, the answer, and its mean of J and F", columns=2, side=SIDE)


def _masked(image: Image.Image, numbers: NDArray[np.uint8]) -> Image.Image:
    return covered(image, numbers.astype(np.int64) - 1, palette(max(1, int(numbers.max()))))


def _mean_by_frame(one: Carried) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    values = one.values.mean((0, 1))
    return np.arange(1, len(values) + 1), values
