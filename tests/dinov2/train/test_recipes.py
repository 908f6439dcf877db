"""Every recipe can be read, says what it is, and has the papers' numbers."""

import pytest

from dinov2.config import configs_folder, read
from dinov2.optim import Schedules
from dinov2.train.ablations import AblationConfig
from dinov2.train.config import TrainConfig

ALL = sorted(path.stem for path in (configs_folder() / "train").glob("*.yaml"))
RECIPES = [name for name in ALL if not name.startswith("ablation_")]
IMAGENET = 1_281_167
EPOCH = 1250  # steps of an epoch, as DINOv2 counts


def _config(name: str) -> TrainConfig:
    return read(TrainConfig, [name, "data=IMAGENET", "output=DIR"], recipes="train")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole_and_says_command_hardware_and_what_to_expect(name: str):
    _config(name).check()
    first, second, *_ = (configs_folder() / "train" / f"{name}.yaml").read_text().splitlines()
    command, hardware = first.split(":", 1)
    assert command.startswith(f"# dinov2 train {name} ") and " data=" in command and " output=" in command
    assert any(word in hardware for word in ("GPU", "A100", "V100", "CPU"))
    assert second.startswith("# Expected")


@pytest.mark.parametrize("name", [name for name in ALL if name not in RECIPES])
def test_every_variant_of_an_ablation_can_be_trained(name: str):
    given = "knn_train=A knn_test=B output=DIR data=D sources.curated=C sources.uncurated=P"
    config = read(AblationConfig, [name, *given.split()], recipes="train")
    config.check()
    for variant in config.variants:
        for words in config.commands(variant, 0):
            read(TrainConfig, words, recipes="train").check()
    first, second, *_ = (configs_folder() / "train" / f"{name}.yaml").read_text().splitlines()
    assert first.startswith(f"# dinov2 ablate {name} ") and "GPU" in first and second.startswith("# Expected")


def _found(name: str) -> dict[str, object]:
    """The numbers of shared tables, read off the schedules themselves."""
    config = _config(name)
    steps = config.length(IMAGENET)
    schedules = Schedules(
        optim=config.optim, teacher=config.teacher, steps=steps, batch=config.batch, pictures=IMAGENET
    )
    epoch = IMAGENET / config.batch if config.epochs else EPOCH
    warmup, warm = config.optim.warmup * steps / epoch, config.teacher.temperature_warmup * steps / epoch
    peak = schedules.at(round(config.optim.warmup * steps))
    frozen = next(step for step in range(steps) if schedules.at(step).last_layer_lr) / epoch
    return {
        "epochs": round(steps / epoch),
        "batch": config.batch,
        "peak": peak.lr,
        "warmup": warmup,
        "end": schedules.at(steps).lr,
        "decay": (schedules.at(0).weight_decay, schedules.at(steps).weight_decay),
        "temperature": (schedules.at(0).teacher_temperature, schedules.at(steps).teacher_temperature, warm),
        "momentum": schedules.at(0).momentum,
        "frozen": frozen,
    }


PUBLISHED = {  # epochs, batch, peak rate, warmup, weight decay at the end, temperature's rise, momentum
    "dino_vits16": (800, 1024, 5e-4 * 1024 / 256, 10, 0.4, 30, 0.996),
    "dino_vits8": (800, 1024, 5e-4 * 1024 / 256, 10, 0.4, 30, 0.996),
    "dino_vitb16": (400, 1024, 5e-4 * 1024 / 256, 10, 0.4, 30, 0.996),
    "dino_vitb8": (300, 1024, 5e-4 * 1024 / 256, 10, 0.4, 30, 0.996),
    "dino_resnet50": (800, 4080, 0.03 * 4080 / 256, 10, 1e-4, 30, 0.996),
    "ibot_vits16": (800, 1024, 5e-4 * 1024 / 256, 10, 0.4, 30, 0.996),
    "ibot_vitb16": (400, 1024, 5e-4 * 1024 / 256, 10, 0.4, 30, 0.996),
    "ibot_vitl16": (250, 1024, 5e-4 * 1024 / 256, 10, 0.4, 30, 0.996),
    "dinov2_vitl16_short": (100, 2048, 4e-3 * 2**0.5, 10, 0.4, 30, 0.992),
    "dinov2_vitl14": (500, 3072, 2e-4 * 3**0.5, 80, 0.2, 30, 0.994),
    "dinov2_vitg14": (500, 3072, 2e-4 * 3**0.5, 80, 0.2, 30, 0.994),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fractions_of_a_run_are_the_papers_epochs(name: str):
    epochs, batch, peak, warmup, decay, rise, momentum = PUBLISHED[name]
    found = _found(name)
    assert (found["epochs"], found["batch"]) == (epochs, batch)
    assert found["peak"] == pytest.approx(peak, rel=1e-4) and found["end"] == pytest.approx(1e-6)
    assert found["warmup"] == pytest.approx(warmup, rel=1e-3) and found["frozen"] == pytest.approx(
        1, abs=5e-3
    )
    assert found["decay"] == pytest.approx((1e-4 if name == "dino_resnet50" else 0.04, decay))
    assert found["temperature"] == pytest.approx((0.04, 0.07, rise), rel=1e-3)
    assert found["momentum"] == pytest.approx(momentum)


def test_dino_is_without_what_came_after_it():
    for name in ("dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"):
        config = _config(name)
        assert config.losses.weights() == {"dino": 1.0} and config.masks.probability == 0
        assert config.teacher.targets == "centering" and config.optim.clip_per == "parameter"
        assert (config.optim.layer_decay, config.optim.patch_embed_lr, config.model.layer_scale) == (1, 1, 0)
        assert (config.augment.global_scale, config.augment.local_scale) == ([0.4, 1.0], [0.05, 0.4])
        assert config.heads.dino.norm_last == (config.model.size != "vit_small")
