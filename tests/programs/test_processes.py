"""A stage on several processes: real ones, started by torchrun, that talk over gloo."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests import sharded_teacher, sharded_weights
from tests.jobs import begin, distance, finish, run_together

from burnish import checkpoint, images, launcher, sharded_checkpoint
from burnish.config import ConfigError, parse
from burnish.launcher import JobError
from burnish.preflight import check_inputs
from burnish.prompts import write_prompts
from burnish.run_config import RunConfig
from burnish.shelves import policy_class
from burnish.tracking import Run, read_rows
from burnish.types import Prompt

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
RUNTIME = {"device": "cpu", "threads": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in ("qwen_image21", "stable_diffusion3", "flux2_klein"):
        found[family] = tmp_path_factory.mktemp(family)
        policy_class(family).tiny().save(found[family])
    return found


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["qwen_image21"]


def recipe(
    kind: str, model: Path, processes: int, *, policy: Any = None, sharding: str = "none"
) -> RunConfig:
    """A stage of three steps of five groups, which no two processes share evenly."""
    stage: dict[str, Any] = {
        "steps": 3,
        "save_every": 1,
        "prompts_per_step": 5,
        "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"], "limit": 10},
        "rollout": {"num_steps": 3, "group_size": 3, "window": 0, "keep": "none"},
        "algorithm": {"kind": kind},
        "optimizer": {"num_updates": 2, "micro_batch": 8, "ema_decay": 0.5},
        "rewards": {"truth": {"kind": "oracle", "floor": 0.01}},
    }
    if kind == "nft":
        # A frozen start is asked, too.
        stage["algorithm"]["kl_weight"] = 0.5
    if kind == "grpo":
        stage["rollout"] |= {"window": 1, "keep": "window"}
        # Needs the scores of all groups at once.
        stage["advantages"] = {"rescale_batch": True}
        stage["guard"] = {"judge": {"kind": "oracle"}, "every": 2, "num_prompts": 8}
    if kind == "distill":
        del stage["rewards"]
        stage["rollout"] |= {"guidance_scale": 1.0, "keep": 2, "group_size": 1}
        stage["algorithm"]["teachers"] = {"t2i": {"path": str(model), "guidance_scale": 2.0}}
        # Or the start would be what it ends with.
        stage["algorithm"]["fixed_states"] = None
    data = {
        "name": "several",
        "policy": {"path": str(model), "resolution": 64, **(policy or {})},
        "runtime": RUNTIME | {"processes": processes, "sharding": sharding},
        "stages": {"stage": stage},
        "judge": {"kind": "oracle"},
    }
    return parse(RunConfig, data)


def cut_off(config: RunConfig, folder: Path) -> None:
    """Kill one of the processes of a stage after its first step; all must end with it."""
    torchrun = begin(config, folder)
    stage = folder / "stages" / "stage"
    deadline = time.monotonic() + 300
    while not read_rows(stage / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert torchrun.wait(timeout=120) != 0
    assert not (stage / "DONE").exists() and len(read_rows(stage / "metrics.jsonl")) < 3


@pytest.mark.parametrize(("kind", "processes"), [("nft", 4), ("grpo", 2), ("distill", 2)])
def test_several_processes_train_what_one_trains(
    kind: str, processes: int, model: Path, tmp_path: Path
) -> None:
    """Also where one of fewer was killed before."""
    alone = finish(recipe(kind, model, 1), tmp_path / "alone")
    if kind == "nft":
        cut_off(recipe(kind, model, 2), tmp_path / "together")
    together = finish(recipe(kind, model, processes), tmp_path / "together")
    assert distance(alone / "model", together / "model") < TOLERANCE
    # The start is elsewhere: there is something to agree on.
    assert distance(alone / "model", model) > 10 * TOLERANCE
    for one, other in zip(
        *(read_rows(p / "metrics.jsonl") for p in (alone, together)), strict=True
    ):
        assert one.keys() == other.keys()
        for name in one.keys() - {name for name in one if name.startswith("time/")}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_spread_weights_are_trained_as_whole_ones(models: dict[str, Path], tmp_path: Path) -> None:
    """Another family and algorithm is spread below, where a process is killed."""
    kind, family = "grpo", "stable_diffusion3"
    model, policy = models[family], {"family": family}
    alone = finish(recipe(kind, model, 1, policy=policy), tmp_path / "alone")
    spread = recipe(kind, model, 2, policy=policy, sharding="full")
    together = finish(spread, tmp_path / "spread")
    assert distance(alone / "model", together / "model") < TOLERANCE
    assert distance(alone / "model", model) > 10 * TOLERANCE
    # A checkpoint is the same, however many processes wrote it.
    names = [p.name for p in sorted((alone / "checkpoints").glob("step-*"))]
    for group, tensors in checkpoint.load(alone / "checkpoints" / names[-1]).tensors.items():
        theirs = sharded_checkpoint.whole(together / "checkpoints" / names[-1])[group]
        assert tensors.keys() == theirs.keys()
        for name, tensor in tensors.items():
            assert float((tensor - theirs[name]).abs().max()) < TOLERANCE, name


def test_weights_that_are_gathered_rounded_stay_exact(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """In bfloat16 they learn what whole ones learn, and those of the best look, which are written,
    are as they are kept."""
    found = []
    for processes, sharding in ((1, "none"), (2, "full")):
        policy = {"family": "flux2_klein"}
        data = recipe("distill", models["flux2_klein"], processes, policy=policy).model_dump()
        data["runtime"] |= {"dtype": "bfloat16", "sharding": sharding}
        data["stages"]["stage"]["algorithm"]["fixed_states"] = {"every": 1}
        found.append(finish(parse(RunConfig, data), tmp_path / sharding))
    rows = [read_rows(stage / "metrics.jsonl")[0] for stage in found]
    for name in ("loss", "policy/grad_norm"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.005), name
    assert 0 < distance(*(stage / "model" for stage in found)) < 1e-3
    file = "model/transformer/diffusion_pytorch_model.safetensors"
    written = torch.cat([t.flatten() for t in load_file(found[1] / file).values()])
    assert float((written != written.bfloat16().float()).float().mean()) > 0.5


def test_spread_weights_are_trained_on_sources_of_many_sizes(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Which need calls of their own, and not as many of them on every process; what is drawn has
    two sizes, too."""
    model = models["flux2_klein"]
    policy = {"family": "flux2_klein", "aspects": ["1:1", "2:1"]}
    rng = np.random.default_rng(0)
    rows = []
    for row in range(5):
        picture = rng.integers(0, 255, (64, 64 + 32 * row, 3), dtype=np.uint8)
        source = images.encode_png(Image.fromarray(picture))
        rows.append(Prompt(id=f"own-{row}", text="make it blue", task="edit", sources=(source,)))
    write_prompts(tmp_path / "edits.jsonl", rows)
    found = []
    for name, processes, sharding in (("alone", 1, "none"), ("spread", 2, "full")):
        config = recipe("distill", model, processes, policy=policy, sharding=sharding)
        stage = config.stages["stage"].model_dump()
        stage["steps"] = 1
        stage["prompts"] = {"path": str(tmp_path / "edits.jsonl"), "tasks": ["edit"]}
        stage["algorithm"]["teachers"] = {"edit": stage["algorithm"]["teachers"]["t2i"]}
        config = parse(RunConfig, config.model_dump() | {"stages": {"stage": stage}})
        found.append(finish(config, tmp_path / name) / "model")
    assert distance(*found) < TOLERANCE < distance(found[0], model)


