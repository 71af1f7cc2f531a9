"""Settings: what is accepted, what is refused, and that each refusal says what to do."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from burnish.config import (
    Config,
    ConfigError,
    apply_overrides,
    config_hash,
    dump_yaml,
    load,
    nearest,
    parse,
    parse_yaml,
)


class Grpo(Config):
    """One member of the union."""

    name: Literal["grpo"] = "grpo"
    clip_range: float = Field(default=1e-4, gt=0)
    mode: Literal["residual", "detached"] = "residual"


class Nft(Config):
    """The other member."""

    name: Literal["nft"] = "nft"
    beta: float = 0.1


class Optimizer(Config):
    """A section."""

    rate: float = 3e-4
    warmup: int = 5


class Sample(Config):
    """A config with every kind of field."""

    steps: int = 10
    seed: int | None = None
    out: Path | None = None
    is_fast: bool = False
    sizes: tuple[int, ...] = (1, 2)
    optimizer: Optimizer = Optimizer(rate=1e-3)
    algorithm: Annotated[Grpo | Nft, Field(discriminator="name")] = Grpo()
    rewards: dict[str, dict[str, float]] = Field(
        default_factory=lambda: {"general": {"alignment": 0.5, "aesthetic": 0.5}}
    )
    stages: list[Grpo] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "Sample":
        if self.is_fast and self.steps > 100:
            raise ValueError(f"need steps <= 100 with is_fast, got {self.steps}; lower one")
        return self


def message(data: dict, *overrides: str) -> str:
    """The message of the error that the data gives."""
    with pytest.raises(ConfigError) as caught:
        parse(Sample, data, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_values_reach_every_kind_of_field() -> None:
    """File and overrides together; exponents are numbers and lists are lists."""
    made = parse(
        Sample,
        {"steps": 3, "algorithm": {"name": "nft"}},
        ["algorithm.beta=5e-1", "sizes=[4, 5]", "out=/tmp/x", "seed=7", "is_fast=true"],
    )
    assert made.algorithm == Nft(beta=0.5)
    assert (made.steps, made.sizes, made.out, made.seed) == (3, (4, 5), Path("/tmp/x"), 7)
    assert made.is_fast


def test_an_override_keeps_what_the_defaults_say_beside_it() -> None:
    """Sections, mappings and lists are amended, not replaced."""
    made = parse(Sample, {}, ["optimizer.warmup=0", "rewards.general.alignment=1", "sizes.1=9"])
    assert made.optimizer == Optimizer(rate=1e-3, warmup=0)
    assert made.rewards == {"general": {"alignment": 1.0, "aesthetic": 0.5}}
    assert made.sizes == (1, 9)


def test_an_override_adds_a_key_to_a_mapping() -> None:
    """Keys inside mapping fields are the user's own."""
    made = parse(Sample, {}, ["rewards.portrait.identity=1.0"])
    assert made.rewards["portrait"] == {"identity": 1.0}
    assert "general" in made.rewards


@pytest.mark.parametrize("order", [1, -1])
def test_choosing_another_member_starts_its_section_afresh(order: int) -> None:
    """In either order on the command line, no key of the old member stays behind."""
    overrides = ["algorithm.name=nft", "algorithm.beta=0.7"][::order]
    made = parse(Sample, {"algorithm": {"name": "grpo", "clip_range": 0.2}}, overrides)
    assert made.algorithm == Nft(beta=0.7)


def test_choosing_the_same_member_keeps_its_section() -> None:
    """A repeated choice is no reset."""
    made = parse(
        Sample, {"algorithm": {"name": "grpo", "clip_range": 0.2}}, ["algorithm.name=grpo"]
    )
    assert made.algorithm == Grpo(clip_range=0.2)


def test_overrides_leave_the_data_alone() -> None:
    """The data given are not changed."""
    data = {"optimizer": {"rate": 1.0}}
    apply_overrides(Sample, data, ["optimizer.rate=2"])
    assert data == {"optimizer": {"rate": 1.0}}


