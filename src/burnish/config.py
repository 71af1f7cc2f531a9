"""Settings: a strict base class, YAML, dotted overrides, errors that name the nearest right key.

Decided here: YAML is read by the 1.2 rules (`1e-4` is a number, `no` is a word, a key stands
once); values from files and command lines are never coerced (`"5"` is not 5); an override amends
what the run would have had without it, the defaults included. A config stands beside what it
configures, so this file knows no field of any of them, and it does not load torch.
"""

import hashlib
import importlib
import json
import pkgutil
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, to_jsonable_python

from burnish.dialect import Dumper, Loader
from burnish.wording import brief, nearest, shown

ConfigT = TypeVar("ConfigT", bound="Config")


class ConfigError(ValueError):
    """Settings that cannot be used; the message is one line, `problems` has one for each fault."""

    def __init__(self, problem: str, *others: str) -> None:
        self.problems = (problem, *others)
        more = f" (and {len(others)} more)" if others else ""
        super().__init__(problem + more)


class Config(BaseModel):
    """Base of all settings: frozen, keyword-only, no unknown keys, no NaN and no infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        # Otherwise field names such as `model_path` raise a warning.
        protected_namespaces=(),
    )


def load(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file as `cls`, amended by `key=value` overrides."""
    return parse(cls, read_yaml(path), overrides, where=str(path))


def parse(
    cls: type[ConfigT], data: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = ""
) -> ConfigT:
    """Make a `cls` from plain data, as YAML gives it, and overrides.

    Args:
        cls: the config class.
        data: mappings, lists and scalars.
        overrides: `dotted.key=value` each; the value is read as YAML.
        where: the file the data came from, for messages.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, broken override.
    """
    amended = apply_overrides(cls, data, overrides)
    prefix = f"{where}: " if where else ""
    unknown = list(_unknown_keys(cls, cls, amended, ()))
    if unknown:
        raise ConfigError(*(prefix + line for line in unknown))
    try:
        # Through JSON, because only there strictness still takes a list for a tuple and text for
        # a path, which is all that YAML can write.
        return cls.model_validate_json(json.dumps(amended), strict=True)
    except ValidationError as error:
        lines = [prefix + _reworded(cls, amended, details) for details in error.errors()]
        raise ConfigError(*lines) from None


def apply_overrides(
    cls: type[Config], data: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Copy `data` with `dotted.key=value` overrides set; defaults fill what `data` leaves out.

    Setting the key that selects a union's member starts that section afresh, and such overrides go
    first, so that their order on the command line does not matter.
    """
    amended = to_jsonable_python(data)
    parsed = [_split_override(text) for text in overrides]
    parsed.sort(key=lambda item: not _selects_member(cls, amended, item[0]))
    for keys, value in parsed:
        _set(cls, amended, keys, value)
    return amended


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"need a config file, {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"need a readable text file, {path} is not ({brief(error)}); check it"
        ) from None
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """Read YAML text whose top level is a mapping; an empty text is an empty mapping."""
    data = _yaml_value(text, where)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: need `key: value` lines, got {shown(data)}; write a mapping")
    return data


def dump_yaml(config: Config) -> str:
    """All settings as YAML, in the order of the class; `parse_yaml` and `parse` read them back."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True
    )


def config_hash(config: Config) -> str:
    """SHA-256 of the canonical JSON: the same settings give the same hash on every machine."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


EMBEDDED = "embedded:"
"""Prefix of paths to what ships with the package."""


def located(path: str) -> Path:
    """The path of a file; `embedded:...` is looked up in the package's own `miniature` folder."""
    if path.startswith(EMBEDDED):
        return Path(__file__).parent / "miniature" / path.removeprefix(EMBEDDED)
    return Path(path)


def shelf(package: str, base: type[ConfigT]) -> tuple[type[ConfigT], ...]:
    """The config of every file of a shelf; the file name is the value of its `kind`."""
    found: list[type[ConfigT]] = []
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        members = vars(importlib.import_module(f"{package}.{module.name}")).values()
        for member in members:
            if not (isinstance(member, type) and issubclass(member, base)):
                continue
            if _literal(member.model_fields.get("kind")) == (module.name,):
                found.append(cast(type[ConfigT], member))
    return tuple(found)


