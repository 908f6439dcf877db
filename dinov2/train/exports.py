"""The teacher's backbone as a folder, at the end of a run and, if asked, on the way."""

from pathlib import Path

from dinov2.data.sources import Source
from dinov2.export import save_backbone
from dinov2.parallel import is_main
from dinov2.ssl.networks import whole_backbone
from dinov2.train.config import TrainConfig
from dinov2.train.state import State


def export_if_asked(config: TrainConfig, folder: Path, source: Source, state: State) -> None:
    """Write `backbones/STEP` if the settings want the teacher of this step."""
    if state.step and config.checkpoint.exported(state.step):
        export_teacher(config, folder / "backbones" / f"{state.step:08d}", source, state)


def export_teacher(config: TrainConfig, place: Path, source: Source, state: State) -> None:
    """Write the teacher's backbone to `place`, with what made it on its card. All ranks call it."""
    teacher = whole_backbone(state.teacher)
    if not is_main():
        return
    place.parent.mkdir(exist_ok=True)
    save_backbone(
        teacher,
        None,
        place,
        mean=config.augment.mean,
        std=config.augment.std,
        card={
            "trained on": f"{len(source):,} pictures (data fingerprint {source.fingerprint})",
            "steps": f"{state.step:,} of {config.batch} pictures",
            "losses": ", ".join(f"{name} x {weight:g}" for name, weight in config.weights().items()),
            "targets": config.teacher.targets,
            "seed": config.seed,
            **({"began from": config.init} if config.init else {}),
            **({"distilled from": config.distill} if config.distill else {}),
        },
    )
