"""Video object segmentation: the first frame's masks carried through a video by the likeness of its patches.

DINO (arXiv 2104.14294, sec. 4.2.1) on DAVIS, by its published settings: patch tokens of the last block, the
first frame and the 7 before as context, the 5 most similar patches within 12 rows and columns, T = 0.1, each
label's map stretched from 0 to 1 before the largest wins. Measured as DAVIS does: J and F of all but the
first and last frame. `size` is of the short side: 480, rounded up to whole patches.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dinov2.config import at_least, one_of, runtime
from dinov2.console import progress
from dinov2.exits import UserError
from dinov2.files import write_whole
from dinov2.pages import Page
from evals.bench import Bench
from evals.dense_data import MASK, DensePart, LayoutConfig, open_part
from evals.layouts import TEST, davis
from evals.patches import PatchTokens
from evals.propagation import Propagator
from evals.ranks import dealt
from evals.results import Outcome
from evals.task import Task
from evals.video_data import OBJECTS, Sequence, sequences_of
from evals.video_drawing import Carried, draw_videos
from evals.video_metrics import contour_accuracy, mean_recall_decay, region_similarity
from evals.windows import enlarged

SHORTEST = 3  # frames: the first is given, the last is not measured


@dataclass(frozen=True, kw_only=True)
class VideoConfig(LayoutConfig):
    size: int = 480  # pixels of a frame's short side, rounded up to whole patches
    year: str | None = None  # 2016 or 2017: whose lists of DAVIS; null: the newer that is there
    objects: str = "auto"  # one: all that is marked is one object; several: by their ids; auto: as masks look
    context: int = 7  # frames before, beside the first
    top: int = 5  # patches whose labels are taken
    reach: int = 12  # rows and columns that a patch may have moved away
    temperature: float = 0.1  # of the likeness
    batch: int = runtime(4)  # frames at once through the backbone

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.objects, OBJECTS, "objects")
        if self.year is not None:
            one_of(self.year, davis.YEARS, "year")
        at_least(0, self, "context", "reach")
        at_least(1, self, "top")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: give more than 0")


@dataclass(frozen=True)
class Videos:
    """The sequences to be measured on."""

    part: DensePart
    sequences: list[Sequence]

    @property
    def sources(self) -> dict[str, DensePart]:
        return {"test": self.part}


def data(config: VideoConfig) -> Videos:
    """The frames of `data=` or `test=`; a folder of frames is a sequence.

    Raises:
        UserError: see `open_part`; a sequence has fewer than three frames, or no object in its first.
    """
    part = open_part(config, TEST, MASK)
    if config.year is not None:
        frames = davis.find(part.place, TEST, config.year).frames
        part = replace(part, part=replace(part.part, frames=frames))
    sequences = sequences_of(part, config.objects)
    short = next((one for one in sequences if len(one) < SHORTEST), None)
    if short is not None:
        raise UserError(f"the sequence {short.name} has {len(short)} frames, fewer than {SHORTEST}")
    return Videos(part, sequences)


def run(bench: Bench, videos: Videos, config: VideoConfig, work: Path) -> Outcome:
    """J, F, and their mean over all objects of all sequences, each over its frames."""
    frames = sum(len(sequence) for sequence in videos.sequences)
    found = []
    with progress(total=frames, what="video", unit="frame") as bar:
        answers = dealt(bench, _carried_once, videos.sequences, config, work)
        for sequence, answer in zip(videos.sequences, answers, strict=True):
            found.append(_measured(sequence, answer))
            bar.update(len(sequence))
    table = np.concatenate([one.table for one in found])  # [objects, J or F, mean or recall or decay]
    scores = {
        f"{measure}_{figure}": table[:, which, place]
        for which, measure in enumerate("jf")
        for place, figure in enumerate(("mean", "recall", "decay"))
    }
    scores = {"jf_mean": table[:, :, 0].mean(1), **scores}
    per_sequence = {one.sequence.name: 100 * float(one.table[:, :, 0].mean()) for one in found}
    return Outcome(
        headline="jf_mean",
        metrics={name: 100 * float(values.mean()) for name, values in scores.items()},
        lower=("j_decay", "f_decay"),
        scores=scores,  # intervals are of drawing other objects: frames of one video are no sample
        details={"jf_mean": per_sequence, "objects": len(table), "frames": frames},
        draw=partial(_draw, bench, config, found),
    )


def _carried_once(bench: Bench, sequence: Sequence, config: VideoConfig, work: Path) -> NDArray[np.uint8]:
    """A sequence is done or not done: its answers are what a killed command continues from."""
    saved = work / f"{sequence.name}.npy"
    if not saved.exists():
        tokens = PatchTokens(bench, config, blocks=[bench.backbone.n_blocks - 1], whole=True)
        with write_whole(saved) as file:
            np.save(file, carried(tokens, sequence, config))
    return np.load(saved)


def carried(tokens: PatchTokens, sequence: Sequence, config: VideoConfig) -> NDArray[np.uint8]:
    """The number of the object at each pixel, 0 for none, [frames, height, width]. The first is the truth."""
    first = sequence.numbers(0)
    answers = [first]
    tiling = tokens.tiling(sequence.size)
    propagator = None
    for start in range(0, len(sequence), config.batch):
        rows = range(start, min(start + config.batch, len(sequence)))
        found = tokens(torch.cat([tiling.cut(sequence.image(row)) for row in rows]))
        for maps in found.unflatten(1, tiling.grid):
            if propagator is None:
                labels = _as_labels(first, tiling.grid, len(sequence.objects)).to(maps)
                propagator = Propagator(
                    maps,
                    labels,
                    context=config.context,
                    top=config.top,
                    reach=config.reach,
                    temperature=config.temperature,
                )
                continue
            answers.append(_decided(propagator.step(maps), first.shape))
    return np.stack(answers)


def _as_labels(
    numbers: NDArray[np.uint8], grid: tuple[int, int], objects: int
) -> Float[Tensor, "labels rows columns"]:
    """Which label each patch has, as its middle pixel says; none (0) is a label too."""
    rows, columns = (
        ((np.arange(count) + 0.5) * side / count).astype(np.int64)
        for count, side in zip(grid, numbers.shape, strict=True)
    )
    small = torch.from_numpy(numbers[np.ix_(rows, columns)].astype(np.int64))
    return torch.nn.functional.one_hot(small, objects + 1).permute(2, 0, 1).float()


def _decided(labels: Float[Tensor, "labels rows columns"], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The label of each pixel: the largest, after each label's map is stretched from 0 to 1."""
    large = enlarged(labels, shape).flatten(1)
    low, high = large.amin(1, keepdim=True), large.amax(1, keepdim=True)
    stretched = torch.where(high > low, (large - low) / (high - low), large)  # one that is flat stays
    return stretched.argmax(0).view(*shape).byte().cpu().numpy()


def _measured(sequence: Sequence, answers: NDArray[np.uint8]) -> Carried:
    """J and F of each object in each frame but the first and the last."""
    values = np.empty((len(sequence.objects), 2, len(sequence) - 2))
    for row in range(1, len(sequence) - 1):
        truth, counted = sequence.numbers(row), sequence.counted(row)
        for number in range(len(sequence.objects)):
            pair = truth == number + 1, answers[row] == number + 1
            values[number, :, row - 1] = region_similarity(*pair, counted), contour_accuracy(*pair, counted)
    table = np.array([[mean_recall_decay(measure) for measure in one] for one in values])
    return Carried(sequence, answers, values, table)


def _draw(bench: Bench, config: VideoConfig, found: list[Carried], page: Page) -> None:
    draw_videos(page, bench.backbone, found, config.size)


TASK = Task(VideoConfig, data, run, "masks carried through videos (DAVIS: J, F)")
