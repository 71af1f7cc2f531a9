"""The memory of a vote: who was shown what, and every vote and its undoing, in one SQLite file.

No vote is ever changed or removed: a vote and its undoing are events, and what counts is the last
event of a battle. A battle is shown to one voter, once; its token, signed with a secret of the
file, says so, and can be voted on once until it is undone. So a double click, a reload or a
repeated request counts once, and a killed server loses nothing that it had answered.

Which pair meets next is drawn, less often the more it has met, so that all stay connected; the
probability is written beside the battle. A few battles are gold: a picture against its own ruin,
which tells who looks.
"""

import contextlib
import hashlib
import hmac
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from burnish.arena.battles import Battle, Winner
from burnish.arena.contest import Contest
from burnish.config import ConfigError

VERSION = 3
"""Of the layout and of what a contest is known by; another version is refused by name."""
RUINED = "gold:ruined"
"""Stands for the worse picture of a gold battle."""
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE battles (
    id TEXT PRIMARY KEY, voter TEXT NOT NULL, prompt TEXT NOT NULL, category TEXT NOT NULL,
    a TEXT NOT NULL, b TEXT NOT NULL, probability REAL NOT NULL, shown REAL NOT NULL
);
CREATE INDEX by_voter ON battles (voter, shown);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, battle TEXT NOT NULL REFERENCES battles (id),
    winner TEXT, at REAL NOT NULL
);
CREATE INDEX by_battle ON events (battle, number);
"""
_LAST = """
SELECT b.*, e.winner, e.at, e.number FROM battles b
JOIN events e ON e.number = (SELECT max(number) FROM events WHERE battle = b.id)
"""


class VoteError(ValueError):
    """A vote that does not count; the message is for the voter."""


@dataclass(frozen=True)
class Shown:
    """A battle as a voter sees it."""

    id: str
    voter: str
    prompt: str
    category: str
    a: str
    b: str
    token: str


class Ballots:
    """One contest's votes."""

    def __init__(self, path: Path, contest: Contest, *, gold: float = 0.05) -> None:
        """Open a file, or begin one.

        Args:
            path: of the SQLite file.
            contest: whose votes these are; it must be the one that the file was begun with.
            gold: share of battles that are gold.

        Raises:
            ConfigError: no database of this version, or that of another contest.
        """
        self._path, self._contest, self._gold = path, contest, gold
        self._pairs = contest.matches
        try:
            self._secret = self._begin(contest.digest())
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"need an SQLite file of votes, got {path} ({error}); choose another"
            ) from None

    def _begin(self, digest: str) -> bytes:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing() as database:
            is_new = not database.execute("SELECT 1 FROM sqlite_master").fetchone()
            if is_new:
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                facts = {
                    "version": str(VERSION),
                    "contest": digest,
                    "secret": secrets.token_hex(32),
                }
                database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            found = dict(database.execute("SELECT name, value FROM facts").fetchall())
        _check_version(self._path, found)
        if found["contest"] != digest:
            raise ConfigError(
                f"need the models, pictures and prompts that {self._path} was begun with, got "
                "others; choose another file"
            )
        return bytes.fromhex(found["secret"])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone; it is on the disk when the block ends."""
        database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        database.row_factory = sqlite3.Row
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        finally:
            # Without a commit it is rolled back.
            database.close()

    # --- Signatures --------------------------------------------------------------------------

    def sign(self, *parts: str) -> str:
        """What only this file can have written about these parts."""
        text = "\0".join(parts).encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[:32]

    def is_signed(self, signature: str, *parts: str) -> bool:
        """Whether it has, told in constant time."""
        return hmac.compare_digest(signature.encode(), self.sign(*parts).encode())

    # --- Battles -----------------------------------------------------------------------------

    def show(self, voter: str) -> Shown | None:
        """The battle that a voter has before them: an open one, or a new one; None when all is
        voted."""
        with self._writing() as database:
            row = database.execute(
                "SELECT * FROM battles b WHERE voter = ? AND NOT EXISTS (SELECT 1 FROM events e"
                " WHERE e.battle = b.id AND e.number = (SELECT max(number) FROM events"
                " WHERE battle = b.id) AND e.winner IS NOT NULL) ORDER BY shown DESC LIMIT 1",
                (voter,),
            ).fetchone()
            if row is None:
                row = self._drawn(database, voter)
        return None if row is None else self._shown(row)

    def _shown(self, row: Any) -> Shown:
        return Shown(
            **{name: row[name] for name in ("id", "voter", "prompt", "category", "a", "b")},
            token=f"{row['id']}.{self.sign('battle', row['id'], row['voter'])}",
        )

    def _drawn(self, database: sqlite3.Connection, voter: str) -> dict[str, Any] | None:
        """A new battle of pictures that this voter has not seen against each other."""
        draws = np.random.default_rng(secrets.randbits(64))
        seen = {
            (row["prompt"], frozenset((row["a"], row["b"])))
            for row in database.execute("SELECT * FROM battles WHERE voter = ?", (voter,))
        }
        met = Counter(
            frozenset((row["a"], row["b"]))
            # What was shown and never voted on, to somebody who only passed by, is no meeting.
            for row in database.execute(
                "SELECT a, b FROM battles WHERE id IN (SELECT battle FROM events)"
            )
        )
        left = {
            pair: own
            for pair in self._pairs
            if (own := [p for p in self._contest.prompts if (p.id, frozenset(pair)) not in seen])
        }
        if not left:
            return None
        pairs = list(left)
        weights = np.array([1 / (1 + met[frozenset(pair)]) for pair in pairs])
        chances = weights / weights.sum()
        place = int(draws.choice(len(pairs), p=chances))
        prompt = left[pairs[place]][int(draws.integers(len(left[pairs[place]])))]
        names = list(pairs[place])
        fresh = [name for name in names if (prompt.id, frozenset((name, RUINED))) not in seen]
        if fresh and draws.random() < self._gold:
            names = [fresh[int(draws.integers(len(fresh)))], RUINED]
        draws.shuffle(names)
        row = {
            "id": secrets.token_hex(8), "voter": voter, "prompt": prompt.id,
            "category": prompt.category, "a": names[0], "b": names[1],
            "probability": float(chances[place]) / len(left[pairs[place]]), "shown": time.time(),
        }  # fmt: skip
        database.execute(
            "INSERT INTO battles VALUES (:id, :voter, :prompt, :category, :a, :b, :probability,"
            " :shown)",
            row,
        )
        return row

    def battle(self, token: str, voter: str) -> Any:
        """The battle of a token.

        Raises:
            VoteError: a token that was not given to this voter.
        """
        name, _, signature = token.partition(".")
        if not self.is_signed(signature, "battle", name, voter):
            raise VoteError("This vote was not for you, or from another arena.")
        with self._writing() as database:
            return database.execute("SELECT * FROM battles WHERE id = ?", (name,)).fetchone()

    # --- Votes -------------------------------------------------------------------------------

    def vote(self, token: str, voter: str, winner: str) -> None:
        """Count a vote; the same vote again changes nothing.

        Raises:
            VoteError: a forged token, an unknown answer, or another answer than before.
        """
        if winner not in get_args(Winner):
            raise VoteError("Choose left, right, a tie, or both bad.")
        name = self.battle(token, voter)["id"]
        with self._writing() as database:
            last = self._last(database, name)
            if last == winner:
                return
            if last is not None:
                raise VoteError("You have voted on this pair already; undo the vote to change it.")
            database.execute(
                "INSERT INTO events (battle, winner, at) VALUES (?, ?, ?)",
                (name, winner, time.time()),
            )

    def newest(self, voter: str) -> str | None:
        """The token of the battle of a voter's newest vote that counts; None without one."""
        with self._writing() as database:
            row = database.execute(
                f"{_LAST} WHERE b.voter = ? AND e.winner IS NOT NULL ORDER BY e.number DESC"
                " LIMIT 1",
                (voter,),
            ).fetchone()
        return None if row is None else self._shown(row).token

    def undo(self, token: str, voter: str) -> None:
        """Take the vote on a battle back; to do it again changes nothing.

        Raises:
            VoteError: a token that was not given to this voter.
        """
        name = self.battle(token, voter)["id"]
        with self._writing() as database:
            if self._last(database, name) is None:
                return
            now = time.time()
            database.execute(
                "INSERT INTO events (battle, winner, at) VALUES (?, NULL, ?)", (name, now)
            )
            # It is what the voter sees next.
            database.execute("UPDATE battles SET shown = ? WHERE id = ?", (now, name))

    def _last(self, database: sqlite3.Connection, battle: str) -> str | None:
        row = database.execute(
            "SELECT winner FROM events WHERE battle = ? ORDER BY number DESC LIMIT 1", (battle,)
        ).fetchone()
        return None if row is None else row["winner"]

    def votes_since(self, voter: str, seconds: float) -> int:
        """Events of a voter in the last so many seconds."""
        with self._writing() as database:
            (count,) = database.execute(
                "SELECT count(*) FROM events e JOIN battles b ON b.id = e.battle"
                " WHERE b.voter = ? AND e.at > ?",
                (voter, time.time() - seconds),
            ).fetchone()
        return int(count)

    def counted(self, voter: str) -> int:
        """Votes of a voter that count."""
        with self._writing() as database:
            (count,) = database.execute(
                f"SELECT count(*) FROM ({_LAST} WHERE b.voter = ? AND e.winner IS NOT NULL)",
                (voter,),
            ).fetchone()
        return int(count)