def test_a_teacher_is_spread_like_its_student(models: dict[str, Path], tmp_path: Path) -> None:
    """Each process reads and keeps its share, uneven as it may be; gathered, they are the teacher,
    also where the next one was read ahead. Compiled blocks change neither it nor a gradient."""
    model, answer = models["flux2_klein"], tmp_path / "answer.json"
    policy: Any = policy_class("flux2_klein").load(model, resolution=64)
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            parameter.mul_(1.5)
    policy.save(tmp_path / "teacher")
    run_together(sharded_teacher.__file__, 3, *map(str, (model, tmp_path / "teacher", answer)))
    told = json.loads(answer.read_text())
    kept = [own["kept"] for own in told["processes"]]
    assert sum(kept) == told["whole"] and max(kept) < 0.36 * told["whole"]
    assert len(set(kept)) > 1, "as these sizes are no multiples of three"
    assert max(own["gap"] for own in told["processes"]) < TOLERANCE
    assert max(own["learning"] for own in told["processes"]) < TOLERANCE


def test_shares_are_read_by_any_number_of_processes(tmp_path: Path) -> None:
    """By more, by fewer, by one; what cannot be written leaves all as it was, and a share that is
    damaged is told as of any checkpoint, by whoever looks at it to all."""
    folder = str(tmp_path)
    run_together(sharded_weights.__file__, 3, "save", folder, "3")
    run_together(sharded_weights.__file__, 2, "read", folder, "3")
    assert checkpoint.steps(tmp_path) == [2, 3]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    told, expected = sharded_checkpoint.whole(found.folder), sharded_weights.wanted(3)
    assert told.keys() == expected.keys()
    for group, own in expected.items():
        assert all(torch.equal(told[group][name], tensor) for name, tensor in own.items())
    file = sorted(found.folder.glob("shard-00002-*"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    run_together(sharded_weights.__file__, 2, "fail", folder, "2")
    with pytest.warns(checkpoint.CheckpointWarning, match="shard-00002-.* was changed"):
        older = checkpoint.latest(tmp_path)
    assert older is not None and older.step == 2


def test_what_shares_prefixes_is_not_spread(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"need policy\.share_prefix=false .* qwen_image21"):
        check_inputs(recipe("nft", model, 2, sharding="full"))
    whole = {"share_prefix": False}
    check_inputs(recipe("nft", model, 2, policy=whole, sharding="full"))
    config = recipe("grpo", model, 2, policy=whole, sharding="full")
    check_inputs(config)
    # Its null prompts are calls of their own, and each process must make as many.
    stage = config.stages["stage"].model_dump()
    stage["algorithm"]["guidance"] = "guided"
    both = parse(RunConfig, config.model_dump() | {"stages": {"stage": stage}})
    with pytest.raises(ConfigError, match="need an objective without the unconditional branch"):
        check_inputs(both)


def test_a_stage_whose_process_was_killed_goes_on_with_another_number_of_them(
    model: Path, tmp_path: Path
) -> None:
    """Spread over two it was, over three it is then."""
    policy, sharding = {"share_prefix": False}, "full"
    alone = finish(recipe("nft", model, 1, policy=policy), tmp_path / "alone")
    folder = tmp_path / "cut"
    cut_off(recipe("nft", model, 2, policy=policy, sharding=sharding), folder)
    resumed = finish(recipe("nft", model, 3, policy=policy, sharding=sharding), folder)
    assert [row["step"] for row in read_rows(resumed / "metrics.jsonl")] == [0, 1, 2]
    assert distance(alone / "model", resumed / "model") < TOLERANCE


def test_the_process_that_fails_tells_why(model: Path, tmp_path: Path) -> None:
    """Those that wait for it lose their connection, which is no news."""
    config = recipe("nft", model, 2)
    Run.create(tmp_path, config)
    foreign = tmp_path / "stages" / "stage" / "foreign.txt"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with pytest.raises(JobError, match=r"^train/stage: need an empty .* foreign.txt") as caught:
        launcher.run_jobs(config, tmp_path)
    assert caught.value.exit_code == 2


def test_every_process_needs_a_group(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"need a group for each of 6 processes, got .*=5"):
        recipe("nft", model, 6)
