"""Pickles that hold nothing but plain containers, numbers and text.

A pickle is a program. What published data sets pack into theirs needs none of that: no class and no function
is ever looked up here, so none can run. Arrays of NumPy are refused with all the rest.
"""

import pickle
from typing import IO, Any


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it wants {module}.{name}; only lists, dicts, numbers and text are read: write it as JSON"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside itself")


def load_plain(file: IO[bytes]) -> Any:
    """Raises pickle.UnpicklingError for anything else, and for what is no pickle."""
    try:
        return _Plain(file, encoding="latin1").load()  # Python 2 wrote text as bytes
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # whatever bytes that are no pickle happen to do
        raise pickle.UnpicklingError(f"it is no whole pickle ({type(error).__name__})") from None
