"""The vision tower of the miniature's judge, taught to recognise before the rest learns to speak.

At full size a vision-language model is put together from a vision tower that was trained before.
From random weights a whole judge learns what is large soon and a mouth or a row of eyes hardly at
all, because few of the words that it learns to write depend on them. Here each attribute of a scene
and each flaw of a picture has a linear head of its own on the tower's last features; the heads are
thrown away. This is also three times cheaper than learning through the language model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from burnish.miniature.base_model import reconstructed
from burnish.miniature.fitting import FittingPlan, fit
from burnish.miniature.pictures import draw_scene, to_bytes
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.runtime import Runtime, derived_seed, seeded
from burnish.world.flaws import PIXEL_FLAWS, is_visible, otherwise
from burnish.world.render import render
from burnish.world.scenes import DOMAINS, Scene, Value

_OBJECT = ("shape", "colour", "size", "place", "count")
CLASSES: dict[str, tuple[Value, ...]] = {
    **DOMAINS,
    **{f"{n}.{name}": DOMAINS[name] for n in range(2) for name in _OBJECT},
    **{f"{n}.shape": (*DOMAINS["shape"], "none") for n in range(2)},
    "flaw": ("none", *sorted(PIXEL_FLAWS)),
}
"""What is recognised: key of a scene, or `flaw`, -> its values."""
_LEFT_OUT = -100
"""Of the loss: what a picture does not have or show, and words that are misspelt."""


@dataclass(frozen=True, kw_only=True)
class EyesPlan(FittingPlan):
    """How long and how fast the tower learns."""

    steps: int = 700


def to_recognise(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """A picture, uint8 `64 64 3`, and the class of each key of `CLASSES`."""
    scene = otherwise(draw_scene(rng), rng, share=0.3)
    names = CLASSES["flaw"]
    flaw = names[0] if rng.random() < 0.7 else names[int(rng.integers(1, len(names)))]
    pixels = render(scene)
    if flaw != "none":
        pixels = PIXEL_FLAWS[str(flaw)](pixels)
    return to_bytes(pixels), classes({**_shown(scene), "flaw": flaw})


def _shown(scene: Scene) -> dict[str, Value]:
    return {key: value for key, value in scene.values.items() if is_visible(scene, key)}


def classes(values: dict[str, Value]) -> list[int]:
    """The class of each key; what is not there is left out of the loss."""
    return [
        options.index(values[key]) if values.get(key) in options else _LEFT_OUT
        for key, options in CLASSES.items()
    ]


class Heads(nn.Module):
    """A linear classifier of each key, which looks at one picture's tokens where it likes.

    A language model will read the tokens in the same way: by attention, and what it looks for
    stands in the features. A classifier of all tokens side by side is learnt in half the steps, but
    of what it finds in the differences between places the language model reads nothing.
    """

    def __init__(self, width: int) -> None:
        """Heads for tokens of a width; at first they look at all tokens alike."""
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(len(CLASSES), width))
        self.classes = nn.Linear(width, sum(map(len, CLASSES.values())))
        sizes = torch.tensor([len(options) for options in CLASSES.values()])
        self.keys = torch.arange(len(CLASSES)).repeat_interleave(sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        """`picture token feature` -> logits `picture class`, of all keys side by side."""
        normed = nn.functional.rms_norm(tokens, tokens.shape[-1:])
        looks = (normed @ self.queries.T).softmax(dim=1)
        found = looks.transpose(1, 2) @ normed
        return (found[:, self.keys] * self.classes.weight).sum(dim=2) + self.classes.bias


def recognition_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy over all keys that pictures have, and the share recognised of each key.

    Args:
        logits: `picture class`, the classes of all keys side by side.
        wanted: `picture key`.
    """
    parts = logits.float().split([len(options) for options in CLASSES.values()], dim=1)
    losses, right = [], {}
    for key, part, own in zip(CLASSES, parts, wanted.unbind(dim=1), strict=True):
        there = own != _LEFT_OUT
        if bool(there.any()):
            losses.append(nn.functional.cross_entropy(part[there], own[there], reduction="sum"))
            right[key] = float((part[there].argmax(dim=1) == own[there]).float().mean())
    return torch.stack(losses).sum() / (wanted != _LEFT_OUT).sum(), right


def learn_to_recognise(
    visual: Any,
    processor: Any,
    base: QwenImage21Policy,
    plan: EyesPlan,
    rt: Runtime,
    *,
    folder: Path | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda found: None,
) -> list[dict[str, float]]:
    """Train a Qwen-VL vision tower in place to recognise; it ends as its average.

    Args:
        visual: the tower.
        processor: whose image processor cuts pictures into patches.
        base: whose autoencoder the pictures pass.
        plan: how long and how fast.
        rt: ranks that share each step.
        folder: checkpoints go here, and a training that was cut off goes on from the newest.
        on_step: called with the figures of each step done now.

    Returns:
        Loss and share recognised of every step, over all keys and of each.
    """
    with seeded(plan.seed, "heads"):
        heads = Heads(visual.config.out_hidden_size)

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(derived_seed(plan.seed, "eyes", step, rt.rank))
        drawn, wanted = zip(*(to_recognise(rng) for _ in range(plan.batch_size)), strict=True)
        seen = reconstructed(base, np.stack(drawn))
        inputs = processor.image_processor(
            images=[Image.fromarray(picture) for picture in seen], return_tensors="pt"
        )
        with rt.autocast():
            found = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
            logits = heads(found.pooler_output.unflatten(0, (plan.batch_size, -1)))
        loss, right = recognition_loss(logits, torch.tensor(wanted))
        return loss, {"loss": float(loss.detach()), **right}

    modules = nn.ModuleList([visual, heads])
    return fit(modules, visual.blocks, plan, rt, losses, folder=folder, on_step=on_step)
