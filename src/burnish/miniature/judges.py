"""The miniature's judge: pictures, raters who look at them, and one tiny model for all dimensions.

A judge has to be right where the policy draws, so its pictures are of two kinds. Some are rendered,
with and without flaws, and passed through the base's autoencoder, so that no judge can tell them by
their crisp edges; they hold what a trained policy may come to draw. Others are drawn by the base
itself, at random guidance, with the smears and half-made things that no list of flaws holds. The
portrait dimension has a set of its own, as in the paper (arXiv 2606.27608, section 3.2), because
elsewhere hands and eyes are nearly always right.
Several pictures of each prompt make a pair group, because training by groups asks for differences
within a prompt.

A model with random weights first learns to see (`miniature/sight.py`), as a judge at full size
starts from one that can; then `burnish.reward_training` trains it, the same code as at full size.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from burnish import checkpoint, images
from burnish.annotations.base import write_annotations
from burnish.annotations.schema import Annotation
from burnish.config import located
from burnish.miniature.base_model import reconstructed
from burnish.miniature.pictures import draw_edit, draw_scene, pixel_flaw, to_bytes
from burnish.miniature.prompt_sets import edit_prompt, scene_prompt
from burnish.miniature.sight import SightPlan, learn_to_see, sample_texts
from burnish.miniature.tokenizer import build_tokenizer
from burnish.policies.qwen_assembly import assemble
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.reward_training import RewardTrainingConfig, SourceConfig, train_judge
from burnish.rollout import draw
from burnish.runtime import Runtime, derived_seed, seeded
from burnish.tracking import progress, track, writing
from burnish.types import Prompt
from burnish.world.edits import Edit
from burnish.world.flaws import spoil
from burnish.world.raters import ANATOMY, Raters, rate_edit, rate_scene
from burnish.world.render import render
from burnish.world.scenes import Scene

SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    # 8 x 8 patches, merged two by two: sixteen tokens for a picture of 64 x 64.
    "vision": {
        "patch_size": 8,
        "hidden_size": 160,
        "intermediate_size": 320,
        "depth": 4,
        "num_heads": 5,
        "num_position_embeddings": 64,
    },
}
"""The judge's sizes, as differences from those of `assemble`."""
VOCABULARY = 900
"""Of the judge's tokenizer, without special tokens."""
ORIGIN = "Burnish, the embedded world"
LICENCE = "Apache-2.0"
CATEGORY_OF = {"portraits": "portrait"}
"""Sets of one category."""
JUDGES: dict[str, dict[str, Any]] = {
    "judge": {},
    "judge_pairwise": {"loss": "pairwise", "batch_size": 16},
}
"""The judges that ship, by name of their folder, and what is special about their training. Two
pictures make a pair, so the control arm reads as many pictures in a step."""
_BLOCK = 16
"""Prompts that are worked on together."""


@dataclass(frozen=True, kw_only=True)
class PicturesPlan:
    """How many annotated pictures, and of what kind."""

    rendered_scenes: int = 1500
    """Prompts whose pictures are rendered."""
    rendered_edits: int = 1100
    portraits: int = 700
    """Prompts of the portrait set, rendered: most of its pictures have a wrong hand or eyes."""
    sampled_scenes: int = 1500
    """Prompts whose pictures the base draws."""
    sampled_edits: int = 1100
    members: int = 5
    """Pictures of each prompt."""
    num_steps: int = 6
    """Sampler steps of the base."""
    guidance: tuple[float, float] = (1.0, 3.0)
    """Range of the base's guidance scale."""
    held_out: bool = False
    """Only combinations that no model of the miniature is trained on, instead of none of them."""
    seed: int = 0


@dataclass(frozen=True)
class _Subject:
    """A prompt and what is right for it."""

    prompt: Prompt
    wanted: Scene | Edit


