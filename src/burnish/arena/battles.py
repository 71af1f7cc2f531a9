"""Votes as a file: one battle a line, ours or anybody's.

    {"battle": "b1", "prompt": "p7", "category": "portrait", "a": "base", "b": "student",
     "winner": "b", "voter": "v3"}

`a` stood on the left. A line is one vote of one voter; a second vote of the same voter on the same
battle is an error. Other keys are left alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from burnish.config import ConfigError
from burnish.tracking import write_rows
from burnish.wording import brief, nearest

Winner = Literal["a", "b", "tie", "both_bad"]
"""Who won; that both are bad is a tie for the rating, and told as a rate of its own."""
SCORES: Mapping[Winner, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
"""Of the picture on the left."""


@dataclass(frozen=True, kw_only=True)
class Battle:
    """One vote of one voter on two pictures of one prompt."""

    battle: str
    prompt: str
    category: str
    a: str
    b: str
    winner: Winner
    voter: str


_KEYS = tuple(field.name for field in fields(Battle))


def read_battles(path: Path) -> list[Battle]:
    """The votes of a JSONL file.

    Raises:
        ConfigError: no such file, or the first line that is no battle, with its number.
    """
    try:
        # Some programs begin a file with the mark of its encoding.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = brief(error)
        needed = f"need a JSONL file of battles, got {path} ({reason}); check the path"
        raise ConfigError(needed) from None
    found = list(_parsed(path, text))
    if not found:
        raise ConfigError(f"{path}: need at least one battle, got an empty file")
    return found


def _parsed(path: Path, text: str) -> Iterator[Battle]:
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        battle = _battle(line, where)
        if (battle.battle, battle.voter) in seen:
            raise ConfigError(
                f"{where}: need one vote of a voter on a battle, got a second of "
                f"{battle.voter!r} on {battle.battle!r}; remove one"
            )
        seen.add((battle.battle, battle.voter))
        yield battle


def _battle(line: str, where: str) -> Battle:
    try:
        row = json.loads(line)
        # JSON can write half a character, which no page can hold.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        needed = f"{where}: need one JSON object a line, got {line[:60]!r}; fix the line"
        raise ConfigError(needed) from None
    missing = [key for key in _KEYS if not isinstance(row, dict) or key not in row]
    if missing:
        raise ConfigError(
            f"{where}: need the keys {', '.join(_KEYS)}, got none named {missing[0]}; add it"
        )
    for key in _KEYS:
        if not isinstance(row[key], str | int) or not str(row[key]).strip():
            raise ConfigError(f"{where}: need a name for {key}, got {row[key]!r}; correct it")
        if not str(row[key]).isprintable():
            raise ConfigError(
                f"{where}: need printable characters for {key}, got {row[key]!r}; correct it"
            )
    winner = row["winner"]
    if winner not in get_args(Winner):
        near = nearest(str(winner), get_args(Winner))
        advice = f"did you mean {near!r}?" if near else "take one of them"
        raise ConfigError(
            f"{where}: need a winner of {', '.join(get_args(Winner))}, got {winner!r}; {advice}"
        )
    if str(row["a"]) == str(row["b"]):
        raise ConfigError(f"{where}: need two different models, got {row['a']!r} twice; fix it")
    return Battle(winner=winner, **{k: str(row[k]) for k in _KEYS if k != "winner"})


def write_battles(path: Path, battles: Sequence[Battle]) -> None:
    """Write votes as `read_battles` reads them."""
    write_rows(path, (asdict(battle) for battle in battles))


def by_category(battles: Sequence[Battle]) -> dict[str, list[Battle]]:
    """Votes of each category, in the order of its first one."""
    found: dict[str, list[Battle]] = {}
    for battle in battles:
        found.setdefault(battle.category, []).append(battle)
    return found
