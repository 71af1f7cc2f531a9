"""Merges: what they are at their ends, what they leave out, and exactness of LoRA."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.merging import average, concatenate_lora, task_arithmetic, ties

NAMES = {"first.weight": (4, 6), "second.bias": (5,)}


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=draws).to(dtype) for n, s in NAMES.items()}


BASE, ONE, OTHER = model(0), model(1), model(2)


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].float().flatten() for name in NAMES])


def test_no_scale_is_the_base_and_one_teacher_at_full_scale_is_that_teacher() -> None:
    assert torch.equal(flat(task_arithmetic(BASE, [ONE, OTHER], [0.0, 0.0])), flat(BASE))
    torch.testing.assert_close(flat(task_arithmetic(BASE, [ONE, OTHER], [0.0, 1.0])), flat(OTHER))
    torch.testing.assert_close(flat(ties(BASE, [ONE], density=1.0)), flat(ONE))


def test_the_average_does_not_know_the_base_nor_an_order() -> None:
    merged = flat(average(BASE, [ONE, OTHER]))
    torch.testing.assert_close(merged, (flat(ONE) + flat(OTHER)) / 2)
    torch.testing.assert_close(flat(average(model(9), [OTHER, ONE])), merged)


def test_task_arithmetic_is_linear_in_its_scales() -> None:
    def change(*scales: float) -> Tensor:
        return flat(task_arithmetic(BASE, [ONE, OTHER], scales)) - flat(BASE)

    torch.testing.assert_close(change(0.4, -0.6), 0.4 * change(1.0, 0.0) - 0.6 * change(0.0, 1.0))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_ties_keeps_the_largest_changes_of_a_single_teacher(density: float) -> None:
    change, wanted = flat(ties(BASE, [ONE], density=density)) - flat(BASE), flat(ONE) - flat(BASE)
    count = round(density * len(wanted))
    largest = wanted.abs().topk(count).indices
    assert set(change.nonzero().flatten().tolist()) == set(largest.tolist())
    torch.testing.assert_close(change[largest], wanted[largest])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if isinstance(found, Tensor):
            self.count = max(self.count, found.numel())
        return found


@pytest.mark.parametrize("spacing", [0.25, 1e-30, 1e-44])
@pytest.mark.parametrize("density", [1e-6, 0.2, 0.9, 1.0])
def test_ties_ranks_the_changes_of_the_whole_model_without_gathering_them(
    density: float, spacing: float
) -> None:
    """Many are equal, and all that are as large as the last one that is kept are kept."""
    draws = torch.Generator().manual_seed(0)
    teacher = {
        str(n): torch.randn(5000, generator=draws).mul(4).round() * spacing for n in range(20)
    }
    base = {name: torch.zeros(5000) for name in teacher}
    changes = torch.cat(list(teacher.values()))
    least = changes.abs().topk(max(1, round(density * len(changes)))).values[-1]
    least = least.clamp_min(torch.finfo(torch.float32).tiny)
    with Largest() as made:
        merged = ties(base, [teacher], density=density)
    assert torch.equal(torch.cat(list(merged.values())), changes.where(changes.abs() >= least, 0))
    assert made.count < len(changes)


def test_ties_never_mixes_signs_and_averages_only_those_that_agree() -> None:
    learnt = torch.stack([flat(ONE) - flat(BASE), flat(OTHER) - flat(BASE)])
    change = flat(ties(BASE, [ONE, OTHER], density=1.0)) - flat(BASE)
    sign = learnt.sum(dim=0).sign()
    assert torch.equal(change.sign(), sign)
    alike = learnt[0].sign() == learnt[1].sign()
    torch.testing.assert_close(change[alike], learnt.mean(dim=0)[alike])
    louder = learnt.gather(0, learnt.abs().argmax(dim=0, keepdim=True))[0]
    torch.testing.assert_close(change[~alike], louder[~alike])


def test_equal_teachers_are_the_same_merge_whatever_the_method() -> None:
    merged = flat(ties(BASE, [ONE, ONE], density=1.0))
    torch.testing.assert_close(merged, flat(average(BASE, [ONE, ONE])))


def test_merged_weights_have_the_dtype_of_the_base() -> None:
    base, teacher = model(0, torch.bfloat16), model(1, torch.bfloat16)
    for merged in (average(base, [teacher]), ties(base, [teacher])):
        assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize("ranks", [(2,), (2, 3), (1, 4, 2)])
def test_concatenated_adapters_add_what_the_dense_merge_adds(ranks: Sequence[int]) -> None:
    draws = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(r, 7, generator=draws), torch.randn(5, r, generator=draws)) for r in ranks
    ]
    scales = [0.3 + 0.2 * place for place in range(len(ranks))]
    low, high = concatenate_lora(pairs, scales)
    dense = sum((s * (b @ a) for s, (a, b) in zip(scales, pairs, strict=True)), torch.zeros(5, 7))
    assert low.shape[0] == high.shape[1] == sum(ranks)
    assert (high @ low - dense).abs().max() <= 1e-5
    if len(ranks) > 1 and len(set(ranks)) == 1:
        factors = sum(b for _, b in pairs) @ sum(a for a, _ in pairs)
        assert (factors - dense).abs().max() > 1e-2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="need at least one teacher"):
        average(BASE, [])
    with pytest.raises(ValueError, match=r"got 1 other tensors in teacher 2, first second\.bias"):
        average(BASE, [ONE, {"first.weight": OTHER["first.weight"]}])
    with pytest.raises(ValueError, match="need 2 scales"):
        task_arithmetic(BASE, [ONE, OTHER], [1.0])
    with pytest.raises(ValueError, match="need a density"):
        ties(BASE, [ONE], density=0.0)
    with pytest.raises(ValueError, match="need a scale for each adapter"):
        concatenate_lora([], [])
