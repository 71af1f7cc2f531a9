"""What a GPU computes is what a CPU computes, in the memory that was planned.

`make test TESTS=tests/gpu` on a machine with one; `make pretended` anywhere, on one that is not
there.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.family_recipes import recipe
from tests.jobs import distance, finish
from torch import Tensor

from burnish import images
from burnish.batches import branches
from burnish.config import parse
from burnish.jobs import run_job
from burnish.optimization import OptimizerConfig
from burnish.planning.forecast import forecast
from burnish.planning.plan import PROCESS_BYTES
from burnish.policies.parts.execution import checkpoint_blocks
from burnish.preflight import check_inputs
from burnish.rewards.vlm import VlmConfig
from burnish.run_config import RunConfig
from burnish.runtime import Runtime
from burnish.shelves import families, policy_class
from burnish.types import Prompt, Scored, ScoreRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("small_sources"),
    # Stages of a step teach nobody anything.
    pytest.mark.filterwarnings("ignore::burnish.fixed_states.FixedStatesWarning"),
]


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def real_gpu(gpu: torch.device) -> torch.device:
    """For what is compiled for it."""
    if "pretended" in torch.cuda.get_device_name(gpu):
        pytest.skip("needs the kernels of a real GPU")
    return gpu


@pytest.fixture(params=families())
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A family, and the folder of a tiny pipeline of it."""
    family = policy_class(request.param)
    family.tiny().save(tmp_path / "model")
    return family, tmp_path / "model"


def prompts(family: Any) -> list[Prompt]:
    """Two of one task, of different lengths."""
    source = images.encode_png(Image.linear_gradient("L").convert("RGB").resize((64, 64)))
    task = family.tasks[-1]
    given = (source,) if task == "edit" else ()
    texts = ("a red circle", "a large red circle above a small blue star")
    return [Prompt(id=text, text=text, task=task, sources=given) for text in texts]


@torch.no_grad()
def asked(family: Any, folder: Path, device: torch.device | str) -> Iterator[Tensor]:
    """Guided and conditional velocity of a policy on a device, and pictures."""
    policy = family.load(folder, resolution=64, device=device)
    own = prompts(family)
    prefix, null = branches(policy, policy.encode(own), policy.encode_null(own))
    noise = policy.noise([torch.Generator().manual_seed(row) for row in range(2)])
    sigma = torch.tensor([0.9, 0.4], device=noise.device)
    guided, conditional, _ = policy.guided(noise, sigma, prefix, null, 3.0)
    assert guided.device == torch.device(device)
    yield from (guided.cpu(), conditional.cpu(), policy.decode(noise).cpu())


def test_velocities_and_pictures_are_those_of_a_cpu(
    model: tuple[Any, Path], gpu: torch.device
) -> None:
    # In TF32, a picture would be another one by a fortieth.
    with torch.backends.cudnn.flags(allow_tf32=False):
        here, there = (list(asked(*model, device)) for device in ("cpu", gpu))
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-3, rtol=1e-3)


def test_gradients_are_those_of_a_cpu(model: tuple[Any, Path], gpu: torch.device) -> None:
    family, folder = model
    found = []
    for device in (torch.device("cpu"), gpu):
        policy = family.load(folder, resolution=64, device=device)
        policy.transformer.requires_grad_(True)
        noise = policy.noise([torch.Generator().manual_seed(row) for row in range(2)])
        sigma = torch.tensor([0.9, 0.4], device=device)
        prefix = policy.prefix(policy.encode(prompts(family)))
        policy.velocity(noise, sigma, prefix).square().mean().backward()
        named = policy.transformer.named_parameters()
        found.append({name: p.grad.cpu() for name, p in named if p.grad is not None})
    here, there = found
    assert here.keys() == there.keys()
    for name, grad in here.items():
        torch.testing.assert_close(there[name], grad, atol=1e-5, rtol=2e-2, msg=name)


