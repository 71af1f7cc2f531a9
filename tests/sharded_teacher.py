"""What one of several processes keeps of a teacher, what the teacher says, and what its student's
gradient is, both with compiled blocks: run by torchrun with the folders of a student and of its
teacher, and a file for the answer."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from burnish.residency import Source, Teachers
from burnish.runtime import RuntimeConfig
from burnish.sharding import Shards, full, local, whole
from burnish.shelves import policy_class
from burnish.types import Prompt

FAMILY = "flux2_klein"


def velocity(policy: Any) -> torch.Tensor:
    prefix = policy.prefix(policy.encode([Prompt(id="a", text="a cat", task="t2i")]))
    noise = policy.noise([torch.Generator().manual_seed(0)])
    found: torch.Tensor = policy.velocity(noise, torch.tensor([0.7]), prefix)
    return found


def gradients(policy: Any) -> list[torch.Tensor]:
    policy.transformer.requires_grad_(True)
    velocity(policy).square().mean().backward()
    return [full(parameter.grad) for parameter in policy.transformer.parameters()]


def main(student: Path, teacher: Path, answer: Path) -> None:
    rt = RuntimeConfig(device="cpu", threads=1, dtype="float32", sharding="full").build()
    policy: Any = policy_class(FAMILY).load(student, resolution=64)
    wanted = gradients(policy.sibling())
    # Without the last stage of compiling, which takes minutes.
    policy.compile_blocks("aot_eager")
    plain: Any = policy_class(FAMILY).load(teacher, resolution=64)
    teachers = Teachers(policy, {"other": Source(student), "t2i": Source(teacher)}, rt)
    teachers.activate("other")
    teachers.prefetch("t2i")
    found = teachers.activate("t2i")
    kept = sum(local(weight).nbytes for weight in found.transformer.parameters())
    with whole(found), torch.no_grad():
        gap = float((velocity(found) - velocity(plain)).abs().max())
    Shards(policy, rt)
    own, other = (torch.cat([g.flatten() for g in grads]) for grads in (gradients(policy), wanted))
    learning = float((own - other).abs().max() / other.abs().max())
    told = rt.gather({"kept": kept, "gap": gap, "learning": learning})
    if rt.is_main:
        size = sum(weight.nbytes for weight in plain.transformer.parameters())
        answer.write_text(json.dumps({"processes": told, "whole": size}))
    rt.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    # As `burnish job` ends: what libraries do as they are unloaded is not asked for here.
    os._exit(0)
