"""A run of lightly-train's DINOv2, to compare with ours (`tests.benchmarks.contest`).

usage: PYTHON tests/benchmarks/lightly_run.py SETTINGS.json

PYTHON is that of an environment of lightly-train's own; nothing of this project is imported there but the one
file that lets torchvision be imported beside a CPU-only torch. The settings are of `lightly_train.pretrain`,
and besides: `network` (of its vision transformer), `steps`, `marks` (steps at which the teacher's weights are
written to `out`/STEP.pth, in the published keys), `warmup` and the like as fractions of the run.
"""

# lightly-train is not of this project's environment:
# pyright: reportMissingImports=false
import importlib.util
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # its telemetry
os.environ.setdefault("LIGHTLY_TRAIN_POSTHOG_KEY", "")  # and where that would go

ROOT = Path(__file__).parents[2]
FRACTIONS = ("warmup_steps", "teacher_temp_warmup_steps", "student_freeze_last_layer_steps")


def declare_operators() -> None:
    """torchvision can be imported after this, see `dinov2.vision_ops`."""
    spec = importlib.util.spec_from_file_location("vision_ops", ROOT / "dinov2" / "vision_ops.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vision_ops"] = module
    spec.loader.exec_module(module)


def main(settings: dict[str, Any]) -> None:
    declare_operators()
    import lightly_train
    import torch
    from lightly_train._methods.dinov2.dinov2 import DINOv2
    from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import (
        DinoVisionTransformer,
    )
    from pytorch_lightning import seed_everything

    torch.set_num_threads(1)
    out, steps = Path(settings.pop("out")), settings.pop("steps")
    marks = settings.pop("marks")
    seed_everything(settings["seed"])  # pretrain does so after the network was made
    network = DinoVisionTransformer(block_chunks=0, drop_path_uniform=True, **settings.pop("network"))

    updated = DINOv2.on_train_batch_end

    def marked(method: DINOv2, *words: Any, **named: Any) -> None:
        updated(method, *words, **named)  # the teacher's average
        if method.trainer.global_step in marks:
            teacher = method.teacher_embedding_model.wrapped_model.get_model()
            torch.save(teacher.state_dict(), out / f"{method.trainer.global_step:08d}.pth")
            used = resource.getrusage(resource.RUSAGE_SELF)
            with open(out / "marks.jsonl", "a") as file:
                line = {"step": method.trainer.global_step, "cpu_seconds": used.ru_utime + used.ru_stime}
                file.write(json.dumps(line) + "\n")

    DINOv2.on_train_batch_end = marked
    for name in FRACTIONS:
        settings["method_args"][name] = round(settings["method_args"][name] * steps)
    lightly_train.pretrain(
        out=str(out),
        model=network,
        method="dinov2",
        epochs=1_000_000,  # max_steps ends it
        num_workers=0,
        accelerator="cpu",
        devices=1,
        overwrite=True,
        loggers={"jsonl": None, "tensorboard": None},
        callbacks={
            "learning_rate_monitor": None,
            "early_stopping": None,
            "model_export": None,
            "model_checkpoint": None,
        },
        trainer_args={
            "max_steps": steps,
            "enable_checkpointing": False,
            "log_every_n_steps": max(1, steps // 20),
        },
        **settings,
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
