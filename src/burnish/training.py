"""The training loop: prompts, rollout, scores, credit, update, checkpoint.

One loop for every algorithm; it never asks which one runs. All random draws are functions of seed
and step, so a resumed run repeats an uninterrupted one bit for bit. Before it spends anything the
loop proves on its first step that weights move (and `grpo` that sampler and trainer agree); before
it calls a result done it proves that the written weights are the trained ones. Several processes
share the groups of a step; none of them is split.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from burnish import runtime
from burnish.adapters import LoraConfig, attach, detach, write_adapter
from burnish.algorithms.base import AdvantagesConfig, Algorithm, SelfCheckError, StageContext
from burnish.config import Config, ConfigError
from burnish.curation import SelectionConfig
from burnish.guard import Guard, GuardConfig
from burnish.looks import Watch
from burnish.optimization import OptimizerConfig, State
from burnish.policies.base import Policy
from burnish.policies.parts.reading import hash_module
from burnish.progress import progress
from burnish.prompts import GroupSampler, PromptsConfig
from burnish.rewards.base import AsyncRewardSet, RewardConfig, RewardSet, check_weights
from burnish.rollout import read_ahead, sample
from burnish.rollout_config import RolloutConfig
from burnish.runtime import Runtime
from burnish.samples import keep_samples
from burnish.sharding import Shards, whole
from burnish.shelves import AnyAlgorithm, AnyReward
from burnish.stability import WINDOW, warn_of_runaway
from burnish.tracking import Run, RunError, atomic_folder, writing
from burnish.types import Failed, Group, Prompt, Scored
from burnish.updates import update

_MAX_UNSCORED = 3
"""Steps in a row that teach nothing because a reward is gone, after which a stage stops."""


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
    samples_every: int = Field(default=10, ge=0)
    """Steps between pictures that are kept with their scores, a group of what is drawn anyway; 0
    keeps none."""
    curation: SelectionConfig | None = None
    """Draw a group of every prompt before the first step, and train on the prompts that pass; None
    trains on all of them."""
    guard: GuardConfig | None = None
    """Ends the stage when the reward rises while a held-out score falls."""

    def scorers(self) -> Iterator[tuple[str, RewardConfig]]:
        """All that score, by the key that names each here."""
        for name, reward in self.rewards.items():
            yield f"rewards.{name}", reward
        if self.guard is not None:
            yield from ((f"guard.{key}", reward) for key, reward in self.guard.scorers())

    @model_validator(mode="after")
    def _fits_together(self) -> "StageConfig":
        name = self.algorithm.kind
        if self.algorithm.needs_rewards and not self.rewards:
            raise ValueError(
                f"need at least one reward for {name}, got none; add one under rewards"
            )
        for key, is_given, why in (
            ("advantages", self.advantages != AdvantagesConfig(), "they are made of rewards"),
            ("guard", self.guard is not None, "it watches a reward"),
            ("curation", self.curation is not None, "it goes by rewards"),
        ):
            if is_given and not self.algorithm.needs_rewards:
                raise ValueError(f"need no {key} for {name}, got some; {why}, leave `{key}` out")
        if self.algorithm.needs_rewards and self.rollout.group_size < 2:
            raise ValueError(f"need group_size of at least 2 for {name}, got 1; raise it")
        check_weights(self.rewards, self.prompts.tasks)
        average = self.optimizer.draw_average
        self.algorithm.check_rollout(self.rollout, self.prompts.tasks, draws_average=average)
        return self

    def check_read(self) -> None:
        """Refuse settings that nothing would read. Not when settings are parsed: folders of runs
        that are complete may hold them.

        Raises:
            ConfigError: there is one.
        """
        rollout = self.rollout
        if self.rewards and not self.algorithm.needs_rewards:
            raise ConfigError(
                f"need no rewards for {self.algorithm.kind}, got some; it learns from its teachers "
                "alone, leave `rewards` out"
            )
        if rollout.guidance_scale == 1 and rollout.negative_prompt:
            raise ConfigError(
                "need rollout.guidance_scale other than 1 for a negative_prompt, got 1, which is "
                "without guidance; leave rollout.negative_prompt out"
            )
        if rollout.window_start == "sliding" and rollout.window_steps is not None:
            raise ConfigError(
                "need a window that can move for rollout.window_start=sliding, got window_steps="
                f"{list(rollout.window_steps)}; leave window_start or window_steps out"
            )


def train(
    config: StageConfig,
    load: Callable[[], Policy[Any, Any]],
    run: Run,
    rt: Runtime,
    *,
    seed: int,
    label: str,
) -> Path:
    """Run a stage to its end, from its newest checkpoint; returns the folder of its pipeline.

    Args:
        config: what to do.
        load: reads the start, which is changed in place; called by one process of a machine after
            another.
        run: the stage's own run folder.
        rt: device and ranks.
        seed: with the step it decides every random draw.
        label: shown with the progress.

    Raises:
        RunError: nothing could be learnt, scores fail, or a file could not be written.
        SelfCheckError: a self-check failed.
    """
    with rt.in_turn():
        policy, algorithm, shards, before = _made_ready(config, load, rt, seed)
    state = State.start(policy, config.optimizer)
    prompts = config.prompts.read()
    state.restore(run, rt)
    with rt.main_first():
        watch = _watch(config, algorithm, run, state.step, prompts)
    pool = config.algorithm.pool
    sampler = GroupSampler(prompts, per_step=config.prompts_per_step, seed=seed, pool=pool)
    unscored, is_unsaved = 0, False
    with (
        AsyncRewardSet(RewardSet.build(config.rewards)) as scorer,
        progress(label, config.steps, done=state.step, is_shown=rt.is_main) as bar,
    ):
        while state.step < config.steps:
            if watch is not None and watch.looks.is_due(state.step):
                _look(watch, state, run, rt)
            if watch is not None and watch.is_over:
                bar.advance(0, note="ended by its guard")
                break
            metrics = _step(config, algorithm, sampler, scorer, state, run, rt, seed)
            if rt.is_main:
                run.log(state.step, metrics | (watch.looks.told(state.step) if watch else {}))
                if (state.step + 1) % WINDOW == 0:
                    warn_of_runaway(run.metrics(), label)
            unscored = _unscored(unscored, metrics, state.step, config.steps)
            state.step += 1
            is_unsaved |= state.step % config.save_every == 0
            if (is_unsaved and not unscored) or state.step == config.steps:
                state.save(run, rt)
                is_unsaved = False
            reward = metrics.get("reward/mean")
            bar.advance(note="" if reward is None else f"reward {reward:.3f}")
    if watch is not None and watch.looks.last_step < state.step and not watch.is_over:
        _look(watch, state, run, rt)
    state.finish()
    shards.leave(is_needed=rt.is_main)
    folder = run.folder / "model"
    if rt.is_main:
        _finish(config, policy, watch, run, before)
    rt.barrier()
    return folder


def is_unscored(metrics: Mapping[str, Any]) -> bool:
    """Whether a step taught nothing because a reward failed on all pictures."""
    return metrics.get("data/trained") == 0 and metrics.get("data/gone_rewards", 0) > 0


def _unscored(before: int, metrics: Mapping[str, Any], step: int, steps: int) -> int:
    """Such steps in a row, with this one of so many; raises where a stage draws for nothing."""
    found = before + 1 if is_unscored(metrics) else 0
    if found == min(_MAX_UNSCORED, steps):
        raise RunError(
            f"need scores to learn from, got a reward that fails on every picture of {found} steps "
            f"in a row, to step {step}; see what is wrong with it and start the same command "
            "again, which goes on from the last checkpoint before them"
        )
    return found


def _made_ready(
    config: StageConfig, load: Callable[[], Policy[Any, Any]], rt: Runtime, seed: int
) -> tuple[Policy[Any, Any], Algorithm, Shards, str]:
    """The policy as it is trained, and the hash of its weights at the start."""
    policy = load()
    policy.transformer.requires_grad_(True)
    before = hash_module(policy.transformer) if rt.is_main else ""
    # Before factors are put in and weights restored: an algorithm may keep a copy of the start.
    algorithm = config.algorithm.build(_context(config, policy, rt, seed))
    if config.lora is not None:
        with runtime.seeded(seed, "lora"):
            is_autocast = rt.dtype != torch.float32
            attach(policy.transformer, config.lora, policy.lora_targets, is_autocast=is_autocast)
    return policy, algorithm, Shards(policy, rt), before


def _finish(
    config: StageConfig,
    policy: Policy[Any, Any],
    watch: Watch | None,
    run: Run,
    before: str,
) -> None:
    """Write what was trained; `before` is the hash of the weights that it started from."""
    if watch is not None:
        watch.restore(policy)
    if config.lora is not None:
        write_adapter(run.folder / "lora", detach(policy.transformer))
    _export(policy, before, run.folder / "model")


def _watch(
    config: StageConfig, algorithm: Algorithm, run: Run, step: int, prompts: Sequence[Prompt]
) -> Watch | None:
    """Who looks at the policy now and then: the stage's guard, or whom its algorithm wants."""
    if config.guard is None:
        return algorithm.watch(run.folder, step, prompts)
    return Guard(config.guard, config.rollout, config.prompts.tasks, run.folder, step=step)


