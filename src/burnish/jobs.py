"""The jobs of a run: curate, train, merge, measure, take benches, meet.

Stages and measurements are jobs. A job that has its inputs runs in a process of its own, as many at
a time as there are cores (or GPUs); a job that is complete is not run again.
"""

from functools import partial
from pathlib import Path
from typing import Any

from burnish.arena.battles import write_battles
from burnish.arena.contest import gather
from burnish.arena.raters import scores, vote
from burnish.bench_tree import Replies
from burnish.benching import (
    ChosenBench,
    Drawing,
    draw_pictures,
    judge_pictures,
    model_facts,
    read_replies,
)
from burnish.config import ConfigError, located
from burnish.curation import measure_prompts, write_kept
from burnish.evaluation import HEADLINE, Row, measure
from burnish.ledger import pin_files
from burnish.merging import merge_into
from burnish.policies.base import Policy
from burnish.policy_config import load_policy
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts
from burnish.rewards.base import ByTask
from burnish.run_config import BASE, BEST_OF, STAGE, RunConfig
from burnish.run_folder import (
    BATTLES,
    bench_places,
    contestants,
    job_folder,
    mark_complete,
    model_folder,
    start_folder,
    with_folders,
)
from burnish.runtime import ALONE, Runtime
from burnish.significance import MIN_COVERAGE
from burnish.tracking import Run, RunError, write_rows
from burnish.training import StageConfig, train
from burnish.types import Failed


def run_job(config: RunConfig, folder: Path, job: str, rt: Runtime) -> None:
    """Do one job in this process and mark it complete."""
    kind, name = job.split("/", 1)
    work = {
        "train": _run_stage,
        "merge": _merge,
        "measure": _measure,
        "curate": _curate,
        "bench": _take_benches,
        "arena": _meet,
    }[kind]
    work(config, folder, name, rt)
    if rt.is_main:
        mark_complete(folder, job)


