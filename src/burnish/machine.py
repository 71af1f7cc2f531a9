"""What can be known of a machine: versions, devices, memory, disk, and whether a model draws on it.

Every finding that is not fine comes with what to do about it.
"""

import contextlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from burnish import __version__, images, rollout, runtime, vision_build
from burnish.config import located
from burnish.pipeline_folders import INDEX
from burnish.policy_config import PolicyConfig, load_policy
from burnish.types import Guidance, Prompt
from burnish.wording import brief

_GIBIBYTE = 1 << 30
_LEAST_DISK = 1.0  # GiB; a run of the miniature leaves a tenth of it.
_PACKAGES = ("diffusers", "transformers", "peft", "safetensors", "pillow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    is_fine: bool
    found: str
    advice: str = ""
    """What to do if it is not fine."""


def examine(model: str = PolicyConfig().path) -> list[Finding]:
    """Look at versions, device, cores, memory, disk, and whether a model loads and draws."""
    return [*_versions(), *_machine(), _drawing(model)]


def _versions() -> Iterator[Finding]:
    yield Finding(name="burnish", is_fine=True, found=__version__)
    yield Finding(
        name="python",
        is_fine=sys.version_info >= (3, 11),
        found=platform.python_version(),
        advice="use Python 3.11 or newer",
    )
    yield Finding(name="torch", is_fine=True, found=torch.__version__)
    yield _torchvision()
    for package in _PACKAGES:
        version, is_fine = "not installed", False
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version, is_fine = importlib.metadata.version(package), True
        advice = "install Burnish again with its dependencies"
        yield Finding(name=package, is_fine=is_fine, found=version, advice=advice)


def _torchvision() -> Finding:
    try:
        was_helped = vision_build.ensure_torchvision()
        version = importlib.metadata.version("torchvision")
    except Exception as error:
        # Whatever an import stumbles on is what the user wants to know here.
        return Finding(
            name="torchvision",
            is_fine=False,
            found=_one_line(error),
            advice="install the torchvision that belongs to the torch above",
        )
    note = ", built for another torch, made usable" if was_helped else ", fits torch"
    return Finding(name="torchvision", is_fine=True, found=version + note)


def _machine() -> Iterator[Finding]:
    device = runtime.choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    yield Finding(name="device", is_fine=True, found=f"{device} ({name})")
    yield Finding(name="cores", is_fine=True, found=str(runtime.usable_cores()))
    size = runtime.memory(torch.device("cpu"))
    if size is not None:
        yield Finding(name="memory", is_fine=True, found=f"{size / _GIBIBYTE:.1f} GiB")
    free = shutil.disk_usage(Path.cwd()).free / _GIBIBYTE
    yield Finding(
        name="free disk",
        is_fine=free >= _LEAST_DISK,
        found=f"{free:.1f} GiB in {Path.cwd()}",
        advice=f"free {_LEAST_DISK:g} GiB at least, or work in another folder",
    )


def _drawing(model: str) -> Finding:
    """Load a model and draw one picture in two steps."""
    name = f"model {model}"
    if not (located(model) / INDEX).is_file():
        advice = "make it with `burnish miniature build`, or install Burnish again"
        return Finding(name=name, is_fine=False, found="missing", advice=advice)
    try:
        rt = runtime.start()
        policy = load_policy(PolicyConfig(resolution=64), located(model), rt)
        prompt = Prompt(id="doctor", text="a large red circle")
        with rt.autocast():
            drawn = rollout.draw(policy, [prompt], num_steps=2, guidance=Guidance(3.0), seeds=[0])
        images.to_pil(drawn[0])
    except Exception as error:
        # Whatever a library stumbles on is what the user wants to know here.
        advice = "install Burnish again; BURNISH_TRACEBACK=1 burnish sample x shows where"
        return Finding(name=name, is_fine=False, found=_one_line(error), advice=advice)
    return Finding(name=name, is_fine=True, found="loads and draws")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {brief(error, names_file=True)}"
