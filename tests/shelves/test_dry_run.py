"""Plans and reality, for every model family: what is counted without memory is what is held."""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.family_recipes import recipe
from torch import Tensor, nn

from burnish import images
from burnish.activations import GpuPrecision, Hollow, Live, Saved, hollow, num_bytes, weights
from burnish.adapters import LoraConfig, attach
from burnish.buckets import Buckets
from burnish.optimization import Kind, OptimizerConfig, State, state_bytes
from burnish.planning.dry_run import Counts, Measured, measure, measure_drawing, ready
from burnish.planning.parts import passing_parts
from burnish.policies.parts.execution import checkpoint_blocks
from burnish.runtime import Runtime
from burnish.shelves import families, policy_class
from burnish.types import Prompt

FLOAT = Runtime(device=torch.device("cpu"), dtype=torch.float32)
NARROW = Runtime(device=torch.device("cpu"), dtype=torch.bfloat16)
# A function's fixture: the module reads no source before its tests.
pytestmark = pytest.mark.usefixtures("small_sources")

COUNTS = Counts(
    pictures=3,
    picture_prompts=2,
    credited=4,
    credited_prompts=2,
    states=3,
    state_prompts=2,
    draw_scale=2.0,
    credit_scale=2.0,
    trains_null=False,
)


def asked(task: str) -> Prompt:
    """A prompt of a task, an edit of a picture that is no square."""
    if task == "t2i":
        return Prompt(id="t2i", text="two red squares")
    picture = images.encode_png(images.to_pil(torch.rand(3, 64, 128)))
    return Prompt(id="edit", text="make them blue", task="edit", sources=(picture,))


@pytest.fixture(scope="module", params=families())
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A tiny policy, the same without memory, and its folder."""
    kind = policy_class(request.param)
    real, folder = kind.tiny(), tmp_path_factory.mktemp(request.param)
    real.save(folder)
    return real, kind.hollow(folder, resolution=real.resolution), folder


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_a_hollow_policy_counts_what_a_real_one_holds(
    pair: tuple[Any, Any, Path], task: str
) -> None:
    """Every figure, to the byte: what is saved for the backward pass, and every peak."""
    real, empty, _ = pair
    if task not in real.tasks:
        pytest.skip(f"{real.family} does no {task}")
    gc.collect()
    held, told = (
        asdict(measure(ready(policy, None), asked(task), "fog", COUNTS, FLOAT))
        for policy in (real, empty)
    )
    assert told == held
    drawn, hollow_drawn = (
        asdict(measure_drawing(policy, asked(task), "fog", COUNTS, FLOAT))
        for policy in (real, empty)
    )
    # Again: what a network keeps of its first call is there.
    assert drawn == hollow_drawn and 0 < drawn["drawing"] <= held["drawing"]
    assert held["copies"] == 0
    assert min(held[name] for name in ("reading", "drawing", "decoding", "crediting", "saved")) > 0
    assert bool(held["prefix"]) == real.has_shared_prefix


def test_in_bfloat16_only_statistics_of_norms_differ(pair: tuple[Any, Any, Path]) -> None:
    """A CPU keeps them in bfloat16; they are described in float32, as a GPU has them."""
    gc.collect()
    held, told = (
        asdict(measure(ready(policy, None), asked(policy.tasks[0]), "fog", COUNTS, NARROW))
        for policy in pair[:2]
    )
    for name in ("saved", "updating"):
        assert held[name] <= told.pop(name) <= 1.005 * held.pop(name)
    assert told == held
    assert held["copies"] > 0


def test_a_hollow_policy_has_the_weights_of_its_folder(pair: tuple[Any, Any, Path]) -> None:
    """The same names, shapes and types, shared where they are shared, and no memory."""
    real, empty, _ = pair
    for name, network in real.networks().items():
        twin = empty.networks()[name]
        kinds = [
            {key: (p.shape, p.dtype) for key, p in one.named_parameters()}
            for one in (network, twin)
        ]
        assert kinds[0] == kinds[1]
        assert num_bytes(weights(twin)) == num_bytes(weights(network))
        assert all(isinstance(parameter, Hollow) for parameter in twin.parameters())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
@pytest.mark.parametrize("optimizer", get_args(Kind))
def test_optimizer_and_average_are_as_planned(
    pair: tuple[Any, Any, Path], lora: LoraConfig | None, optimizer: Kind
) -> None:
    """Of a real state after a real step; with a LoRA they have its size."""
    _, _, folder = pair
    kind = policy_class(pair[0].family)
    policy = kind.load(folder, resolution=64)
    policy.transformer.requires_grad_(True)
    if lora is not None:
        attach(policy.transformer, lora, policy.lora_targets)
    state = State.start(policy, OptimizerConfig(ema_decay=0.9, kind=optimizer))
    for parameter in policy.transformer.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    empty = ready(kind.hollow(folder, resolution=64), lora)
    trained = [parameter for _, parameter in empty.trainable()]
    held = {
        value.untyped_storage().data_ptr(): value.nbytes
        for one in state.optimizer.state.values()
        for value in one.values()
        if torch.is_tensor(value)
    }
    assert state_bytes(trained, optimizer) == sum(held.values())
    assert num_bytes(trained) == num_bytes(state.average)
    if lora is not None:
        assert num_bytes(trained) < num_bytes(empty.transformer.parameters()) / 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_less_waits_for_the_backward_pass_where_blocks_are_computed_again(
    pair: tuple[Any, Any, Path], device: str
) -> None:
    """On the plan of a GPU, too, though it is made on a CPU."""
    rt = Runtime(device=torch.device(device), dtype=torch.bfloat16)
    empty = ready(pair[1], None)
    own = asked(empty.tasks[0])
    again = GpuPrecision if device == "cuda" else contextlib.nullcontext
    saved = []
    for share in (False, 0.5, True):
        checkpoint_blocks(empty.transformer, empty.block_classes, share, again=again)
        saved.append(measure(empty, own, "", COUNTS, rt).saved)
    checkpoint_blocks(empty.transformer, empty.block_classes, False)
    assert 0 < saved[2] < saved[1] < saved[0] and saved[2] < 0.8 * saved[0]


def test_activations_are_linear_in_the_micro_batch(pair: tuple[Any, Any, Path]) -> None:
    """Beyond what a prompt costs once: each state saves as much as the other, and weights none."""
    empty = ready(pair[1], None)
    saved = [
        measure(empty, asked(empty.tasks[0]), "", replace(COUNTS, states=states), NARROW)
        for states in (3, 6, 9)
    ]
    assert saved[1].saved - saved[0].saved == saved[2].saved - saved[1].saved > 0
    assert len({found.copies for found in saved}) == 1
    assert saved[2].updating > saved[0].updating


# --- The counting itself ---------------------------------------------------------------------


def test_the_largest_bucket_is_counted(pair: tuple[Any, Any, Path]) -> None:
    _, empty, folder = pair
    large = type(empty).hollow(folder, resolution=64)
    large.buckets = Buckets(64, ("1:1", "16:9", "2:1"))
    prompt = asked(empty.tasks[0])
    square, most = (
        measure(ready(policy, None), prompt, "fog", COUNTS, FLOAT) for policy in (empty, large)
    )
    assert most.latents == 1.5 * square.latents
    assert most.decoding > 1.3 * square.decoding and most.reading == square.reading


def test_live_counts_each_storage_once_while_it_lives() -> None:
    """Views add nothing, and what is gone is gone."""
    with Live() as live:
        whole = torch.ones(256)
        view = whole[:10]
        assert live.now == 1024
        del whole
        assert live.now == 1024
        del view
        assert live.now == 0 and live.peak == 1024


def test_saved_counts_what_the_backward_pass_needs() -> None:
    """The input of a square, once, and no weights."""
    weight = torch.ones(64, requires_grad=True)
    with Saved(ignored=[weight]) as saved:
        product = weight * 2
        (product.square() * product.square()).sum().backward()
    # product itself, and its two squares.
    assert saved.num_bytes == 3 * 256


def test_hollow_weights_need_no_memory_and_stay_shared() -> None:
    """A network of gigabytes; two layers with one weight."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1 << 15, 1 << 15, bias=False)
            self.second = nn.Linear(8, 8)
            self.third = self.second

    made = hollow(Shared)
    assert num_bytes(weights(made)) == 4 * ((1 << 30) + 64 + 8)
    assert made.second is made.third
    out = made.first(torch.ones(2, 1 << 15))
    assert isinstance(out, Hollow) and out.shape == (2, 1 << 15)