def _curate(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    own, place = config.curated(name), job_folder(folder, f"curate/{name}")
    Run.create(place, own, environment=rt.describe())
    measure_prompts(own, own.prompts.read(), _start(config, folder, name, rt), place, rt)
    for other in config.stages:
        # An empty pool ends the job that measured it, before any stage that trains on one.
        if config.profile_of(other) == name:
            _chosen(config, folder, other, rt)


def _merge(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    plan = config.merges[name]
    # Nothing is drawn, so that no device is needed.
    policy = load_policy(config.policy, located(config.policy.path), ALONE)
    merge_into(policy, [model_folder(folder, STAGE + source) for source in plan.of], plan)
    policy.save(job_folder(folder, f"merge/{name}") / "model")


def _start(config: RunConfig, folder: Path, name: str, rt: Runtime) -> Policy[Any, Any]:
    """The policy that a stage starts from."""
    return load_policy(config.policy, start_folder(config, config.stages[name], folder), rt)


def _chosen(config: RunConfig, folder: Path, name: str, rt: Runtime) -> StageConfig:
    """The stage with the prompts that its curation keeps."""
    stage, profile = config.stages[name], config.profile_of(name)
    if stage.curation is None or profile is None:
        return stage
    source, own = (job_folder(folder, f"curate/{n}") for n in (profile, name))
    if rt.is_main:
        write_kept(source, stage.prompts.read(), stage.curation, own)
    prompts = stage.prompts.model_copy(
        update={
            "path": str(own / "kept.jsonl"),
            "columns": {},
            # What is kept was chosen by both, and may have none of some category.
            "categories": None,
            "limit": None,
        }
    )
    return stage.model_copy(update={"prompts": prompts})


def _run_stage(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    stage, wanted = config.stages[name], config.runtime.processes
    if rt.world_size != wanted:
        raise ConfigError(
            f"need {wanted} processes for runtime.processes={wanted}, got {rt.world_size}; start "
            f"them with torchrun, or begin or resume the run with "
            f"runtime.processes={rt.world_size}"
        )
    place = job_folder(folder, f"train/{name}")
    with rt.main_first():
        # By its own words, so that a run can be moved; what it refers to is looked up here.
        run = Run.create(place, stage, environment=rt.describe()) if rt.is_main else Run.open(place)
        files = {name: reward.inputs() for name, reward in stage.rewards.items()}
        pin_files(run.folder, "rewards", files)
        if stage.guard is not None:
            files = {f"guard.{key}": reward.inputs() for key, reward in stage.guard.scorers()}
            pin_files(run.folder, "guard-judges", files)
        stage = with_folders(config, _chosen(config, folder, name, rt), folder)
    load = partial(_start, config, folder, name, rt)
    train(stage, load, run, rt, seed=config.seed, label=name)


def _measure(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    path = config.policy.path if name == BASE else STAGE + name
    policy = load_policy(config.policy.drawing(rt.dtype), model_folder(folder, path), rt)
    for role in config.bases if name == BASE else (name,):
        _measure_role(config, folder / "evaluation" / role, role, policy, rt)


def _measure_role(
    config: RunConfig, target: Path, name: str, policy: Policy[Any, Any], rt: Runtime
) -> None:
    """Rows and pictures of one policy, at one guidance.

    Raises:
        RunError: most pictures have no score.
    """
    plan, tasks, is_best_of = config.evaluation, config.tasks(name), name == BEST_OF
    wanted = plan.best_of_prompts if is_best_of else plan.num_prompts
    held_out = _some(read_prompts(located(plan.prompts)), tasks, wanted)
    sets = [(held_out, plan.best_of if is_best_of else plan.num_seeds)]
    if plan.knowledge is not None and not is_best_of:
        knowledge = read_prompts(located(plan.knowledge))
        sets.append((_some(knowledge, tasks, plan.num_knowledge), 1))
    judge = ByTask(config.judges)
    rows: list[Row] = []
    for prompts, num_seeds in sets:
        rows += measure(
            policy,
            prompts,
            judge,
            rt,
            name=name,
            config=plan,
            guidance=config.deployed(name),
            num_seeds=num_seeds,
            pictures=None if is_best_of else target / "pictures",
        )
    scored, failed = ([r for r in rows if r["metric"] == m] for m in (HEADLINE, "failed"))
    if len(failed) > len(scored):
        raise RunError(
            f"need scores of the pictures of {name}, got failures for {len(failed)} of "
            f"{len(scored) + len(failed)} ({failed[-1]['reason']}); see what is wrong with the "
            "judge and start the same command again"
        )
    write_rows(target / "scores.jsonl", rows)


def _meet(config: RunConfig, folder: Path, task: str, rt: Runtime) -> None:
    assert config.arena is not None, "a run without an arena has no such job"
    prompts = read_prompts(located(config.evaluation.prompts))
    contest = gather(contestants(config, folder, task), prompts, tasks=(task,))
    judge = config.arena.judge
    seen = scores(contest, judge.build())
    battles = vote(contest, seen, config.arena.raters, crowd=judge.kind)
    write_battles(job_folder(folder, f"arena/{task}") / BATTLES, battles)


def _take_benches(config: RunConfig, folder: Path, name: str, rt: Runtime) -> None:
    path = config.policy.path if name == BASE else STAGE + name
    model = model_folder(folder, path)
    policy = load_policy(config.policy.drawing(rt.dtype), model, rt)
    plan = config.evaluation
    drawing = Drawing(
        config.deployed(name), plan.num_steps, plan.seed, str(rt.dtype), config.policy.buckets.names
    )
    facts = model_facts(model, drawing)
    for bench, settings in config.benches_of(name).items():
        chosen = ChosenBench.of(settings)
        pictures, place = bench_places(folder, name, bench)
        label = f"{name} on {bench}"
        draw_pictures(
            chosen,
            policy,
            rt,
            pictures,
            drawing,
            facts=facts,
            label=label,
            micro_batch=plan.micro_batch,
        )
        replies = place / chosen.replies_folder
        judge_pictures(chosen, pictures, replies, rt, label=label)
        _check_answered(chosen, read_replies(chosen, pictures, replies), f"benches.{bench}")


def _check_answered(chosen: ChosenBench, replies: Replies, key: str) -> None:
    """Raise where a judge has left out so many questions that a result would be invalid.

    Replies that cannot be read are replies: to ask again would bring the same.
    """
    wanted = [
        (item.id, number, question.name)
        for item, number, _ in chosen.places()
        for question in chosen.bench.questions(item)
    ]
    lost = [replies.get(one) for one in wanted if not isinstance(replies.get(one), str)]
    if len(lost) > (1 - MIN_COVERAGE) * len(wanted):
        reasons = [reply.reason for reply in lost if isinstance(reply, Failed)]
        raise RunError(
            f"{key}: need replies to {MIN_COVERAGE:.0%} of {len(wanted)} questions, got "
            f"{len(wanted) - len(lost)} ({next(iter(reasons), 'nothing was asked')}); fix the "
            "judge and start the same command again, what it answered is kept"
        )


def _some(prompts: PromptSet, tasks: tuple[str, ...], count: int) -> PromptSet:
    own = [[e for e in prompts.entries if e.task == task][:count] for task in tasks]
    return PromptSet(entry for entries in own for entry in entries)
