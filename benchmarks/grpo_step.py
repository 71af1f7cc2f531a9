"""One GRPO step on pipelines of random weights, as `overhead.py` and `cost.py` measure it.

Pipelines have sizes that two cores can train: 6 layers, 128 wide or more. Scores are given: what a
judge adds is measured by `asynchronous.py`, and what processes wait for each other by `scaling.py`.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from burnish import images
from burnish.algorithms.base import StageContext
from burnish.algorithms.grpo import GrpoConfig
from burnish.optimization import OptimizerConfig, State
from burnish.policies.base import Policy
from burnish.policies.qwen_image_edit import edit_plus
from burnish.rewards.oracle import OracleConfig
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig
from burnish.runtime import ALONE
from burnish.shelves import policy_class
from burnish.types import Prompt, Scored, Task
from burnish.updates import update

LAYERS = 6
HEADS = 8
ROLLOUT = RolloutConfig(num_steps=6, guidance_scale=3.0, group_size=8, window=2, micro_batch=16)
OPTIMIZER = OptimizerConfig(num_updates=1, micro_batch=16)
REWARDS = {"given": OracleConfig()}


def make_policy(family: str, resolution: int, layers: int = LAYERS) -> Policy[Any, Any]:
    """A family's tiny pipeline with a larger transformer of random weights."""
    kind = policy_class(family)
    pipeline: Any = kind.tiny().pipeline
    old = pipeline.transformer
    changes = {"num_layers": layers, "num_attention_heads": HEADS}
    if "caption_projection_dim" in old.config:
        changes["caption_projection_dim"] = HEADS * old.config.attention_head_dim
    torch.manual_seed(0)
    pipeline.transformer = type(old).from_config({**old.config, **changes})
    policy: Any = kind(pipeline, resolution=resolution)
    return policy


def make_prompts(task: Task, count: int, step: int, side: int, references: int) -> list[Prompt]:
    """Never the same ones twice."""
    rng = np.random.default_rng(step)
    found = []
    for row in range(count):
        pictures = [
            Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
            for _ in range(references if task == "edit" else 0)
        ]
        sources = tuple(images.encode_png(picture) for picture in pictures)
        text = f"{row} red cats and {step} blue ones"
        found.append(Prompt(id=str(row), text=text, task=task, sources=sources))
    return found


class Step:
    """One step after another of one policy."""

    def __init__(
        self,
        policy: Policy[Any, Any],
        task: Task,
        count: int,
        rollout: RolloutConfig = ROLLOUT,
        references: int = 1,
    ) -> None:
        self.policy, self.task, self.count = policy, task, count
        self.rollout, self.references = rollout, references
        policy.transformer.requires_grad_(True)
        self.state = State.start(policy, OPTIMIZER)
        self.algorithm = GrpoConfig().build(
            StageContext(
                policy=policy,
                guidance=rollout.guidance,
                num_steps=rollout.num_steps,
                steps=100,
                kernel=rollout.kernel,
                noise_level=rollout.noise_level,
                num_updates=OPTIMIZER.num_updates,
                micro_batch=OPTIMIZER.micro_batch,
                seed=0,
                rewards=REWARDS,
            )
        )
        # The first step also proves that sampler and trainer agree; the others are what costs.
        self.state.step = 1

    def run(self) -> None:
        step, side = self.state.step, self.policy.resolution
        prompts = make_prompts(self.task, self.count, step, side, self.references)
        groups = sample(self.policy, prompts, self.rollout, seed=0, step=step)
        size = self.rollout.group_size
        given = tuple(Scored(value=place / size) for place in range(size))
        scored = [replace(group, scores={"given": given}) for group in groups]
        signals, _ = self.algorithm.credit(scored, self.state.step)
        update(
            OPTIMIZER,
            self.algorithm,
            self.state,
            ALONE,
            prompts,
            signals,
            seed=0,
            total=100,
        )
        self.state.step += 1


def shrink_sources(resolution: int) -> None:
    """Qwen-Image-Edit makes every source a megapixel; here sources are as large as pictures."""
    edit_plus.CONDITION_IMAGE_SIZE = edit_plus.VAE_IMAGE_SIZE = resolution**2