@pytest.mark.parametrize(
    ("override", "given", "advice"),
    [
        ("algorithm.clip_rang=1", "`algorithm.clip_rang`", "`algorithm.clip_range`"),
        ("optimiser.rate=1", "`optimiser`", "`optimizer`"),
        ("clip_range=1", "`clip_range`", "`algorithm.clip_range`"),
        ("beta=1", "`beta`", "`algorithm.beta`"),
        ("algorithm.zzz=1", "`algorithm.zzz`", "name, clip_range, mode"),
        ("stages=[{mod: residual}]", "`stages.0.mod`", "`stages.0.mode`"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(override: str, given: str, advice: str) -> None:
    """With its full path, wherever it stands."""
    text = message({}, override)
    assert f"got {given}" in text
    assert advice in text.split(";")[1]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("algorithm.mode=residul", ("algorithm.mode", "'residul'", "did you mean residual?")),
        ("algorithm={name: grop}", ("algorithm.name", "'grop'", "did you mean grpo?")),
        ("algorithm={beta: 1}", ("algorithm.name", "got nothing", "grpo, nft")),
        ("algorithm.clip_range=-1", ("algorithm.clip_range", "greater than 0", "-1")),
        ("algorithm=7", ("algorithm", "a section of keys", "7")),
        ("steps=many", ("steps", "a valid integer", "'many'")),
        ("steps=1.5", ("steps", "integer", "1.5")),
        ("steps='5'", ("steps", "integer", "'5'")),
        ("steps=true", ("steps", "integer", "True")),
        ("is_fast=1", ("is_fast", "boolean", "1")),
        ("steps=1e999", ("steps", "integer")),
        ("optimizer.rate=1e999", ("optimizer.rate", "finite")),
        ("rewards.general.alignment=much", ("rewards.general.alignment", "'much'")),
        ("sizes=[1, x]", ("sizes.1", "'x'")),
        ("sizes.7=1", ("sizes.7", "below 2")),
        ("steps.x=3", ("steps.x", "`steps` is 10")),
        ("steps", ("key=value", "'steps'")),
        ("=3", ("key=value", "'=3'")),
        ("a..b=3", ("key=value", "'a..b=3'")),
        ("steps=[", ("steps", "valid YAML")),
    ],
)
def test_a_wrong_value_says_needed_given_and_what_to_do(
    override: str, parts: tuple[str, ...]
) -> None:
    """One line with the dotted path."""
    text = message({}, override)
    for part in parts:
        assert part in text
    assert ";" in text


def test_every_fault_has_a_line() -> None:
    """The message is the first and counts the others."""
    with pytest.raises(ConfigError) as caught:
        parse(Sample, {"steps": "x", "sizes": 3}, where="recipe.yaml")
    assert len(caught.value.problems) == 2
    assert "(and 1 more)" in str(caught.value)
    assert all(line.startswith("recipe.yaml: ") for line in caught.value.problems)


def test_a_rule_between_fields_speaks_for_itself() -> None:
    """The text of a validator is the message."""
    text = message({"is_fast": True, "steps": 101})
    assert text == "need steps <= 100 with is_fast, got 101; lower one"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("steps: 1\nsteps: 2\n", "line 2: need valid YAML, the key 'steps' stands twice"),
        ("steps: [1\nsizes: 2\n", "line 2"),
        ("- 1\n", "`key: value`"),
        ("out: !!python/object:os.system {}\n", "valid YAML"),
        ("a: &a [*a]\n", "valid YAML"),
        ("\x00", "valid YAML"),
    ],
)
def test_broken_yaml_is_one_line_with_its_place(text: str, part: str) -> None:
    """Doubled keys, open brackets, objects and loops are refused."""
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, where="x.yaml")
    assert part in str(caught.value)
    assert str(caught.value).startswith("x.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_follows_the_later_standard() -> None:
    """What version 1.1 misreads: exponents, words, octals, dates."""
    text = "a: 1e-4\nb: no\nc: 010\nd: 2026-01-01\ne: on\nf: true\ng: 1_0\nh:\n"
    assert parse_yaml(text, where="") == {
        "a": 1e-4, "b": "no", "c": 10, "d": "2026-01-01", "e": "on", "f": True, "g": "1_0",
        "h": None,
    }  # fmt: skip
    assert parse_yaml("", where="") == {}


def test_files(tmp_path: Path) -> None:
    """A file is read with its overrides; a missing one and a binary one are named."""
    path = tmp_path / "a.yaml"
    path.write_text("steps: 4\n")
    assert load(Sample, path, ["seed=1"]) == Sample(steps=4, seed=1)
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load(Sample, tmp_path / "none.yaml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="need a readable text file"):
        load(Sample, path)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    rewards=st.dictionaries(
        TEXTS | st.sampled_from(["1e-4", "no", "007", "null", "~", "1.", ".5", "true", "<<", "-"]),
        st.dictionaries(TEXTS, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        max_size=3,
    ),
    out=TEXTS | st.sampled_from(["1e-4", "12", "null", "a: b", "# x", "'", '"']),
    seed=st.none() | st.integers(-(2**60), 2**60),
    rate=st.floats(allow_nan=False, allow_infinity=False),
)
def test_what_is_dumped_reads_back_the_same(
    rewards: dict, out: str, seed: int | None, rate: float
) -> None:
    """For any text, number and key, with the same hash."""
    made = Sample(rewards=rewards, out=Path(out), seed=seed, optimizer=Optimizer(rate=rate))
    again = parse(Sample, parse_yaml(dump_yaml(made), where=""))
    assert again == made
    assert config_hash(again) == config_hash(made)


def test_the_hash_knows_every_value_and_no_order() -> None:
    """It is the same on every machine, so one value is written down here."""
    assert config_hash(Optimizer()) == config_hash(Optimizer(warmup=5, rate=0.0003))
    assert config_hash(Optimizer(warmup=6)) != config_hash(Optimizer())
    assert config_hash(Optimizer()).startswith("94027b70")
    one = Sample(rewards={"a": {}, "b": {}})
    assert config_hash(one) == config_hash(Sample(rewards={"b": {}, "a": {}}))


def test_a_config_is_frozen_and_keyword_only() -> None:
    """In Python too."""
    with pytest.raises(ValidationError, match="frozen"):
        Optimizer().rate = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Optimizer(1.0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Optimizer(speed=1.0)  # pyright: ignore[reportCallIssue]


def test_nearest() -> None:
    """Something like it, or nothing."""
    assert nearest("optimiser", ["algorithm", "optimizer"]) == "optimizer"
    assert nearest("zzz", ["algorithm", "optimizer"]) is None
    assert nearest("gpu", ["auto", "cpu", "cuda"]) is None


def test_no_torch_is_loaded() -> None:
    """So that help texts and mistakes come at once."""
    code = "import sys, burnish.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
