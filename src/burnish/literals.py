"""Words of other programs out of their source files, which are read and never run."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.config import ConfigError
from burnish.wording import brief

_FIELD = re.compile(r"\{\{|\}\}|\{(\w*)\}")


def constants(path: Path) -> dict[str, Any]:
    """The texts, numbers and dictionaries that a Python file gives names to.

    A value that names an earlier constant is that constant; anything that would have to be run is
    left out.

    Raises:
        ConfigError: no readable Python file.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError) as error:
        reason = brief(error)
        raise ConfigError(f"need a readable file {path} ({reason}); check the checkout") from None
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], _value(statement.value, found)
            if isinstance(target, ast.Name) and value is not None:
                found[target.id] = value
    return found


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """None for what is not plain."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.List):
        return [_value(part, known) for part in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {
            key.value: _value(value, known) for key, value in pairs if isinstance(key, ast.Constant)
        }
    return None


def plain(text: str) -> Any:
    """The value of a text, number, list or dictionary as Python writes it; None for other text."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def filled(template: str, fields: Mapping[str, str]) -> str:
    """A template of `str.format` whose fields are nothing but names.

    Raises:
        ConfigError: a field that is not among them.

    >>> filled("{{{a}}}", {"a": "x"})
    '{x}'
    """

    def fill(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] not in fields:
            raise ConfigError(
                f"need the fields {', '.join(fields)} in the words of a judge, got {match[0]!r}; "
                "check the checkout"
            )
        return fields[match[1]]

    return _FIELD.sub(fill, template)