def annotated_pictures(base: QwenImage21Policy, plan: PicturesPlan) -> list[Annotation]:
    """Pictures of the embedded world with the opinions of raters.

    Alignment and aesthetic of every picture drawn from text, and the anatomy of portraits;
    instruction and aesthetic of every edit. A function of the base and the plan.

    Args:
        base: whose autoencoder all pictures pass, and who draws half of them.
        plan: how many.
    """
    kinds = [
        ("rendered", "t2i", plan.rendered_scenes),
        ("rendered", "edit", plan.rendered_edits),
        ("portraits", "t2i", plan.portraits),
        ("sampled", "t2i", plan.sampled_scenes),
        ("sampled", "edit", plan.sampled_edits),
    ]
    raters = Raters.hire(seed=plan.seed)
    found: list[Annotation] = []
    for made, task, count in kinds:
        name = f"{made}-{task}"
        rng = np.random.default_rng(derived_seed(plan.seed, "annotated pictures", name))
        subjects = [
            _subject(f"{name}-{number}", task, rng, CATEGORY_OF.get(made), plan.held_out)
            for number in range(count)
        ]
        blocks = [subjects[start : start + _BLOCK] for start in range(0, count, _BLOCK)]
        for block in track(blocks, f"{made} pictures, {task}"):
            pictures = (
                _sampled(base, block, plan, rng)
                if made == "sampled"
                else _rendered(
                    base, block, plan, rng, spoilt=ANATOMY if made == "portraits" else ()
                )
            )
            for subject, group in zip(block, pictures, strict=True):
                found += _opinions(subject, group, raters, rng)
    return found


def write_pictures(out: Path, plan: PicturesPlan) -> Path:
    """Write `annotated_pictures` of the embedded base into a folder; returns the file."""
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    path = out / "pictures.jsonl"
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        write_annotations(path, annotated_pictures(base, plan))
    return path


def new_judge(texts: Sequence[str]) -> tuple[Any, Any]:
    """A tiny `Qwen3VLForConditionalGeneration` with random weights, and its processor.

    Args:
        texts: what judges write; its tokenizer has words for that.
    """
    with seeded(0, "new judge"):
        pipeline = assemble(build_tokenizer(more=texts, size=VOCABULARY), encoder=SIZES)
    model = pipeline.text_encoder
    # A third faster than the fused kinds at these sizes.
    model.set_attn_implementation("eager")
    return model, pipeline.processor


def judge_config(model: Path, annotations: Path, **changes: Any) -> RewardTrainingConfig:
    """How the miniature's judge is trained; `changes` replace single settings.

    Args:
        model: the folder of `new_judge`.
        annotations: the file of `annotated_pictures`.
        changes: by name of the setting.
    """
    settings: dict[str, Any] = {
        "path": str(model),
        "annotations": (SourceConfig(path=str(annotations)),),
        "rubrics": "embedded:rubrics",
        "lora_rank": 0,
        "learning_rate": 5e-4,
        "warmup_steps": 50,
        "batch_size": 32,
        # About one epoch of two processes.
        "steps": 900,
        "held_out_limit": 500,
        # A model from nothing has neither mode.
        "skip_reasoning": 0.15,
        "save_every": 250,
    }
    return RewardTrainingConfig(**{**settings, **changes})


def train_miniature_judge(
    out: Path,
    base_folder: Path,
    rt: Runtime,
    *,
    name: str = "judge",
    pictures: PicturesPlan | None = None,
    sight: SightPlan | None = None,
    **changes: Any,
) -> Path:
    """Make the annotations, teach a new model to see, then train a judge of all dimensions.

    What is there already is not made again, so a call that was cut off goes on where it stood.

    Args:
        out: made if missing; gets `annotations/`, `sighted/` (what judges start from) and the run
            of the judge.
        base_folder: the base model, as its pipeline is written.
        rt: precision and ranks; bfloat16 pays on processors that have it.
        name: of the run's folder.
        pictures: how many annotated pictures.
        sight: how the model learns to see.
        changes: settings of the training that differ from `judge_config`.

    Returns:
        The judge's folder.
    """
    annotations, sighted = out / "annotations" / "pictures.jsonl", out / "sighted"
    base = QwenImage21Policy.load(base_folder, resolution=64)
    if rt.is_main and not annotations.is_file():
        write_annotations(annotations, annotated_pictures(base, pictures or PicturesPlan()))
    rt.barrier()
    if not (sighted / "config.json").is_file():
        _teach_to_see(out, base, sight or SightPlan(), rt)
    rt.barrier()
    config = judge_config(sighted, annotations, **changes)
    return train_judge(config, out / name, rt)


def _teach_to_see(out: Path, base: QwenImage21Policy, plan: SightPlan, rt: Runtime) -> None:
    """Write `out/sighted`, a model that can describe pictures and has not judged any."""
    model, processor = new_judge(list(sample_texts(1500)))
    folder = out / "checkpoints" / "sight"
    with progress("sight", plan.steps, done=max(checkpoint.steps(folder), default=0)) as bar:
        learn_to_see(
            model,
            processor,
            base,
            plan,
            rt,
            folder=folder,
            on_step=lambda found: bar.advance(
                note=", ".join(f"{name} {value:.3f}" for name, value in found.items())
            ),
        )
    if rt.is_main:
        unfinished = out / ".sighted.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        unfinished.replace(out / "sighted")


