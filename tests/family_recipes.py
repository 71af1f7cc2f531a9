"""A short recipe that every model family goes through."""

from pathlib import Path
from typing import Any

from burnish.config import parse
from burnish.run_config import RunConfig
from burnish.shelves import policy_class

DRAW = {"num_steps": 2, "group_size": 4, "window": 0, "keep": "none", "guidance_scale": 2.0}


def recipe(family: str, model: Path, **changes: Any) -> RunConfig:
    """Teachers by two algorithms, of two tasks where there are two, and a student as a LoRA."""
    prompts = {"path": "embedded:prompts/train.jsonl", "limit": 4}
    stage: dict[str, Any] = {
        "steps": 1,
        "prompts_per_step": 2,
        "rewards": {"truth": {"kind": "oracle"}},
    }
    tasks = policy_class(family).tasks
    stages: dict[str, Any] = {
        "grpo_teacher": {
            **stage,
            "prompts": {**prompts, "tasks": [tasks[0]]},
            "rollout": {**DRAW, "num_steps": 4, "window": 1, "keep": "window"},
            "algorithm": {"kind": "grpo"},
        },
        "nft_teacher": {
            **stage,
            "prompts": {**prompts, "tasks": [tasks[-1]]},
            "rollout": DRAW,
            "algorithm": {"kind": "nft"},
        },
        "student": {
            "steps": 2,
            "prompts_per_step": 2,
            "prompts": {**prompts, "tasks": list(tasks)},
            "rollout": {**DRAW, "guidance_scale": 1.0, "keep": 2, "group_size": 1},
            "algorithm": {
                "kind": "distill",
                # The only task of a family has the first.
                "teachers": {
                    tasks[-1]: {"path": "stage:nft_teacher"},
                    tasks[0]: {"path": "stage:grpo_teacher"},
                },
            },
            "lora": {"rank": 2},
        },
    }
    data = {
        "name": "family",
        "policy": {"family": family, "path": str(model), "resolution": 64},
        "stages": stages,
        "judge": {"kind": "oracle"},
        "evaluation": {"num_prompts": 2, "knowledge": None, "num_steps": 2, "guidance_scale": 2},
    }
    return parse(RunConfig, data | changes)
