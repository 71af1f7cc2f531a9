"""Checkpoints: exact, whole or absent, and damage is found."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from burnish import checkpoint, sharded_checkpoint
from burnish.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    latest,
    load,
    save,
    steps,
)
from burnish.optimization import OptimizerConfig, State
from burnish.optimizer_states import load_optimizer_state, optimizer_state
from burnish.runtime import ALONE, generator, seeded
from burnish.shelves import policy_class
from burnish.tracking import Run


def weights(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that tell their step."""
    return {"policy": {"weight": torch.full((4, 3), float(step)), "scalar": torch.tensor(step)}}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    """All dtypes, views, shared memory and empty tensors, bit for bit."""
    base = torch.randn(6, 4, generator=generator(0, "base"))
    named = {
        "bfloat16": base.bfloat16(),
        "view": base[1:3, ::2],
        "transposed": base.T,
        "shared": base,
        "again": base,
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0].clone()),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    state = {"step": 7, "names": ["a", None, 0.1 + 0.2], "nested": {"x": True}}
    path = save(tmp_path, 7, {"policy": named, "empty": {}}, state)
    assert path == tmp_path / "step-000007"
    back = latest(tmp_path)
    assert back is not None and back.step == 7 and back.state == state and back.folder == path
    assert set(back.tensors) == {"policy", "empty"} and set(back.tensors["policy"]) == set(named)
    for name, tensor in named.items():
        other = back.tensors["policy"][name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape
        left, right = (t.detach().contiguous().flatten() for t in (tensor, other))
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_the_layout_is_what_the_manual_says(tmp_path: Path) -> None:
    """Safetensors, JSON, a manifest with sizes and hashes, and the marker."""
    path = save(tmp_path, 12, weights(12), {})
    names = {entry.name for entry in path.iterdir()}
    assert names == {"policy.safetensors", "state.json", "manifest.json", "COMPLETE"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 12
    assert manifest["files"]["state.json"]["bytes"] == (path / "state.json").stat().st_size
    assert len(manifest["files"]["policy.safetensors"]["sha256"]) == 64


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    """A new run starts from the beginning."""
    assert latest(tmp_path / "none") is None
    (tmp_path / "step-x").mkdir()
    assert latest(tmp_path) is None and steps(tmp_path) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """As many as asked for."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, weights(step), {}, keep=2)
    assert steps(tmp_path) == [3, 4]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000003", "step-000004"]


def test_a_given_up_future_goes(tmp_path: Path) -> None:
    """After falling back to an older step, the damaged newer one must not push out the new one."""
    save(tmp_path, 10, weights(10), {}, keep=1)
    save(tmp_path, 20, weights(20), {}, keep=2)
    save(tmp_path, 15, weights(15), {}, keep=1)
    assert steps(tmp_path) == [15]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    """The second is the one that counts."""
    save(tmp_path, 1, weights(1), {"try": 1})
    save(tmp_path, 1, weights(1), {"try": 2})
    assert load(tmp_path / "step-000001").state == {"try": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


DAMAGES = {
    "no marker": lambda path: (path / "COMPLETE").unlink(),
    "no tensors": lambda path: (path / "policy.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "flipped bit": lambda path: flip(path / "policy.safetensors", -1),
    "flipped header": lambda path: flip(path / "policy.safetensors", 12),
    "changed state": lambda path: flip(path / "state.json", 3),
    "changed manifest": lambda path: flip(path / "manifest.json", 20),
    "cut": lambda path: os.truncate(path / "policy.safetensors", 20),
    "empty": lambda path: (path / "policy.safetensors").write_bytes(b""),
    "marker cut": lambda path: os.truncate(path / "COMPLETE", 9),
    "no JSON": lambda path: forge(path / "state.json", b"\0" * 9),
    "folder emptied": lambda path: (shutil.rmtree(path), path.mkdir()),
}


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def forge(path: Path, data: bytes) -> None:
    """Change a file with its hashes, which then say as little as those that another process checks
    say to this one."""
    path.write_bytes(data)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"] |= checkpoint.facts([path])
    told = json.dumps(manifest).encode()
    (path.parent / "manifest.json").write_bytes(told)
    (path.parent / "COMPLETE").write_text(hashlib.sha256(told).hexdigest())


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_and_says_so(tmp_path: Path, damage: str) -> None:
    """To the newest whole one, with the damage named; with none left it is an error."""
    for step in (1, 2, 3):
        save(tmp_path, step, weights(step), {"step": step})
    DAMAGES[damage](tmp_path / "step-000003")
    with pytest.warns(CheckpointWarning, match=r"step-000003 .*back to .* step 2") as warned:
        back = latest(tmp_path)
    assert len(warned) == 1
    assert back is not None and back.step == 2 and back.state == {"step": 2}
    assert float(back.tensors["policy"]["weight"][0, 0]) == 2
    for step in (1, 2):
        DAMAGES[damage](tmp_path / f"step-00000{step}")
    with pytest.raises(CheckpointError, match="all 3 are damaged") as caught:
        latest(tmp_path)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not called damage."""
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = save(tmp_path, 1, weights(1), {})
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(CheckpointError, match="has format 2; use the version"):
        load(path)


@pytest.mark.parametrize("place", range(9))
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Wherever in the writing it comes: one error, no half-written folder, the old one whole."""
    save(tmp_path, 1, weights(1), {})
    before = files(tmp_path)
    calls = [0]
    real = os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    try:
        save(tmp_path, 2, weights(2), {}, keep=1)
    except CheckpointError as error:
        assert "No space left on device; free some disk space" in str(error)
        assert "step-000002" in str(error)
        monkeypatch.undo()
        back = latest(tmp_path)
        assert back is not None
        if back.step == 1:
            assert files(tmp_path) == before
        assert not list(tmp_path.glob(".step-*"))
    else:
        assert place >= 6
        assert steps(tmp_path) == [2]


def test_a_full_disk_under_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of the file format has an error of its own, and space is counted beforehand."""

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    save(tmp_path, 1, weights(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(CheckpointError, match="free some disk space"):
            save(tmp_path, 2, weights(2), {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1))  # pyright: ignore
        with pytest.raises(CheckpointError, match="0 MiB are free"):
            save(tmp_path, 2, weights(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_wrong_call_is_refused(tmp_path: Path) -> None:
    """A group name cannot lead out of the folder."""
    for group in ("../x", "", "A b", "."):
        with pytest.raises(CheckpointError, match="group name"):
            save(tmp_path, 1, {group: {}}, {})
    with pytest.raises(CheckpointError, match="keep >= 1, got 1 and 0"):
        save(tmp_path, 1, {}, {}, keep=0)


def test_a_kill_between_two_names_loses_nothing(tmp_path: Path) -> None:
    """The old one is found under its spare name, and what was half-written is cleared away."""
    save(tmp_path, 1, weights(1), {"try": 1})
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.old")
    (tmp_path / ".step-000002.tmp").mkdir()
    back = latest(tmp_path)
    assert back is not None and back.state == {"try": 1}
    save(tmp_path, 3, weights(3), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_a_failed_replacement_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only checkpoint of a run is not thrown away before the new one has its name."""
    save(tmp_path, 1, weights(1), {"try": 1}, keep=1)
    real = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp") and target.name == "step-000001":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(tmp_path, 1, weights(1), {"try": 2}, keep=1)
    back = latest(tmp_path)
    assert back is not None and back.state == {"try": 1}


def test_looking_does_not_disturb_a_writer(tmp_path: Path) -> None:
    """What another process is writing stays where it is."""
    (tmp_path / ".step-000002.tmp").mkdir()
    assert latest(tmp_path) is None
    assert (tmp_path / ".step-000002.tmp").exists()


WRITER = """
import sys, torch
from pathlib import Path
from burnish.checkpoint import save
print("up", flush=True)
for step in range(1, 10000):
    tensors = {"policy": {"weight": torch.full((300, 300), float(step))}}
    save(Path(sys.argv[1]), step // 2, tensors, {"step": step // 2}, keep=2)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL while checkpoints are written and replaced as fast as they can."""
    dice = random.Random(0)
    for trial in range(2):
        folder = tmp_path / str(trial)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"up\n"
            while not steps(folder):
                time.sleep(0.01)
            time.sleep(dice.uniform(0.05, 0.4))
            writer.kill()
        back = latest(folder)
        assert back is not None and back.state == {"step": back.step}
        assert float(back.tensors["policy"]["weight"][0, 0]) // 2 == back.step


def trained(
    count: int, start: tuple[dict, dict, object] | None = None, at: int = 0
) -> tuple[dict, dict, object]:
    """Train a little with noise that a step draws for itself, from the start or from a state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=1 / 3, betas=(0.8, 0.95))
    if start:
        model.load_state_dict(start[0])
        load_optimizer_state(optimizer, start[1]["optimizer"], start[2])
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    for step in range(at, count):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        noise = torch.randn(5, 3, generator=generator(0, "own", step))
        optimizer.zero_grad()
        model(noise).square().mean().backward()
        optimizer.step()
    tensors, values = optimizer_state(optimizer)
    return model.state_dict(), {"optimizer": tensors}, values


@settings(derandomize=True, max_examples=6, deadline=None)
@given(at=st.integers(0, 6))
def test_a_resumed_training_is_equal_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, at: int
) -> None:
    """Weights, moments and learning rates, through the files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, moments, values = trained(at)
    save(folder, at, {"policy": model, **moments}, json.loads(json.dumps({"optimizer": values})))
    back = latest(folder)
    assert back is not None
    start = (dict(back.tensors["policy"]), dict(back.tensors))
    resumed = trained(6, (*start, back.state["optimizer"]), at)
    straight = trained(6)
    assert resumed[2] == straight[2]
    for left, right in [(resumed[0], straight[0]), *zip_values(resumed[1], straight[1])]:
        assert set(left) == set(right)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_spread_weights_resume_before_any_gradient_came(tmp_path: Path) -> None:
    """There are no moments then, and shares of nothing leave no group."""
    state = State.start(policy_class("flux2_klein").tiny(), OptimizerConfig(ema_decay=0.5))
    weights = [parameter for _, parameter in state.policy.trainable()]
    run, saved = Run.create(tmp_path, OptimizerConfig()), [weight.clone() for weight in weights]
    facts = {"optimizer": optimizer_state(state.optimizer)[1]}
    with warnings.catch_warnings():
        # That there is one process.
        warnings.simplefilter("ignore")
        sharded_checkpoint.save(run.checkpoints, 1, state.tensors(), facts, ALONE, keep=2)
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
        state.restore(run, ALONE)
    assert state.step == 1 and not optimizer_state(state.optimizer)[0]
    assert weights and all(torch.equal(a, b) for a, b in zip(weights, saved, strict=True))


def test_moments_in_eight_bits_resume_bit_for_bit(tmp_path: Path) -> None:
    """Their scales and tables are no moments, and come back, too; a small weight has float32."""

    def eight(count: int, back: Checkpoint | None = None) -> tuple[torch.nn.Linear, dict, Any]:
        with seeded(0):
            model = torch.nn.Linear(80, 64)
        optimizer = OptimizerConfig(kind="adamw_8bit", learning_rate=0.01).build(
            list(model.parameters())
        )
        if back is not None:
            model.load_state_dict(back.tensors["policy"])
            load_optimizer_state(optimizer, back.tensors["optimizer"], back.state)
        for step in range(back.step if back else 0, count):
            optimizer.zero_grad()
            model(torch.randn(5, 80, generator=generator(step))).square().mean().backward()
            optimizer.step()
        return model, *optimizer_state(optimizer)

    model, tensors, state = eight(3)
    assert tensors["0.state1"].dtype == torch.uint8
    assert tensors["1.state1"].dtype == torch.float32
    save(tmp_path, 3, {"policy": model.state_dict(), "optimizer": tensors}, state)
    resumed, straight = eight(6, latest(tmp_path)), eight(6)
    assert torch.equal(resumed[0].weight, straight[0].weight)
    assert all(torch.equal(tensor, straight[1][name]) for name, tensor in resumed[1].items())
    assert not torch.equal(resumed[0].weight, model.weight)


def zip_values(left: dict, right: dict) -> list[tuple[dict, dict]]:
    """Pairs of groups under the same name."""
    assert set(left) == set(right)
    return [(left[name], right[name]) for name in left]


def test_the_optimizer_of_other_parameters_is_refused() -> None:
    """Another shape or another number of parameters, with what to do."""

    def optimizer(*shapes: tuple[int, ...]) -> torch.optim.AdamW:
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        made = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        made.step()
        return made

    tensors, state = optimizer_state(optimizer((2, 3), (4,)))
    load_optimizer_state(optimizer((2, 3), (4,)), tensors, state)
    for shapes in (((3, 2), (4,)), ((2, 3),), ((2, 3), (4,), (5,))):
        with pytest.raises(CheckpointError, match="resume with the settings it was saved with"):
            load_optimizer_state(optimizer(*shapes), tensors, state)
