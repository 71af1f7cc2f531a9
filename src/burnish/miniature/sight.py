"""How the miniature's judge learns to see, before it learns to judge.

At full size a judge starts from a model that can describe pictures. From random weights it would
have to learn that from judgements alone, and does not: most of what a prompt asks for is there, so
"as asked" is nearly always right, and copying the prompt explains most of what raters wrote. Here
the model first describes pictures with no prompt to copy from; and it checks pictures against
prompts of which half is otherwise, because where they nearly fit, what is asked for can pass for
what is seen. These are drawn as they are needed and pass the base's autoencoder, as all pictures do
that a judge gets to see. Between them it reads what raters wrote of the pictures that the judge's
own training holds, for what no drawing has: smears, and words for them. It never sees a score.

Everything is asked in the judge's own words and ends where the score will stand. With other words
the judge's training would begin by learning its checks again, and forget some.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from burnish.annotations.schema import Annotation
from burnish.config import located
from burnish.judges.lessons import END, pictures_of, spoken
from burnish.judging import MARKER, Rubric, question
from burnish.miniature.base_model import reconstructed
from burnish.miniature.fitting import FittingPlan, fit
from burnish.miniature.pictures import draw_edit, draw_scene, pixel_flaw, to_bytes
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.runtime import Runtime, derived_seed, generator
from burnish.world.edits import Edit
from burnish.world.flaws import alternatives, is_visible, otherwise, spoil
from burnish.world.grammar import say
from burnish.world.oracle import ANATOMY
from burnish.world.raters import by_weight, checks, words
from burnish.world.render import render
from burnish.world.scenes import Scene, attribute

DESCRIBE = Rubric("description", "Describe the picture.")
ALIGNMENT, AESTHETIC, PORTRAIT, INSTRUCTION = (
    Rubric.read(located(f"embedded:rubrics/{name}.md"))
    for name in ("alignment", "aesthetic", "portrait", "instruction")
)
ASKED = {rubric.dimension: rubric for rubric in (ALIGNMENT, AESTHETIC, PORTRAIT, INSTRUCTION)}
"""What the judge will be asked, by dimension."""

OTHERWISE = 0.5
"""Share of what is asked for that a picture shows otherwise: little is gained by guessing."""


@dataclass(frozen=True, kw_only=True)
class SightPlan(FittingPlan):
    """How long and how fast the judge learns to see."""

    steps: int = 700
    annotated: float = 0.4
    """Share of the steps that read what raters wrote."""
    shares: tuple[float, ...] = (0.08, 0.36, 0.12, 0.04, 0.4)
    """Shares of the other steps of each of `KINDS`."""
    texts: int = 1500
    """Of each kind, from which the tokenizer learns its words."""


@dataclass(frozen=True)
class Sight:
    """Pictures, uint8 `64 64 3`, the last of which is spoken of, and what is said."""

    pictures: tuple[np.ndarray, ...]
    text: str
    rubric: Rubric
    prompt: str = ""

    @property
    def said(self) -> str:
        """What the model writes: where a score will stand, up to there."""
        return f"{self.text}{END if self.rubric is DESCRIBE else MARKER}"


def describe(scene: Scene, is_clean: bool) -> str:
    """What a picture shows, in the words of raters: `picture clean, shape star, colour red`."""
    visible = [key for key in by_weight(scene.values) if is_visible(scene, key)]
    seen = [f"{words(key)} {scene.values[key]}" for key in visible]
    return ", ".join(["picture clean" if is_clean else "picture spoilt", *seen])


def one_picture(rng: np.random.Generator) -> Sight:
    """A scene, in part with something out of place as flawed pictures have it, in part spoilt."""
    scene = draw_scene(rng)
    if rng.random() < 0.4:
        scene = spoil(scene, rng)
    pixels, is_clean = _perhaps_spoilt(render(scene), rng, share=0.3)
    return Sight((pixels,), describe(scene, is_clean), DESCRIBE)


def checked_picture(rng: np.random.Generator) -> Sight:
    """A prompt, and a picture that has half of it otherwise."""
    scene = draw_scene(rng)
    shown = otherwise(scene, rng, share=OTHERWISE)
    pixels, _ = _perhaps_spoilt(render(shown), rng, share=0.2)
    keys = [k for k in scene.values if k not in scene.free and attribute(k) not in ANATOMY]
    return Sight((pixels,), _checked(keys, scene, shown), ALIGNMENT, say(scene, rng))


def checked_portrait(rng: np.random.Generator) -> Sight:
    """A portrait whose hand and eyes are often wrong."""
    scene = draw_scene(rng, "portrait")
    shown = otherwise(scene, rng, share=OTHERWISE)
    pixels, _ = _perhaps_spoilt(render(shown), rng, share=0.2)
    return Sight((pixels,), _checked(ANATOMY, scene, shown), PORTRAIT, say(scene, rng))


def checked_quality(rng: np.random.Generator) -> Sight:
    """A picture that is clean or spoilt as a whole."""
    scene = draw_scene(rng)
    pixels, is_clean = _perhaps_spoilt(render(scene), rng, share=0.5)
    said = "picture clean" if is_clean else "picture spoilt"
    return Sight((pixels,), said, AESTHETIC, say(scene, rng))


def checked_edit(rng: np.random.Generator) -> Sight:
    """An instruction, and what became of it."""
    edit = draw_edit(rng)
    shown, pictures = _outcome(edit, rng)
    rest = [k for k in shown.values if k not in edit.changes]
    said = (_checked(keys, edit.target, shown) for keys in (edit.changes, rest))
    return Sight(pictures, "; ".join(filter(None, said)), INSTRUCTION, edit.instruction)


KINDS = {
    "describe": one_picture,
    "alignment": checked_picture,
    "portrait": checked_portrait,
    "aesthetic": checked_quality,
    "instruction": checked_edit,
}
"""What the model learns, by name, in the order of `SightPlan.shares`."""


def _checked(keys: Iterable[str], wanted: Scene, shown: Scene) -> str:
    """Checks in the words of raters, of values that are right or plainly others."""
    checked = [
        key
        for key in keys
        if alternatives(wanted, key) and is_visible(wanted, key) and is_visible(shown, key)
    ]
    is_right = {key: float(wanted.values[key] == shown.values[key]) for key in checked}
    return checks(is_right, wanted, shown)


def _outcome(edit: Edit, rng: np.random.Generator) -> tuple[Scene, tuple[np.ndarray, ...]]:
    """What became of an instruction: done, not done, something else; the source and its picture."""
    shown, kind = edit.target, rng.random()
    if kind < 0.2:
        shown = edit.source
    elif kind < 0.7:
        shown = otherwise(edit.target, rng, share=OTHERWISE)
    pixels, _ = _perhaps_spoilt(render(shown), rng, share=0.2)
    return shown, (to_bytes(render(edit.source)), pixels)


def _perhaps_spoilt(
    pixels: np.ndarray, rng: np.random.Generator, share: float
) -> tuple[np.ndarray, bool]:
    """The picture, spoilt as a whole with a probability of `share`, and whether it is clean."""
    is_clean = rng.random() >= share
    if not is_clean:
        pixels = pixel_flaw(pixels, rng)
    return to_bytes(pixels), is_clean


def sample_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Some of what is said, and what raters alone say, for a tokenizer to learn from."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield from (make(rng).said.removesuffix(END) for make in KINDS.values())
        yield "picture slightly spoilt, seen unclear wrong"


def drawn(
    base: QwenImage21Policy,
    make: Callable[[np.random.Generator], Sight],
    count: int,
    rng: np.random.Generator,
) -> list[Sight]:
    """Sights of one kind, whose spoken-of pictures have passed an autoencoder."""
    sights = [make(rng) for _ in range(count)]
    outputs = reconstructed(base, np.stack([sight.pictures[-1] for sight in sights]))
    return [
        replace(sight, pictures=(*sight.pictures[:-1], output))
        for sight, output in zip(sights, outputs, strict=True)
    ]


def told(annotation: Annotation) -> Sight:
    """What raters wrote of a picture."""
    pictures = tuple(np.asarray(picture) for picture in pictures_of(annotation))
    return Sight(pictures, spoken(annotation), ASKED[annotation.dimension], annotation.prompt)


class Reader:
    """Pictures and texts as the tensors of a Qwen-VL model."""

    def __init__(self, processor: Any) -> None:
        """A reader for the model of a processor."""
        self._processor = processor

    def _asked(self, sight: Sight) -> str:
        turn = question(sight.rubric, sight.prompt, num_sources=len(sight.pictures) - 1)
        return self._processor.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )

    def __call__(self, sights: Sequence[Sight]) -> tuple[dict[str, Tensor], Tensor]:
        """What the model takes, padded on the left, and which tokens it learns to write.

        Args:
            sights: all with the same number of pictures.
        """
        tokenizer = self._processor.tokenizer
        inputs = self._processor(
            text=[f"{self._asked(sight)}{sight.said}" for sight in sights],
            images=[list(map(Image.fromarray, sight.pictures)) for sight in sights],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        said = tokenizer([sight.said for sight in sights])["input_ids"]
        written = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, ids in enumerate(said):
            written[row, -len(ids) :] = True
        return dict(inputs), written


def writing_loss(model: Any, inputs: dict[str, Tensor], written: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the written tokens, and the share of them that would be chosen."""
    width = int(written.sum(dim=1).max())
    logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1].float()
    there, ids = written[:, -width:], inputs["input_ids"][:, -width:]
    loss = torch.nn.functional.cross_entropy(logits[there], ids[there])
    return loss, (logits[there].argmax(dim=-1) == ids[there]).float().mean()


