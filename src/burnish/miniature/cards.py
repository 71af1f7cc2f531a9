"""Model cards of the embedded models: data, seed, metrics, how to rebuild."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.miniature.faces import FacesPlan
from burnish.tracking import write_atomic


def write_base_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """The card of the base model."""
    lines = [
        "# Burnish miniature: base model",
        "",
        "A `QwenImage21Pipeline` of tiny parts (Apache-2.0), trained from random weights on",
        "pictures that Burnish's own renderer drew: no data of others. It draws 64 x 64 pictures",
        "from text and edits them. It saw good pictures first, then a mixture in which eight in",
        "ten carry one flaw on purpose, so that reinforcement learning has something to gain; it",
        "is a laboratory, not a product.",
        "",
        "Rebuild it with `torchrun --nproc-per-node 2 -m burnish miniature build --out DIR`.",
        "",
        "```json",
        json.dumps(facts, indent=2),
        "```",
    ]
    _write(folder, lines)


def write_judge_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """The card of a judge; `facts` are those of its judge.json."""
    lines = [
        "# Burnish miniature: judge",
        "",
        "A `Qwen3VLForConditionalGeneration` of 3.9 million parameters (Apache-2.0), trained from",
        "random weights on pictures of the embedded world: to describe and to check them, then",
        f"on the opinions of simulated raters, with the loss `{facts['loss']}`, then on what they",
        f"think after its own reasoning; {facts.get('start_share', 0):.0%} of each weight is that",
        "from before this last training. It reasons, then scores alignment, aesthetic, portrait",
        "and instruction from 1 to 5. Agreement with raters on prompts that it never saw:",
        "",
        "```json",
        json.dumps(facts["held_out"], indent=2),
        "```",
        "",
        "Rebuild it, base model first, with `burnish miniature build --out DIR`; examine it with",
        "`burnish reward report` on pictures of `burnish miniature annotate`.",
    ]
    _write(folder, lines)


def write_face_card(folder: Path, measured: Mapping[str, float], plan: FacesPlan) -> None:
    """The card of the face embedder."""
    lines = [
        "# Burnish miniature: face embedder",
        "",
        "A small convolutional network (Apache-2.0) that turns a 64 x 64 picture of the embedded",
        "world into a unit vector of 64 numbers and says whether it shows a face. It was trained",
        "from random weights on portraits that Burnish's own renderer drew: no data of others. On",
        "photographs it means nothing.",
        "",
        f"Data: {plan.portraits} rendered portraits of people without a held-out combination,",
        f"{plan.others} pictures without a face, each as rendered and as the base's autoencoder",
        f"gives it back, three in ten with a flaw of the whole picture. Seed {plan.seed},",
        f"{plan.steps} steps, about three minutes of one free core.",
        "",
        "Measured on portraits of people whose combination of hair, hair colour and skin was never",
        "trained on, over all pairs of pictures:",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| `{name}` | {value:g} |" for name, value in measured.items()),
        "",
        "`auc` is the probability that two pictures of one person are more alike than two of",
        "different people; in `auc_one_attribute` the different people differ in a single",
        "attribute of their look, and `auc_skin`, `auc_eyes`, `auc_mark` say which.",
        "",
        "Rebuild it, base model first, with `burnish miniature build --out DIR`.",
    ]
    _write(folder, lines)


def _write(folder: Path, lines: Sequence[str]) -> None:
    write_atomic(folder / "README.md", "\n".join(lines) + "\n")
