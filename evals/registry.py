"""The tasks by name. A new one is a file and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evals import (
    attention,
    clustering,
    copydetect,
    corruptions,
    depth,
    fewshot,
    finetune,
    health,
    keypoints,
    knn,
    linear,
    logreg,
    resolution,
    retrieval,
    segmentation,
    video,
)
from evals.config import EvalConfig
from evals.data import labelled_parts


@dataclass(frozen=True)
class Task:
    """An evaluation protocol.

    Attributes:
        config: its settings, a subclass of `EvalConfig`.
        data: opens what the settings name; the result has `sources`, by which results are told apart.
        run: takes the `Bench`, the data, the settings, and a folder that a killed command continues from;
            gives an `Outcome`.
        summary: what it is, in one line.
    """

    config: type[EvalConfig]
    data: Callable[[Any], Any]
    run: Callable[..., Any]
    summary: str


TASKS: dict[str, Task] = {
    "attention": Task(
        attention.AttentionConfig, attention.data, attention.run, "objects in the last block's attention"
    ),
    "clustering": Task(
        clustering.ClusteringConfig, labelled_parts, clustering.run, "k-means against the classes"
    ),
    "copydetect": Task(
        copydetect.CopydetectConfig, copydetect.open_sets, copydetect.run, "finding edited copies"
    ),
    "corruptions": Task(
        corruptions.CorruptionsConfig, corruptions.data, corruptions.run, "accuracy on corrupted pictures"
    ),
    "depth": Task(depth.DepthConfig, depth.data, depth.run, "depth of every pixel: linear, ridge or k-NN"),
    "fewshot": Task(
        fewshot.FewshotConfig, labelled_parts, fewshot.run, "classes from a few pictures of each"
    ),
    "finetune": Task(finetune.FinetuneConfig, labelled_parts, finetune.run, "the whole backbone, fine-tuned"),
    "health": Task(health.HealthConfig, health.open_pictures, health.run, "collapse, spread, outlier tokens"),
    "keypoints": Task(
        keypoints.KeypointsConfig, keypoints.open_pairs, keypoints.run, "the same part of another picture"
    ),
    "knn": Task(knn.KNNConfig, labelled_parts, knn.run, "classification by nearest neighbours"),
    "linear": Task(linear.LinearConfig, labelled_parts, linear.run, "linear classification, a grid of heads"),
    "logreg": Task(logreg.LogregConfig, labelled_parts, logreg.run, "logistic regression, a grid of C"),
    "resolution": Task(
        resolution.ResolutionConfig, labelled_parts, resolution.run, "accuracy by the size of the input"
    ),
    "retrieval": Task(
        retrieval.RetrievalConfig,
        retrieval.open_sets,
        retrieval.run,
        "finding what shows the same",
    ),
    "segmentation": Task(
        segmentation.SegmentationConfig,
        segmentation.data,
        segmentation.run,
        "classes of pixels: linear, ridge or k-NN",
    ),
    "video": Task(video.VideoConfig, video.data, video.run, "masks carried through videos (DAVIS: J, F)"),
}