def test_masks_are_looked_at() -> None:
    """How many numbers a mask keeps is known, although the numbers are not."""
    made = hollow(lambda: nn.Linear(4, 4))(torch.ones(5, 4))
    mask = torch.tensor([True, False, True, True, False])
    assert made[mask].shape == (3, 4)
    with pytest.raises(Exception, match="meta"):
        made.sum().item()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: nn.functional.layer_norm(x, (8,)),
        lambda x: nn.functional.rms_norm(x, (8,)),
        lambda x: nn.functional.interpolate(x[None], scale_factor=2.0),
        lambda x: x**2,
    ],
    ids=["layer_norm", "rms_norm", "interpolate", "pow"],
)
def test_a_gpu_computes_in_float32_what_a_cpu_does_not(compute: Callable[[Tensor], Tensor]) -> None:
    """And so does its stand-in under autocast, where a CPU stays in bfloat16."""
    narrow = torch.ones(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute(narrow).dtype == torch.bfloat16
        with GpuPrecision():
            assert compute(narrow).dtype == torch.float32
    with GpuPrecision():
        assert compute(narrow).dtype == torch.bfloat16


def test_all_figures_are_told() -> None:
    """None is left out of a plan by a later field."""
    from burnish.planning import parts

    source = Path(parts.__file__).read_text()
    told = {name for name in Measured.__dataclass_fields__ if f'"{name}"' in source}
    assert told | {"latents", "saved"} == set(Measured.__dataclass_fields__)


@pytest.mark.parametrize("family", families())
def test_beside_a_gpu_is_what_is_read_into_another_type(family: str, tmp_path: Path) -> None:
    """What has the type of its file is mapped from there, whatever stands beside it."""
    kind = policy_class(family)
    real = kind.tiny()
    real.pipeline.to(torch.float16).save_pretrained(tmp_path)
    config = recipe(family, tmp_path)

    def passing(dtype: torch.dtype) -> tuple[int, int]:
        policy = kind.hollow(tmp_path, dtype=dtype, resolution=real.resolution)
        saved = (network.state_dict().values() for network in policy.networks().values())
        whole = num_bytes(one for own in saved for one in own if one.is_floating_point())
        attach(policy.transformer, LoraConfig(rank=2), policy.lora_targets)
        parts = {part.name: part.num_bytes for part in passing_parts(config, policy)}
        return parts["pipeline on its way to the device"], whole

    assert passing(torch.float16)[0] == 0
    # Of the same size, and of another.
    for dtype in (torch.bfloat16, torch.float32):
        found, whole = passing(dtype)
        assert found == whole > 0