def _yaml_value(text: str, where: str) -> Any:
    try:
        # The conversion refuses the loops that anchors can make.
        return to_jsonable_python(yaml.load(text, Loader=Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}" if mark and "\n" in text else where
        problem = " ".join((error.problem or "it cannot be read").split())
        raise ConfigError(f"{place}: need valid YAML, {problem}; correct it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = brief(error)
        raise ConfigError(f"{where}: need valid YAML, got {problem}; correct it") from None


def _split_override(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"need key=value, got {text!r}; write for example `optimizer.rate=1e-4`")
    return keys, _yaml_value(value, f"the value of `{key.strip()}`")


def _selects_member(cls: type[Config], data: Any, keys: Sequence[str]) -> bool:
    annotation: Any = cls
    for key in keys[:-1]:
        annotation = _child(annotation, data, key)
        data = data.get(key) if isinstance(data, dict) else None
    return keys[-1] in _selectors(annotation)


def _set(cls: type[Config], root: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set one value in place, with the defaults filled in along the way."""
    node: Any = root
    annotation: Any = cls
    for depth, key in enumerate(keys):
        path = ".".join(keys[: depth + 1])
        is_last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError(
                    f"{path}: need a place below {len(node)} in the list, got {key!r};"
                    " set the whole list as [a, b]"
                )
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
            if is_last and key in _selectors(annotation) and node.get(key) != value:
                node.clear()
        else:
            raise ConfigError(
                f"{path}: need a section or a list to set {key!r} in, `{'.'.join(keys[:depth])}`"
                f" is {shown(node)}; set that key itself"
            )
        if is_last:
            node[slot] = value
            return
        child = _child(annotation, node, key)
        if isinstance(node, dict) and node.get(slot) is None:
            node[slot] = _default(annotation, node, key)
        annotation, node = child, node[slot]


def _default(annotation: Any, data: Any, key: str) -> Any:
    """What the section would have held under `key`, as plain data; an empty mapping if nothing."""
    member = _member(annotation, data)
    field = member.model_fields.get(key) if member else None
    if field is None or field.is_required():
        return {}
    value = field.get_default(call_default_factory=True, validated_data={})
    return {} if value is None else to_jsonable_python(value)


def _options(annotation: Any) -> list[Any]:
    """The members of a union, with `Annotated` and None taken away."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in _options(part)]
    return [] if annotation is type(None) else [annotation]


def _configs(annotation: Any) -> list[type[BaseModel]]:
    classes = [option for option in _options(annotation) if isinstance(option, type)]
    return [option for option in classes if issubclass(option, BaseModel)]


def _literal(field: FieldInfo | None) -> tuple[Any, ...]:
    annotation = field.annotation if field else None
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _selectors(annotation: Any) -> list[str]:
    """The keys whose fixed values tell the members of a union of configs apart."""
    members = _configs(annotation)
    keys = list(members[0].model_fields) if len(members) > 1 else []
    values = {key: [_literal(member.model_fields.get(key)) for member in members] for key in keys}
    sizes = {key: sum(map(len, values[key])) for key in keys if all(values[key])}
    return [key for key, size in sizes.items() if len(set().union(*values[key])) == size]


def _member(annotation: Any, data: Any) -> type[BaseModel] | None:
    """The config class that `data` is meant for; None where that cannot be told."""
    members = _configs(annotation)
    if len(members) == 1:
        return members[0]
    for key in _selectors(annotation):
        for member in members:
            given = data.get(key) if isinstance(data, dict) else None
            if given in _literal(member.model_fields[key]):
                return member
    return None


def _child(annotation: Any, data: Any, key: str | int) -> Any:
    """The annotation of what stands under `key`; None where nothing is known of it."""
    member = _member(annotation, data)
    if member is not None:
        field = member.model_fields.get(str(key))
        return field.annotation if field else None
    for option in _options(annotation):
        origin, arguments = get_origin(option), get_args(option)
        if not isinstance(origin, type) or not arguments:
            continue
        if issubclass(origin, Mapping):
            return arguments[1]
        is_mixed = issubclass(origin, tuple) and arguments[-1] is not Ellipsis
        return None if is_mixed else arguments[0]
    return None


def _paths(annotation: Any, prefix: str = "", seen: tuple[type, ...] = ()) -> Iterator[str]:
    """Every dotted key that a config class knows."""
    for member in [member for member in _configs(annotation) if member not in seen]:
        for key, field in member.model_fields.items():
            yield prefix + key
            yield from _paths(field.annotation, f"{prefix}{key}.", (*seen, member))


def _unknown_keys(
    root: type[Config], annotation: Any, data: Any, path: tuple[str, ...]
) -> Iterator[str]:
    if isinstance(data, dict):
        member = _member(annotation, data)
        for key, value in data.items():
            if member is not None and key not in member.model_fields:
                yield _unknown_key(root, member, path, key)
            else:
                yield from _unknown_keys(root, _child(annotation, data, key), value, (*path, key))
    elif isinstance(data, list):
        for place, value in enumerate(data):
            child = _child(annotation, data, place)
            yield from _unknown_keys(root, child, value, (*path, str(place)))


def _unknown_key(
    root: type[Config], member: type[BaseModel], path: tuple[str, ...], key: str
) -> str:
    keys = list(member.model_fields)
    meant = [".".join((*path, sibling)) for sibling in [nearest(key, keys)] if sibling]
    meant += [other for other in _paths(root) if other.split(".")[-1] == key]
    advice = f"did you mean `{meant[0]}`?" if meant else f"the keys here are {', '.join(keys)}"
    return f"need a known key, got `{'.'.join((*path, key))}`; {advice}"


def _dotted(root: type[Config], data: Any, location: Sequence[str | int]) -> tuple[str, Any]:
    """The dotted path of a pydantic location, without its union tags, and the annotation there."""
    annotation: Any = root
    parts: list[str] = []
    narrowed = True
    for part in location:
        options = _options(annotation)
        if len(options) > 1 and not narrowed:
            # Pydantic names the member of the union it tried: that is no key of the user's.
            annotation = _member(annotation, data) or annotation
            narrowed = True
            continue
        if part == "[key]" or str(part).startswith(("function-", "tagged-union", "nullable")):
            continue
        annotation = _child(annotation, data, part)
        is_there = part in data if isinstance(data, dict) else isinstance(data, list)
        data = data[part] if is_there else None
        parts.append(str(part))
        narrowed = False
    return ".".join(parts), annotation


def _reworded(root: type[Config], data: Any, details: ErrorDetails) -> str:
    """One pydantic error as one line: needed, given, what to do."""
    path, annotation = _dotted(root, data, details["loc"])
    given, kind = details["input"], details["type"]
    name = path or "the settings"
    if kind == "missing":
        meant = _meant(root, data, path)
        return f"{name}: need a value, got none; {meant}add `{path}: ...` or pass {path}=..."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        selector = str(details.get("ctx", {})["discriminator"]).strip("'")
        literals = [_literal(member.model_fields.get(selector)) for member in _configs(annotation)]
        given = given.get(selector) if isinstance(given, dict) else None
        name = f"{path}.{selector}"
        meant = "" if given else _meant(root, data, name)
        return _wrong_choice(name, given, sum(literals, ()), meant)
    if kind == "literal_error":
        choices = [value for option in _options(annotation) for value in get_args(option)]
        return _wrong_choice(name, given, choices)
    message = " ".join(re.sub("^(Value error|Assertion failed), ", "", details["msg"]).split())
    if kind in ("value_error", "assertion_error"):
        return f"{path}: {message}" if path else message
    context = details.get("ctx", {})
    if kind == "too_short":
        least = context["min_length"]
        message = f"at least {least} entr{'y' if least == 1 else 'ies'}"
    if kind == "string_pattern_mismatch":
        message = f"text of the form {context['pattern']}"
    message = message.replace("an object", "a section of keys")
    needed = re.sub(r"^(Input should be|Input should|Value should|\w+ should be) ", "", message)
    needed = needed.split(", unable to parse")[0]
    advice = f"correct it or pass {path}=..." if path else "correct it"
    return f"{name}: need {needed}, got {shown(given)}; {advice}"


def _meant(root: type[Config], data: Any, missing: str) -> str:
    """The section that a mistyped override meant, which has made one of its own instead."""
    annotation: Any = root
    *path, name, _ = ["", *missing.split(".")]
    for part in path[1:]:
        annotation = _child(annotation, data, part)
        data = data.get(part) if isinstance(data, dict) else None
    is_named = isinstance(data, dict) and _member(annotation, data) is None
    near = nearest(name, [other for other in data if other != name]) if is_named else None
    return f"did you mean `{'.'.join((*path[1:], near))}`? Else " if near else ""


def _wrong_choice(name: str, given: Any, choices: Sequence[Any], meant: str = "") -> str:
    near = nearest(given, choices)
    advice = f"did you mean {near}?" if near else f"{meant}choose one of them"
    return f"{name}: need one of {', '.join(map(str, choices))}, got {shown(given)}; {advice}"
