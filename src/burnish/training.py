"""The training loop: prompts, rollout, scores, credit, update, checkpoint.

One loop for every algorithm; it never asks which one runs. All random draws are functions of seed
and step, so a resumed run repeats an uninterrupted one bit for bit. Before it spends anything the
loop proves on its first step that weights move (and `grpo` that sampler and trainer agree); before
it calls a result done it proves that the written weights are the trained ones. One process trains
one stage.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from burnish import runtime
from burnish.adapters import LoraConfig, attach, detach, write_adapter
from burnish.algorithms.base import AdvantagesConfig, Algorithm, LearnsFrom, SelfCheckError, Setting
from burnish.batches import chunks, stack
from burnish.config import Config
from burnish.curation import SelectionConfig
from burnish.guard import Guard, GuardConfig
from burnish.looks import Watch
from burnish.optimization import OptimizerConfig, State, moved, set_rate
from burnish.policies.base import Policy
from burnish.progress import progress
from burnish.prompts import GroupSampler, PromptsConfig
from burnish.rewards.base import AsyncRewardSet, RewardSet, check_weights
from burnish.rollout import RolloutConfig, sample
from burnish.runtime import Runtime
from burnish.shelves import AnyAlgorithm, AnyReward
from burnish.tracking import Run, RunError, writing
from burnish.types import Group, Prompt, Signal


class StageConfig(Config):
    """One training stage: a policy becomes a teacher, or a student."""

    steps: int = Field(default=40, ge=1)
    """Rollouts."""
    prompts_per_step: int = Field(default=12, ge=1)
    start: str = "base"
    """Whose weights to start from: `base`, or the name of an earlier stage."""
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: Mapping[str, AnyReward] = {}
    advantages: AdvantagesConfig = AdvantagesConfig()
    algorithm: AnyAlgorithm
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    """None trains all weights."""
    save_every: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    curation: SelectionConfig | None = None
    """Draw a group of every prompt before the first step, and train on the prompts that pass; None
    trains on all of them."""
    guard: GuardConfig | None = None
    """Ends the stage when the reward rises while a held-out score falls."""

    @model_validator(mode="after")
    def _fits_together(self) -> "StageConfig":
        name = self.algorithm.kind
        if self.algorithm.needs_rewards and not self.rewards:
            raise ValueError(
                f"need at least one reward for {name}, got none; add one under rewards"
            )
        if not self.algorithm.needs_rewards and self.advantages != AdvantagesConfig():
            raise ValueError(f"need no advantages for {name}, got some; leave `advantages` out")
        if not self.algorithm.needs_rewards and self.guard is not None:
            raise ValueError(
                f"need no guard for {name}, got one; it watches a reward, leave it out"
            )
        if not self.algorithm.needs_rewards and self.curation is not None:
            raise ValueError(
                f"need no curation for {name}, got one; it goes by rewards, leave it out"
            )
        if self.algorithm.needs_rewards and self.rollout.group_size < 2:
            raise ValueError(f"need group_size of at least 2 for {name}, got 1; raise it")
        for task in self.prompts.tasks:
            if not self.algorithm.covers(task):
                raise ValueError(
                    f"need a teacher for task {task!r}, got none; add algorithm.teachers.{task} or "
                    "take the task out of prompts.tasks"
                )
        check_weights(self.rewards, self.prompts.tasks)
        self.algorithm.check_guidance(self.rollout.guidance_scale)
        self._check_rollout(name, self.algorithm.learns_from)
        return self

    def _check_rollout(self, name: str, learns_from: LearnsFrom) -> None:
        draws = self.rollout
        is_stochastic = draws.window > 0 and draws.noise_level > 0 and draws.kernel != "ode"
        if learns_from == "transitions" and not (is_stochastic and draws.keep == "window"):
            raise ValueError(
                f"need a stochastic window that is kept for {name}, got window={draws.window}, "
                f"kernel={draws.kernel}, noise_level={draws.noise_level}, keep={draws.keep}; set "
                "rollout.window=2 rollout.kernel=precise rollout.keep=window"
            )
        if learns_from == "samples" and is_stochastic:
            raise ValueError(
                f"need samples of the ODE for {name}, got a stochastic window of {draws.window} "
                "steps; set rollout.window=0"
            )
        if learns_from != "samples" and self.optimizer.draw_average:
            raise ValueError(
                f"need rollouts of the policy itself for {name}, got draw_average=true; leave "
                "optimizer.draw_average out"
            )
        if learns_from == "path" and (is_stochastic or draws.guidance_scale != 1):
            raise ValueError(
                f"need the unguided ODE path of the student for {name}, got window={draws.window} "
                f"and guidance_scale={draws.guidance_scale:g}; set rollout.window=0 "
                "rollout.guidance_scale=1, the teachers keep their own scale"
            )
        if learns_from == "path" and draws.keep in ("none", "window"):
            raise ValueError(
                f"need kept states for {name}, got keep={draws.keep}; set rollout.keep=4 or all"
            )


def train(
    config: StageConfig, policy: Policy[Any, Any], run: Run, rt: Runtime, *, seed: int, label: str
) -> Path:
    """Run a stage to its end, from its newest checkpoint, and write the trained pipeline.

    Args:
        config: what to do.
        policy: the start; changed in place.
        run: the stage's own run folder.
        rt: device and ranks.
        seed: with the step it decides every random draw.
        label: shown with the progress.

    Returns:
        The folder of the trained diffusers pipeline.

    Raises:
        RunError: nothing could be learnt, or a file could not be written.
        SelfCheckError: a self-check failed.
    """
    policy.transformer.requires_grad_(True)
    before = [parameter.detach().clone() for _, parameter in policy.trainable()]
    # Before factors are put in and weights restored: an algorithm may keep a copy of the start.
    algorithm = config.algorithm.build(_setting(config, policy, seed))
    if config.lora is not None:
        with runtime.seeded(seed, "lora"):
            attach(policy.transformer, config.lora, policy.lora_targets)
    state = State.start(policy, config.optimizer)
    state.restore(run)
    prompts = config.prompts.read()
    pool = config.algorithm.pool
    sampler = GroupSampler(prompts, per_step=config.prompts_per_step, seed=seed, pool=pool)
    watch = _watch(config, algorithm, run, state.step, prompts)
    with (
        AsyncRewardSet(RewardSet.build(config.rewards)) as scorer,
        progress(label, config.steps, done=state.step) as bar,
    ):
        while state.step < config.steps:
            is_due = watch is not None and watch.looks.is_due(state.step)
            seen = _look(watch, state, run, rt) if watch is not None and is_due else {}
            if watch is not None and watch.is_over:
                bar.advance(0, note="ended by its guard")
                break
            metrics = _step(config, algorithm, sampler, scorer, state, run, rt, seed)
            run.log(state.step, metrics | seen)
            state.step += 1
            if state.step % config.save_every == 0 or state.step == config.steps:
                state.save(run)
            reward = metrics.get("reward/mean")
            bar.advance(note="" if reward is None else f"reward {reward:.3f}")
    if watch is not None and watch.looks.last_step < state.step and not watch.is_over:
        _look(watch, state, run, rt)
    state.finish()
    if watch is not None:
        watch.restore(policy)
    if config.lora is not None:
        write_adapter(run.folder / "lora", detach(policy.transformer))
    return _export(policy, before, run.folder / "model")


def _watch(
    config: StageConfig, algorithm: Algorithm, run: Run, step: int, prompts: Sequence[Prompt]
) -> Watch | None:
    """Who looks at the policy now and then: the stage's guard, or whom its algorithm wants."""
    if config.guard is None:
        return algorithm.watch(run.folder, step, prompts)
    return Guard(config.guard, config.rollout, config.prompts.tasks, run.folder, step=step)


