"""The miniature's tokenizer: Qwen's class, its merges learnt from the world's grammar.

A prompt of the world takes about twenty tokens instead of ninety bytes, and any other text still
has a spelling, because every byte is in the vocabulary.
"""

import json
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from burnish.policies.parts.qwen_tokens import learned_tokenizer
from burnish.world.edits import sample_edit
from burnish.world.grammar import corpus

VOCABULARY = 640


def build_tokenizer(
    seed: int = 0, *, more: Iterable[str] = (), size: int = VOCABULARY
) -> PreTrainedTokenizerBase:
    """Learn byte-pair merges from prompts and instructions of the grammar.

    Args:
        seed: of the texts.
        more: further texts to learn from.
        size: of the vocabulary, without special tokens.
    """
    rng = np.random.default_rng(seed)
    texts = [*corpus(3000, seed), *(sample_edit(rng).instruction for _ in range(1500)), *more]
    texts += [
        "Comprehend and analyze the provided prompt.",
        "system\n",
        "user\n",
        "assistant\n",
    ] * 50
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    model = json.loads(learner.to_str())["model"]
    return learned_tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
