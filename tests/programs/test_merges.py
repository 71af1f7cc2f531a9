"""Merges of pipelines: by command, and as policies of a run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish import cli
from burnish.adapters import Adapter, read_adapter, write_adapter
from burnish.config import ConfigError, parse
from burnish.jobs import run_job
from burnish.merging import MergeConfig, merge_into
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.run_config import RunConfig
from burnish.run_folder import job_folder
from burnish.tracking import write_atomic

STAGE: dict[str, Any] = {
    "steps": 1,
    "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"]},
    "rollout": {"window": 0, "keep": "none", "guidance_scale": 2.0},
    "rewards": {"truth": {"kind": "oracle"}},
    "algorithm": {"kind": "nft"},
}


def weights(policy: QwenImage21Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.transformer.parameters()])


def shaken(policy: QwenImage21Policy, seed: int) -> QwenImage21Policy:
    """Another model of the same base."""
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            draws = torch.Generator().manual_seed(seed)
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return policy


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: folder / name for name in ("base", "one", "other")}
    QwenImage21Policy.tiny().save(found["base"])
    for seed, name in enumerate(("one", "other")):
        shaken(QwenImage21Policy.tiny(), seed).save(found[name])
    return found


def read(folder: Path) -> torch.Tensor:
    return weights(QwenImage21Policy.load(folder, resolution=64))


def test_the_command_writes_a_pipeline(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    command = ["merge", "task_arithmetic", str(models["one"]), str(models["other"])]
    scales = ["--scale", "0.25", "--scale", "0.5"]
    assert cli.main([*command, *scales, "--base", str(models["base"]), "--out", str(out)]) == 0
    base, one, other = (read(models[name]) for name in ("base", "one", "other"))
    torch.testing.assert_close(read(out), base + 0.25 * (one - base) + 0.5 * (other - base))


def test_a_merge_is_stored_as_its_base_is(models: dict[str, Path], tmp_path: Path) -> None:
    """Rounded as the base's transformer is, and the very files of all else."""
    policy = QwenImage21Policy.tiny()
    policy.transformer.to(torch.bfloat16)
    policy.save(tmp_path / "base")
    out = tmp_path / "merged"
    command = ["merge", "average", str(models["one"]), str(models["other"])]
    assert cli.main([*command, "--base", str(tmp_path / "base"), "--out", str(out)]) == 0
    name = "transformer/diffusion_pytorch_model.safetensors"
    written = load_file(out / name)
    one, other = (load_file(models[teacher] / name) for teacher in ("one", "other"))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for key, tensor in written.items():
        torch.testing.assert_close(tensor, ((one[key] + other[key]) / 2).bfloat16())
    for part in ("vae", "text_encoder"):
        for file in (tmp_path / "base" / part).iterdir():
            assert (out / part / file.name).read_bytes() == file.read_bytes()


def test_loras_are_merged_exactly_and_written_as_one(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)

    def lora(*modules: str) -> dict[str, Adapter]:
        pairs = [
            (torch.randn(2, 4, generator=draws), torch.randn(3, 2, generator=draws))
            for _ in modules
        ]
        return {m: Adapter(*pair, scale=0.5) for m, pair in zip(modules, pairs, strict=True)}

    def dense(adapters: dict[str, Adapter], module: str) -> torch.Tensor:
        own = adapters.get(module)
        return torch.zeros(3, 4) if own is None else own.scale * own.high @ own.low

    one, other = lora("a", "b"), lora("b", "c")
    for name, adapters in (("one", one), ("other", other)):
        write_adapter(tmp_path / name, adapters)
    command = ["merge", "lora", str(tmp_path / "one"), str(tmp_path / "other")]
    out = tmp_path / "merged"
    assert cli.main([*command, "--scale", "0.5", "--scale", "2", "--out", str(out)]) == 0
    merged = read_adapter(out)
    assert list(merged) == ["a", "b", "c"]
    for module in merged:
        expected = 0.5 * dense(one, module) + 2 * dense(other, module)
        torch.testing.assert_close(dense(merged, module), expected)
    assert cli.main([*command, "--scale", "1", "--out", str(tmp_path / "more")]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("soup {one}", "need one of average, task_arithmetic, ties"),
        ("average {one} missing", "got missing; take one with model_index.json"),
        ("average {one} --scale 1", "need no scales for average"),
        ("ties {one} --density 0", "density: need greater than 0"),
        ("task_arithmetic {one} {other} --scale 1", "need 2 scales"),
        ("average {one} --out {one}", "need a folder that does not exist yet"),
    ],
)
def test_what_cannot_be_merged_is_told(
    arguments: str, words: str, models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    given = arguments.format(**models).split()
    out = [] if "--out" in given else ["--out", str(tmp_path / "merged")]
    assert cli.main(["merge", *given, "--base", str(models["base"]), *out]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "merged").exists()


def test_a_model_of_another_encoder_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    foreign = QwenImage21Policy.tiny(seed=1)
    foreign.save(tmp_path / "foreign")
    policy = QwenImage21Policy.load(models["base"], resolution=64)
    with pytest.raises(ConfigError, match="need models of one base, got another"):
        merge_into(policy, [tmp_path / "foreign"], MergeConfig(method="average"))


def run_config(models: dict[str, Path], **merges: Any) -> RunConfig:
    other = {**STAGE, "prompts": {**STAGE["prompts"], "tasks": ["edit"]}}
    data = {
        "name": "merged",
        "policy": {"path": str(models["base"]), "resolution": 64},
        "stages": {"one": STAGE, "other": other, "last": {**STAGE, "start": "soup"}},
        "merges": {"soup": {"method": "average", "of": ["one", "other"]}, **merges},
        "judge": {"kind": "oracle"},
    }
    return parse(RunConfig, data)


def test_a_run_merges_what_its_stages_left(models: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(models)
    jobs = config.jobs()
    assert jobs["merge/soup"] == ("train/one", "train/other")
    assert jobs["measure/soup"] == jobs["train/last"] == ("merge/soup",)
    assert config.tasks("soup") == ("t2i", "edit") and config.deployed("soup").scale == 2.0
    for name in ("one", "other"):
        place = job_folder(tmp_path, f"train/{name}")
        place.mkdir(parents=True)
        (place / "model").symlink_to(models[name])
        write_atomic(place / "DONE", "")
    run_job(config, tmp_path, "merge/soup", config.runtime.build())
    one, other = (read(models[name]) for name in ("one", "other"))
    torch.testing.assert_close(read(tmp_path / "stages" / "soup" / "model"), (one + other) / 2)


@pytest.mark.parametrize(
    ("merges", "words"),
    [
        ({"one": {"method": "average", "of": ["one"]}}, "that no stage has, got 'one'"),
        ({"base": {"method": "average", "of": ["one"]}}, "and not base..."),
        ({"x": {"method": "average", "of": ["onee"]}}, "did you mean 'one'?"),
        (
            {"x": {"method": "task_arithmetic", "of": ["one", "other"], "scales": [1.0]}},
            "merges.x.scales: need 2, one for each stage, got 1",
        ),
    ],
)
def test_a_merge_of_nothing_known_is_refused(
    merges: dict[str, Any], words: str, models: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        run_config(models, **merges)
