"""Steps of lightly-train's DINOv2, timed from outside; run by an interpreter that has it installed.

    PYTHON -m tests.benchmarks.lightly_step FOLDER STEPS PRECISION

FOLDER has `pictures`, and gets what lightly-train writes. Steps are taken in turn with others
(tests.benchmarks.turns); the seconds are those of a step without its data. Telemetry is off.
"""

import os
import sys
import time
from importlib.metadata import version
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import dinov2.vision_ops  # noqa: F401  # for what its import does: lightly-train imports torchvision

import pytorch_lightning  # pyright: ignore  # of the other environment

from tests.benchmarks.turns import next_turn

VERSION = version("lightly-train")


class Clock(pytorch_lightning.Callback):
    def on_train_batch_start(self, *given: object) -> None:
        self.start, self.begin = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *given: object) -> None:
        seconds, processor = time.perf_counter() - self.start, time.process_time() - self.begin
        next_turn({"seconds": seconds, "processor": processor, "version": VERSION})


def main(folder: str, steps: int, precision: str) -> None:
    begin = pytorch_lightning.Trainer.__init__

    def timed(trainer: Any, *given: Any, **named: Any) -> None:
        begin(trainer, *given, **named | {"callbacks": [*(named.get("callbacks") or []), Clock()]})

    pytorch_lightning.Trainer.__init__ = timed
    import lightly_train  # pyright: ignore

    batch, count = 8, len(os.listdir(f"{folder}/pictures"))
    lightly_train.pretrain(
        out=f"{folder}/{precision}",
        data=f"{folder}/pictures",
        model="dinov2/vits14-notpretrained",
        method="dinov2",
        batch_size=batch,
        epochs=-(-steps * batch // count),
        num_workers=0,
        precision=precision,
        accelerator="cpu",
        devices=1,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
