"""Qwen's tokenizer class with a vocabulary of ours, for pipelines that are made and not loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from burnish import vision_build

# Before the import below: it fails where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer  # noqa: E402

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's turns and nothing more: no default system message, no thought before an answer."""


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen's tokenizer class with one token per byte and the special tokens that the pipeline
    needs."""
    alphabet = sorted(ByteLevel.alphabet())
    return learned_tokenizer({symbol: number for number, symbol in enumerate(alphabet)}, [])


def learned_tokenizer(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> PreTrainedTokenizerBase:
    """Qwen's tokenizer class around byte pairs learnt elsewhere, with the pipeline's special
    tokens."""
    # Its annotation says text, its code also takes the pairs that a learner gives.
    pairs: Any = list(merges)
    return Qwen2Tokenizer(
        vocab=dict(vocabulary),
        merges=pairs,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
