"""The front door: `dinov2 COMMAND …`, one command a stage.

Commands are entry points of the group `dinov2.commands`. A command is looked up by name and only its own
module is imported, so that the front door points at no stage and other packages can add commands.
"""

import ast
import errno
import os
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2.exits import Stop, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tqdm import tqdm

GROUP = "dinov2.commands"
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # the user can mend these
DISTRIBUTION = "dinov2-pipeline"


def main() -> None:
    """Run the subcommand named by the first word."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(version(DISTRIBUTION))
    elif not words or words[0] in ("-h", "--help", "help"):
        print(overview())
    else:
        run(lambda rest: _command(words[0]).load()(rest), words[0], words[1:])


def run(command: Callable[[list[str]], None], name: str, words: "list[str] | None" = None) -> None:
    """Run one command and leave with its exit status; a `Stop` becomes one line on standard error."""
    try:
        command(sys.argv[1:] if words is None else words)
    except Stop as stop:
        print(f"dinov2 {name}: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"dinov2 {name}: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(UserError.status)
    except KeyboardInterrupt:
        print(f"\ndinov2 {name}: interrupted; the same command continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def overview() -> str:
    """What `dinov2 --help` prints: every command with the first line of its module's docstring."""
    commands = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    width = max((len(entry.name) for entry in commands), default=0)
    lines = [f"  {entry.name:<{width}}  {_summary(entry)}" for entry in commands]
    return "\n".join(
        [
            "usage: dinov2 COMMAND [RECIPE] [key=value …]",
            "",
            "From a pile of pictures to a vision foundation model: curation, DINOv2 training, evaluation.",
            "",
            *lines,
            "",
            "dinov2 COMMAND --help lists the command's recipes and settings.",
        ]
    )


def progress(
    iterable: "Iterable[Any] | None" = None,
    *,
    total: "int | None" = None,
    what: str,
    unit: str = "picture",
    initial: int = 0,
    shown: bool = True,
) -> "tqdm[Any]":
    """A bar with rate and time left on standard error; without a terminal, a line now and then."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=what,
        unit=" " + unit,
        initial=initial,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.2 if terminal else 15.0,
        maxinterval=10.0 if terminal else 30.0,
        smoothing=0.1,
    )


def _command(name: str) -> EntryPoint:
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        near = get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are: " + ", ".join(sorted(found))
        raise UserError(f"there is no command {name!r}; {hint}")
    return found[name]


def _summary(entry: EntryPoint) -> str:
    """First docstring line of the command's module, read without importing it: that would import torch."""
    try:
        spec = find_spec(entry.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return "(not installed)"
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text()))
    return (doc or "").partition("\n")[0]
