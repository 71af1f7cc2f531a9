"""Train a vision-language judge from annotations: reasoning, then one digit that is an expectation.

A judge is taught with raters' reasoning and must do with its own, so agreement and calibration are
taken from held-out pictures that it reads as a reward would, out of prompts that it never saw. A
share of the lessons leaves the reasoning out, which makes the fast mode. What comes out is a folder
that `rewards.vlm` reads: merged weights, rubrics, `judge.json`.

The loop is transformers' `Trainer`, so checkpoints are its own: weights as safetensors, but
optimizer and random states written by `torch.save` and read with `weights_only`, which runs no code
of the file. No draw depends on these states, as the order of lessons is a function of the seed; a
resumed training repeats an uninterrupted one.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from burnish import runtime, vision_build
from burnish.algorithms.base import SelfCheckError
from burnish.annotations.base import split
from burnish.annotations.schema import Annotation, annotation_digest
from burnish.config import Config, ConfigError, located
from burnish.judges.agreement import measured
from burnish.judges.lessons import Curriculum, SourceConfig, exercises, read_sources
from burnish.judges.model import (
    TrainableJudge,
    longest_answer,
    read_trainable,
    stop_at,
    towards_start,
)
from burnish.judges.trainer import (
    SCALE_NAME,
    JudgeTrainer,
    Objective,
    Reporter,
    ScoreLoss,
    add_pair_scale,
    latest_checkpoint,
)
from burnish.judging import Rubric
from burnish.ledger import pin
from burnish.progress import progress
from burnish.rewards.vlm import Judge, judge_facts
from burnish.runtime import Runtime, RuntimeConfig
from burnish.tracking import Run, atomic_folder, write_json, writing

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from peft import PeftModel  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

RUBRICS = Path(__file__).parent / "rubrics"
"""The rubrics that ship with the package."""


class RewardTrainingConfig(Config):
    """How a judge is trained."""

    path: str
    """A Qwen-VL model and processor as transformers write them."""
    annotations: tuple[SourceConfig, ...]
    dimensions: tuple[str, ...] = ()
    """What is judged; empty takes every dimension of the annotations."""
    rubrics: str | None = None
    """A folder with a Markdown file for each dimension; None takes those of the judge in `path`, or
    those of the package if there is no judge."""
    loss: ScoreLoss = "soft_label"
    """At the digit; `expected` is the paper's."""
    reasoning_weight: float = Field(default=1.0, ge=0)
    score_weight: float = Field(default=1.0, ge=0)
    mass_weight: float = Field(default=1.0, ge=0)
    """Of the penalty on probability beside the digits; 0 ends in judges that are off the scale."""
    skip_reasoning: float = Field(default=0.15, ge=0, le=1)
    """Share of the lessons that teach the score without reasoning."""
    lora_rank: int = Field(default=64, ge=0)
    """Of an adapter on the language side; 0 trains all weights."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak, which a cosine brings down to 0; 1e-5 is a usual start for all weights."""
    warmup_steps: int = Field(default=50, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    start_share: float = Field(default=0.0, ge=0, lt=1)
    """Of the start in every weight that is written (WiSE-FT, arXiv 2109.01903)."""
    epochs: float = Field(default=1.0, gt=0)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; given, it is used in the place of `epochs`."""
    batch_size: int = Field(default=8, ge=1)
    """Annotations, or pairs of them, in one forward pass of each process."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes for one optimizer step."""
    max_pixels: int | None = Field(default=None, ge=1024)
    """Larger pictures are shrunk to so many pixels, in training and in use; None keeps the
    processor's own limit."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts on which agreement is measured and the calibration fitted."""
    held_out_limit: int = Field(default=1000, ge=1)
    """Most held-out pictures of a dimension that are read."""
    reasoning: bool = True
    """Whether they are read with reasoning: the mode for which the calibration is right."""
    save_every: int = Field(default=500, ge=1)
    """Optimizer steps between checkpoints."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode pictures."""
    seed: int = 0
    runtime: RuntimeConfig = RuntimeConfig()


def train_judge(
    config: RewardTrainingConfig,
    out: Path,
    rt: Runtime,
    *,
    label: str = "judge",
    on_step: Callable[[int], None] = lambda step: None,
) -> Path:
    """Train a judge to its end, from its newest checkpoint, and write its folder.

    Args:
        config: what to do.
        out: the run folder; made if missing. A judge that is done in it is not trained again.
        rt: device, precision and ranks; torchrun's processes share each step.
        label: shown with the progress.
        on_step: called with the number of steps done, after each.

    Returns:
        `out/judge`, which `rewards.vlm.Judge.load` reads.

    Raises:
        ConfigError: no annotations, or none that fit the loss; an unknown dimension or one without
            a rubric; a model that cannot be read or whose digits are not single tokens.
        RunError: the folder is another run's, or was begun with other annotations or rubrics; or
            the loss is not finite any more.
        SelfCheckError: what was written is not what was trained.
    """
    annotations, rubrics = _material(config)
    _check_split(config)
    training, held_out = split(annotations, held_out=config.held_out, seed=config.seed)
    # A picture about which a judge wrote is there a second time.
    held_out = [annotation for annotation in held_out if annotation.reasoned_by == "raters"]
    chosen = exercises(training, in_pairs=config.loss == "pairwise")
    folder = out / "judge"
    with runtime.seeded(config.seed, "judge"):
        judge = read_trainable(
            located(config.path),
            lora_rank=config.lora_rank,
            max_pixels=config.max_pixels,
            device=rt.device,
        )
        # After all that a typing error could stop: it makes the folder this training's own.
        run = Run.create(out, config, environment=rt.describe()) if rt.is_main else None
        if rt.is_main:
            pin(out, "material", _digests(annotations, rubrics))
        if (folder / "judge.json").is_file():
            return folder
        curriculum = _curriculum(config, chosen, rubrics, rt)
        scale = _fit(config, judge, curriculum, out / "checkpoints", run, rt, label, on_step)
        if rt.is_main:
            facts = {
                **_facts(config, rubrics),
                "pair_scale": scale,
                "exercises": len(chosen),
                "longest_answer": longest_answer(judge.collator, training),
            }
            _write(config, judge, rubrics, held_out, facts, folder, rt)
    rt.barrier()
    return folder


def _facts(config: RewardTrainingConfig, rubrics: Sequence[Rubric]) -> dict[str, Any]:
    """What `judge.json` says of how the judge was made."""
    return {
        "base": config.path,
        "loss": config.loss,
        "start_share": config.start_share,
        "rubrics": {rubric.dimension: rubric.digest for rubric in rubrics},
        "split": {"held_out": config.held_out, "seed": config.seed},
    }


def _material(config: RewardTrainingConfig) -> tuple[list[Annotation], list[Rubric]]:
    """The annotations of the wanted dimensions, and a rubric for each dimension."""
    scored = config.loss != "pairwise"
    annotations = read_sources(config.annotations, config.dimensions, scored=scored)
    dimensions = sorted({annotation.dimension for annotation in annotations})
    folder = _rubrics(config)
    known = sorted(path.stem for path in folder.glob("*.md"))
    if unknown := [name for name in dimensions if name not in known]:
        raise ConfigError(
            f"rubrics: need a rubric for each dimension of the annotations, got none for "
            f"{unknown[0]!r} in {folder} ({', '.join(known) or 'empty'}); write {unknown[0]}.md, "
            "or choose others with `dimensions`"
        )
    return annotations, [Rubric.read(folder / f"{name}.md") for name in dimensions]


def _rubrics(config: RewardTrainingConfig) -> Path:
    """A judge goes on being asked what it was asked."""
    if config.rubrics is not None:
        return located(config.rubrics)
    own = located(config.path) / "rubrics"
    return own if own.is_dir() else RUBRICS


def _check_split(config: RewardTrainingConfig) -> None:
    """Refuse to hold out what the judge in `path` was trained on.

    Raises:
        ConfigError: its split is another.
    """
    path = located(config.path)
    if not (path / "judge.json").is_file():
        return
    known = judge_facts(path).get("split")
    own = {"held_out": config.held_out, "seed": config.seed}
    if known is not None and known != own:
        raise ConfigError(
            f"need the split of the judge in {path}, held_out={known['held_out']:g} "
            f"seed={known['seed']}, got held_out={config.held_out:g} seed={config.seed}; set them, "
            "or what is held out now was trained on before"
        )


def _digests(annotations: Sequence[Annotation], rubrics: Sequence[Rubric]) -> dict[str, str]:
    """What a training is begun with, by its content."""
    rows = hashlib.sha256()
    for annotation in sorted(annotations, key=lambda a: a.id):
        rows.update(annotation_digest(annotation).encode())
        said = (annotation.score_mean, annotation.score_std, annotation.rank, annotation.reasoning)
        rows.update(repr((annotation.id, *said)).encode())
    texts = hashlib.sha256("".join(rubric.digest for rubric in rubrics).encode())
    return {"annotations": rows.hexdigest()[:16], "rubrics": texts.hexdigest()[:16]}


def _per_step(config: RewardTrainingConfig, rt: Runtime) -> int:
    """Exercises of one optimizer step."""
    return config.batch_size * config.accumulate * rt.world_size


def _curriculum(
    config: RewardTrainingConfig,
    chosen: Sequence[tuple[Annotation, ...]],
    rubrics: Sequence[Rubric],
    rt: Runtime,
) -> Curriculum:
    """The lessons of all optimizer steps."""
    per_step = _per_step(config, rt)
    steps = config.steps or math.ceil(config.epochs * len(chosen) / per_step)
    return Curriculum(
        chosen,
        rubrics,
        length=steps * per_step,
        skip_reasoning=config.skip_reasoning,
        seed=config.seed,
    )


def _fit(
    config: RewardTrainingConfig,
    judge: TrainableJudge,
    curriculum: Curriculum,
    folder: Path,
    run: Run | None,
    rt: Runtime,
    label: str,
    on_step: Callable[[int], None],
) -> float | None:
    """Train in place, from the newest checkpoint; the scale of the pairwise loss, if it is that."""
    steps = len(curriculum) // _per_step(config, rt)
    if config.loss == "pairwise":
        add_pair_scale(judge.model)
    newest = latest_checkpoint(folder)
    done = 0 if newest is None else newest[1]
    if run is not None:
        run.rewind(done - 1)
    with progress(label, steps, done=done) as bar:
        trainer = JudgeTrainer(
            Objective(
                loss=config.loss,
                reasoning_weight=config.reasoning_weight,
                score_weight=config.score_weight,
                mass_weight=config.mass_weight,
                digits=judge.collator.alphabet.digits,
                learning_rate=config.learning_rate,
            ),
            model=judge.model,
            args=_arguments(config, steps, folder, rt),
            data_collator=judge.collator,
            train_dataset=curriculum,
            callbacks=[Reporter(run, bar, on_step)],
        )
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest[0]))
    scale = trainer.log_scale()
    if scale is None:
        return None
    delattr(judge.model, SCALE_NAME)
    return float(scale.detach().exp())


