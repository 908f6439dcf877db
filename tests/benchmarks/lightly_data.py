"""lightly-train's augmentation for DINOv2, timed; run by an interpreter that has it installed.

    PYTHON -m tests.benchmarks.lightly_data PICTURES

Prints the pictures a CPU second that are read, decoded, augmented and normalised, the best of three rounds.
"""

import os
import sys
import time
from pathlib import Path

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import dinov2.vision_ops  # noqa: F401  # for what its import does: lightly-train imports torchvision

import torch
from lightly_train._data import file_helpers  # pyright: ignore  # of the other environment
from lightly_train._methods.dinov2 import dinov2_transform  # pyright: ignore

if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = dinov2_transform.DINOv2ViTTransformArgs()
    arguments.resolve_auto()
    arguments.resolve_incompatible()
    augment = dinov2_transform.DINOv2ViTTransform(arguments)
    paths, best = sorted(Path(sys.argv[1]).iterdir()), float("inf")
    for _ in range(3):
        start = time.process_time()
        for path in paths:
            augment({"image": file_helpers.open_image_numpy(path)})
        best = min(best, time.process_time() - start)
    print(len(paths) / best)
