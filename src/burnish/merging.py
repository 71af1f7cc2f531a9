"""Several fine-tuned models of one base as one, by arithmetic on their weights.

The cheap alternatives to distillation, and its controls. A merge is no folded student: it draws
with guidance, as its teachers do. Arithmetic runs in float32 and returns each tensor in the dtype
of the base.

LoRA adapters are merged exactly: the product of the concatenated factors is the weighted sum of the
products. Averaging the factors themselves would add cross terms and halve the strength, so it is
not offered.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field, model_validator
from torch import Tensor

from burnish.adapters import Adapter
from burnish.config import Config, ConfigError
from burnish.policies.base import Policy
from burnish.residency import Source, read_kin

Weights = Mapping[str, Shaped[Tensor, "..."]]
"""Named tensors, as a `state_dict` has them."""

_HALF = 16  # Bits of half of a float32.
_LOWER = (1 << _HALF) - 1

Method = Literal["average", "task_arithmetic", "ties"]
"""How teachers become one; see the functions of these names."""


class MergeConfig(Config):
    """How models become one."""

    method: Method
    scales: tuple[float, ...] | None = None
    """Of `task_arithmetic`, one for each model; of `ties`, one for all. None is 1."""
    density: float = Field(default=0.2, gt=0, le=1)
    """Of `ties`: share of each model's changes that is kept."""

    @model_validator(mode="after")
    def _scales_are_read(self) -> "MergeConfig":
        if self.scales is not None and self.method == "average":
            raise ValueError("need no scales for average, got some; take task_arithmetic")
        if self.scales is not None and self.method == "ties" and len(self.scales) != 1:
            raise ValueError(f"need one scale for ties, got {len(self.scales)}; it is for all")
        return self

    def merge(self, base: Weights, teachers: Sequence[Weights]) -> dict[str, Tensor]:
        """The merged weights.

        Raises:
            ValueError: weights or scales that do not fit.
        """
        if self.method == "average":
            return average(base, teachers)
        if self.method == "ties":
            return ties(base, teachers, density=self.density, scale=(self.scales or (1.0,))[0])
        return task_arithmetic(base, teachers, self.scales or [1.0] * len(teachers))


def merge_into(policy: Policy[Any, Any], folders: Sequence[Path], config: MergeConfig) -> None:
    """Give the base, in place, the merged weights of pipelines that were trained from it.

    Args:
        policy: the base.
        folders: of the pipelines.
        config: how.

    Raises:
        ConfigError: a pipeline with another architecture, encoder, VAE or scheduler.
    """
    base = {name: tensor.cpu() for name, tensor in policy.transformer.state_dict().items()}
    stored = [read_kin(policy, Source(folder)) for folder in folders]
    weights = [{name: one.read(name) for name in base} for one in stored]
    try:
        policy.transformer.load_state_dict(config.merge(base, weights))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def merge_adapters(
    adapters: Sequence[Mapping[str, Adapter]], scales: Sequence[float] | None = None
) -> dict[str, Adapter]:
    """LoRAs of one base as one, exactly: every module has the ranks of all that adapt it.

    Args:
        adapters: of each LoRA, by module.
        scales: one for each LoRA; 1 if left out.

    Raises:
        ConfigError: not one scale for each.
    """
    scales = scales or [1.0] * len(adapters)
    if len(scales) != len(adapters):
        raise ConfigError(
            f"need {len(adapters)} scales, one for each LoRA, got {len(scales)}; give as many"
        )
    merged = {}
    for module in dict.fromkeys(name for own in adapters for name in own):
        pairs = [(s, own[module]) for s, own in zip(scales, adapters, strict=True) if module in own]
        low, high = concatenate_lora(
            [(adapter.low, adapter.high) for _, adapter in pairs],
            [scale * adapter.scale for scale, adapter in pairs],
        )
        merged[module] = Adapter(low, high, 1.0)
    return merged