def _look(watch: Watch, state: State, run: Run, rt: Runtime) -> dict[str, float]:
    """What is seen of the policy as it would be written now."""
    rewards = [
        row["reward/mean"]
        for row in run.metrics()
        if row["step"] >= watch.looks.last_step and row.get("reward/mean") is not None
    ]
    reward = sum(rewards) / len(rewards) if rewards else None
    with run.timer("look"), state.averaged(bool(state.average)):
        return watch.look(state.policy, state.step, reward, rt)


def _setting(config: StageConfig, policy: Policy[Any, Any], seed: int) -> Setting:
    return Setting(
        policy=policy,
        guidance=config.rollout.guidance,
        sampler_steps=config.rollout.num_steps,
        num_steps=config.steps,
        kernel=config.rollout.kernel,
        noise_level=config.rollout.noise_level,
        num_updates=config.optimizer.num_updates,
        micro_batch=config.optimizer.micro_batch,
        seed=seed,
        rewards=config.rewards,
        advantages=config.advantages,
    )


def _step(
    config: StageConfig,
    algorithm: Algorithm,
    sampler: GroupSampler,
    scorer: AsyncRewardSet,
    state: State,
    run: Run,
    rt: Runtime,
    seed: int,
) -> dict[str, float]:
    """One rollout and its updates; returns metrics."""
    before = state.policy.work.evaluations
    with state.averaged(config.optimizer.draw_average):
        with run.timer("rollout"), rt.autocast():
            groups = _rollout(config, algorithm, scorer, state, sampler.prompts(state.step), seed)
        with run.timer("credit"), rt.autocast():
            signals, metrics = algorithm.credit(groups, state.step)
    metrics["data/images"] = float(sum(len(group.trajectories) for group in groups))
    metrics["data/trained"] = float(len(signals))
    with run.timer("update"):
        metrics |= _update(config, algorithm, state, rt, signals, seed)
    metrics["data/evaluations"] = float(state.policy.work.evaluations - before)
    return metrics


