"""The arithmetic of plans: which parts meet, what devices share, what a shortage says."""

import json
from dataclasses import replace

import pytest

from burnish.config import ConfigError
from burnish.planning.plan import (
    FRAGMENTATION,
    GIBIBYTE,
    PHASES,
    PROCESS_BYTES,
    Part,
    Plan,
    Sharding,
    check,
    shown,
    table,
)

PLAN = Plan(
    stage="teacher",
    key="stages.teacher",
    device="cpu",
    parts=[
        Part(name="weights", num_bytes=8 * GIBIBYTE, is_sharded=True),
        Part(name="encoder", num_bytes=2 * GIBIBYTE),
        Part(name="drawing", num_bytes=6 * GIBIBYTE, during=("drawing",), advice="draw fewer"),
        Part(name="update", num_bytes=9 * GIBIBYTE, during=("update",), advice="train fewer"),
        Part(name="gradients", num_bytes=4 * GIBIBYTE, during=("update",), is_sharded=True),
    ],
    disk=[Part(name="checkpoints", num_bytes=GIBIBYTE)],
)


def test_what_never_meets_is_not_added() -> None:
    """The peak is that of the worst phase; all the rest of the parts wait for theirs."""
    assert PLAN.held("reading") == 10 * GIBIBYTE
    assert PLAN.held("drawing") == 16 * GIBIBYTE
    assert PLAN.held("update") == 23 * GIBIBYTE
    assert PLAN.peak == "update"
    assert PLAN.needed == round(FRAGMENTATION * 23 * GIBIBYTE) + PROCESS_BYTES["cpu"]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_devices_divide_what_is_sharded_and_nothing_else(count: int) -> None:
    """Rounded up, as every device must have its share."""
    spread = replace(PLAN, sharding=Sharding(count))
    for phase in PHASES:
        here = [part for part in PLAN.parts if phase in part.during]
        shared = sum(-(-part.num_bytes // count) for part in here if part.is_sharded)
        own = sum(part.num_bytes for part in here if not part.is_sharded)
        assert spread.held(phase) == shared + own


def test_a_shortage_names_the_largest_part_of_the_peak() -> None:
    """Not the largest of all, and what to change; nothing where all fits."""
    assert PLAN.shortage(PLAN.needed) is None
    said = PLAN.shortage(24 * GIBIBYTE)
    assert said is not None and "\n" not in said
    assert said.startswith("stages.teacher: need 26.05 GiB on the device, got 24.00 GiB")
    assert "update (9.00 GiB): train fewer" in said
    bare = replace(PLAN, parts=[replace(part, advice="") for part in PLAN.parts])
    assert "more devices" in (bare.shortage(0) or "")


def test_the_machine_beside_a_gpu_is_looked_at() -> None:
    """In its own worst phase: what is there only while models are read meets no teacher."""
    host = [
        Part(name="on its way", num_bytes=6 * GIBIBYTE, during=("loading",)),
        Part(name="teacher", num_bytes=4 * GIBIBYTE, during=("credit", "update")),
        Part(name="judge", num_bytes=GIBIBYTE),
    ]
    plan = replace(PLAN, device="cuda", host=host)
    assert plan.host_peak == "loading" and plan.beside("loading") == 7 * GIBIBYTE
    assert plan.beside("update") == 5 * GIBIBYTE and plan.beside("drawing") == GIBIBYTE
    check([plan], plan.needed, 7 * GIBIBYTE)
    with pytest.raises(ConfigError, match=r"need 7\.00 GiB of memory beside the GPU.*on its way"):
        check([plan], plan.needed, 6 * GIBIBYTE)
    words = table(plan, None)
    assert "7.00 GiB  at its peak, loading" in words and "loading, in RAM" in words
    assert plan.as_json(None)["host_needed"] == 7 * GIBIBYTE


def test_all_stages_are_looked_at() -> None:
    """Every one that is short has a line of its own; an unknown device is not refused."""
    check([PLAN], None)
    check([PLAN], 64 * GIBIBYTE)
    with pytest.raises(ConfigError, match="and 1 more") as caught:
        check([PLAN, replace(PLAN, stage="student")], GIBIBYTE)
    assert len(caught.value.problems) == 2


def test_a_table_has_every_part_and_json_every_byte() -> None:
    """Both tell the same."""
    spread = replace(PLAN, sharding=Sharding(4))
    words = table(spread, 24 * GIBIBYTE)
    for part in [*PLAN.parts, *PLAN.disk]:
        assert part.name in words
    assert "2.00 GiB  always" in words and "has 24.00 GiB" in words and "4 devices" in words
    told = json.loads(json.dumps(spread.as_json(24 * GIBIBYTE)))
    assert told["needed"] == spread.needed and told["held"]["update"] == spread.held("update")
    assert [part["num_bytes"] for part in told["parts"]] == [p.num_bytes for p in PLAN.parts]
    assert shown(told["available"]) == "24.00 GiB"
