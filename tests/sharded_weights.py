"""Weights, an average and moments that are spread: saved by some processes, read by others. Run by
torchrun with `save`, `read` or `fail`, the folder of checkpoints and the step of the newest whole
one; what is read is compared here."""

import errno
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from burnish import checkpoint, sharded_checkpoint
from burnish.runtime import RuntimeConfig

SHAPES = {"policy:a.weight": (7, 5), "policy:b": (1, 3), "average:a.weight": (7, 5)}
SHAPES |= {"optimizer:0.exp_avg": (7, 5)}


def wanted(step: int) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {"optimizer": {"0.step": torch.tensor(float(step))}}
    for number, (key, shape) in enumerate(SHAPES.items()):
        group, name = key.split(":")
        draws = torch.Generator().manual_seed(100 * step + number)
        dtype = torch.bfloat16 if key == "policy:b" else torch.float32
        found.setdefault(group, {})[name] = torch.randn(shape, generator=draws).to(dtype)
    return found


def main(task: str, folder: Path, newest: int) -> None:
    rt = RuntimeConfig(device="cpu", threads=1, dtype="float32", sharding="full").build()
    mesh = init_device_mesh("cpu", (rt.world_size,))
    sharded_checkpoint.FILE_BYTES = 60  # Two files of each process at least.

    def spread(whole: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)]) if whole.ndim else whole

    if task == "save":
        for step in (1, 2, 3):
            own = {group: {n: spread(t) for n, t in o.items()} for group, o in wanted(step).items()}
            sharded_checkpoint.save(folder, step, own, {"step": step}, rt, keep=2)
    if task == "fail":
        # One disk is full.
        if not rt.is_main:
            full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
            mock.patch.object(HuggingFaceStorageWriter, "write_data", full).start()
        own = {"policy": {"w": spread(torch.zeros(100, 9))}}
        try:
            sharded_checkpoint.save(folder, 4, own, {}, rt, keep=2)
        except checkpoint.CheckpointError as error:
            assert "No space left on device" in str(error) and "\n" not in str(error)
        else:
            raise AssertionError("this must fail")
    found = checkpoint.latest(folder, rt)
    assert found is not None and found.is_sharded and found.step == found.state["step"] == newest
    expected = wanted(newest)
    read = sharded_checkpoint.read(found.folder, lambda group, name: spread(expected[group][name]))
    for group, own in expected.items():
        assert read[group].keys() == own.keys()
        for name, tensor in own.items():
            share = read[group][name]
            assert isinstance(share, DTensor) == (tensor.ndim > 0)
            full = share.full_tensor() if isinstance(share, DTensor) else share
            assert torch.equal(full, tensor) and full.dtype == tensor.dtype, name
    rt.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    # As `burnish job` ends: what libraries do as they are unloaded is not asked for here.
    os._exit(0)
