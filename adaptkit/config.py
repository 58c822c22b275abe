"""Settings: from YAML, JSON and command-line text to frozen dataclasses, and back.

Values are converted by the type of their field, so "2e-3" (which PyYAML reads as text) becomes a float where a float is
wanted. Every problem of a mapping is collected and shown at once; unknown keys are answered with near matches.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

from adaptkit.errors import AdaptKitError, ConfigError, MissingPathError

T = TypeVar("T")

_HINTS: dict[type[Any], dict[str, Any]] = {}
_MAX_YAML_BYTES = 4 * 2**20
_MAX_DEPTH = 64  # no settings of ours nest deeper than 4; a hostile file could otherwise exhaust the stack
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


class FieldInfo(NamedTuple):
    """One setting, as `describe` shows it; `default` is plain data, or "(required)" where there is none."""

    name: str
    type: str
    default: Any
    help: str


class _WrongValueError(Exception):
    """A value that its type doesn't accept; the text says what would be accepted."""


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from plain values, converting each by its field's type.

    Args:
        cls: A dataclass. Its fields may be bool, int, float, str, Path, Any, Literal, unions, tuples, lists,
            dictionaries and other dataclasses.
        mapping: Field names to values, as read from YAML, JSON or `parse_overrides`. Fields left out keep their
            defaults.
        where: What the mapping is ("recipe coop.yaml"); begins the error message.

    Raises:
        ConfigError: Unknown keys, missing fields or values that don't fit; all of them in one message.

    Example:
        >>> from adaptkit.types import TrainingSettings
        >>> from_mapping(TrainingSettings, {"lr": "2e-3", "epochs": 5}).lr
        0.002
    """
    problems: list[str] = []
    instance = _build(cls, mapping, "", problems, 0)
    if problems:
        start = f"In {where}: " if where else ""
        count = f"{len(problems)} problems. " if len(problems) > 1 else ""
        raise ConfigError(start + count + " ".join(problems))
    return typing.cast(T, instance)


def to_mapping(instance: Any) -> dict[str, Any]:
    """The plain values of a dataclass (tuples become lists, paths text); `from_mapping` reads them back.

    Raises:
        ConfigError: `instance` isn't a dataclass, or holds something that isn't plain.
    """
    if not dataclasses.is_dataclass(instance) or isinstance(instance, type):
        raise ConfigError(f"{type(instance).__name__} is not an instance of a settings class.")
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance) if field.init}


def describe(cls: type[Any]) -> list[FieldInfo]:
    """Every setting of a dataclass, in order; those of nested dataclasses with dotted names ("train.lr")."""
    hints = _hints(cls)
    found: list[FieldInfo] = []
    for field in _init_fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found += [item._replace(name=f"{field.name}.{item.name}") for item in describe(kind)]
            continue
        found.append(FieldInfo(field.name, _type_text(kind), _default(field), str(field.metadata.get("help", ""))))
    return found


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Nested mapping from `--set` texts; a later one wins over an earlier one of the same name.

    Values stay text for `from_mapping` to convert; `null` is None, and what begins with [ or { is read as YAML.

    Raises:
        ConfigError: A text that isn't NAME=VALUE, or a name that is used both for a value and for a group.

    Example:
        >>> parse_overrides(["train.lr=2e-3", "num_context=4"])
        {'train': {'lr': '2e-3'}, 'num_context': '4'}
    """
    result: dict[str, Any] = {}
    wholes: set[tuple[str, ...]] = set()  # names that were given a value, which may itself be a mapping
    for item in items:
        name, equals, text = item.partition("=")
        parts = [part.strip() for part in name.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"{item!r} is no override: write NAME=VALUE, for example train.lr=2e-3.")
        level = result
        for depth, part in enumerate(parts[:-1], start=1):
            if tuple(parts[:depth]) in wholes:
                raise ConfigError(f"{item!r} sets a part of {part!r}, which another override sets as a whole.")
            level = level.setdefault(part, {})
        if parts[-1] in level and tuple(parts) not in wholes:
            raise ConfigError(f"{item!r} sets {name.strip()!r} as a whole, of which another override sets a part.")
        level[parts[-1]] = _override_value(text.strip(), item)
        wholes.add(tuple(parts))
    return result