def learn_to_see(
    model: Any,
    processor: Any,
    base: QwenImage21Policy,
    annotations: Sequence[Annotation],
    plan: SightPlan,
    rt: Runtime,
    *,
    folder: Path | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda found: None,
) -> list[dict[str, float]]:
    """Train a Qwen-VL model in place to describe and to check; it ends as its average.

    Args:
        model: of random weights.
        processor: of the model.
        base: whose autoencoder the drawn pictures pass.
        annotations: what raters wrote; none that the judge's training holds out.
        plan: how long and how fast.
        rt: ranks that share each step.
        folder: checkpoints go here, and a training that was cut off goes on from the newest.
        on_step: called with the figures of each step done now.

    Returns:
        Loss and share of right tokens of every step, by kind.
    """
    reader = Reader(processor)
    shelves: dict[tuple[str, str], list[Annotation]] = {}
    for annotation in annotations:
        shelves.setdefault((annotation.dimension, annotation.task), []).append(annotation)

    def sights(step: int) -> tuple[str, list[Sight]]:
        draws = generator(plan.seed, "sight", step)
        rng = np.random.default_rng(derived_seed(plan.seed, "sight", step, rt.rank))
        if float(torch.rand(1, generator=draws)) < plan.annotated:
            # Each shelf as often as any other, or beauty would be most of what is read.
            shelf = list(shelves.values())[int(torch.randint(len(shelves), (), generator=draws))]
            rows = rng.integers(len(shelf), size=plan.batch_size)
            return "annotated", [told(shelf[row]) for row in rows]
        row = int(torch.multinomial(torch.tensor(plan.shares), 1, generator=draws))
        kind, make = list(KINDS.items())[row]
        return kind, drawn(base, make, plan.batch_size, rng)

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        kind, batch = sights(step)
        inputs, written = reader(batch)
        with rt.autocast():
            loss, right = writing_loss(model, inputs, written)
        return loss, {kind: float(loss.detach()), f"{kind}_right": float(right)}

    model.requires_grad_(False)
    language = nn.ModuleList([model.model.language_model, model.lm_head])
    layers = model.model.language_model.layers
    return fit(language, layers, plan, rt, losses, folder=folder, on_step=on_step)
