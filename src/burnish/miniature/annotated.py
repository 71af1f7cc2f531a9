"""Annotated pictures of the embedded world: what its raters say of right and wrong pictures.

A judge has to be right where the policy draws, so its pictures are of two kinds. Some are rendered,
with and without flaws, and passed through the base's autoencoder, so that no judge can tell them by
their crisp edges; they hold what a trained policy may come to draw. Others are drawn by the base
itself, at random guidance, with the smears and half-made things that no list of flaws holds. The
portrait dimension has a set of its own, as in the paper (arXiv 2606.27608, section 3.2), because
elsewhere hands and eyes are nearly always right. And there are pictures that do not fit their
prompt at all: where nearly everything is as asked, a judge does well to take what was asked for
what it sees. Several pictures of each prompt make a pair group, because training by groups asks for
differences within a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from burnish import images
from burnish.annotations.base import write_annotations
from burnish.annotations.schema import Annotation
from burnish.config import located
from burnish.miniature.base_model import reconstructed
from burnish.miniature.pictures import draw_edit, draw_scene, pixel_flaw, to_bytes
from burnish.miniature.prompt_sets import edit_prompt, scene_prompt
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.progress import track
from burnish.rollout import draw
from burnish.runtime import derived_seed, quick
from burnish.tracking import writing
from burnish.types import Guidance, Prompt
from burnish.world.edits import Edit
from burnish.world.flaws import otherwise, spoil
from burnish.world.oracle import ANATOMY
from burnish.world.raters import Raters, rate_edit, rate_scene
from burnish.world.render import render
from burnish.world.scenes import Scene

ORIGIN = "Burnish, the embedded world"
LICENCE = "Apache-2.0"
CATEGORY_OF = {"portraits": "portrait"}
"""Sets of one category."""
CHANGES: dict[str, Callable[[Scene, np.random.Generator], Scene]] = {
    "rendered": spoil,
    "portraits": partial(spoil, names=ANATOMY),
    "mismatched": partial(otherwise, share=0.35),
}
"""What is wrong with the content of rendered pictures."""
SET_FOR_CONTENT = frozenset({"portraits", "mismatched"})
"""Sets that nobody is asked to rate for beauty: the others hold enough of that."""
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
    mismatched_scenes: int = 900
    """Prompts of which a third is otherwise in most rendered pictures."""
    mismatched_edits: int = 700
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

    Alignment of every picture drawn from text, and the anatomy of portraits; instruction of every
    edit; aesthetic outside `SET_FOR_CONTENT`. A function of the base and the plan.

    Args:
        base: whose autoencoder all pictures pass, and who draws half of them.
        plan: how many.
    """
    kinds = [
        ("rendered", "t2i", plan.rendered_scenes),
        ("rendered", "edit", plan.rendered_edits),
        ("portraits", "t2i", plan.portraits),
        ("mismatched", "t2i", plan.mismatched_scenes),
        ("mismatched", "edit", plan.mismatched_edits),
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
                else _rendered(base, block, plan, rng, CHANGES[made])
            )
            for subject, group in zip(block, pictures, strict=True):
                found += _opinions(subject, made, group, raters, rng)
    return found


def write_pictures(out: Path, plan: PicturesPlan) -> Path:
    """Write `annotated_pictures` of the embedded base into a folder; returns the file."""
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    path = out / "pictures.jsonl"
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        write_annotations(path, annotated_pictures(base, plan))
    return path


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
    change: Callable[[Scene, np.random.Generator], Scene],
) -> list[list[np.ndarray]]:
    """Right and flawed pictures of each subject, as the autoencoder gives them back.

    Args:
        base: whose autoencoder that is.
        block: the subjects.
        plan: how many of each.
        rng: of the flaws.
        change: makes content wrong.
    """
    drawn = [to_bytes(p) for s in block for p in _versions(s.wanted, plan.members, rng, change)]
    return _grouped(list(reconstructed(base, np.stack(drawn))), plan.members)


def _versions(
    wanted: Scene | Edit,
    count: int,
    rng: np.random.Generator,
    change: Callable[[Scene, np.random.Generator], Scene],
) -> Iterator[np.ndarray]:
    """The right picture, and others of which each misses something, or is spoilt, or both."""
    right = wanted.target if isinstance(wanted, Edit) else wanted
    yield render(right)
    for _ in range(count - 1):
        shown, draw_of = right, rng.random()
        if isinstance(wanted, Edit) and draw_of < 0.3:
            shown = wanted.source
        elif draw_of < 0.75:
            shown = change(right, rng)
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
        with quick().autocast():
            drawn = draw(
                base,
                prompts,
                num_steps=plan.num_steps,
                guidance=Guidance(float(rng.uniform(*plan.guidance))),
                seeds=[int(seed) for seed in rng.integers(2**31, size=len(prompts))],
            )
        rounds.append(_bytes_of(drawn))
    return [list(pictures) for pictures in zip(*rounds, strict=True)]


def _bytes_of(drawn: Sequence[torch.Tensor]) -> list[np.ndarray]:
    return [to_bytes(one.float().clamp(0, 1).permute(1, 2, 0).numpy()) for one in drawn]


def _grouped(pictures: Sequence[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [list(pictures[start : start + size]) for start in range(0, len(pictures), size)]


def _opinions(
    subject: _Subject,
    made: str,
    pictures: Sequence[np.ndarray],
    raters: Raters,
    rng: np.random.Generator,
) -> Iterator[Annotation]:
    """What the raters say of each picture of one prompt, `made` in one of the ways of the plan."""
    prompt, wanted = subject.prompt, subject.wanted
    for number, picture in enumerate(pictures):
        # What was written to the file is what is rated.
        seen = picture.astype(np.float32) / 255
        opinions = (
            rate_edit(seen, wanted, raters, rng)
            if isinstance(wanted, Edit)
            else rate_scene(seen, wanted, raters, rng)
        )
        if made in SET_FOR_CONTENT:
            opinions = [opinion for opinion in opinions if opinion.dimension != "aesthetic"]
        output = images.encode_png(Image.fromarray(picture))
        for opinion in opinions:
            yield Annotation(
                id=f"{prompt.id}-{number}-{opinion.dimension}",
                task=prompt.task,
                prompt=prompt.text,
                sources=prompt.sources,
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
