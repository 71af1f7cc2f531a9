"""What stands on the shelves of algorithms and rewards, as types that a recipe can name.

Nothing else lists them: a new file is a new kind.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from burnish.algorithms.base import AlgorithmConfig
from burnish.config import shelf
from burnish.rewards.base import RewardConfig

if TYPE_CHECKING:
    from burnish.algorithms.distill import DistillConfig
    from burnish.algorithms.grpo import GrpoConfig
    from burnish.algorithms.nft import NftConfig
    from burnish.rewards.face import FaceConfig
    from burnish.rewards.oracle import OracleConfig
    from burnish.rewards.remote import RemoteConfig
    from burnish.rewards.vlm import VlmConfig

    AnyAlgorithm = GrpoConfig | NftConfig | DistillConfig
    AnyReward = FaceConfig | OracleConfig | RemoteConfig | VlmConfig
else:
    AnyAlgorithm = Annotated[
        reduce(or_, shelf("burnish.algorithms", AlgorithmConfig)), Field(discriminator="kind")
    ]
    AnyReward = Annotated[
        reduce(or_, shelf("burnish.rewards", RewardConfig)), Field(discriminator="kind")
    ]
