"""The settings of the demo."""

from dataclasses import dataclass

from dinov2.config import required, runtime, section

IMAGENETTE = "imagenette"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many of the demo's own pictures to make of each kind."""

    most_training: int = 200  # windows a photograph for training; fewer where there is no room
    most_test: int = 48  # windows a photograph for testing
    seeds: float = 0.1  # part of the training windows that are seeds
    fewest_seeds: int = 4  # seeds a photograph
    copies: int = 60  # planted copies of each kind
    corrupt: int = 30  # planted files that cannot be read
    drawings: int = 120  # pictures that no seed is like


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    output: str = runtime(required())  # folder for all that is made, report.html among it
    images: str = ""  # your own folder of pictures, or imagenette; empty: windows of packaged photographs
    seed: int = 0  # of the pictures and of the training
    most: int = 5_000  # of your own pictures to take, drawn by their names
    curation: str = "demo"  # recipe of the curation
    training: str = "demo"  # recipe of the training
    plan: Plan = section(Plan)
    workers: int = runtime(0)  # processes that read and describe pictures; 0: one a core