def _subject(
    name: str, task: str, rng: np.random.Generator, category: str | None, held_out: bool
) -> _Subject:
    if task == "edit":
        edit = draw_edit(rng, held_out=held_out)
        return _Subject(edit_prompt(name, edit), edit)
    scene = draw_scene(rng, category, held_out=held_out)
    return _Subject(scene_prompt(name, scene, rng), scene)


def _rendered(
    base: QwenImage21Policy,
    block: Sequence[_Subject],
    plan: PicturesPlan,
    rng: np.random.Generator,
    spoilt: Sequence[str] = (),
) -> list[list[np.ndarray]]:
    """Right and flawed pictures of each subject, as the autoencoder gives them back.

    Args:
        base: whose autoencoder that is.
        block: the subjects.
        plan: how many of each.
        rng: of the flaws.
        spoilt: attributes that are wrong in most pictures; empty for any.
    """
    drawn = [to_bytes(p) for s in block for p in _versions(s.wanted, plan.members, rng, spoilt)]
    return _grouped(list(reconstructed(base, np.stack(drawn))), plan.members)


def _versions(
    wanted: Scene | Edit, count: int, rng: np.random.Generator, spoilt: Sequence[str] = ()
) -> Iterator[np.ndarray]:
    """The right picture, and others of which each misses something, or is spoilt, or both."""
    right = wanted.target if isinstance(wanted, Edit) else wanted
    yield render(right)
    for _ in range(count - 1):
        shown, draw_of = right, rng.random()
        if isinstance(wanted, Edit) and draw_of < 0.3:
            shown = wanted.source
        elif draw_of < 0.75:
            shown = spoil(right, rng, spoilt)
            if rng.random() < 0.3 and _shows_something(shown):
                shown = spoil(shown, rng)
        pixels = render(shown)
        if shown is right or rng.random() < 0.4:
            pixels = pixel_flaw(pixels, rng)
        yield pixels


def _shows_something(scene: Scene) -> bool:
    """Whether there is anything left to spoil."""
    return scene.values.get("0.shape") != "none"


def _sampled(
    base: QwenImage21Policy, block: Sequence[_Subject], plan: PicturesPlan, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """Pictures of each subject that the base draws, each round at a guidance of its own."""
    prompts = [subject.prompt for subject in block]
    rounds = []
    for _ in range(plan.members):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn = draw(
                base,
                prompts,
                num_steps=plan.num_steps,
                guidance_scale=float(rng.uniform(*plan.guidance)),
                seeds=[int(seed) for seed in rng.integers(2**31, size=len(prompts))],
            )
        rounds.append(_bytes_of(drawn))
    return [list(pictures) for pictures in zip(*rounds, strict=True)]


def _bytes_of(batch: torch.Tensor) -> list[np.ndarray]:
    pixels = batch.float().clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return [to_bytes(picture) for picture in pixels]


def _grouped(pictures: Sequence[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [list(pictures[start : start + size]) for start in range(0, len(pictures), size)]


def _opinions(
    subject: _Subject, pictures: Sequence[np.ndarray], raters: Raters, rng: np.random.Generator
) -> Iterator[Annotation]:
    """What the raters say of each picture of one prompt."""
    prompt, wanted = subject.prompt, subject.wanted
    for number, picture in enumerate(pictures):
        # What was written to the file is what is rated.
        seen = picture.astype(np.float32) / 255
        opinions = (
            rate_edit(seen, wanted, raters, rng)
            if isinstance(wanted, Edit)
            else rate_scene(seen, wanted, raters, rng)
        )
        output = images.encode_png(Image.fromarray(picture))
        for opinion in opinions:
            yield Annotation(
                id=f"{prompt.id}-{number}-{opinion.dimension}",
                task=prompt.task,
                prompt=prompt.text,
                sources=() if prompt.source is None else (prompt.source,),
                output=output,
                dimension=opinion.dimension,
                score_mean=opinion.mean,
                score_std=opinion.std,
                num_raters=opinion.num_raters,
                reasoning=opinion.reasoning,
                pair_group=prompt.id,
                category=prompt.category,
                licence=LICENCE,
                origin=ORIGIN,
            )