def _arguments(
    config: RewardTrainingConfig, steps: int, folder: Path, rt: Runtime
) -> TrainingArguments:
    found = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=rt.dtype == torch.bfloat16,
        use_cpu=rt.device.type == "cpu",
        # Every step, so that the rows do not depend on where a training was cut off.
        logging_steps=1,
        # A loss that is lost must be seen, not smoothed over.
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        seed=config.seed,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=rt.device.type == "cuda",
        remove_unused_columns=False,
        # The scale of the pairwise loss is used outside the model, where a search would miss it.
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    # Several GPUs are for torchrun. One process would share a batch out row by row, and pictures
    # are no rows.
    found._n_gpu = min(found.n_gpu, 1)
    return found


def _write(
    config: RewardTrainingConfig,
    trained: TrainableJudge,
    rubrics: Sequence[Rubric],
    held_out: Sequence[Annotation],
    facts: dict[str, Any],
    folder: Path,
    rt: Runtime,
) -> None:
    """Write the judge, read it again, compare, measure, calibrate; it gets its name last."""
    model = trained.model
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    if config.start_share:
        towards_start(model, located(config.path), config.start_share)
    model = model.to(trained.dtype)
    # The trainer switched it off, and an answer is written token by token.
    model.config.use_cache = True
    stop_at(model, trained.collator.end)
    with atomic_folder(folder) as unfinished:
        with writing(folder):
            model.save_pretrained(unfinished)
            trained.collator.processor.save_pretrained(unfinished)
            (unfinished / "rubrics").mkdir()
            for rubric in rubrics:
                path = unfinished / "rubrics" / f"{rubric.dimension}.md"
                path.write_text(rubric.text + "\n", encoding="utf-8")
            write_json(unfinished / "judge.json", facts)
        judge = Judge.load(unfinished, rt.device)
        _compare(model, judge.model)
        found = measured(
            judge,
            held_out,
            limit=config.held_out_limit,
            reasoning=config.reasoning,
            batch_size=4 * config.batch_size,
        )
        write_json(unfinished / "judge.json", facts | found)


def _compare(trained: nn.Module, written: nn.Module) -> None:
    """Prove that two models have the same weights.

    Raises:
        SelfCheckError: they have not.
    """
    read = dict(written.named_parameters())
    for name, parameter in trained.named_parameters():
        if name not in read or not torch.equal(parameter.detach(), read[name]):
            raise SelfCheckError(
                f"need the written weights to be the trained ones, got other {name}"
            )
