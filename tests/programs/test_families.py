"""Every family trains: teachers by each algorithm, a student, a LoRA, from one recipe."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish import checkpoint, runtime
from burnish.adapters import LoraConfig, read_adapter
from burnish.config import ConfigError, parse
from burnish.preflight import check_inputs
from burnish.run_config import RunConfig
from burnish.shelves import families, policy_class
from burnish.stages import run_job

# Stages of a step teach nobody anything.
pytestmark = pytest.mark.filterwarnings("ignore::burnish.fixed_states.FixedStatesWarning")

_DRAW = {"num_steps": 2, "group_size": 4, "window": 0, "keep": "none", "guidance_scale": 2.0}


def recipe(family: str, model: Path, **changes: Any) -> RunConfig:
    """A teacher of each task, by two algorithms, and a student as a LoRA."""
    prompts = {"path": "embedded:prompts/train.jsonl", "limit": 4}
    stage: dict[str, Any] = {
        "steps": 1,
        "prompts_per_step": 2,
        "rewards": {"truth": {"kind": "oracle"}},
    }
    tasks = policy_class(family).tasks
    stages: dict[str, Any] = {
        "t2i_teacher": {
            **stage,
            "prompts": {**prompts, "tasks": ["t2i"]},
            "rollout": {**_DRAW, "num_steps": 4, "window": 1, "keep": "window"},
            "algorithm": {"kind": "grpo"},
        }
    }
    if "edit" in tasks:
        stages["edit_teacher"] = {
            **stage,
            "prompts": {**prompts, "tasks": ["edit"]},
            "rollout": _DRAW,
            "algorithm": {"kind": "nft"},
        }
    stages["student"] = {
        "steps": 2,
        "prompts_per_step": 2,
        "prompts": {**prompts, "tasks": list(tasks)},
        "rollout": {**_DRAW, "guidance_scale": 1.0, "keep": 2, "group_size": 1},
        "algorithm": {
            "kind": "distill",
            "teachers": {task: {"path": f"stage:{task}_teacher"} for task in tasks},
        },
        "lora": {"rank": 2},
    }
    data = {
        "name": "family",
        "policy": {"family": family, "path": str(model), "resolution": 64},
        "stages": stages,
        "judge": {"kind": "oracle"},
        "evaluation": {"num_prompts": 2, "knowledge": None, "num_steps": 2, "guidance_scale": 2},
    }
    return parse(RunConfig, data | changes)


@pytest.mark.parametrize("family", families())
def test_a_family_goes_from_teachers_to_a_student(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    policy_class(family).tiny().save(model)
    config = recipe(family, model)
    check_inputs(config)
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
    trained = [job for job in config.jobs() if job.startswith("train/")]
    for job in (*trained, "measure/student"):
        run_job(config, tmp_path / "run", job, rt)
    stages = tmp_path / "run" / "stages"
    for name in config.stages:
        rows = [json.loads(row) for row in (stages / name / "metrics.jsonl").open()]
        assert rows and all(math.isfinite(row["loss"]) for row in rows)
    assert (stages / "student" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    scores = (tmp_path / "run/evaluation/student/scores.jsonl").read_text()
    assert scores.count("composite") == 4 * len(policy_class(family).tasks)


@pytest.mark.parametrize("family", families())
def test_a_lora_is_trained_beside_rounded_weights(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    policy_class(family).tiny().save(model)
    config = recipe(family, model)
    first = config.stages["t2i_teacher"].model_copy(update={"lora": LoraConfig(rank=2)})
    policy = config.policy.model_copy(update={"dtype": "bfloat16", "checkpointing": True})
    student = config.stages["student"].model_dump()
    student["algorithm"]["teachers"] = {"t2i": {"path": "stage:t2i_teacher"}}
    student["prompts"]["tasks"] = ["t2i"]
    config = parse(
        RunConfig,
        config.model_dump()
        | {
            "policy": policy.model_dump(),
            "stages": {"t2i_teacher": first.model_dump(), "student": student},
        },
    )
    rt = runtime.Runtime(device=torch.device("cpu"), dtype=torch.bfloat16)
    for job in ("train/t2i_teacher", "train/student"):
        run_job(config, tmp_path / "run", job, rt)
    for name in config.stages:
        stage = tmp_path / "run" / "stages" / name
        found = checkpoint.latest(stage / "checkpoints")
        assert found is not None
        assert {t.dtype for t in found.tensors["policy"].values()} == {torch.float32}
        learnt = read_adapter(stage / "lora")
        assert any(float(adapter.high.abs().max()) > 0 for adapter in learnt.values())
        written = load_file(stage / "model/transformer/diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_rounded_weights_are_not_trained_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"need a LoRA .* set stages\.t2i_teacher\.lora\.rank"):
        recipe("qwen_image21", tmp_path, policy={"path": str(tmp_path), "dtype": "bfloat16"})


def test_a_model_of_another_family_is_told_before_it_is_read(tmp_path: Path) -> None:
    def index(name: str, **facts: Any) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, **facts}))

    index("Flux2KleinPipeline")
    with pytest.raises(ConfigError, match=r"got a Flux2KleinPipeline .*policy\.family=flux2_klein"):
        check_inputs(recipe("qwen_image21", tmp_path))
    index("StableCascadePipeline")
    with pytest.raises(ConfigError, match=r"families are .*flux2_klein.*docs/extend\.md"):
        check_inputs(recipe("flux2_klein", tmp_path))
    index("Flux2KleinPipeline", is_distilled=True)
    with pytest.raises(ConfigError, match=r"evaluation\.guidance_scale: need guidance_scale=1"):
        check_inputs(recipe("flux2_klein", tmp_path))


def test_a_task_that_the_family_cannot_do_is_told_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    config = recipe("stable_diffusion3", tmp_path)
    stage = config.stages["t2i_teacher"]
    prompts = stage.prompts.model_copy(update={"tasks": ("t2i", "edit")})
    stages = {"t2i_teacher": stage.model_copy(update={"prompts": prompts})}
    with pytest.raises(ConfigError, match=r"need t2i for .*stable_diffusion3, got edit"):
        check_inputs(config.model_copy(update={"stages": stages}))
