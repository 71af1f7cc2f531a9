"""The model of a judge in training: read, adapted, moved back towards its start.

Any model that transformers know as `AutoModelForImageTextToText` of the Qwen-VL line will do, and
so will a judge, which is such a model with more beside it.

A chat template that lets the model think begins an answer inside a thought, but puts a begun answer
that a server continues behind one, so that a judge would be read elsewhere than it was taught. Such
a model is trained and written with Qwen's plain template.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from burnish import vision_build
from burnish.annotations.schema import Annotation
from burnish.config import ConfigError
from burnish.judges.lessons import Collator, spoken
from burnish.judging import MARKER, Rubric, question
from burnish.policies.parts.qwen_tokens import CHAT_TEMPLATE
from burnish.wording import brief

# Before the imports below: they fail where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

LANGUAGE_MATRICES = (
    r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
"""What a LoRA adapts: the language side of the Qwen-VL line, never its vision tower."""


@dataclass(frozen=True)
class TrainableJudge:
    """A judge in training."""

    model: Any
    collator: Collator
    dtype: torch.dtype
    """Of the weights as they were read, and as they will be written."""


def read_trainable(
    path: Path, *, lora_rank: int, max_pixels: int | None, device: torch.device
) -> TrainableJudge:
    """Read a model for training.

    Args:
        path: its folder.
        lora_rank: of an adapter on the language side; 0 trains all weights.
        max_pixels: larger pictures are shrunk to so many pixels; None keeps the processor's limit.
        device: where it will be trained.

    Raises:
        ConfigError: no such model, or one whose digits are not single tokens.
    """
    # The backward of the CPU's fused attention is several times slower at small sizes.
    attention = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    needed = "the folder of a Qwen-VL model and processor"
    if not path.is_dir():
        # Looked for as a name in the hub's cache, it would cost half a minute.
        raise ConfigError(f"path: need {needed}, got {path}, which is none; check the path")
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, local_files_only=True, dtype="auto", **attention
        )
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = brief(error, names_file=True)
        raise ConfigError(f"path: need {needed}, got {path}: {reason}") from None
    if not _is_continued_as_begun(processor):
        processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    if max_pixels is not None:
        # Transformers call an area an edge.
        size, most = processor.image_processor.size, max_pixels
        least = min(size["shortest_edge"], most)
        processor.image_processor.size = type(size)(shortest_edge=least, longest_edge=most)
    judge = TrainableJudge(model, Collator.of(processor), model.dtype)
    if not lora_rank:
        # Steps are smaller than half precision can see.
        return replace(judge, model=model.float().requires_grad_(True))
    adapter = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LANGUAGE_MATRICES)
    return replace(judge, model=get_peft_model(model, adapter))


def _is_continued_as_begun(processor: Any) -> bool:
    """Whether a server that continues an answer writes before it what stands before a lesson's."""
    user = {"role": "user", "content": question(Rubric("any", "Rate it."), "", num_sources=0)}
    asked = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    for begun in (MARKER, f"Good{MARKER}"):
        answer = {"role": "assistant", "content": [{"type": "text", "text": begun}]}
        told = processor.apply_chat_template(
            [user, answer], continue_final_message=True, tokenize=False
        )
        if told != f"{asked}{begun}":
            return False
    return True


@torch.no_grad()
def towards_start(model: Any, path: Path, share: float) -> None:
    """Move all weights by a share of the way to those from which the training began."""
    start = AutoModelForImageTextToText.from_pretrained(path, local_files_only=True)
    for name, parameter in start.named_parameters():
        own = model.get_parameter(name)
        own.lerp_(parameter.to(own), share)


def stop_at(model: Any, end: int) -> None:
    """Make generation end at a token."""
    known = model.generation_config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    model.generation_config.eos_token_id = ends if end in ends else [*ends, end]


def longest_answer(collator: Collator, annotations: Sequence[Annotation]) -> int:
    """Tokens that an answer may take: those of the longest known one, and a quarter more."""
    said = sorted({spoken(annotation) for annotation in annotations})
    ids = collator.processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    # Marker, digit, end.
    return math.ceil(1.25 * (max(map(len, ids)) + len(collator.alphabet.marker) + 2))
