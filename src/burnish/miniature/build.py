"""Build the miniature from nothing: tokenizer, autoencoder, base, judges, face embedder, prompts.

    burnish miniature build --out DIR         everything, on two cores
    burnish miniature build --out DIR --quick a reduced version that only shows that it learns

Started by torchrun, the processes share the work of each step:

    torchrun --nproc-per-node 2 -m burnish miniature build --out DIR
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from burnish import checkpoint, runtime
from burnish.miniature import cards
from burnish.miniature.annotated import PicturesPlan
from burnish.miniature.autoencoder import (
    AutoencoderKLQwenImage21,
    AutoencoderPlan,
    new_autoencoder,
    train_autoencoder,
)
from burnish.miniature.base_model import (
    ENCODER_SIZES,
    SIZES,
    BasePlan,
    examples,
    make_pool,
    train_base,
)
from burnish.miniature.eyes import EyesPlan
from burnish.miniature.faces import FacesPlan, build_faces
from burnish.miniature.judges import JUDGES, train_miniature_judge
from burnish.miniature.pictures import edit_example, text_example
from burnish.miniature.prompt_sets import prompt_sets
from burnish.miniature.sight import SightPlan
from burnish.miniature.tokenizer import build_tokenizer
from burnish.policies.parts.qwen_assembly import assemble
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.progress import Progress, progress
from burnish.prompts import write_prompts
from burnish.runtime import Runtime
from burnish.tracking import write_json

SEED = 0
_QUICK_BASE = BasePlan(steps=40, clean_steps=20, batch_size=8, ns_steps=1)


def build(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Build everything below `out`: the models in `weights`, and `prompts`.

    A build that was cut off goes on where its last checkpoint in `out/checkpoints` stands.

    Args:
        out: made if missing; existing files are replaced.
        quick: far fewer examples and steps; the models learn, but draw badly.

    Returns:
        What the card says: losses, counts, minutes.
    """
    rt = runtime.start(runtime.RuntimeConfig(threads=1))
    started = time.monotonic()
    counts = (160, 120) if quick else (24_000, 16_000)
    texts = list(examples(text_example, counts[0], SEED + 1))
    edits = list(examples(edit_example, counts[1], SEED + 2))
    policy = QwenImage21Policy(_assemble(), resolution=64)
    facts: dict[str, Any] = {"seed": SEED, "text_examples": counts[0], "edit_examples": counts[1]}
    pixels = np.stack([e.pixels for e in texts + edits])
    plan = AutoencoderPlan(steps=40, decoder_steps=12) if quick else AutoencoderPlan()
    # Apart, or a whole build would take over what a reduced one left in the same place.
    folder = out / "checkpoints" / ("reduced" if quick else "whole")
    facts["autoencoder_loss"] = _train_autoencoder(policy, pixels, plan, rt, folder / "autoencoder")
    base_plan = _QUICK_BASE if quick else BasePlan()
    done = max(checkpoint.steps(folder / "base"), default=0)
    with _losses("base model", base_plan.steps, done) as shown:
        losses = train_base(
            policy,
            make_pool(policy, texts),
            make_pool(policy, edits),
            replace(base_plan, seed=SEED),
            rt,
            folder=folder / "base",
            on_step=shown.add,
        )
    facts |= {f"base_loss_{task}": ends for task, ends in _ends(losses).items()}
    facts |= {"autoencoder_steps": plan.steps + plan.decoder_steps, "base_steps": base_plan.steps}
    facts |= {"processes": rt.world_size, "batch_of_each_process": base_plan.batch_size}
    if not done:
        facts["minutes"] = round((time.monotonic() - started) / 60, 1)
    if rt.is_main:
        policy.save(out / "weights" / "base")
        store_half(out / "weights" / "base")
        cards.write_base_card(out / "weights" / "base", facts)
        for name, prompts in prompt_sets().items():
            write_prompts(out / "prompts" / f"{name}.jsonl", prompts)
    rt.barrier()
    facts["judges"] = _build_judges(out, folder / "judge", rt, quick=quick)
    if rt.is_main:
        facts["face"] = _build_faces(out, quick=quick)
    rt.barrier()
    return facts


