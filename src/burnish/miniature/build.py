"""Build the miniature from nothing: tokenizer, autoencoder, base model, prompt sets, model card.

    burnish miniature build --out DIR         everything, on two cores
    burnish miniature build --out DIR --quick a reduced version that only shows that it learns

Started by torchrun, the processes share the work of each step:

    torchrun --nproc-per-node 2 -m burnish miniature build --out DIR
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from burnish import runtime
from burnish.miniature.autoencoder import AutoencoderPlan, train_autoencoder
from burnish.miniature.base_model import (
    ENCODER_SIZES,
    SIZES,
    BasePlan,
    examples,
    make_pool,
    train_base,
)
from burnish.miniature.pictures import edit_example, text_example
from burnish.miniature.prompt_sets import prompt_sets
from burnish.miniature.tokenizer import build_tokenizer
from burnish.policies.qwen_assembly import assemble
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import write_prompts
from burnish.runtime import Runtime
from burnish.tracking import Progress, progress, write_atomic

SEED = 0


def build(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Build everything below `out`: `weights/base` and `prompts`.

    Args:
        out: made if missing; existing files are replaced.
        quick: far fewer examples and steps; the models learn, but draw badly.

    Returns:
        What the card says: losses, counts, minutes.
    """
    rt = runtime.start(runtime.RuntimeConfig(threads=1))
    started = time.monotonic()
    counts = (300, 200) if quick else (14_000, 9_000)
    texts = list(examples(text_example, counts[0], SEED + 1))
    edits = list(examples(edit_example, counts[1], SEED + 2))
    policy = QwenImage21Policy(_assemble(), resolution=64)
    facts: dict[str, Any] = {"seed": SEED, "text_examples": counts[0], "edit_examples": counts[1]}
    pixels = np.stack([e.pixels for e in texts + edits])
    plan = AutoencoderPlan(steps=60, decoder_steps=20) if quick else AutoencoderPlan()
    facts["autoencoder_loss"] = _train_autoencoder(policy, pixels, plan, rt)
    base_plan = BasePlan(steps=60, batch_size=16) if quick else BasePlan()
    with _losses("base model", base_plan.steps) as losses:
        train_base(
            policy,
            make_pool(policy, texts),
            make_pool(policy, edits),
            replace(base_plan, seed=SEED),
            rt,
            on_step=losses.add,
        )
    facts |= {f"base_loss_{task}": ends for task, ends in losses.ends().items()}
    facts["minutes"] = round((time.monotonic() - started) / 60, 1)
    facts["processes"] = rt.world_size
    if rt.is_main:
        policy.save(out / "weights" / "base")
        store_half(out / "weights" / "base")
        write_card(out / "weights" / "base", facts)
        for name, prompts in prompt_sets().items():
            write_prompts(out / "prompts" / f"{name}.jsonl", prompts)
    return facts


def _assemble() -> Any:
    torch.manual_seed(SEED)
    return assemble(build_tokenizer(SEED), transformer=SIZES, encoder=ENCODER_SIZES)


def _train_autoencoder(
    policy: QwenImage21Policy, pixels: np.ndarray, plan: AutoencoderPlan, rt: Runtime
) -> list[float]:
    """Train on random pictures of the pool and put the result into the pipeline; first and last
    loss."""
    rng = np.random.default_rng([SEED, rt.rank])
    torch.manual_seed(SEED)

    def draw(count: int) -> np.ndarray:
        return pixels[rng.integers(len(pixels), size=count)]

    with _losses("autoencoder", plan.steps + plan.decoder_steps) as losses:
        vae = train_autoencoder(
            draw, plan, rt, on_step=lambda step, loss: losses.add(step, {"pixels": loss})
        )
    policy.pipeline.register_modules(vae=vae)
    policy.vae = vae.requires_grad_(False)
    return losses.ends()["pixels"]


@dataclass
class _Losses:
    """Losses of a training by name, shown while it runs."""

    bar: Progress
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, found: dict[str, float]) -> None:
        for name, value in found.items():
            self.values.setdefault(name, []).append(value)
        self.bar.advance(
            note=", ".join(f"{k} {np.mean(v[-20:]):.4f}" for k, v in self.values.items())
        )

    def ends(self) -> dict[str, list[float]]:
        """Mean of the first and of the last tenth of each loss."""
        found = {}
        for name, values in self.values.items():
            tenth = max(1, len(values) // 10)
            parts = (values[:tenth], values[-tenth:])
            found[name] = [round(float(np.mean(part)), 5) for part in parts]
        return found


@contextlib.contextmanager
def _losses(label: str, steps: int) -> Iterator[_Losses]:
    with progress(label, steps) as bar:
        yield _Losses(bar)


def store_half(folder: Path) -> None:
    """Rewrite all float32 weights below a folder as float16: half the package, the same pictures.

    The configs go on saying float32, so that whoever loads the pipeline computes in float32.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        halves = {
            name: tensor.half() if tensor.dtype == torch.float32 else tensor
            for name, tensor in load_file(file).items()
        }
        if not all(bool(tensor.isfinite().all()) for tensor in halves.values()):
            raise ValueError(f"need weights that float16 can hold, got larger ones in {file}")
        save_file(halves, file, metadata={"format": "pt"})


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """The model card beside the weights: data, seed, metrics, how to rebuild."""
    lines = [
        "# Burnish miniature: base model",
        "",
        "A `QwenImage21Pipeline` of tiny parts (Apache-2.0), trained from random weights on",
        "pictures that Burnish's own renderer drew: no data of others. It draws 64 x 64 pictures",
        "from text and edits them. Six in ten of its training pictures carry one flaw on purpose,",
        "so that reinforcement learning has something to gain; it is a laboratory, not a product.",
        "",
        "Rebuild it with `torchrun --nproc-per-node 2 -m burnish miniature build --out DIR`.",
        "",
        "```json",
        json.dumps(facts, indent=2),
        "```",
    ]
    write_atomic(folder / "README.md", "\n".join(lines) + "\n")
