"""What `qwen_image21` computes once per prompt and shares: the keys and values of text and sources.

The transformer is causal over text and source images and modulates both from t = 0, so their keys
and values depend neither on the noisy latents nor on the noise level. They are stored once per
prompt; a batch of samples refers to them by row index.

Prompts differ in length, but one call of the transformer puts the target of all its samples at one
frame position. A shorter prompt would see the target too far away. Rotary embeddings are relative,
and a target's height and width positions are absolute, so turning the stored keys forward on the
frame axis puts every prompt at its true distance. That position is the longest prompt's own: an
image advances it by its longer side, and the transformer knows fewer positions than a few large
images have tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from burnish import vision_build
from burnish.policies.base import Prefix
from burnish.policies.parts.qwen_encoding import QwenPrompt

# Before the import below: it fails where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.models.transformers.transformer_qwenimage21 import (  # noqa: E402
    QwenImage21AttnProcessor,
)


def turn_frame_axis(
    keys: Float[Tensor, "prompt token head channel"],
    steps: Float[Tensor, " prompt"],
    frequencies: Float[Tensor, " pair"],
) -> Float[Tensor, "prompt token head channel"]:
    """Move rotary-embedded keys `steps` positions forward on the frame axis.

    The frame axis owns the first channels of every head, as consecutive (real, imaginary) pairs:

        pair_j -> pair_j * exp(i * steps * frequency_j)

    Rotations add up, so a key embedded at position p becomes the key of position p + steps.
    """
    num_channels = 2 * len(frequencies)
    angles = steps[:, None].float() * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    pairs = keys[..., :num_channels].float().unflatten(-1, (-1, 2)).contiguous()
    frame = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    return torch.cat([frame.to(keys.dtype), keys[..., num_channels:]], dim=-1)


@dataclass(frozen=True, eq=False)
class KeyValueStore:
    """Keys and values of every layer, one row per prompt, padded on the right."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    """Valid tokens of each prompt."""
    frequencies: Float[Tensor, " pair"]
    """Angular frequencies of the frame axis."""
    position: int
    """Frame position of the target that the keys are aligned to."""

    @property
    def width(self) -> int:
        """Padded number of prefix tokens."""
        return self.keys[0].shape[1]

    @classmethod
    def aligned(
        cls,
        *,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        prompts: Sequence[QwenPrompt],
        frequencies: Float[Tensor, " pair"],
    ) -> "KeyValueStore":
        """Take keys as the transformer embedded them, with every prompt starting at position 0."""
        position = max(prompt.target_position for prompt in prompts)
        steps = [float(position - prompt.target_position) for prompt in prompts]
        if any(steps):
            offsets = torch.tensor(steps, device=keys[0].device)
            keys = tuple(turn_frame_axis(layer, offsets, frequencies) for layer in keys)
        lengths = tuple(prompt.num_tokens for prompt in prompts)
        return cls(keys, values, lengths, frequencies, position)

    def widen(self, width: int, position: int) -> "KeyValueStore":
        """The same prompts, padded to `width` tokens and aligned to another position."""
        keys, values = self.keys, self.values
        if extra := position - self.position:
            steps = torch.full((len(self.lengths),), float(extra), device=keys[0].device)
            keys = tuple(turn_frame_axis(layer, steps, self.frequencies) for layer in keys)
        if more := width - self.width:
            keys, values = (
                tuple(F.pad(layer, (0, 0, 0, 0, 0, more)) for layer in layers)
                for layers in (keys, values)
            )
        return replace(self, keys=keys, values=values, position=position)

    @classmethod
    def stack(cls, stores: Sequence["KeyValueStore"]) -> "KeyValueStore":
        """All prompts of all stores, in order."""
        if len(stores) == 1:
            return stores[0]
        width = max(store.width for store in stores)
        position = max(store.position for store in stores)
        wide = [store.widen(width, position) for store in stores]
        return replace(
            wide[0],
            keys=tuple(torch.cat(layer) for layer in zip(*(s.keys for s in wide), strict=True)),
            values=tuple(torch.cat(layer) for layer in zip(*(s.values for s in wide), strict=True)),
            lengths=tuple(length for store in wide for length in store.lengths),
        )


class PrefixProcessor(QwenImage21AttnProcessor):
    """Diffusers' own attention, with the mask that a gathered cache brings: the transformer makes
    one of as many tokens as it counts positions, of which a prefix has fewer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        rotary_emb: Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        cache: object = layer_cache
        found: Tensor = super().__call__(
            attn,
            hidden_states,
            cache.mask if isinstance(cache, _GatheredLayer) else attention_mask,
            rotary_emb,
            layer_cache,
            kv_cache_mode,
            cache_write_slice,
            segments,
            key_valid,
        )
        return found


