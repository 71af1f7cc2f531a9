"""Battles from a file or by simulated raters, and the leaderboard that is made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.family_recipes import recipe

from burnish import cli, images, ratings
from burnish.arena.battles import Battle, read_battles, write_battles
from burnish.arena.board import rate, voters
from burnish.arena.contest import Contest, gather
from burnish.arena.raters import RatersConfig, scores, vote
from burnish.config import ConfigError
from burnish.rewards.base import Reward
from burnish.tracking import Run
from burnish.types import Failed, NotApplicable, Prompt, Score, Scored, ScoreRequest

STRENGTH = {"base": 0.0, "teacher": 0.5, "student": 0.8}
CATEGORIES = ("portrait", "typography")


def battles(count: int = 4000, prompts: int = 80, side: float = 0.3) -> list[Battle]:
    """Votes of a planted tournament."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        a, b = (str(name) for name in rng.choice(sorted(STRENGTH), 2, replace=False))
        prompt = int(rng.integers(prompts))
        chance = 1 / (1 + np.exp(STRENGTH[b] - STRENGTH[a] - side))
        winner = "a" if rng.random() < chance else "b"
        draw = rng.random()
        found.append(
            Battle(
                battle=f"b{number}", prompt=f"p{prompt}", category=CATEGORIES[prompt % 2], a=a, b=b,
                winner="both_bad" if draw < 0.05 else "tie" if draw < 0.15 else winner,
                voter=f"v{number % 5}",
            )
        )  # fmt: skip
    return found


def line(**changes: Any) -> str:
    row = {"battle": "b", "prompt": "p", "category": "c", "a": "x", "b": "y", "winner": "a",
           "voter": "v"}  # fmt: skip
    return json.dumps(
        {key: value for key, value in {**row, **changes}.items() if value is not None}
    )


