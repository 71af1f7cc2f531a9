"""A leaderboard from battles: ratings with intervals over prompts, win rates, voters.

All numbers come from the same votes: Elo by `burnish.ratings` with the base anchored at 1000, and
intervals from drawing prompts again with all their votes and an upset. A category has a board of
its own, fitted to its own votes. What standing on the left is worth is fitted too, where pairs met
in both orders, so that a habit of voters is no rating.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from burnish import ratings
from burnish.arena.battles import SCORES, Battle, by_category
from burnish.config import ConfigError
from burnish.significance import MIN_PROMPTS
from burnish.wording import nearest

AT = 1000.0
"""Rating of the anchor."""
RESAMPLES = 2000
"""Of prompts, for an interval."""


@dataclass(frozen=True)
class Votes:
    """Battles as numbers."""

    players: tuple[str, ...]
    prompts: tuple[str, ...]
    left: ndarray
    right: ndarray
    score: ndarray
    prompt: ndarray


def as_votes(battles: Sequence[Battle], players: Sequence[str]) -> Votes:
    """Battles by the places of their players and prompts."""
    place = {name: number for number, name in enumerate(players)}
    prompts = tuple(dict.fromkeys(battle.prompt for battle in battles))
    row = {name: number for number, name in enumerate(prompts)}
    return Votes(
        players=tuple(players),
        prompts=prompts,
        left=np.array([place[battle.a] for battle in battles], dtype=int),
        right=np.array([place[battle.b] for battle in battles], dtype=int),
        score=np.array([SCORES[battle.winner] for battle in battles]),
        prompt=np.array([row[battle.prompt] for battle in battles], dtype=int),
    )


def rate(
    battles: Sequence[Battle], *, anchor: str | None = None, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """The whole leaderboard as plain data.

    Args:
        battles: of any models and categories.
        anchor: a model whose rating is 1000; None is `base`, or else the first by name.
        resamples: for each interval.

    Raises:
        ConfigError: an unknown anchor, or models that no battles connect.
    """
    players = sorted({name for battle in battles for name in (battle.a, battle.b)})
    if anchor is not None and anchor not in players:
        raise ConfigError(
            f"need a model of the battles as anchor, got {anchor!r}; did you mean "
            f"{nearest(anchor, players) or players[0]!r}?"
        )
    anchor = anchor or ("base" if "base" in players else players[0])
    parts = ratings.components(_tally(as_votes(battles, players)).votes)
    if len(parts) > 1:
        sets = "; ".join(", ".join(players[p] for p in part) for part in parts)
        raise ConfigError(
            f"need battles that connect all models, got {len(parts)} sets without a battle between "
            f"them: {sets}; let some of them meet"
        )
    boards = {name: _category(own, anchor, resamples) for name, own in by_category(battles).items()}
    return {
        "anchor": anchor,
        "at": AT,
        "votes": len(battles),
        "prompts": len({battle.prompt for battle in battles}),
        "voters": voters(battles),
        "board": board(battles, players, anchor, resamples),
        "categories": boards,
        "both_bad": float(np.mean([battle.winner == "both_bad" for battle in battles])),
        "ties": float(np.mean([battle.winner == "tie" for battle in battles])),
    }


def _category(battles: Sequence[Battle], anchor: str, resamples: int) -> dict[str, Any]:
    """The board of a category, or why there is none."""
    players = sorted({name for battle in battles for name in (battle.a, battle.b)})
    parts = ratings.components(_tally(as_votes(battles, players)).votes)
    if anchor not in players or len(parts) > 1:
        reason = "its battles do not connect all its models with the anchor"
        return {"rows": [], "reason": reason, "votes": len(battles)}
    return board(battles, players, anchor, resamples)


def board(
    battles: Sequence[Battle], players: Sequence[str], anchor: str, resamples: int
) -> dict[str, Any]:
    """Ratings of some players from battles that connect them."""
    votes = as_votes(battles, players)
    whole = _tally(votes)
    has_side = ratings.has_both_sides(whole.votes)
    found = ratings.fit(whole, has_side=has_side)
    place = list(players).index(anchor)
    elo = found.elo(place, AT)
    low, high = _intervals(votes, place, resamples, has_side=has_side)
    counts = whole.votes.sum(0) + whole.votes.sum(1)
    wins = whole.score.sum(1) + (whole.votes - whole.score).sum(0)
    order = ratings.order(found.strength)
    few = _prompts_of_each(votes) < MIN_PROMPTS
    reason = _reason([name for name, is_few in zip(players, few, strict=True) if is_few], anchor)
    # An interval is one of a difference to the anchor: its few prompts are everybody's.
    few |= few[place]
    if low is not None and high is not None:
        # Few prompts of one model make an interval that errs too often, whatever the others have.
        low, high = (np.where(few, np.nan, ends) for ends in (low, high))
    rows = [
        {
            "model": players[player],
            "elo": round(float(elo[player]), 2),
            "low": _rounded(low, player),
            "high": _rounded(high, player),
            "votes": int(counts[player]),
            "is_anchor": players[player] == anchor,
            "score": round(float(wins[player] / counts[player]), 4),
        }
        for player in order
    ]
    rates = ratings.win_rates(whole)[np.ix_(order, order)]
    return {
        "rows": rows,
        "votes": len(battles),
        "prompts": len(votes.prompts),
        "matrix": [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in rates],
        "left_side": round(float(ratings.ELO * found.side), 2) if has_side else None,
        "reason": reason,
    }


def _reason(few: Sequence[str], anchor: str) -> str:
    """Why there is no interval, or none of some models."""
    if not few:
        return ""
    if anchor in few:
        return f"fewer than {MIN_PROMPTS} prompts of the anchor, {anchor}: no intervals"
    return f"fewer than {MIN_PROMPTS} prompts of {', '.join(few)}: no intervals there"


def _tally(votes: Votes) -> ratings.Tally:
    return ratings.tally(votes.left, votes.right, votes.score, len(votes.players))


def _intervals(
    votes: Votes, anchor: int, resamples: int, *, has_side: bool
) -> tuple[ndarray, ndarray] | tuple[None, None]:
    """Over prompts; None where there are too few."""
    if len(votes.prompts) < MIN_PROMPTS:
        return None, None
    clusters = ratings.tally(votes.left, votes.right, votes.score, len(votes.players), votes.prompt)
    again = ratings.bootstrap(clusters, resamples, has_side=has_side)
    return ratings.interval(again.elo(anchor, AT))


def _rounded(values: ndarray | None, place: int) -> float | None:
    if values is None or np.isnan(values[place]):
        return None
    return round(float(values[place]), 2)


def _prompts_of_each(votes: Votes) -> ndarray:
    """On how many prompts each player met somebody."""
    met = np.zeros((len(votes.players), len(votes.prompts)), dtype=bool)
    met[votes.left, votes.prompt] = met[votes.right, votes.prompt] = True
    return met.sum(1)


def voters(battles: Sequence[Battle]) -> list[dict[str, Any]]:
    """Votes of each voter, and how often others who saw the same two models on a prompt agree.

    A tie agrees with a tie; nobody is compared with themselves. A voter whose battles nobody shares
    has no agreement.
    """
    seen: dict[tuple[str, frozenset[str]], list[tuple[str, str]]] = {}
    for battle in battles:
        chosen = {"a": battle.a, "b": battle.b}.get(battle.winner, "tie")
        key = (battle.prompt, frozenset((battle.a, battle.b)))
        seen.setdefault(key, []).append((battle.voter, chosen))
    agreed: dict[str, list[bool]] = {}
    for votes in seen.values():
        for voter, chosen in votes:
            others = [other == chosen for name, other in votes if name != voter]
            agreed.setdefault(voter, []).extend(others)
    counts = Counter(battle.voter for battle in battles)
    return [
        {
            "voter": voter,
            "votes": count,
            "agreement": round(float(np.mean(agreed[voter])), 4) if agreed[voter] else None,
            "compared": len(agreed[voter]),
        }
        for voter, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
