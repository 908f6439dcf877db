"""Typed settings: defaults < recipe file < `key=value` words.

A stage's settings are one frozen dataclass (nested dataclasses are its sections). OmegaConf checks types;
this module finds recipes, says errors in the user's terms, and knows which settings make two runs the same
run. The comment beside a field is its help text.
"""

import dataclasses
import hashlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dinov2.exits import UserError

C = TypeVar("C")
CHECK = "--check"  # has a command print its resolved settings, or say what is wrong, and do nothing


def required() -> Any:
    """A field that the user must give."""
    return MISSING


def runtime(default: Any = MISSING) -> Any:
    """A field that says how a run is executed, not what it computes: it may change when the run continues."""
    metadata = {"runtime": True}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def listed(*values: Any) -> Any:
    """A list field with these defaults."""
    return dataclasses.field(default_factory=lambda: list(values))


def by_name() -> Any:
    """A field of numbers, or of sections, by names of the user's own; none by default."""
    return dataclasses.field(default_factory=dict)


def section(kind: type[C]) -> C:
    """A nested section with its own defaults."""
    return dataclasses.field(default_factory=kind)


def one_of(value: str, options: typing.Collection[str], key: str) -> str:
    """`value`, if it is among `options`; else a `UserError` that names the nearest."""
    if value not in options:
        near = get_close_matches(value, options, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose from " + ", ".join(sorted(options))
        raise UserError(f"{key}={value}: unknown; {hint}")
    return value


def at_least(least: int, config: Any, *keys: str) -> None:
    """A `UserError` for the first of these settings, by its dotted key, that is below `least`."""
    for key in keys:
        value = reduce(getattr, key.split("."), config)
        if value < least:
            raise UserError(f"{key}={value}: give {least} or more")


def read(schema: type[C], words: Sequence[str], *, recipes: str = "", doc: str = "") -> C:
    """Build `schema` from its defaults, an optional recipe named by the first word, and `key=value` words.

    Args:
        recipes: kind of recipe, a folder under `configs/`; empty if this command takes none.
        doc: the command's docstring, printed by `--help`.

    Raises:
        UserError: an unknown key (the nearest is named), a wrong type, a missing value, an unknown recipe.
    """
    if any(word in ("-h", "--help") for word in words):
        print(usage(schema, recipes, doc))
        sys.exit(0)
    check = CHECK in words
    config = OmegaConf.structured(schema)
    words = [word for word in words if word != CHECK]
    if recipes and words and "=" not in words[0]:
        config = _merge_recipe(schema, config, recipe_path(recipes, words.pop(0)))
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not understood: settings are written key=value")
        config = _set(schema, config, key, _parse(schema, key, text), word)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key}= is missing; --help lists all settings")
    try:
        made = typing.cast(C, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    if check:
        print(to_yaml(made), end="")
        sys.exit(0)
    return made


def identity(config: Any) -> dict[str, Any]:
    """What a run computes: every setting by its dotted key, without those marked runtime."""
    return {
        key: getattr(owner, field.name)
        for key, field, owner in _leaves(config)
        if not field.metadata.get("runtime")
    }


def default_identity(config: Any) -> dict[str, Any]:
    """What `identity` would be with nothing set, as far as there is a default; of the same named sections."""
    return {
        key: default
        for key, field, _ in _leaves(config)
        if not field.metadata.get("runtime") and (default := _default(field)) != MISSING
    }


def fingerprint(config: Any) -> str:
    """Hex hash of `identity(config)`; a folder of results belongs to it."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML, as `config.yaml` holds them."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def recipe_path(kind: str, name: str) -> Path:
    """The recipe file called `name`: a path, or one that ships under `configs/KIND/`."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no recipe file {name}")
        return path
    known = {path.stem: path for path in sorted((configs_folder() / kind).glob("*.yaml"))}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are: " + (", ".join(known) or "none")
        raise UserError(f"there is no {kind} recipe {name!r}; {hint} (settings are written key=value)")
    return known[name]


