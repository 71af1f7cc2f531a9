"""What stands on the shelves of algorithms, benches, rewards and policies, as a recipe names it.

Nothing else lists them: a new file is a new kind.
"""

import importlib
import pkgutil
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from burnish import policies
from burnish.algorithms.base import AlgorithmConfig
from burnish.bench.base import BenchConfig
from burnish.config import ConfigError, shelf
from burnish.pipeline_folders import read_index
from burnish.policies.base import Policy
from burnish.rewards.base import RewardConfig

if TYPE_CHECKING:
    from burnish.algorithms.distill import DistillConfig
    from burnish.algorithms.grpo import GrpoConfig
    from burnish.algorithms.nft import NftConfig
    from burnish.bench.gedit import GeditConfig
    from burnish.bench.geneval import GenevalConfig
    from burnish.bench.imgedit import ImgeditConfig
    from burnish.bench.miniature import MiniatureConfig
    from burnish.bench.qwen_image_bench import QwenImageBenchConfig
    from burnish.bench.unigenbench import UnigenbenchConfig
    from burnish.rewards.face import FaceConfig
    from burnish.rewards.oracle import OracleConfig
    from burnish.rewards.remote import RemoteConfig
    from burnish.rewards.vlm import VlmConfig

    AnyAlgorithm = GrpoConfig | NftConfig | DistillConfig
    AnyBench = (
        GeditConfig
        | GenevalConfig
        | ImgeditConfig
        | MiniatureConfig
        | QwenImageBenchConfig
        | UnigenbenchConfig
    )
    AnyReward = FaceConfig | OracleConfig | RemoteConfig | VlmConfig
    Family = str
else:
    Family = Literal[
        tuple(
            file.name
            for file in pkgutil.iter_modules(policies.__path__)
            if file.name != "base" and not file.ispkg
        )
    ]
    AnyAlgorithm = Annotated[
        reduce(or_, shelf("burnish.algorithms", AlgorithmConfig)), Field(discriminator="kind")
    ]
    AnyBench = Annotated[
        reduce(or_, shelf("burnish.bench", BenchConfig)), Field(discriminator="kind")
    ]
    AnyReward = Annotated[
        reduce(or_, shelf("burnish.rewards", RewardConfig)), Field(discriminator="kind")
    ]


def families() -> tuple[str, ...]:
    """Names of the model families that there are."""
    return get_args(Family)


def policy_class(family: str) -> type[Policy[Any, Any]]:
    """The class of a family.

    Raises:
        ConfigError: its file holds none.
    """
    module = importlib.import_module(f"burnish.policies.{family}")
    for member in vars(module).values():
        if isinstance(member, type) and getattr(member, "family", None) == family:
            return member
    raise ConfigError(f"need a policy class in {module.__name__}, got none of family {family}")


def family_of(folder: Path) -> str:
    """The family that reads a pipeline's folder.

    Raises:
        ConfigError: it is no such folder, or no family reads it.
    """
    found = read_index(folder).get("_class_name")
    known = {policy_class(name).pipeline_class.__name__: name for name in families()}
    if found not in known:
        raise ConfigError(
            f"need a model of a known family, got a {found} in {folder}; the families are "
            f"{', '.join(known.values())}, and docs/extend.md tells how to add one"
        )
    return known[found]
