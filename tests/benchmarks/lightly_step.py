"""Steps of lightly-train's DINOv2, timed from outside; run by an interpreter that has it installed.

    PYTHON -m tests.benchmarks.lightly_step PICTURES STEPS PRECISION

Prints a line of JSON: seconds of each step (data apart), and the process's peak memory. Telemetry is off.
"""

import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import dinov2.vision_ops  # noqa: F401  # for what its import does: lightly-train imports torchvision

import pytorch_lightning  # pyright: ignore  # of the other environment

from tests.benchmarks.figures import peak_memory

SECONDS: list[float] = []
PROCESSOR: list[float] = []  # seconds of all threads


class Clock(pytorch_lightning.Callback):
    def on_train_batch_start(self, *given: object) -> None:
        self.start, self.begin = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *given: object) -> None:
        SECONDS.append(time.perf_counter() - self.start)
        PROCESSOR.append(time.process_time() - self.begin)


def main(pictures: str, steps: int, precision: str) -> None:
    begin = pytorch_lightning.Trainer.__init__

    def timed(trainer: Any, *given: Any, **named: Any) -> None:
        begin(trainer, *given, **named | {"callbacks": [*(named.get("callbacks") or []), Clock()]})

    pytorch_lightning.Trainer.__init__ = timed
    import lightly_train  # pyright: ignore

    batch = 8
    with tempfile.TemporaryDirectory() as folder:
        lightly_train.pretrain(
            out=f"{folder}/out",
            data=pictures,
            model="dinov2/vits14-notpretrained",
            method="dinov2",
            batch_size=batch,
            epochs=-(-steps * batch // len(list(Path(pictures).iterdir()))),
            num_workers=0,
            precision=precision,
            accelerator="cpu",
            devices=1,
        )
    told: dict[str, Any] = {"seconds": SECONDS, "processor": PROCESSOR, "gib": peak_memory()}
    told["version"] = version("lightly-train")
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