def configs_folder() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def usage(schema: type, recipes: str, doc: str) -> str:
    """The text of `--help`: what the command does, its recipes, and each setting with default and comment."""
    lines = [doc.strip(), ""] if doc else []
    if recipes:
        lines.append("recipes:")
        known = {field.name for field in dataclasses.fields(schema)}
        for path in sorted((configs_folder() / recipes).glob("*.yaml")):
            text = path.read_text()
            if not known.issuperset(re.findall(r"^(\w+):", text, re.MULTILINE)):
                continue  # of another command that shares the folder
            first = text.partition("\n")[0]
            lines.append(f"  {path.stem:<24} {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
        lines.append("")
    lines.append(f"settings ({CHECK} prints them resolved, and does nothing else):")
    for key, field, text in _described(schema):
        default = _default(field)
        shown = "(required)" if default == MISSING else json.dumps(default)
        lines.append(f"  {key + '=' + shown:<44} {text}".rstrip())
    return "\n".join(lines)


def _merge_recipe(schema: type, config: Any, path: Path) -> Any:
    try:
        values = yaml.load(path.read_text(), _Words) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of settings")
    for key, value in _flatten(values):
        config = _set(schema, config, key, _typed(_kind(schema, key), value), f"{path}: {key}")
    return config


class _Words(yaml.SafeLoader):
    """YAML in which all that is not quoted is text, but for null: `yes` is a word, and 007 no number."""


_Words.yaml_implicit_resolvers = {
    letter: [(tag, form) for tag, form in known if tag.rpartition(":")[2] in ("null", "merge")]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _typed(kind: Any, value: Any) -> Any:
    """What `_Words` gives: as it is in a field of texts, else with numbers and booleans as YAML has them."""
    if isinstance(value, list):
        return [_typed(kind, one) for one in value]
    if isinstance(value, dict):
        return {key: _typed(kind, one) for key, one in value.items()}
    if not isinstance(value, str) or _holds_text(kind):
        return value
    try:
        typed = yaml.safe_load(value)
        return float(typed) if isinstance(typed, str) and float in (kind, *typing.get_args(kind)) else typed
    except (yaml.YAMLError, ValueError):  # the second: YAML 1.1 reads 1e-4 as text, and "many" too
        return value


def _set(schema: type, config: Any, key: str, value: Any, where: str) -> Any:
    """`config` with one value changed. (A merge, because frozen schemas refuse assignment.)"""
    kind = _kind(schema, key)
    if kind is None:
        raise UserError(f"{where}: there is no setting {key!r}" + _nearest(schema, key))
    if dataclasses.is_dataclass(kind) or _is_table(kind):
        first = f"NAME.{_first_key(typing.get_args(kind)[1])}" if _is_table(kind) else _first_key(kind)
        raise UserError(f"{where}: {key!r} is a section; set a key of it, such as {key}.{first}=")
    if typing.get_origin(kind) is list and isinstance(value, str | int | float):
        raise UserError(f"{where}: give a list, as in {key}=[{value}]")
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        return OmegaConf.merge(config, nested)
    except ConfigKeyError:
        raise UserError(f"{where}: there is no setting {key!r}" + _nearest(schema, key)) from None
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None


def _parse(schema: type, key: str, text: str) -> Any:
    """The value of a word. Text stays text where the field is text: a path may look like YAML."""
    kind = _kind(schema, key)
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if str in options:
        empty = types.NoneType in options and text in ("null", "none")
        return None if empty else text.replace("${", "\\${")  # no interpolation in what a user types
    try:
        value = yaml.load(text.replace("${", "\\${") if _holds_text(kind) else text, _Words)
    except yaml.YAMLError:
        return text
    return _typed(kind, value)


def _holds_text(kind: Any) -> bool:
    """Whether a field is text, or a list or table of texts."""
    inside = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        inside = inside[1:]
    return kind is str or any(map(_holds_text, inside))


def _kind(schema: type, key: str) -> Any:
    """The type of the field with this dotted key, or None."""
    kind: Any = schema
    for part in key.split("."):
        if typing.get_origin(kind) is dict:  # any key may be set, such as mix.web=2
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        else:
            return None
    return kind


def _is_table(kind: Any) -> bool:
    """Sections by names of the user's own."""
    return typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1])


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _nearest(schema: type, key: str) -> str:
    keys = [known for known, _, _ in _described(schema)]
    last = {known.rpartition(".")[2]: known for known in reversed(keys)}
    near = get_close_matches(key, keys, n=1) or [
        last[name] for name in get_close_matches(key.rpartition(".")[2], last, n=1)
    ]
    return f"; did you mean {near[0]!r}?" if near else "; --help lists all settings"


def _first_key(schema: Any) -> str:
    return next(key for key, _, _ in _described(schema))


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _default(field: "dataclasses.Field[Any]") -> Any:
    """Of a leaf, which has the one or the other; MISSING where the user must give it."""
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _leaves(config: Any, prefix: str = "", inherited: bool = False) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for name, part in sorted(value.items()):
                yield from _leaves(part, f"{prefix}{field.name}.{name}.")
        elif dataclasses.is_dataclass(value):
            if not field.metadata.get("runtime"):
                yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, config


def _described(schema: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", str]]:
    kinds = [kind for kind in reversed(schema.__mro__) if hasattr(kind, "__dataclass_fields__")]
    source = "".join(map(inspect.getsource, kinds))  # inherited settings have their comments too
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.MULTILINE))
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if _is_table(hints[field.name]):
            yield from _described(typing.get_args(hints[field.name])[1], f"{prefix}{field.name}.NAME.")
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from _described(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, comments.get(field.name, "")