def average(base: Weights, teachers: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of the teachers' weights: task arithmetic with weights that sum to 1.

    Args:
        base: whose names, shapes and dtypes the teachers share.
        teachers: at least one.

    Raises:
        ValueError: no teacher, or one of another shape.

    Reference: model soups, arXiv:2203.05482.

    >>> average({"w": torch.zeros(1)}, [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    {'w': tensor([2.])}
    """
    return task_arithmetic(base, teachers, [1 / max(len(teachers), 1)] * len(teachers))


def task_arithmetic(
    base: Weights, teachers: Sequence[Weights], scales: Sequence[float]
) -> dict[str, Tensor]:
    """The base plus the weighted sum of what each teacher learnt.

        merged = base + sum_k scale_k (teacher_k - base)

    Args:
        base: what the teachers were trained from.
        teachers: at least one.
        scales: one for each teacher; all 0 is the base, a single 1 the teacher.

    Raises:
        ValueError: no teacher, one of another shape, or not one scale for each.

    Reference: task arithmetic, arXiv:2212.04089.

    >>> task_arithmetic({"w": torch.ones(1)}, [{"w": torch.tensor([2.0])}] * 2, [1.0, 0.5])
    {'w': tensor([2.5000])}
    """
    _check(base, teachers)
    if len(scales) != len(teachers):
        raise ValueError(
            f"need {len(teachers)} scales, one for each model, got {len(scales)}; give as many"
        )
    return {
        name: _back(
            tensor,
            sum(
                (s * t for s, t in zip(scales, _learnt(name, base, teachers), strict=True)),
                tensor.float(),
            ),
        )
        for name, tensor in base.items()
    }


def ties(
    base: Weights, teachers: Sequence[Weights], *, density: float = 0.2, scale: float = 1.0
) -> dict[str, Tensor]:
    """Keep the largest changes of each teacher, and in each place only those of the elected sign.

        trimmed_k = the `density` largest of |teacher_k - base| of the whole model, the rest 0
        sign = sign of sum_k trimmed_k, in each place
        merged = base + scale * mean of the trimmed changes that have that sign

    Args:
        base: what the teachers were trained from.
        teachers: at least one.
        density: share of each teacher's changes that is kept, in (0, 1].
        scale: of the merged change.

    Raises:
        ValueError: no teacher, one of another shape, or a density out of range.

    Reference: TIES-Merging, arXiv:2306.01708.

    >>> up, down = {"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([-1.0, 3.0])}
    >>> ties({"w": torch.zeros(2)}, [up, down], density=1.0)
    {'w': tensor([2., 2.])}
    """
    _check(base, teachers)
    if not 0 < density <= 1:
        raise ValueError(f"need a density above 0 and at most 1, got {density}; 0.2 is usual")
    floors = [_magnitude(base, teacher, density) for teacher in teachers]
    merged = {}
    for name, tensor in base.items():
        changes = torch.stack(_learnt(name, base, teachers))
        least = torch.tensor(floors).reshape(-1, *[1] * tensor.ndim)
        trimmed = changes.where(changes.abs() >= least, 0)
        agrees = (trimmed != 0) & (trimmed.sign() == trimmed.sum(dim=0).sign())
        kept = trimmed.where(agrees, 0).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)
        merged[name] = _back(tensor, tensor.float() + scale * kept)
    return merged


def concatenate_lora(
    adapters: Sequence[tuple[Float[Tensor, "_rank input"], Float[Tensor, "output _rank"]]],
    scales: Sequence[float],
) -> tuple[Float[Tensor, "rank input"], Float[Tensor, "output rank"]]:
    """One adapter whose product is the weighted sum of the adapters' products.

        [B_1 B_2] [s_1 A_1; s_2 A_2] = s_1 B_1 A_1 + s_2 B_2 A_2

    Args:
        adapters: (A, B) of one module each, so that the module learnt B A; ranks may differ. A
            scaling of an adapter itself (alpha / rank) belongs in its scale.
        scales: one for each adapter.

    Raises:
        ValueError: no adapter, or not one scale for each.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> low, high = concatenate_lora([(a, b), (a, b)], [1.0, 0.5])
    >>> high @ low
    tensor([[4.5000, 9.0000]])
    """
    if not adapters or len(scales) != len(adapters):
        raise ValueError(f"need a scale for each adapter, got {len(scales)} and {len(adapters)}")
    low = torch.cat([s * a.float() for s, (a, _) in zip(scales, adapters, strict=True)])
    return low, torch.cat([b.float() for _, b in adapters], dim=1)


def _learnt(name: str, base: Weights, teachers: Sequence[Weights]) -> list[Tensor]:
    return [teacher[name].float() - base[name].float() for teacher in teachers]


def _back(like: Tensor, values: Tensor) -> Tensor:
    return values.to(like.dtype)


def _magnitude(base: Weights, teacher: Weights, density: float) -> float:
    """The least change that belongs to the largest share; above 0, as no change is none.

    Sizes of floats are ordered as their bits are. So a count of their upper halves, tensor after
    tensor, tells the upper half of the one that is sought, and a count of the lower halves beside
    it the rest; the changes of a whole model are never there at once.
    """
    rank = max(1, round(density * sum(tensor.numel() for tensor in base.values())))
    least = 0
    for shift in (_HALF, 0):
        counts = torch.zeros(1 << _HALF, dtype=torch.int64)
        for name in base:
            sizes = _learnt(name, base, [teacher])[0].abs().flatten().view(torch.int32)
            if shift == 0:
                sizes = sizes[sizes >> _HALF == least >> _HALF]
            counts += torch.bincount((sizes >> shift) & _LOWER, minlength=len(counts))
        # How many are as large or larger, from the largest.
        reached = counts.flip(0).cumsum(0)
        place = int((reached < rank).sum())
        rank -= int(reached[place - 1]) if place else 0
        least |= (_LOWER - place) << shift
    found = torch.tensor(least, dtype=torch.int32).view(torch.float32)
    return max(float(found), torch.finfo(torch.float32).tiny)


def _check(base: Weights, teachers: Sequence[Weights]) -> None:
    if not teachers:
        raise ValueError("need at least one teacher, got none")
    for place, teacher in enumerate(teachers):
        wrong = [
            name
            for name in base.keys() | teacher.keys()
            if name not in base or name not in teacher or base[name].shape != teacher[name].shape
        ]
        if wrong:
            raise ValueError(
                f"need teachers of the base's architecture, got {len(wrong)} other tensors in "
                f"teacher {place + 1}, first {sorted(wrong)[0]}"
            )
