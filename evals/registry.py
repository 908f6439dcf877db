"""The tasks by name. A new one is a file, which ends by defining its `TASK`, and a line here."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from evals.task import Task

# Each is the file of this name in this folder.
NAMES = (
    "attention",
    "clustering",
    "copydetect",
    "corruptions",
    "depth",
    "fewshot",
    "finetune",
    "health",
    "keypoints",
    "knn",
    "linear",
    "logreg",
    "resolution",
    "retrieval",
    "segmentation",
    "video",
)


class Tasks(Mapping[str, Task]):
    """The tasks, each imported when it is asked for: one evaluation waits for no other one's imports."""

    def __getitem__(self, name: str) -> Task:
        if name not in NAMES:
            raise KeyError(name)
        task = import_module(f"evals.{name}").TASK
        assert isinstance(task, Task)
        return task

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


TASKS = Tasks()