class _GatheredLayer:
    """One layer's cache as the attention asks for it; rows are gathered when they are needed.

    Gathering inside the layer keeps at most one layer's copies alive without gradient, and with
    gradient sums the samples' gradients into one row per prompt.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, rows: Tensor | None, mask: Tensor | None
    ) -> None:
        self.keys, self.values, self.rows, self.mask = keys, values, rows, mask

    def get(self) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            return self.keys, self.values
        return self.keys.index_select(0, self.rows), self.values.index_select(0, self.rows)

    def store(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a shared prefix is read-only; fill a QwenImage21KVCache instead")


class GatheredCache:
    """Duck-typed stand-in for diffusers' `QwenImage21KVCache` in cached mode."""

    def __init__(self, store: KeyValueStore, rows: Tensor | None, mask: Tensor | None) -> None:
        self.layers = [
            _GatheredLayer(keys, values, rows, mask)
            for keys, values in zip(store.keys, store.values, strict=True)
        ]

    def get_layer(self, layer_idx: int) -> _GatheredLayer:
        """The cache of one block."""
        return self.layers[layer_idx]


@dataclass(frozen=True, eq=False)
class QwenPrefix(Prefix):
    """Samples that refer to the stored keys and values of their prompts."""

    store: KeyValueStore
    rows: tuple[int, ...]
    """Prompt of each sample, as a row of the store."""
    index: Tensor = field(init=False, repr=False)
    """`rows` on the store's device, made once so that no step waits for a copy."""

    def __post_init__(self) -> None:
        index = torch.tensor(self.rows, dtype=torch.long, device=self.store.keys[0].device)
        object.__setattr__(self, "index", index)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> "QwenPrefix":
        return QwenPrefix(self.store, tuple(self.rows[row] for row in rows))

    @classmethod
    def join(cls, prefixes: Sequence["QwenPrefix"]) -> "QwenPrefix":
        """All samples of all prefixes, in order; parts of one join share their store."""
        stores = list({id(prefix.store): prefix.store for prefix in prefixes}.values())
        starts, start = {}, 0
        for store in stores:
            starts[id(store)] = start
            start += len(store.lengths)
        rows = tuple(starts[id(prefix.store)] + row for prefix in prefixes for row in prefix.rows)
        return cls(KeyValueStore.stack(stores), rows)

    def cache(self, num_targets: int) -> GatheredCache:
        """What the transformer reads in cached mode beside a target of so many tokens."""
        whole = self.rows == tuple(range(len(self.store.lengths)))
        return GatheredCache(self.store, None if whole else self.index, self._mask(num_targets))

    def _mask(self, num_targets: int) -> Bool[Tensor, "batch 1 1 token"] | None:
        """True at real tokens; None where nothing is padded: attention is faster without a mask."""
        lengths = [self.store.lengths[row] for row in self.rows]
        if min(lengths) == self.store.width:
            return None
        limit = torch.tensor(lengths, device=self.index.device)
        is_real = torch.arange(self.store.width, device=self.index.device) < limit[:, None]
        return F.pad(is_real, (0, num_targets), value=True)[:, None, None]