def _check_version(path: Path, facts: Mapping[str, str], *older: int) -> None:
    if facts.get("version") not in [str(version) for version in (VERSION, *older)]:
        raise ConfigError(
            f"need votes of version {VERSION}, {path} has version {facts.get('version')}; "
            "use the version of Burnish that wrote it, or another file"
        )


def read_votes(path: Path) -> tuple[list[Battle], dict[str, tuple[int, int]]]:
    """All votes that count, and how each voter did on gold: right ones of so many.

    Raises:
        ConfigError: no file of votes, or of another version.
    """
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        database.row_factory = sqlite3.Row
        facts = dict(database.execute("SELECT name, value FROM facts").fetchall())
        # They only know less of what was voted on.
        _check_version(path, facts, 2)
        rows = database.execute(f"{_LAST} WHERE e.winner IS NOT NULL ORDER BY e.number").fetchall()
        database.close()
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"need an SQLite file of votes, got {path} ({error}); check the path"
        ) from None
    battles, gold = [], {}
    for row in rows:
        if RUINED not in (row["a"], row["b"]):
            own = ("prompt", "category", "a", "b", "winner", "voter")
            battles.append(Battle(battle=row["id"], **{name: row[name] for name in own}))
            continue
        right, asked = gold.get(row["voter"], (0, 0))
        is_right = {"a": row["a"], "b": row["b"]}.get(row["winner"], RUINED) != RUINED
        gold[row["voter"]] = (right + is_right, asked + 1)
    return battles, gold