def test_a_family_goes_from_teachers_to_a_student_in_the_planned_memory(
    model: tuple[Any, Path], tmp_path: Path, gpu: torch.device
) -> None:
    """With encoders that come and go, and blocks that are computed again."""
    family, folder = model
    config = recipe(family.family, folder)
    policy = config.policy.model_copy(update={"offload": True, "checkpointing": True})
    config = config.model_copy(update={"policy": policy})
    check_inputs(config)
    plans = {f"train/{plan.stage}": plan for plan in forecast(config, "cuda")}
    rt = Runtime(device=gpu, dtype=torch.bfloat16)
    is_pretended = "pretended" in torch.cuda.get_device_name(gpu)
    for name in config.stages:
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        run_job(config, tmp_path / "run", f"train/{name}", rt)
        held = torch.cuda.max_memory_allocated(gpu) - before
        plan = plans[f"train/{name}"]
        planned = plan.needed - PROCESS_BYTES["cuda"]
        # A real one has workspaces larger than a tiny model; `benchmarks/counted.py` has real ones.
        assert held < planned or not is_pretended, name
        file = tmp_path / "run" / "stages" / name / "metrics.jsonl"
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        assert rows and all(math.isfinite(row["loss"]) for row in rows)
    run_job(config, tmp_path / "run", "measure/student", rt)


def test_a_judge_says_what_it_says_on_a_cpu(small_judge: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    requests = [
        ScoreRequest(
            prompt=Prompt(id=str(row), text="a cat", task="t2i"),
            image=torch.rand(3, 64, 64, generator=draws) * row / 4,
        )
        for row in range(4)
    ]
    config = VlmConfig(path=str(small_judge), dimension="alignment")
    found = [
        config.model_copy(update={"device": device}).build().score(requests)
        for device in ("cpu", "cuda")
    ]
    for here, there in zip(*found, strict=True):
        assert isinstance(here, Scored) and isinstance(there, Scored)
        assert there.value == pytest.approx(here.value, abs=1e-2) and there.note == here.note


def test_several_gpus_train_what_one_trains(tmp_path: Path) -> None:
    """Whole and spread weights, over NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path / "model"
    policy_class("stable_diffusion3").tiny().save(folder)
    data = recipe("stable_diffusion3", folder).model_dump()
    data["stages"] = {"stage": data["stages"]["nft_teacher"]}
    found = []
    for number, (processes, sharding) in enumerate(((1, "none"), (2, "none"), (2, "full"))):
        own = {"device": "cuda", "dtype": "float32", "processes": processes, "sharding": sharding}
        config = parse(RunConfig, data | {"runtime": own})
        found.append(finish(config, tmp_path / f"run{number}") / "model")
    moved = distance(found[0], folder)
    assert moved > 1e-4
    assert max(distance(found[0], other) for other in found[1:]) < 0.1 * moved


def test_blocks_are_compiled(model: tuple[Any, Path], real_gpu: torch.device) -> None:
    """In two sizes, and half of them computed again."""
    family, folder = model
    policy = family.load(folder, resolution=64, device=real_gpu)
    policy.transformer.requires_grad_(True)
    checkpoint_blocks(policy.transformer, policy.block_classes, 0.5)
    own = prompts(family)
    found = []
    for _ in range(2):
        velocities = []
        for rows in ([0, 1], [0, 1, 0]):
            noise = policy.noise([torch.Generator().manual_seed(row) for row in range(len(rows))])
            sigma = torch.linspace(0.9, 0.4, len(rows), device=real_gpu)
            prefix = policy.prefix(policy.encode(own)).take(rows)
            velocities.append(policy.velocity(noise, sigma, prefix))
        policy.transformer.zero_grad()
        torch.cat(velocities).square().mean().backward()
        grads = [p.grad.clone() for p in policy.transformer.parameters() if p.grad is not None]
        found.append((torch.cat(velocities).detach(), grads))
        policy.compile_blocks()
    plain, compiled = found
    torch.testing.assert_close(compiled[0], plain[0], atol=1e-3, rtol=1e-3)
    for grad, other in zip(plain[1], compiled[1], strict=True):
        torch.testing.assert_close(other, grad, atol=1e-5, rtol=2e-2)


def test_moments_in_eight_bits_move_weights(real_gpu: torch.device) -> None:
    weight = torch.nn.Parameter(torch.zeros(4096, device=real_gpu))
    optimizer = OptimizerConfig(kind="adamw_8bit").build([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert bool((weight < 0).all())
