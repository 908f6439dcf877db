"""What pip installs is complete: imports declared, requirements pinned, recipes and pages inside."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES = [name for name in ("dinov2", "curation", "evals", "slurm") if (ROOT / name).is_dir()]


def test_every_import_is_a_declared_dependency() -> None:
    extras = ("cpu", "gpu", "classifiers", "faces", "fast")
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in EXTRAS[name])]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    providers = packages_distributions()
    for path in _python_files():
        for name in _imported(path) - sys.stdlib_module_names - set(PACKAGES):
            provided = {canonicalize_name(found) for found in providers.get(name, [name])}
            assert provided & declared, (
                f"{path.relative_to(ROOT)} imports {name}: pyproject.toml has no such line"
            )


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    pins = dict(line.split("==") for line in _lines("constraints.txt") if not line.startswith("#"))
    lines = [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["demo"], *EXTRAS["test"]]
    for requirement in map(Requirement, lines):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"


def test_the_version_is_the_same_everywhere() -> None:
    assert f"version: {PROJECT['version']}" in _lines("CITATION.cff")
    assert any(line.startswith(f"## {PROJECT['version']}") for line in _lines("CHANGELOG.md"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_all_that_the_commands_need(installed: Path) -> None:
    for package in PACKAGES:
        assert _files(installed / package, but="configs") == _files(ROOT / package)
    assert _files(installed / "dinov2" / "configs") == _files(ROOT / "configs")
    extra = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert extra == set(PACKAGES)
    (info,) = installed.glob("*.dist-info")
    assert "Apache License" in next(info.rglob("LICENSE")).read_text()


def test_every_command_that_is_listed_is_there(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dinov2", "--help"]
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    for name, place in PROJECT["entry-points"]["dinov2.commands"].items():
        module, function = place.split(":")
        path = installed / Path(*module.split("."))
        source = path.with_suffix(".py")
        tree = ast.parse(source.read_text())
        summary = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert summary and re.search(rf"^  {name} +{re.escape(summary)}$", said, re.MULTILINE)
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("python", "complaint"),
    [
        ("no-such-python", "no-such-python was not found"),
        ("/bin/false", "does not serve: Python 3.11 to 3.13"),
    ],
)
def test_make_says_in_one_line_which_python_is_missing(python: str, complaint: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "-C", str(tmp_path), "install", f"PYTHON={python}"], capture_output=True, text=True
    )
    assert done.returncode == 2 and complaint in done.stderr
    assert not (tmp_path / ".venv").exists()


def _python_files() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def _imported(path: Path) -> set[str]:
    """Top names of all absolute imports of a file, also those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def _files(folder: Path, but: str = "-") -> dict[str, bytes]:
    """Contents by name of all files below, without what Python compiles and without the folder `but`."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    wanted = {name: path for name, path in paths.items() if not {"__pycache__", but} & set(name.parts)}
    return {name.as_posix(): path.read_bytes() for name, path in wanted.items()}


def _lines(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()