def _rollout(
    config: StageConfig,
    algorithm: Algorithm,
    scorer: AsyncRewardSet,
    state: State,
    prompts: Sequence[Prompt],
    seed: int,
) -> list[Group]:
    """The groups of a step, scored if there are rewards."""
    policy, plan = algorithm.behaviour(state.policy, config.rollout, prompts, state.step)
    draw = partial(sample, policy, prompts, plan, seed=seed, step=state.step)
    if not config.rewards:
        return draw()
    drawn = draw(on_batch=scorer.submit)
    scored = scorer.collect()
    return [scored[group.prompt.id] for group in drawn]


def _update(
    config: StageConfig,
    algorithm: Algorithm,
    state: State,
    rt: Runtime,
    signals: list[Signal],
    seed: int,
) -> dict[str, float]:
    """All optimizer steps on the signals of one rollout."""
    plan, parameters = config.optimizer, [p for _, p in state.policy.trainable()]
    turns = _turns(signals, plan.num_updates, runtime.generator(seed, "order", state.step))
    totals: dict[str, list[float]] = {}
    for update in range(plan.num_updates):
        part = [s for s, turn in zip(signals, turns, strict=True) if turn == update]
        states = sum(len(signal.sigmas) for signal in part)
        for chunk in chunks(part, plan.micro_batch):
            batch = stack(chunk, state.policy.device)
            with rt.autocast():
                output = algorithm.loss(state.policy, batch)
            (output.loss * len(batch.sigmas) / states).backward()
            for name, value in {"loss": float(output.loss.detach()), **output.metrics}.items():
                totals.setdefault(name, []).append(value)
            if state.step == update == 0:
                check_ratio(output.metrics, plan.num_updates)
        norm = nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
        if not bool(norm.isfinite()):
            raise RunError(
                f"need a finite gradient, got {float(norm)} at step {state.step}; lower "
                "optimizer.learning_rate and start again, the last checkpoint is as it was"
            )
        totals.setdefault("policy/grad_norm", []).append(float(norm))
        place = state.step * plan.num_updates + update
        set_rate(state.optimizer, plan, update=place, total=config.steps * plan.num_updates)
        witness = moved(parameters) if state.step == update == 0 else None
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if witness is not None and signals and not witness():
            raise SelfCheckError("need weights that move, got none changed by the first step")
        if state.average:
            torch._foreach_lerp_(
                state.average, [p.detach() for p in parameters], 1 - plan.ema_decay
            )
    return {name: sum(values) / len(values) for name, values in totals.items()}


def check_ratio(metrics: Mapping[str, float], num_updates: int) -> None:
    """Old and new policy are the same before the first update."""
    # With several updates the old velocities come from batches of another shape.
    allowed = 0.0 if num_updates == 1 else 1e-3
    ratio = metrics.get("policy/ratio_max", 1.0)
    if abs(ratio - 1) > allowed:
        raise SelfCheckError(f"need a ratio of 1 before the first update, got {ratio:.8g}")


def _turns(signals: Sequence[Signal], num_updates: int, draws: torch.Generator) -> list[int]:
    """Update of each signal: every group is dealt out evenly, so that advantages stay balanced."""
    groups: dict[str, list[int]] = {}
    for row, signal in enumerate(signals):
        groups.setdefault(signal.prompt.id, []).append(row)
    turns = [0] * len(signals)
    for first, rows in enumerate(groups.values()):
        for place, member in enumerate(torch.randperm(len(rows), generator=draws).tolist()):
            turns[rows[member]] = (first + place) % num_updates
    return turns


def _export(policy: Policy[Any, Any], before: Sequence[Tensor], folder: Path) -> Path:
    """Write the pipeline, read it again, and check that it is ours and not the start."""
    policy.transformer.requires_grad_(False)
    ours = dict(policy.transformer.named_parameters())
    if all(torch.equal(a, b) for a, b in zip(before, ours.values(), strict=True)):
        raise RunError(
            "need groups whose rewards differ, got none in the whole stage, so that nothing was "
            "learnt; choose other prompts or rewards, or a larger group"
        )
    unfinished = folder.with_name(f".{folder.name}.tmp")
    with writing(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        policy.save(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    fresh = type(policy).load(folder, resolution=policy.resolution, device=policy.device)
    for name, parameter in fresh.transformer.named_parameters():
        if not torch.equal(parameter, ours[name]):
            raise SelfCheckError(
                f"need the written weights to be the trained ones, got other {name}"
            )
    return folder
