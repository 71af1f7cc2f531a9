"""What one of several processes keeps of a teacher, and what the teacher says: run by torchrun with
the folders of a student and of its teacher, and a file for the answer."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from burnish.residency import Source, Teachers
from burnish.runtime import RuntimeConfig
from burnish.sharding import local, whole
from burnish.shelves import policy_class
from burnish.types import Prompt

FAMILY = "flux2_klein"


@torch.no_grad()
def velocity(policy: Any) -> torch.Tensor:
    prefix = policy.prefix(policy.encode([Prompt(id="a", text="a cat", task="t2i")]))
    noise = policy.noise([torch.Generator().manual_seed(0)])
    found: torch.Tensor = policy.velocity(noise, torch.tensor([0.7]), prefix)
    return found


def main(student: Path, teacher: Path, answer: Path) -> None:
    rt = RuntimeConfig(device="cpu", threads=1, sharding="full").build()
    policy: Any = policy_class(FAMILY).load(student, resolution=64)
    plain: Any = policy_class(FAMILY).load(teacher, resolution=64)
    teachers = Teachers(policy, {"other": Source(student), "t2i": Source(teacher)}, rt)
    teachers.activate("other")
    teachers.prefetch("t2i")
    found = teachers.activate("t2i")
    kept = sum(local(weight).nbytes for weight in found.transformer.parameters())
    with whole(found):
        gap = float((velocity(found) - velocity(plain)).abs().max())
    told = rt.gather({"kept": kept, "gap": gap})
    if rt.is_main:
        size = sum(weight.nbytes for weight in plain.transformer.parameters())
        answer.write_text(json.dumps({"processes": told, "whole": size}))
    rt.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    # As `burnish job` ends: what libraries do as they are unloaded is not asked for here.
    os._exit(0)