def _look(watch: Watch, state: State, run: Run, rt: Runtime) -> None:
    """Have the main process look at the policy as it would be written now; all know its row."""
    with run.timer("look"), state.averaged(bool(state.average)):
        watch.prepare(state.policy, rt)
        with whole(state.policy):
            seen = _looked(watch, state, run, rt) if rt.is_main else {}
        watch.looks.rows = rt.gather(watch.looks.rows)[0]
        # As they are kept, and not as they are gathered to draw.
        weights = state.weights(rt) if watch.looks.is_best else {}
        if rt.is_main:
            watch.looks.remember(weights, seen)


def _looked(watch: Watch, state: State, run: Run, rt: Runtime) -> dict[str, float]:
    rewards = [
        row["reward/mean"]
        for row in run.metrics()
        if row["step"] >= watch.looks.last_step and row.get("reward/mean") is not None
    ]
    reward = sum(rewards) / len(rewards) if rewards else None
    return watch.look(state.policy, state.step, reward, rt)


def _context(config: StageConfig, policy: Policy[Any, Any], rt: Runtime, seed: int) -> StageContext:
    return StageContext(
        policy=policy,
        guidance=config.rollout.guidance,
        num_steps=config.rollout.num_steps,
        steps=config.steps,
        kernel=config.rollout.kernel,
        noise_level=config.rollout.noise_level,
        num_updates=config.optimizer.num_updates,
        micro_batch=config.optimizer.micro_batch,
        seed=seed,
        rewards=config.rewards,
        advantages=config.advantages,
        may_borrow=config.lora is not None and not rt.is_sharded,
        rt=rt,
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
            own = rt.mine(sampler.prompts(state.step))
            groups = _rollout(config, algorithm, scorer, state, own, seed)
        if rt.is_main and config.rewards:
            keep_samples(run, state.step, groups, every=config.samples_every)
        with run.timer("credit"), rt.autocast():
            signals, metrics = algorithm.credit(groups, state.step)
    with run.timer("update"):
        updated = update(
            config.optimizer, algorithm, state, rt, own, signals, seed=seed, total=config.steps
        )
    counts = {
        "data/images": float(sum(len(group.trajectories) for group in groups)),
        "data/trained": float(len(signals)),
        "data/evaluations": float(state.policy.work.evaluations - before),
    }
    parts = rt.gather(counts)
    told = {name: sum(part[name] for part in parts) for name in counts}
    return metrics | told | _failures(config, groups, rt) | updated


def _failures(config: StageConfig, groups: Sequence[Group], rt: Runtime) -> dict[str, float]:
    """Scores that failed, and rewards that did so on all pictures of the step."""
    if not config.rewards:
        return {}
    own = {
        name: [
            sum(isinstance(score, kind) for group in groups for score in group.scores.get(name, ()))
            for kind in (Scored, Failed)
        ]
        for name in config.rewards
    }
    parts = rt.gather(own)
    every = [[sum(part[name][k] for part in parts) for k in (0, 1)] for name in own]
    return {
        "data/failed_scores": float(sum(failed for _, failed in every)),
        "data/gone_rewards": float(sum(failed > 0 and not scored for scored, failed in every)),
    }


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
    read_ahead(policy, prompts, plan.guidance)
    with whole(policy):
        if not config.rewards:
            return draw(is_decoded=False)
        drawn = draw(on_batch=scorer.submit)
    scored = scorer.collect()
    return [scored[group.prompt.id] for group in drawn]


def _export(policy: Policy[Any, Any], before: str, folder: Path) -> None:
    """Write the pipeline, read it again, and check that it is ours and not the start."""
    policy.transformer.requires_grad_(False)
    ours = dict(policy.transformer.named_parameters())
    if hash_module(policy.transformer) == before:
        raise RunError(
            "need groups whose rewards differ, got none in the whole stage, so that nothing was "
            "learnt; choose other prompts or rewards, or a larger group"
        )
    with atomic_folder(folder) as unfinished, writing(folder):
        policy.save(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
    # On the CPU: a device need not have room for a second one.
    fresh = type(policy).load(
        folder,
        resolution=policy.resolution,
        dtype=policy.dtype,
        frozen_dtype=policy.frozen_dtype,
    )
    for name, parameter in fresh.transformer.named_parameters():
        if not torch.equal(parameter, ours[name].cpu()):
            raise SelfCheckError(
                f"need the written weights to be the trained ones, got other {name}"
            )