def merge(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """One nested mapping out of several; later ones win, group by group. The arguments aren't changed."""
    result: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                below = result.get(key)
                result[key] = merge(below, value) if isinstance(below, Mapping) else merge(value)
            else:
                result[key] = value
    return result


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping.

    Raises:
        MissingPathError: No such file.
        ConfigError: The file is too large, isn't valid YAML (with the line), repeats a key, uses aliases, or holds
            something else than a mapping.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise MissingPathError(f"There is no settings file {path}: check the path.")
        size = path.stat().st_size
        if size > _MAX_YAML_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes; a settings file has at most {_MAX_YAML_BYTES:,}.")
        text = path.read_text(encoding="utf-8")
    except AdaptKitError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
    content = _parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; a settings file holds names and values.")
    return content


def check_templates(templates: str | Iterable[str]) -> tuple[str, ...]:
    """One template or several, each with exactly one `{}` for the class name.

    Raises:
        ConfigError: None at all, or one without `{}`, with several, or with other braces.
    """
    checked = (templates,) if isinstance(templates, str) else tuple(templates)
    if not checked:
        raise ConfigError("No template was given: write at least one, such as 'a photo of a {}.'.")
    for template in checked:
        places = template.count("{}")
        if places != 1 or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
            raise ConfigError(
                f"The template {template!r} has {places} places for the class name; write exactly one {{}} and no"
                " other braces, as in 'a photo of a {}.'."
            )
    return checked


def _build(cls: type[Any], mapping: Any, path: str, problems: list[str], depth: int) -> Any:
    """An instance, or None with at least one problem noted."""
    if not isinstance(mapping, Mapping):
        problems.append(f"{path or cls.__name__} is {_show(mapping)}; names and values are accepted.")
        return None
    fields = _init_fields(cls)
    known = [field.name for field in fields]
    before = len(problems)
    for key in mapping:
        if key not in known:
            problems.append(_unknown_key(f"{path}{'.' if path else ''}{key}", str(key), known))
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for field in fields:
        name = f"{path}.{field.name}" if path else field.name
        if field.name in mapping:
            values[field.name] = _field_value(hints[field.name], mapping[field.name], name, problems, depth)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{name} is missing; it has no default.")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:  # from the class's own __post_init__
        problems.append(str(error))
        return None


def _field_value(kind: Any, value: Any, name: str, problems: list[str], depth: int) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else _build(kind, value, name, problems, depth + 1)
    try:
        return _convert(kind, value, depth + 1)
    except _WrongValueError as error:
        problems.append(f"{name} is {_show(value)}; {error}.")
        return None


def _unknown_key(full: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    if near:
        return f"Unknown setting {full!r}: did you mean {' or '.join(repr(match) for match in near)}?"
    return f"Unknown setting {full!r}; known: {', '.join(known) or 'none'}."


def _convert(kind: Any, value: Any, depth: int) -> Any:
    """`value` as `kind`; raises `_WrongValueError` with what is accepted."""
    if depth > _MAX_DEPTH:
        raise _WrongValueError("values this deeply nested aren't accepted")
    if kind is Any or kind is object:
        return value
    if kind in _SCALARS:  # first: results hold thousands of counts
        return _SCALARS[kind](value)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _convert_literal(kind, value)
    if origin is Union or origin is types.UnionType:
        return _convert_union(kind, value, depth)
    base = origin or kind
    if base in (tuple, list, Sequence):
        return _convert_sequence(kind, value, depth)
    if base in (dict, Mapping):
        return _convert_mapping(kind, value, depth)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        problems: list[str] = []
        built = value if isinstance(value, kind) else _build(kind, value, "", problems, depth)
        if problems:
            raise _WrongValueError("in it: " + " ".join(problem.rstrip(".") for problem in problems))
        return built
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _WrongValueError(f"a {_type_text(kind)} is accepted")


def _convert_literal(kind: Any, value: Any) -> Any:
    choices = typing.get_args(kind)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    for choice in choices:  # command-line text for a choice that is a number or a bool
        if isinstance(value, str) and not isinstance(choice, str) and str(choice).lower() == value.lower():
            return choice
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise _WrongValueError(f"one of {', '.join(repr(choice) for choice in choices)} is accepted{hint}")


def _convert_union(kind: Any, value: Any, depth: int) -> Any:
    members = typing.get_args(kind)
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    for member in members:  # a value that already is of a member's type stays as it is
        if isinstance(member, type) and type(value) is member and typing.get_origin(member) is None:
            return _convert(member, value, depth)
    reasons = []
    for member in sorted(members, key=lambda member: member is str):  # text last: everything fits it
        try:
            return _convert(member, value, depth)
        except _WrongValueError as error:
            reasons.append(str(error))
    if len(reasons) == 1:
        raise _WrongValueError(reasons[0])
    raise _WrongValueError(f"{_type_text(kind)} is accepted")


def _convert_sequence(kind: Any, value: Any, depth: int) -> Any:
    arguments = typing.get_args(kind)
    is_tuple = (typing.get_origin(kind) or kind) is not list
    if isinstance(value, str):
        # numbers may come as "1,2"; a text is one item, since templates hold commas
        value = [value] if not arguments or arguments[0] is str else [part.strip() for part in value.split(",")]
    if not isinstance(value, (list, tuple)):
        raise _WrongValueError(f"a list of {_type_text(arguments[0]) if arguments else 'values'} is accepted")
    if not arguments:
        items = list(value)
    elif (len(arguments) == 2 and arguments[1] is Ellipsis) or not is_tuple or len(arguments) == 1:
        if len(arguments) == 1 and is_tuple and len(value) != 1 and typing.get_origin(kind) is tuple:
            raise _WrongValueError("exactly 1 value is accepted")
        items = [_convert(arguments[0], item, depth + 1) for item in value]
    else:
        if len(value) != len(arguments):
            raise _WrongValueError(f"exactly {len(arguments)} values are accepted")
        items = [_convert(member, item, depth + 1) for member, item in zip(arguments, value, strict=True)]
    return tuple(items) if is_tuple else items


def _convert_mapping(kind: Any, value: Any, depth: int) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _WrongValueError("names and values are accepted")
    key_kind, value_kind = typing.get_args(kind) or (Any, Any)
    return {_convert(key_kind, key, depth + 1): _convert(value_kind, item, depth + 1) for key, item in value.items()}


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE + _FALSE:
        return value.strip().lower() in _TRUE
    raise _WrongValueError("true or false is accepted")


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    raise _WrongValueError("a whole number is accepted")


def _to_float(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise _WrongValueError("a finite number is accepted")


def _to_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise _WrongValueError("text is accepted (in YAML, put it in quotes)")


def _to_path(value: Any) -> Path:
    if isinstance(value, (str, Path)):
        return Path(value)
    raise _WrongValueError("a path is accepted")


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    Path: _to_path,
}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    raise ConfigError(f"A setting holds {type(value).__name__}, which isn't plain data.")


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Types by field; kept, since evaluating the annotations takes longer than reading a result otherwise."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _init_fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{cls.__name__} is not a settings class (a dataclass).")
    return [field for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return _plain(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    return "(required)"


def _type_text(kind: Any) -> str:
    """A type in the words of the help text: "int", "float or null", "sgd | adamw", "list of text"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is Union or origin is types.UnionType:
        return " or ".join(_type_text(argument) for argument in arguments)
    if origin in (tuple, list, Sequence):
        if (len(arguments) == 2 and arguments[1] is Ellipsis) or len(arguments) == 1:
            return f"list of {_type_text(arguments[0])}"
        return "(" + ", ".join(_type_text(argument) for argument in arguments) + ")"
    if origin in (dict, Mapping):
        return f"mapping of {_type_text(arguments[1])}"
    names: dict[Any, str] = {str: "text", type(None): "null", Any: "anything", Path: "path"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _override_value(text: str, item: str) -> Any:
    if text == "null":
        return None
    return _parse_yaml(text, f"the override {item!r}") if text[:1] in ("[", "{") else text


def _parse_yaml(text: str, where: str) -> Any:
    import yaml  # on first use: `adaptkit --help` reads no YAML

    class Loader(yaml.SafeLoader):
        """The safe loader, without aliases (small files that unfold without end) and without repeated keys."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                mark = self.get_event().start_mark  # type: ignore[no-untyped-call]  # the stubs leave it out
                raise yaml.constructor.ConstructorError(
                    None, None, "aliases (*name) aren't accepted; write the value out", mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader: plain data only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}{line} isn't valid YAML: {reason}.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} isn't valid YAML: {(str(error).splitlines() or ['damaged'])[0]}.") from error
    except (LookupError, AttributeError) as error:  # what PyYAML lets through of "!!bool x" and "!!timestamp x"
        raise ConfigError(f"{where} isn't valid YAML: a value in it doesn't fit its tag (!!…).") from error