def test_a_file_comes_back_and_foreign_keys_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "battles.jsonl"
    write_battles(path, battles(50))
    assert read_battles(path) == battles(50)
    path.write_text(line(language="en") + "\n\n")
    assert [battle.winner for battle in read_battles(path)] == ["a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line(winner="model_a"), "x.jsonl:1: need a winner of a, b, tie, both_bad, got 'model_a'"),
        (line(winner="ties"), "did you mean 'tie'?"),
        (line(voter=None), "x.jsonl:1: need the keys .*, got none named voter"),
        (line().replace('"x"', "null"), "need a name for a, got None"),
        (line(voter=" "), "need a name for voter, got ' '"),
        (line(voter="\x1b[2J"), "need printable characters for voter"),
        (line(b="x"), "need two different models, got 'x' twice"),
        (line() + "\n" + line(), "x.jsonl:2: need one vote of a voter on a battle, got a second"),
        ("not json", "x.jsonl:1: need one JSON object a line"),
        ("[" * 100_000, "x.jsonl:1: need one JSON object a line"),
        (line(voter="\ud800"), "x.jsonl:1: need one JSON object a line"),
        ("[1]", "need the keys"),
        ("", "need at least one battle"),
    ],
)
def test_a_line_that_is_no_battle_is_told_by_its_number(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_battles(path)


def test_planted_strengths_and_sides_come_back(tmp_path: Path) -> None:
    found = rate(battles())
    assert found["anchor"] == "base" and found["prompts"] == 80
    rows = {row["model"]: row for row in found["board"]["rows"]}
    assert list(rows) == ["student", "teacher", "base"]
    assert rows["base"]["elo"] == rows["base"]["low"] == rows["base"]["high"] == 1000
    for name in ("student", "teacher"):
        # Ties, 15 in 100 of all votes, pull the expected score towards a half.
        score = 0.85 / (1 + np.exp(-STRENGTH[name])) + 0.075
        planted = 1000 + ratings.ELO * np.log(score / (1 - score))
        assert rows[name]["elo"] == pytest.approx(planted, abs=20)
        assert 1000 < rows[name]["low"] < rows[name]["elo"] < rows[name]["high"]
    assert 20 < found["board"]["left_side"] < 70
    assert found["ties"] == pytest.approx(0.1, abs=0.02)
    assert found["both_bad"] == pytest.approx(0.05, abs=0.01)
    assert set(found["categories"]) == set(CATEGORIES)
    matrix = np.array(found["board"]["matrix"], dtype=float)
    np.testing.assert_allclose(matrix + matrix.T, np.where(np.eye(3), np.nan, 1.0), atol=2e-4)
    assert matrix[0, 2] > 0.55


def test_the_anchor_only_moves_the_scale() -> None:
    ours, theirs = (rate(battles(), anchor=name)["board"]["rows"] for name in (None, "student"))
    shifts = [a["elo"] - b["elo"] for a, b in zip(ours, theirs, strict=True)]
    assert np.ptp(shifts) < 0.05
    with pytest.raises(ConfigError, match="did you mean 'student'"):
        rate(battles(), anchor="studnet")


def test_models_that_never_met_have_no_common_scale() -> None:
    apart = [b for b in battles() if {b.a, b.b} == {"base", "teacher"}]
    other = [Battle(battle="z", prompt="p", category="c", a="x", b="y", winner="a", voter="v")]
    with pytest.raises(
        ConfigError, match="got 2 sets without a battle between them: base, teacher"
    ):
        rate([*apart, *other])


def test_a_category_without_the_anchor_and_few_prompts_are_told() -> None:
    extra = Battle(
        battle="z", prompt="q", category="new", a="student", b="teacher", winner="a", voter="v"
    )
    found = rate([*battles(400), extra])
    assert found["categories"]["new"]["rows"] == []
    few = rate([b for b in battles() if b.prompt in ("p1", "p2")])
    assert few["board"]["rows"][0]["low"] is None and "fewer than 10" in few["board"]["reason"]


def test_a_model_that_met_on_few_prompts_has_no_interval_and_the_others_have() -> None:
    new = [
        Battle(battle=f"n{n}", prompt=f"p{n}", category=CATEGORIES[0], a="new", b="base",
               winner="tie", voter="v")
        for n in range(3)
    ]  # fmt: skip
    found = rate([*battles(), *new])["board"]
    rows = {row["model"]: row for row in found["rows"]}
    assert rows["new"]["low"] is rows["new"]["high"] is None
    assert rows["student"]["low"] < rows["student"]["high"]
    assert found["reason"] == "fewer than 10 prompts of new: no intervals there"


def test_an_anchor_that_met_on_few_prompts_leaves_nobody_an_interval() -> None:
    """All intervals are those of a difference to it."""
    apart = [battle for battle in battles() if "base" not in (battle.a, battle.b)]
    few = [b for b in battles() if "base" in (b.a, b.b) and b.prompt in ("p1", "p2")]
    found = rate([*apart, *few])
    rows = found["board"]["rows"]
    assert {row["low"] for row in rows} == {row["high"] for row in rows} == {None}
    assert found["board"]["reason"] == "fewer than 10 prompts of the anchor, base: no intervals"
    other = rate([*apart, *few], anchor="student")["board"]["rows"]
    assert {row["model"] for row in other if row["low"] is None} == {"base"}


def test_agreement_counts_others_on_the_same_pictures() -> None:
    def seen(voter: str, a: str, b: str, winner: Any) -> Battle:
        return Battle(battle=voter, prompt="p", category="c", a=a, b=b, winner=winner, voter=voter)

    found = voters(
        [seen("one", "x", "y", "a"), seen("two", "y", "x", "b"), seen("three", "x", "y", "tie"),
         seen("alone", "x", "z", "a")]
    )  # fmt: skip
    agreement = {row["voter"]: row["agreement"] for row in found}
    # The second chose the same picture on the other side.
    assert agreement == {"one": 0.5, "two": 0.5, "three": 0.0, "alone": None}


# --- Contests and simulated raters -----------------------------------------------------------


PROMPTS = [Prompt(id=f"p{n}", text="x", category=CATEGORIES[n % 2]) for n in range(30)]


def write_pictures(folder: Path, count: int = 30, side: int = 32) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        picture = images.to_pil(torch.full((3, side, side), number / 60))
        (folder / f"p{number}.png").write_bytes(images.encode_png(picture))
    return folder


def test_what_one_has_drawn_all_must_have_drawn(tmp_path: Path) -> None:
    places = {name: write_pictures(tmp_path / name, n) for name, n in (("x", 30), ("y", 20))}
    with pytest.raises(ConfigError, match="y lacks 10 of 30, such as p20; draw them"):
        gather(places, PROMPTS)
    # What nobody has drawn is not asked for.
    contest = gather({"y": places["y"], "w": write_pictures(tmp_path / "w", 20)}, PROMPTS)
    assert [prompt.id for prompt in contest.prompts] == [f"p{n}" for n in range(20)]
    before = contest.digest()
    (tmp_path / "w" / "p3.png").write_bytes((tmp_path / "w" / "p4.png").read_bytes())
    assert contest.digest() != before
    del places["y"]
    places["z"] = write_pictures(tmp_path / "z", 30, side=16)
    with pytest.raises(ConfigError, match="need pictures of one size, got x 32 x 32, z 16 x 16"):
        gather(places, PROMPTS)
    with pytest.raises(ConfigError, match=r"need pictures named after prompts, such as p0\.webp"):
        gather({"x": places["x"], "y": tmp_path}, PROMPTS)
    with pytest.raises(ConfigError, match="need two contestants at least"):
        gather({"x": places["x"]}, PROMPTS)
    with pytest.raises(ConfigError, match="need a folder of pictures"):
        gather({"x": places["x"], "y": tmp_path / "nowhere"}, PROMPTS)


def contest() -> Contest:
    names = ("base", "student", "teacher")
    return Contest(
        prompts=tuple(PROMPTS), pictures={n: {p.id: Path(p.id) for p in PROMPTS} for n in names}
    )


def test_every_pair_meets_once_on_every_prompt_and_sides_are_mixed() -> None:
    meetings = list(contest().pairs(0))
    assert len({(p.id, frozenset((a, b))) for p, a, b in meetings}) == len(meetings) == 90
    assert 25 < sum(a < b for _, a, b in meetings) < 65
    assert list(contest().pairs(0)) == meetings != list(contest().pairs(1))
    assert len(list(contest().pairs(0, per_prompt=2))) == 60


def test_simulated_raters_prefer_the_higher_score_and_say_who_they_are() -> None:
    seen = {(name, p.id): STRENGTH[name] for name in STRENGTH for p in PROMPTS}
    found = vote(contest(), seen, RatersConfig(count=2), crowd="oracle")
    assert len(found) == 180 and {b.voter for b in found} == {
        "simulated:oracle-0", "simulated:oracle-1",
    }  # fmt: skip
    assert all(STRENGTH[{"a": b.a, "b": b.b}[b.winner]] == max(STRENGTH[b.a], STRENGTH[b.b])
               for b in found)  # fmt: skip
    ties = vote(contest(), seen, RatersConfig(count=1, margin=0.4), crowd="oracle")
    assert {b.winner for b in ties if {b.a, b.b} == {"teacher", "student"}} == {"tie"}
    bad = vote(contest(), seen, RatersConfig(count=1, bad=0.6), crowd="oracle")
    assert {b.winner for b in bad if "student" not in (b.a, b.b)} == {"both_bad"}
    noisy = vote(contest(), seen, RatersConfig(count=8, noise=2.0), crowd="oracle")
    assert 0.5 < rate(noisy)["board"]["rows"][0]["score"] < 0.7
    # On a prompt of which the reward has nothing to say nobody meets.
    rest = {key: value for key, value in seen.items() if key[1] != "p3"}
    assert len(vote(contest(), rest, RatersConfig(count=1), crowd="oracle")) == 87
    # Nobody could read the page of an arena without a vote.
    with pytest.raises(ConfigError, match="need scores of two pictures of a prompt, got none"):
        vote(contest(), {}, RatersConfig(count=1), crowd="oracle")


def test_a_contestant_whose_pictures_cannot_be_scored_is_told_and_not_rated_by_the_rest() -> None:
    """A few of very many are left out; what is missing of one alone would flatter it."""
    prompts = tuple(Prompt(id=f"p{n}", text="x") for n in range(200))
    names = ("base", "broken")
    own = Contest(prompts=prompts, pictures={n: {p.id: Path(p.id) for p in prompts} for n in names})
    seen: dict[tuple[str, str], float | Failed] = {(n, p.id): 0.5 for n in names for p in prompts}
    seen |= {("broken", f"p{n}"): Failed(reason=f"no face in {n}") for n in range(2)}
    assert len(vote(own, seen, RatersConfig(count=1), crowd="face")) == 198
    seen["broken", "p2"] = Failed(reason="no face in 2")
    words = r"need scores of 99% of the 200 pictures of broken, got 197 .*face \(no face in 0\)"
    with pytest.raises(ConfigError, match=words):
        vote(own, seen, RatersConfig(count=1), crowd="face")
    # Of few pictures one may be lost.
    few = Contest(prompts=prompts[:20], pictures=own.pictures)
    lost = {
        key: value
        for key, value in seen.items()
        if key[1] in {"p1", *(f"p{n}" for n in range(5, 20))}
    }
    assert len(vote(few, lost, RatersConfig(count=1), crowd="face")) == 15


class _Mute(Reward):
    """Has no say on one prompt, and fails on another."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        odd: dict[str, Score] = {"p0": NotApplicable(reason="x"), "p1": Failed(reason="lost")}
        return [odd.get(one.prompt.id, Scored(value=1.0)) for one in requests]


def test_scores_keep_why_a_picture_has_none(tmp_path: Path) -> None:
    places = {name: write_pictures(tmp_path / name, 3) for name in ("x", "y")}
    found = scores(gather(places, PROMPTS), _Mute())
    assert found["x", "p1"] == Failed(reason="lost") and found["y", "p2"] == 1.0
    assert ("x", "p0") not in found and len(found) == 4


def test_the_commands_rate_a_file_and_write_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "battles.jsonl"
    write_battles(path, [*battles(300), *vote_of("<b>bold</b>")])
    assert cli.main(["arena", "rate", str(path), "--resamples", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["anchor"] == "base" and len(found["board"]["rows"]) == 4
    page = (tmp_path / "battles.html").read_text()
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page and "<script" not in page
    assert "4 models, 301 votes on " in page
    # Neither a mark of the encoding nor a page in the place of the votes harms them.
    before = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + before)
    for words in (["--out", str(path)], ["--resamples", "200"]):
        code = cli.main(["arena", "rate", str(path), *words])
        assert code == (2 if "--out" in words else 0)
        assert path.read_bytes() == b"\xef\xbb\xbf" + before
    assert "need a page beside the votes" in capsys.readouterr().err
    assert cli.main(["arena", "rate", str(path), "--anchor", "bse"]) == 2
    assert "did you mean 'base'" in capsys.readouterr().err


def vote_of(name: str) -> list[Battle]:
    return [
        Battle(
            battle="z", prompt="p1", category="portrait", a=name, b="base", winner="a", voter="v"
        )
    ]


TEACHERS = ("base-unguided", "grpo_teacher", "student")


def _vote_in_a_run(folder: Path, prompts: Path, names: list[str]) -> None:
    """Without the set being named: the run knows it, and no other has prompts of these names."""
    rows = [json.loads(row) for row in prompts.open()]
    own = "".join(json.dumps(row | {"id": f"own-{row['id']}"}) + "\n" for row in rows)
    (folder / "own.jsonl").write_text(own)
    plan = {
        "prompts": str(folder / "own.jsonl"),
        "knowledge": None,
        "num_prompts": 2,
        "guidance_scale": 2,
    }
    Run.create(folder / "run", recipe("qwen_image21", folder / "model", evaluation=plan))
    for model in ("base", *TEACHERS):
        place = folder / "run" / "evaluation" / model / "pictures"
        place.mkdir(parents=True)
        for name in names:
            (place / f"own-{name}.png").write_bytes((folder / "dark" / f"{name}.png").read_bytes())
    out = str(folder / "run.jsonl")
    assert cli.main(["arena", "vote", str(folder / "run"), "--out", out]) == 0


def test_a_reward_votes_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    shipped = Path(cli.__file__).parents[1] / "miniature" / "prompts" / "held-out.jsonl"
    prompts.write_text("".join(shipped.open().readlines()[:12]))
    names = [json.loads(row)["id"] for row in prompts.open()]
    for folder, level in (("dark", 0.1), ("light", 0.9)):
        (tmp_path / folder).mkdir()
        for name in names:
            picture = images.to_pil(torch.full((3, 64, 64), level))
            (tmp_path / folder / f"{name}.png").write_bytes(images.encode_png(picture))
    out = tmp_path / "battles.jsonl"
    places = [f"{name}={tmp_path / name}" for name in ("dark", "light")]
    command = ["arena", "vote", *places, "--prompts", str(prompts), "--out", str(out)]
    assert cli.main([*command, "--raters", "{count: 2, noise: 0.1}"]) == 0
    said = capsys.readouterr().out
    assert "24 votes on 12 prompts between dark, light" in said
    assert "12 prompts: two models must differ by" in said
    assert {b.voter for b in read_battles(out)} == {"simulated:oracle-0", "simulated:oracle-1"}
    _vote_in_a_run(tmp_path, prompts, names)
    assert (
        f"votes on 12 prompts between base{', '.join(['', *TEACHERS])}" in capsys.readouterr().out
    )
    assert cli.main(command) == 2
    assert "need a file that does not exist yet" in capsys.readouterr().err
    assert cli.main(["arena", "vote", *[f"same={tmp_path / n}" for n in ("dark", "light")],
                     "--out", str(tmp_path / "same.jsonl")]) == 2  # fmt: skip
    assert "got two for 'same'" in capsys.readouterr().err
    other = [*command[:-1], str(tmp_path / "more.jsonl"), "--raters", "{cuont: 2}"]
    assert cli.main(other) == 2
    assert "did you mean `raters.count`" in capsys.readouterr().err