def _build_judges(out: Path, folder: Path, rt: Runtime, *, quick: bool) -> dict[str, Any]:
    """Train the judge on pictures of the base below `out`, and the pairwise control arm of the same
    start; agreement of each with held-out raters."""
    pictures, eyes, sight, changes = PicturesPlan(), EyesPlan(), SightPlan(), {}
    if quick:
        pictures = PicturesPlan(
            rendered_scenes=8,
            rendered_edits=6,
            portraits=2,
            mismatched_scenes=2,
            mismatched_edits=2,
            sampled_scenes=4,
            sampled_edits=4,
            members=3,
        )
        eyes, sight = EyesPlan(steps=4, batch_size=8), SightPlan(steps=4, batch_size=8, texts=50)
        changes = {"steps": 4, "batch_size": 8, "held_out": 0.2, "reasoning": False}
    found = {}
    for name, settings in JUDGES.items():
        trained = train_miniature_judge(
            folder,
            out / "weights" / "base",
            rt,
            name=name,
            pictures=pictures,
            eyes=eyes,
            sight=sight,
            rationales=6 if quick else 8000,
            **{**settings, **changes},
        )
        facts = json.loads((trained / "judge.json").read_text(encoding="utf-8"))
        found[name] = facts["held_out"]
        if rt.is_main:
            ship_judge(trained, out / "weights" / name)
        rt.barrier()
    return found


def _build_faces(out: Path, *, quick: bool) -> dict[str, Any]:
    """Train the face embedder on what the autoencoder of the base below `out` gives back."""
    base = QwenImage21Policy.load(out / "weights" / "base", resolution=64)
    plan = FacesPlan(portraits=120, others=24, steps=4) if quick else FacesPlan()
    measured = build_faces(base, plan, out / "weights" / "face")
    cards.write_face_card(out / "weights" / "face", measured, plan)
    return measured


def ship_judge(trained: Path, folder: Path) -> None:
    """Copy a trained judge in half precision, without the places of the machine it was trained on.

    Args:
        trained: what `train_miniature_judge` returned.
        folder: replaced if it is there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder)
    store_half(folder)
    facts = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    write_json(folder / "judge.json", {key: facts[key] for key in facts if key != "base"})
    cards.write_judge_card(folder, facts)


def _assemble() -> Any:
    torch.manual_seed(SEED)
    return assemble(build_tokenizer(SEED), transformer=SIZES, encoder=ENCODER_SIZES)


def _train_autoencoder(
    policy: QwenImage21Policy, pixels: np.ndarray, plan: AutoencoderPlan, rt: Runtime, folder: Path
) -> list[float]:
    """Train on random pictures of the pool and put the result into the pipeline; first and last
    loss. What a build that was cut off had finished is taken over."""
    if found := checkpoint.latest(folder):
        vae = new_autoencoder(**found.state["statistics"])
        vae.load_state_dict(dict(found.tensors["autoencoder"]))
        _take_over(policy, vae.eval())
        return found.state["loss"]
    rng = np.random.default_rng([SEED, rt.rank])
    torch.manual_seed(SEED)

    def draw(count: int) -> np.ndarray:
        return pixels[rng.integers(len(pixels), size=count)]

    with _losses("autoencoder", plan.steps + plan.decoder_steps) as shown:
        vae = train_autoencoder(
            draw, plan, rt, on_step=lambda step, loss: shown.add({"pixels": loss})
        )
    ends = _ends(shown.losses)["pixels"]
    if rt.is_main:
        statistics = {"mean": vae.config["latents_mean"], "std": vae.config["latents_std"]}
        state = {"statistics": statistics, "loss": ends}
        checkpoint.save(folder, plan.steps, {"autoencoder": vae.state_dict()}, state)
    _take_over(policy, vae)
    return ends


def _take_over(policy: QwenImage21Policy, vae: AutoencoderKLQwenImage21) -> None:
    policy.pipeline.register_modules(vae=vae)
    policy.vae = vae.requires_grad_(False)


@dataclass
class _Losses:
    """Losses of a training, one entry for each step, shown while it runs."""

    bar: Progress
    losses: list[dict[str, float]] = field(default_factory=list)

    def add(self, found: dict[str, float]) -> None:
        self.losses.append(found)
        means = _by_name(self.losses[-30:])
        self.bar.advance(note=", ".join(f"{k} {np.mean(v):.4f}" for k, v in means.items()))


@contextlib.contextmanager
def _losses(label: str, steps: int, done: int = 0) -> Iterator[_Losses]:
    with progress(label, steps, done=done) as bar:
        yield _Losses(bar)


def _by_name(losses: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = sorted({name for found in losses for name in found})
    return {name: [found[name] for found in losses if name in found] for name in names}


def _ends(losses: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Mean of the first and of the last tenth of each loss."""
    ends = {}
    for name, values in _by_name(losses).items():
        tenth = max(1, len(values) // 10)
        parts = (values[:tenth], values[-tenth:])
        ends[name] = [round(float(np.mean(part)), 5) for part in parts]
    return ends


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
