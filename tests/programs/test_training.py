"""The loop: exact resume after a kill, one loop for all algorithms, self-checks, refusals."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor

from burnish import checkpoint, images, runtime, training
from burnish.config import ConfigError, parse
from burnish.curation import read_profile
from burnish.jobs import run_job
from burnish.optimization import OptimizerConfig, State
from burnish.policies.base import Policy
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import PromptsConfig, read_prompts
from burnish.residency import Teachers
from burnish.rewards.base import RewardWarning
from burnish.rewards.oracle import Oracle
from burnish.run_config import RunConfig
from burnish.run_folder import spent
from burnish.tracking import Run, RunError, read_rows
from burnish.training import SelfCheckError, StageConfig, is_unscored, train
from burnish.types import Failed, Prompt, Score, ScoreRequest

REWARDS = {
    "content": {"kind": "oracle", "dimension": "composite"},
    "quality": {"kind": "oracle", "dimension": "quality"},
}

# Stages of a few steps teach nobody anything.
pytestmark = pytest.mark.filterwarnings("ignore::burnish.fixed_states.FixedStatesWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    QwenImage21Policy.tiny().save(folder)
    return folder


def settings(kind: str, model: Path, **changes: Any) -> dict[str, Any]:
    """A stage of a few seconds."""
    data: dict[str, Any] = {
        "steps": 3,
        "save_every": 1,
        "prompts_per_step": 2,
        "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"], "limit": 8},
        "rollout": {"num_steps": 3, "group_size": 4, "window": 0, "keep": "none"},
        "algorithm": {"kind": kind},
        "optimizer": {"num_updates": 2, "micro_batch": 16, "ema_decay": 0.5},
    }
    if kind == "nft":
        data["optimizer"]["draw_average"] = True
    if kind == "grpo":
        data["rollout"] |= {"num_steps": 4, "window": 1, "keep": "window"}
        data["optimizer"]["num_updates"] = 1
    if kind == "distill":
        data["rollout"] |= {"guidance_scale": 1.0, "keep": 2}
        data["algorithm"]["teachers"] = {"t2i": {"path": str(model), "guidance_scale": 2.0}}
    else:
        data["rewards"] = REWARDS
    return data | changes


def start(folder: Path, model: Path, data: dict[str, Any]) -> tuple[Run, Policy[Any, Any]]:
    config = parse(StageConfig, data)
    run = Run.create(folder, config)
    policy = QwenImage21Policy.load(model, resolution=64)
    train(config, lambda: policy, run, runtime.start(), seed=0, label="test")
    return run, policy


def test_gradients_that_are_not_finite_end_a_stage_with_a_way_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    data = settings("grpo", model)
    advice = (
        r"need a finite gradient, got nan at step 0; lower optimizer\.learning_rate and begin in"
    )
    with pytest.raises(RunError, match=advice):
        start(tmp_path / "first", model, data)
    slower = data | {"optimizer": {**data["optimizer"], "learning_rate": 1e-9}}
    monkeypatch.undo()
    with pytest.raises(RunError, match="belongs to another run"):
        start(tmp_path / "first", model, slower)
    start(tmp_path / "second", model, slower)


@pytest.mark.parametrize("kind", ["nft", "grpo", "distill"])
def test_one_loop_runs_every_algorithm_and_leaves_a_pipeline(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "distill":
        # Nobody looks at its pictures.
        monkeypatch.setattr(QwenImage21Policy, "decode", None)
    run, policy = start(tmp_path, model, settings(kind, model))
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    fresh = QwenImage21Policy.load(tmp_path / "model", resolution=64)
    for name, tensor in fresh.transformer.state_dict().items():
        assert torch.equal(tensor, policy.transformer.state_dict()[name])


@pytest.mark.parametrize(
    ("kind", "evaluations"),
    [
        # 8 pictures of 3 guided steps; 2 of 4 levels' old pair and 3 times the conditional one.
        ("nft", 8 * 3 * 2 + 8 * 4 * (1 + 3)),
        # 8 pictures of 4 guided steps, one trained; the first step replays it.
        ("grpo", 8 * 4 * 2 + 8 * (1 + 3)),
    ],
)
def test_network_evaluations_are_counted(
    kind: str, evaluations: int, model: Path, tmp_path: Path
) -> None:
    run, _ = start(tmp_path, model, settings(kind, model, steps=1))
    assert run.metrics()[0]["data/evaluations"] == evaluations


def test_a_stage_whose_rewards_are_gone_stops_and_goes_on_before_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the last step has no scores it ends, and that is told; a few failures are none."""
    say, asked, gone_from = Oracle.score, itertools.count(), 2
    gone = Failed(reason="the server is gone")

    def score(self: Oracle, requests: Sequence[ScoreRequest]) -> list[Score]:
        # A step asks both rewards once.
        step = next(asked) // len(REWARDS)
        found = [gone] * len(requests) if step >= gone_from else say(self, requests)
        return [gone, *found[1:]] if step == 0 else found

    def steps(name: str) -> list[bool]:
        return [is_unscored(row) for row in read_rows(tmp_path / name / "metrics.jsonl")]

    data = settings("nft", model, steps=6, save_every=2)
    with monkeypatch.context() as patch, pytest.warns(RewardWarning, match="is gone"):
        patch.setattr(Oracle, "score", score)
        with pytest.raises(RunError, match="every picture of 3 steps in a row, to step 4; see"):
            start(tmp_path / "cut", model, data)
        assert steps("cut") == [False, False, True, True, True]
        asked = itertools.count()
        start(tmp_path / "short", model, data | {"steps": 3})
        assert steps("short") == [False, False, True]
        # As if they had never been gone.
        asked, gone_from = itertools.count(), 6
        start(tmp_path / "whole", model, data)
    start(tmp_path / "cut", model, data)
    whole, cut = (
        load_file(tmp_path / name / "model/transformer/diffusion_pytorch_model.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_a_group_is_kept_now_and_then_with_what_was_said_of_it(model: Path, tmp_path: Path) -> None:
    start(tmp_path / "some", model, settings("nft", model, samples_every=2))
    folders = sorted((tmp_path / "some" / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-000000", "step-000002"]
    for folder in folders:
        told = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        assert len({row["prompt"] for row in told}) == 1 and len(told) == 4
        assert all(set(row["scores"]) == set(REWARDS) for row in told)
        assert all(0 <= row["scores"]["content"]["value"] <= 5 for row in told)
        sizes = {images.read(file).size for file in folder.glob("*.webp")}
        assert len(list(folder.glob("*.webp"))) == 4 and sizes == {(64, 64)}
    start(tmp_path / "none", model, settings("nft", model, samples_every=0))
    assert not (tmp_path / "none" / "samples").exists()


def test_the_guard_looks_at_what_the_stage_ends_with(model: Path, tmp_path: Path) -> None:
    look = {"judge": {"kind": "oracle"}, "every": 2, "num_prompts": 8, "action": "warn"}
    run, _ = start(tmp_path, model, settings("nft", model, guard=look))
    rows = (tmp_path / "guard" / "looks.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 2, 3]
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]


def test_prompts_are_curated_before_the_stage_that_asks_for_it(model: Path, tmp_path: Path) -> None:
    stage = settings("nft", model, steps=1)
    hard = stage | {"curation": {"chance": None, "band": [0.0, 0.5]}}
    config = parse(
        RunConfig,
        {
            "name": "curated",
            "policy": {"path": str(model), "resolution": 64},
            "stages": {"all": stage, "hard": hard, "easy": {**hard, "curation": {"top": 0.5}}},
            "judge": {"kind": "oracle"},
        },
    )
    jobs = config.jobs()
    assert list(jobs)[:4] == ["train/all", "curate/hard", "train/hard", "train/easy"]
    assert jobs["train/hard"] == jobs["train/easy"] == ("curate/hard",)
    rt = runtime.start()
    for job in ("curate/hard", "train/hard"):
        run_job(config, tmp_path, job, rt)
    kept = read_prompts(tmp_path / "curation" / "hard" / "kept.jsonl")
    rows = read_profile(tmp_path / "curation" / "hard", stage_prompts(stage))
    means = sorted(row["mean"] for row in rows)
    assert len(rows) == 8 and len(kept) == 4
    assert {p.id for p in kept} == {row["prompt"] for row in rows if row["mean"] <= means[3]}
    cost = spent(config, tmp_path, "hard")
    assert (cost["images"], cost["curated"]) == (8, 32)
    assert spent(config, tmp_path, "all")["curated"] == 0


def stage_prompts(stage: dict[str, Any]) -> Sequence[Prompt]:
    return parse(PromptsConfig, stage["prompts"]).read()


_CHILD = """
import sys, json
from pathlib import Path
from tests.programs.test_training import start
start(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
"""


@pytest.mark.parametrize("kind", ["grpo", "distill"])
def test_a_stage_may_train_a_lora_that_plain_diffusers_reads(
    kind: str, model: Path, tmp_path: Path
) -> None:
    data = settings(kind, model, lora={"rank": 2})
    data["optimizer"] |= {"learning_rate": 0.01, "ema_decay": 0.0}
    run, policy = start(tmp_path / "whole", model, data)
    trained = QwenImage21Policy.load(run.folder / "model", resolution=64)
    base = QwenImage21Policy.load(model, resolution=64)
    prompt = stage_prompts(data)[0]
    noise = policy.noise([torch.Generator().manual_seed(0)])
    drawn = {}
    for name, own in (("base", base), ("trained", trained)):
        drawn[name] = own.pipeline_latents(prompt, noise, num_steps=2, guidance_scale=1.0)
    base.pipeline.load_lora_weights(run.folder / "lora")
    drawn["lora"] = base.pipeline_latents(prompt, noise, num_steps=2, guidance_scale=1.0)
    torch.testing.assert_close(drawn["lora"], drawn["trained"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn["base"], drawn["trained"], atol=1e-3)
    with pytest.raises(
        ConfigError, match=r"lora\.targets: need names of linear modules, got elsewhere"
    ):
        start(tmp_path / "none", model, data | {"lora": {"targets": ["elsewhere"]}})


def as_parquet(prompts: dict[str, Any], place: Path) -> dict[str, Any]:
    """The same prompts as columns of other names."""
    rows = [
        {"key": p.id, "caption": p.text, "kind": p.category, "facts": json.dumps(p.facts)}
        for p in parse(PromptsConfig, prompts).read()
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), place / "theirs.parquet", row_group_size=3)
    columns = {"id": "key", "text": "caption", "category": "kind", "facts": "facts"}
    return prompts | {"path": str(place / "theirs.parquet"), "columns": columns}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("nft", {}), ("grpo", {}), ("distill", {}), ("nft", {"lora": {"rank": 2}}), ("nft", None)],
)
def test_killed_and_resumed_is_bit_equal_to_uninterrupted(
    kind: str, changes: dict[str, Any] | None, model: Path, tmp_path: Path
) -> None:
    """And to one that reads its prompts in another form."""
    data = settings(kind, model, steps=5, **(changes or {}))
    whole, _ = start(tmp_path / "whole", model, data)
    if changes is None:
        data["prompts"] = as_parquet(data["prompts"], tmp_path)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "cut"), str(model), json.dumps(data)]
    paths = os.pathsep.join([str(root), str(root / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, cwd=root, env=environment)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(tmp_path / "cut" / "checkpoints"):
        assert child.poll() is None and time.monotonic() < deadline, "the child should be training"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    cut, _ = start(tmp_path / "cut", model, data)
    assert (cut.folder / "metrics.jsonl").read_bytes() == (
        whole.folder / "metrics.jsonl"
    ).read_bytes()
    name = "model/transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(cut.folder / name), load_file(whole.folder / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", ["grpo", "distill"])
def test_cut_off_between_a_look_and_its_step_and_resumed_logs_the_look(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard's and a student's, both with a checkpoint at the step of the look."""
    data = settings(kind, model)
    look = {"every": 2, "num_prompts": 8}
    if kind == "distill":
        data["algorithm"]["fixed_states"] = look
    else:
        data["guard"] = look | {"judge": {"kind": "oracle"}, "num_steps": 1, "action": "warn"}
    whole, _ = start(tmp_path / "whole", model, data)
    step = training._step

    def cut_off(*args: Any) -> dict[str, float]:
        if args[4].step == 2:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_step", cut_off)
        start(tmp_path / "cut", model, data)
    cut, _ = start(tmp_path / "cut", model, data)
    rows = (whole.folder / "metrics.jsonl").read_bytes()
    assert (cut.folder / "metrics.jsonl").read_bytes() == rows
    seen = {"grpo": "guard/held_out", "distill": "fixed_states/gap"}[kind]
    assert [seen in row for row in whole.metrics()] == [True, False, True]


def test_cut_off_in_the_middle_of_a_teacher_switch_and_resumed_is_bit_equal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = QwenImage21Policy.load(model, resolution=64)
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(1.01)
    other.save(tmp_path / "other")
    data = settings("distill", model, steps=4)
    data["prompts"] |= {"tasks": ["t2i", "edit"]}
    paths = {"t2i": model, "edit": tmp_path / "other"}
    data["algorithm"]["teachers"] = {
        task: {"path": str(path), "guidance_scale": 2.0} for task, path in paths.items()
    }
    whole, _ = start(tmp_path / "whole", model, data)
    switches, reading = [], Teachers._reading

    def cut_off(self: Teachers, label: str) -> Callable[[str], Tensor]:
        weight = reading(self, label)
        switches.append(label)
        if len(switches) < 5:
            return weight
        # Some of the next teacher is there, the rest is still the one before.
        name, parameter = next(iter(self._resident.transformer.named_parameters()))
        parameter.data.copy_(weight(name))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Teachers, "_reading", cut_off)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "cut", model, data)
    # Both to fix the states of the looks, then one step each, then this one.
    assert switches == ["edit", "t2i", "edit", "t2i", "edit"]
    cut, _ = start(tmp_path / "cut", model, data)
    assert cut.metrics() == whole.metrics() and len(whole.metrics()) == 4
    name = "model/transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(cut.folder / name), load_file(whole.folder / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_average_is_lent_for_drawing_and_the_own_weights_come_back(
    model: Path, tmp_path: Path
) -> None:
    policy = QwenImage21Policy.load(model, resolution=64)
    state = State.start(policy, OptimizerConfig(ema_decay=0.5))
    ((_, weight), *_) = policy.trainable()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    own = weight.detach().clone()
    with state.averaged():
        assert torch.equal(weight, before)
    assert torch.equal(weight, own) and torch.equal(state.average[0], before)
    with state.averaged(False):
        assert torch.equal(weight, own)
    state.finish()
    assert torch.equal(weight, before)


def test_the_old_velocities_are_those_of_the_average_that_drew(model: Path, tmp_path: Path) -> None:
    """At the second step the policy has moved away from its average, so the change is not 0."""
    data = settings("nft", model, steps=2)
    data["optimizer"] |= {"num_updates": 1, "ema_decay": 0.9}
    rows = start(tmp_path / "average", model, data)[0].metrics()
    data["optimizer"]["draw_average"] = False
    plain = start(tmp_path / "plain", model, data)[0].metrics()
    assert rows[0]["policy/change"] == plain[0]["policy/change"]
    assert rows[1]["policy/change"] > 10 * plain[1]["policy/change"]


def test_errors_of_clean_latents_are_another_loss_on_the_same_samples(
    model: Path, tmp_path: Path
) -> None:
    found = {}
    for error in ("velocity", "clean"):
        data = settings("nft", model, steps=1, algorithm={"kind": "nft", "error": error})
        (found[error],) = start(tmp_path / error, model, data)[0].metrics()
    assert found["clean"]["reward/mean"] == found["velocity"]["reward/mean"]
    assert found["clean"]["loss"] != found["velocity"]["loss"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    model: Path, tmp_path: Path
) -> None:
    data = settings("nft", model)
    run, _ = start(tmp_path, model, data)
    before = (run.folder / "metrics.jsonl").read_bytes()
    newest = run.checkpoints / "step-000003" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7] + b"garbage")
    with pytest.warns(
        checkpoint.CheckpointWarning, match="falling back to the checkpoint of step 2"
    ):
        start(tmp_path, model, data)
    assert (run.folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("grpo", {"rollout": {"window": 0}}, "need a stochastic window"),
        ("nft", {"rollout": {"window": 2}}, "need samples of the ODE"),
        (
            "distill",
            {"rollout": {"guidance_scale": 3.0, "window": 0, "keep": 2}},
            "unguided ODE path",
        ),
        (
            "distill",
            {"rollout": {"guidance_scale": 1.0, "window": 0, "keep": "none"}},
            "need kept states",
        ),
        ("nft", {"rewards": {}}, "need at least one reward"),
        (
            "grpo",
            {"algorithm": {"kind": "grpo", "clip_range": 1.0}},
            r"algorithm\.\S*clip_range: need less than 1",
        ),
        ("nft", {"rollout": {"window": 0, "group_size": 1}}, "need group_size of at least 2"),
        ("nft", {"prompts_per_stp": 3}, "prompts_per_step"),
        (
            "nft",
            {
                "rewards": {
                    name: {**reward, "weights": {"default": 0.6}}
                    for name, reward in REWARDS.items()
                }
            },
            "'default' that sum to 1 for task t2i, got content 0.6, quality 0.6",
        ),
        (
            "nft",
            {
                "rewards": {
                    "content": {**REWARDS["content"], "weights": {"portrait": 1.0}},
                    "quality": {**REWARDS["quality"], "weights": {"general": 1.0}},
                    "other": {**REWARDS["quality"], "weights": {"general": 0.5}},
                }
            },
            "'general' that sum to 1 for task t2i, got content 0, quality 1, other 0.5",
        ),
        (
            "grpo",
            {"rollout": {"num_steps": 4, "window": 1, "keep": "window", "kernel": "flow_sde"}},
            "need a window after the first step for flow_sde",
        ),
        (
            "grpo",
            {"rollout": {"num_steps": 4, "window": 2, "keep": "window", "window_range": [2, 4]}},
            "ends before the last of 4 steps, got 2 to 4",
        ),
        ("nft", {"optimizer": {"draw_average": True}}, "need an average to draw with"),
        (
            "grpo",
            {"optimizer": {"draw_average": True, "ema_decay": 0.5}},
            "need rollouts of the policy itself",
        ),
    ],
)
def test_impossible_combinations_are_refused_with_a_remedy(
    kind: str, changes: dict[str, Any], message: str, model: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(StageConfig, settings(kind, model, **changes))
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_encoder_is_refused(model: Path, tmp_path: Path) -> None:
    QwenImage21Policy.tiny(seed=1).save(tmp_path / "stranger")
    data = settings("distill", model)
    data["algorithm"]["teachers"]["t2i"]["path"] = str(tmp_path / "stranger")
    with pytest.raises(ConfigError, match="need models of one base, got another"):
        start(tmp_path / "run", model, data)


def test_a_task_without_a_teacher_is_refused(model: Path) -> None:
    data = settings("distill", model)
    data["prompts"]["tasks"] = ["edit"]
    with pytest.raises(ConfigError, match="need a teacher for task 'edit'"):
        parse(StageConfig, data)


def test_weights_that_do_not_move_stop_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(SelfCheckError, match="need weights that move"):
        start(tmp_path, model, settings("distill", model))
