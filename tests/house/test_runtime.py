"""Where numbers are computed: seeds, devices, threads, processes, the torchvision repair."""

import json
import os
import random
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish import precision, runtime, vision_build
from burnish.config import ConfigError
from burnish.runtime import RuntimeConfig, derived_seed, generator, seeded

NAMES = st.lists(st.integers(-5, 5) | st.text(max_size=3), max_size=3)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0, 3), NAMES, st.integers(0, 3), NAMES)
def test_a_seed_is_a_function_of_all_its_names(
    first: int, names: list, second: int, others: list
) -> None:
    """Equal names give equal seeds, and other names, orders, types or splits give others."""
    same = json.dumps([first, *names]) == json.dumps([second, *others])
    assert (derived_seed(first, *names) == derived_seed(second, *others)) == same
    assert 0 <= derived_seed(first, *names) < 1 << 63


def test_seeds_are_the_same_on_every_machine() -> None:
    """One value is written down, because old runs must be reproduced by new versions."""
    assert derived_seed(0, "rollout", 3) == 211106634516208403


def test_a_generator_repeats_its_draw() -> None:
    """Whatever was drawn before it."""
    first = torch.randn(4, generator=generator(1, "noise", 2))
    torch.randn(9)
    assert torch.equal(first, torch.randn(4, generator=generator(1, "noise", 2)))
    assert not torch.equal(first, torch.randn(4, generator=generator(1, "noise", 3)))


def test_seeded_draws_leave_no_trace() -> None:
    """Inside all three global generators follow the names, outside they go on as before."""

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = [draw(), draw()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    assert draw() == before[0]
    with seeded(3, "library"):
        inside = draw()
    assert draw() == before[1]
    with seeded(3, "library"):
        assert draw() == inside
    with seeded(4, "library"):
        assert all(a != b for a, b in zip(draw(), inside, strict=True))


def test_one_process_on_the_cpu() -> None:
    """The sums of one process are its values, and a description names the versions."""
    here = RuntimeConfig(device="cpu", threads=1, dtype="float32").build()
    value = torch.arange(3.0)
    assert here.is_main and here.dtype == torch.float32
    assert torch.equal(here.all_reduce_sum(value), value)
    assert torch.equal(here.all_reduce_mean(value), value)
    here.barrier()
    here.close()
    facts = here.describe()
    assert facts["device"] == "cpu" and facts["torch"] == torch.__version__


def test_autocast_follows_the_dtype() -> None:
    """bfloat16 inside, and nothing where the dtype is float32."""
    value = torch.ones(2, 2)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        here = runtime.start(RuntimeConfig(device="cpu", dtype=name, threads=1))
        with warnings.catch_warnings(action="error"), here.autocast():
            assert (value @ value).dtype == dtype


@pytest.mark.parametrize(
    ("known", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_a_processor_computes_in_bfloat16_only_where_it_has_instructions_for_it(
    known: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere it takes several times as long."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert precision.choose_dtype("auto", torch.device("cpu")) == dtype
    assert runtime.start(RuntimeConfig(device="cpu", threads=1)).dtype == dtype
    assert precision.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for name, asked in precision.DTYPES.items():
        assert precision.choose_dtype(name, torch.device("cpu")) == asked
    # Releases of torch that do not tell.
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert precision.choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_missing_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a traceback from the driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="need 1 CUDA devices for device=cuda, found 0; use"):
        runtime.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="need 3 CUDA devices for device=auto, found 2"):
        runtime.choose_device("auto", 2)


def test_threads_are_bounded_and_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number given wins, then OMP_NUM_THREADS, then the usable cores."""
    before = torch.get_num_threads()
    try:
        assert runtime.set_threads(1) == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        assert runtime.set_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(runtime, "usable_cores", lambda: 2)
        assert runtime.set_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert 1 <= runtime.usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("rank", "world_size", "part"),
    [("2", "2", "RANK=2"), ("0", "0", "WORLD_SIZE=0"), ("x", "2", "whole number in RANK")],
)
def test_a_broken_launch_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str, part: str
) -> None:
    """The environment that torchrun should have set is checked before anybody waits for it."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=part):
        runtime.start(RuntimeConfig(device="cpu", threads=1))


WORKER = """
import time
import torch
from burnish.runtime import RuntimeConfig
here = RuntimeConfig(device="cpu", threads=1).build()
value = torch.tensor([1.0, 2.0]) * (here.rank + 1)
mean = here.all_reduce_mean(value)
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = value.clone()
here.all_reduce_gradients([parameter, torch.nn.Parameter(torch.zeros(1))])
assert parameter.grad.tolist() == mean.tolist() == [1.5, 3.0], mean
assert here.all_reduce_sum(value).tolist() == [3.0, 6.0]
assert value.tolist() == [here.rank + 1.0, 2.0 * (here.rank + 1)], "the input was changed"
with here.in_turn():
    entered = time.monotonic()
    time.sleep(0.2)
    left = time.monotonic()
(_, first), (second, _) = here.gather([entered, left])
assert first <= second, "two at once"
here.barrier()
here.close()
print("main" if here.is_main else "other")
"""


def test_two_processes_share_sums_and_gradients() -> None:
    """Two real processes over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert said == ["main", "other"]


def test_torchvision_can_be_imported() -> None:
    """In a fresh process, and with it the processor that needs it; a second call does nothing."""
    code = (
        "from burnish.vision_build import ensure_torchvision as e\n"
        "assert e() == e()\n"
        "import torchvision.transforms.v2\n"
        "torchvision.extension, torchvision.ops.nms, torchvision.datasets\n"
        "from transformers import Qwen3VLProcessor\n"
        "print(torchvision.__version__, Qwen3VLProcessor.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "Qwen3VLProcessor"


def test_torchvision_is_repaired_for_one_reason_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another failure of its import is passed on."""

    def fail(name: str) -> None:
        raise RuntimeError(f"compiled for another CUDA: {name}")

    def declare() -> None:
        raise AssertionError("operators were declared for nothing")

    monkeypatch.setattr(vision_build, "_declare_operators", declare)
    monkeypatch.setattr(vision_build.importlib, "import_module", fail)
    vision_build.ensure_torchvision.cache_clear()
    with pytest.raises(RuntimeError, match="compiled for another CUDA"):
        vision_build.ensure_torchvision()


def test_freed_memory_is_kept_where_glibc_allows() -> None:
    """On Linux with glibc the call is accepted, elsewhere it is not made."""
    expected = sys.platform == "linux" and runtime.platform.libc_ver()[0] == "glibc"
    assert runtime.keep_freed_memory() == expected
