"""Many teachers, one student: who teaches what, how states count, and who is on the device."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from burnish import residency
from burnish.adapters import (
    Adapter,
    LoraConfig,
    adapted,
    attach,
    detach,
    read_adapter,
    write_adapter,
)
from burnish.algorithms.base import StageContext
from burnish.algorithms.distill import Distill, DistillConfig, TeacherConfig, weights
from burnish.batches import stack
from burnish.borrowing import borrowed
from burnish.config import ConfigError, located, parse
from burnish.flow import KERNELS
from burnish.objectives import velocity_matching
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import read_prompts
from burnish.residency import Source, Teachers
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig
from burnish.shelves import families, policy_class
from burnish.types import Group, Guidance, Prompt, Signal

STEPS = 3
SCALE = 2.5


@pytest.fixture(scope="module")
def policy() -> QwenImage21Policy:
    return QwenImage21Policy.tiny()


@pytest.fixture(scope="module")
def folders(policy: QwenImage21Policy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers of one base that differ in all weights."""
    root = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("one", "two", "three")):
        teacher = policy.sibling()
        with torch.no_grad():
            for parameter in teacher.transformer.parameters():
                draws = torch.Generator().manual_seed(seed)
                parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
        teacher.save(root / name)
    return {name: root / name for name in ("one", "two", "three")}


def prompts(task: str, category: str, count: int = 2) -> list[Prompt]:
    every = read_prompts(located("embedded:prompts/train.jsonl"))
    return [p for p in every if (p.task, p.category) == (task, category)][:count]


def groups(policy: QwenImage21Policy, task: str = "t2i", category: str = "portrait") -> list[Group]:
    config = RolloutConfig(num_steps=STEPS, group_size=2, window=0, keep="all", guidance_scale=1.0)
    return sample(policy, prompts(task, category), config, seed=0, step=0)


def build(policy: QwenImage21Policy, teachers: dict[str, Path], **settings: Any) -> Distill:
    named = {n: TeacherConfig(path=str(f), guidance_scale=SCALE) for n, f in teachers.items()}
    context = StageContext(
        policy=policy, guidance=Guidance(), num_steps=STEPS, steps=10, kernel="ode",
        noise_level=0.0, num_updates=1, micro_batch=16, seed=0, rewards={},
    )  # fmt: skip
    return Distill(DistillConfig(teachers=named, **settings), context)


def drawn_by(
    algorithm: Distill, policy: QwenImage21Policy, asked: list[Prompt], plan: RolloutConfig
) -> list[Group]:
    """The groups that the loop would draw for an algorithm."""
    drawer, own = algorithm.behaviour(policy, plan, asked, 0)
    return sample(drawer, asked, own, seed=0, step=0)


def targets(signals: list[Signal]) -> Tensor:
    return torch.cat([signal.fields["target"] for signal in signals])


# --- Who teaches what ------------------------------------------------------------------------


def test_a_category_goes_before_its_task(
    policy: QwenImage21Policy, folders: dict[str, Path]
) -> None:
    one, two = folders["one"], folders["two"]
    algorithm = build(policy, {"t2i": one, "t2i/portrait": two})
    for category, folder in (("portrait", two), ("landscape", one)):
        drawn = groups(policy, category=category)
        found, told = algorithm.credit(drawn, 0)
        wanted, _ = build(policy, {"t2i": folder}).credit(drawn, 0)
        assert torch.equal(targets(found), targets(wanted))
        assert told["teacher/is_t2i/portrait"] == float(category == "portrait")


def test_two_labels_of_one_teacher_are_one_teacher(
    policy: QwenImage21Policy, folders: dict[str, Path]
) -> None:
    folder = folders["one"]
    drawn = groups(policy)
    alone, both = (
        build(policy, teachers)
        for teachers in ({"t2i": folder}, {"t2i": folder, "t2i/portrait": folder})
    )
    losses = [a.loss(policy, stack(a.credit(drawn, 0)[0])).loss for a in (alone, both)]
    assert torch.equal(losses[0], losses[1])


def test_a_prompt_without_a_teacher_is_an_error(
    policy: QwenImage21Policy, folders: dict[str, Path]
) -> None:
    algorithm = build(policy, {"t2i/portrait": folders["one"], "edit": folders["two"]})
    with pytest.raises(ConfigError, match=r"need a teacher for t2i/landscape, the label of prompt"):
        algorithm.credit(groups(policy, category="landscape"), 0)
    with pytest.raises(ValueError, match=r"one teacher per step, got edit, t2i/portrait"):
        algorithm.credit([*groups(policy), *groups(policy, "edit")], 0)


@pytest.mark.parametrize("label", ["portrait", "t2i/", "video", "video/portrait"])
def test_a_label_that_is_none_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match="need labels of teachers like t2i, edit or t2i/portrait"):
        parse(DistillConfig, {"kind": "distill", "teachers": {label: {"path": "x"}}})


# --- How states count ------------------------------------------------------------------------


def test_on_an_even_schedule_all_weights_are_the_plain_sum() -> None:
    sigmas = torch.linspace(1, 0, 5)
    for kind in ("one", "step", "kl"):
        found = weights(kind, sigmas[:-1], sigmas[1:], 4)
        torch.testing.assert_close(found, torch.ones(4))


def test_kl_weighs_by_the_distance_of_the_next_states() -> None:
    draws = torch.Generator().manual_seed(0)
    latents, mine, theirs = (torch.randn(3, 4, 8, generator=draws) for _ in range(3))
    sigmas, sigmas_next = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.7, 0.2, 0.0])
    ends = [
        KERNELS["ode"](latents, v, sigma=sigmas, sigma_next=sigmas_next, noise_level=0.0).mean
        for v in (mine, theirs)
    ]
    found = velocity_matching(mine, theirs, weight=weights("kl", sigmas, sigmas_next, 1))
    torch.testing.assert_close(found, (ends[0] - ends[1]).pow(2).mean(dim=(1, 2)))


def test_the_loss_follows_the_weights(policy: QwenImage21Policy, folders: dict[str, Path]) -> None:
    drawn = groups(policy)
    found = {}
    for kind in ("one", "step"):
        algorithm = build(policy, {"t2i": folders["one"]}, weight=kind)
        batch = stack(algorithm.credit(drawn, 0)[0])
        found[kind] = algorithm.loss(policy, batch)
    gap = velocity_matching(batch.velocity(policy), batch.fields["target"])
    expected = (gap * batch.fields["weight"]).mean()
    torch.testing.assert_close(found["step"].loss, expected)
    assert found["step"].metrics == found["one"].metrics


def test_guidance_rises_over_its_share_of_the_stage(
    policy: QwenImage21Policy, folders: dict[str, Path]
) -> None:
    teachers = {"t2i": folders["one"]}
    assert [build(policy, teachers).guidance("t2i", step).scale for step in (0, 9)] == [
        SCALE,
        SCALE,
    ]
    rising = build(policy, teachers, guidance_ramp=0.5)
    assert [rising.guidance("t2i", s).scale for s in range(6)] == pytest.approx(
        [1.3, 1.6, 1.9, 2.2, 2.5, 2.5]
    )


def test_late_states_have_low_noise(policy: QwenImage21Policy) -> None:
    config = RolloutConfig(num_steps=8, group_size=1, window=0, keep="late", guidance_scale=1.0)
    sigmas = [
        float(t.sigmas)
        for step in range(30)
        for group in sample(policy, prompts("t2i", "general"), config, seed=0, step=step)
        for t in group.trajectories
    ]
    schedule = policy.schedule(8)
    places = [int((schedule - sigma).abs().argmin()) for sigma in sigmas]
    # The mean of Beta(5, 2) is 5/7; the place is the floor of eight times that.
    assert sum(places) / len(places) == pytest.approx(8 * 5 / 7 - 0.5, abs=0.6)
    assert len(set(places)) > 3


# --- Who is on the device --------------------------------------------------------------------


def state(policy: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.transformer.state_dict().items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("guess", [None, "two", "three"])
def test_the_next_teacher_is_right_whatever_was_guessed(
    guess: str | None, policy: QwenImage21Policy, folders: dict[str, Path]
) -> None:
    teachers = Teachers(policy, {name: Source(folder) for name, folder in folders.items()})
    teachers.activate("one")
    if guess is not None:
        teachers.prefetch(guess)
    found = state(teachers.activate("two"))
    assert equal(found, state(QwenImage21Policy.load(folders["two"], resolution=64)))


def test_a_half_copied_teacher_never_passes_for_one(
    policy: QwenImage21Policy, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = Teachers(policy, {name: Source(folder) for name, folder in folders.items()})
    resident = teachers.activate("one").transformer

    def cut_off(transformer: Any, weight: Callable[[str], Tensor]) -> None:
        name, parameter = next(iter(resident.named_parameters()))
        parameter.data.copy_(weight(name))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(residency, "_fill", cut_off)
        with pytest.raises(KeyboardInterrupt):
            teachers.activate("two")
    again = state(teachers.activate("one"))
    assert equal(again, state(QwenImage21Policy.load(folders["one"], resolution=64)))


# --- Teachers that are LoRAs -----------------------------------------------------------------


def write_lora(path: Path, policy: QwenImage21Policy, modules: list[str], layout: str) -> None:
    prefix = {"diffusers": "transformer.", "peft": "base_model.model."}[layout]
    shapes = {n: p.shape for n, p in policy.transformer.named_parameters()}
    draws = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        out, inner = shapes.get(f"{module}.weight", (8, 8))
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(4, inner, generator=draws)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(out, 4, generator=draws)
    path.mkdir(exist_ok=True)
    name = {"diffusers": "pytorch_lora_weights", "peft": "adapter_model"}[layout]
    save_file(tensors, path / f"{name}.safetensors")
    if layout == "peft":
        (path / "adapter_config.json").write_text('{"lora_alpha": 2, "r": 4}')


@pytest.mark.parametrize(("layout", "scale"), [("diffusers", 1.0), ("peft", 0.5)])
def test_a_lora_on_a_base_is_the_teacher_with_its_weights_added(
    layout: str, scale: float, policy: QwenImage21Policy, folders: dict[str, Path], tmp_path: Path
) -> None:
    modules = [f"transformer_blocks.{n}.attn.to_q" for n in range(2)]
    write_lora(tmp_path / "lora", policy, modules, layout)
    adapters = read_adapter(tmp_path / "lora")
    assert list(adapters) == modules and {a.scale for a in adapters.values()} == {scale}
    teachers = Teachers(
        policy, {"plain": Source(folders["one"]), "lora": Source(folders["one"], tmp_path / "lora")}
    )
    plain, found = (state(teachers.activate(name)) for name in ("plain", "lora"))
    for name, before in plain.items():
        adapter = adapters.get(name.removesuffix(".weight"))
        learnt = 0 if adapter is None else scale * adapter.high @ adapter.low
        torch.testing.assert_close(found[name], before + learnt)
    assert equal(plain, state(teachers.activate("plain")))


LORAS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 16},
    "rank-stabilised": {"lora_alpha": 16, "use_rslora": True},
    "patterns": {"alpha_pattern": {"attn.to_q": 32, "to_k": 2}, "rank_pattern": {"attn.to_k": 2}},
}
"""Settings of peft under which a factor of alpha / r would be another model's."""


@pytest.mark.parametrize("family", ["qwen_image", "flux2_klein"])
@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_has_the_strength_that_its_trainer_gave_it(
    family: str, kind: str, tmp_path: Path
) -> None:
    """As peft writes it, and as the trainers of diffusers do."""
    import peft
    from diffusers.training_utils import _collate_lora_metadata

    pipeline: Any = policy_class(family).tiny().pipeline
    base = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    plan = peft.LoraConfig(r=4, target_modules=["attn.to_q", "attn.to_k"], **LORAS[kind])

    def agrees(found: Path, wanted: dict[str, Tensor]) -> None:
        learnt = adapted(base, read_adapter(found), where=str(found))
        assert not equal(base, wanted)
        for name, tensor in wanted.items():
            torch.testing.assert_close(learnt[name], tensor, msg=name)

    model = peft.get_peft_model(copy.deepcopy(pipeline.transformer), plan)
    _shake(model)
    model.save_pretrained(tmp_path / "peft")
    agrees(tmp_path / "peft", model.merge_and_unload().state_dict())

    network = pipeline.transformer
    network.add_adapter(plan)
    _shake(network)
    factors = peft.get_peft_model_state_dict(network)
    said = _collate_lora_metadata({"transformer": network})
    pipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=factors, **said)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "theirs")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    agrees(tmp_path / "theirs", network.state_dict())


def _shake(network: Any) -> None:
    """Give adapters something to say."""
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")
@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
def test_a_lora_that_is_more_than_two_factors_is_refused(setting: str, tmp_path: Path) -> None:
    import peft

    plan = peft.LoraConfig(r=4, target_modules=["attn.to_q"], **{setting: True})
    model = peft.get_peft_model(policy_class("qwen_image").tiny().transformer, plan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"need a LoRA of two factors for each .* got {setting}"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"got base_model\.model\.transformer_blocks\.0\.attn"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"need JSON in .*adapter_config\.json"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("family", families())
def test_teachers_that_are_loras_borrow_the_weights_of_a_student_that_is_one(
    family: str, tmp_path: Path, small_sources: None
) -> None:
    """They are what their copies are, use no transformer but the student's, and leave it as it is:
    its velocity, its adapters, and what of it is trained."""
    student: Any = policy_class(family).tiny()
    student.save(tmp_path / "base")
    sources = {}
    for seed, label in enumerate(("one", "two")):
        teacher = student.sibling()
        _randomly_adapted(teacher, LoraConfig(rank=2), seed)
        sources[label] = Source(tmp_path / "base", tmp_path / label)
        write_adapter(tmp_path / label, detach(teacher.transformer))
    copies = Teachers(student, sources)
    own = Teachers(student, sources, may_borrow=True)
    _randomly_adapted(student, LoraConfig(rank=4), 2)
    trained = [name for name, _ in student.trainable()]

    task = student.tasks[0]
    rows = [p for p in read_prompts(located("embedded:prompts/train.jsonl")) if p.task == task][:2]
    latents = student.noise([torch.Generator().manual_seed(row) for row in range(2)])

    @torch.no_grad()
    def velocity(policy: Any) -> Tensor:
        prefix = policy.prefix(policy.encode(rows))
        return policy.velocity(latents, torch.tensor([0.9, 0.4]), prefix)

    before = velocity(student)
    for label in ("one", "two", "one"):
        found = velocity(own.activate(label))
        torch.testing.assert_close(found, velocity(copies.activate(label)), rtol=0, atol=2e-5)
        assert (found - before).abs().max() > 1e-3
        assert torch.equal(velocity(student), before)
    ids = {id(parameter) for parameter in student.transformer.parameters()}
    assert {id(p) for p in own.activate("one").transformer.parameters()} == ids
    assert [name for name, _ in student.trainable()] == trained


def test_compiled_blocks_stay_alike_when_their_weights_are_lent() -> None:
    """The code of one serves all of them: no block is compiled for itself."""
    tiny: Any = policy_class("flux2_klein").tiny()
    sizes = {**tiny.pipeline.transformer.config, "num_single_layers": 12}
    tiny.pipeline.transformer = type(tiny.pipeline.transformer).from_config(sizes).eval()
    student: Any = type(tiny)(tiny.pipeline, resolution=64)
    teacher = student.sibling()
    _randomly_adapted(teacher, LoraConfig(rank=2), 0)
    adapters = detach(teacher.transformer)
    own: Any = borrowed(student, adapters)
    _randomly_adapted(student, LoraConfig(rank=2), 1)
    student.compile_blocks("eager")
    own.transformer.put_in(adapters)
    prefix = student.prefix(student.encode([Prompt(id="a", text="a cat")]))
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for policy in (student, own, student, own):
            policy.velocity(student.noise([torch.Generator()]), torch.tensor([0.5]), prefix)
    # Of two kinds of block, with adapters of the one and of the other.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def _randomly_adapted(policy: Any, config: LoraConfig, seed: int) -> None:
    """With factors of a LoRA that change something."""
    attach(policy.transformer, config, policy.lora_targets)
    draws = torch.Generator().manual_seed(seed)
    for _, parameter in policy.trainable():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draws)


def test_weights_that_differ_are_not_borrowed(
    policy: QwenImage21Policy, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A LoRA on another model is a teacher with a transformer of its own."""
    write_lora(tmp_path / "lora", policy, ["transformer_blocks.0.attn.to_q"], "diffusers")
    source = {"t2i": Source(folders["one"], tmp_path / "lora")}
    for student, lends in ((policy, False), (QwenImage21Policy.load(folders["one"]), True)):
        found = Teachers(student, source, may_borrow=True).activate("t2i").transformer
        lent = {id(p) for p in found.parameters()} == {
            id(p) for p in student.transformer.parameters()
        }
        assert lent == lends


def test_modules_that_are_not_found_are_counted(
    policy: QwenImage21Policy, folders: dict[str, Path], tmp_path: Path
) -> None:
    known, other = "transformer_blocks.0.attn.to_q", "blocks.0.attn.query"
    for modules, count in (([known, other], "1 of 2"), ([other], "0 of 1")):
        write_lora(tmp_path / "lora", policy, modules, "diffusers")
        with pytest.raises(ConfigError, match=rf"got {count} modules bound in .*{other}"):
            Teachers(policy, {"t2i": Source(folders["one"], tmp_path / "lora")})


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need a LoRA as safetensors"):
        read_adapter(tmp_path / "none")
    save_file({"weight": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="got none among 1 tensors"):
        read_adapter(tmp_path / "plain.safetensors")
    save_file({"a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match="need both factors of a"):
        read_adapter(tmp_path / "half.safetensors")


def test_an_adapter_of_nothing_changes_nothing() -> None:
    base = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2)}
    found = adapted(base, {"a": Adapter(torch.ones(1, 2), torch.zeros(2, 1), 1.0)}, where="x")
    assert all(torch.equal(found[name], base[name]) for name in base)


# --- Whose path ------------------------------------------------------------------------------


def test_off_policy_the_path_and_its_target_are_the_teachers(
    policy: QwenImage21Policy, folders: dict[str, Path]
) -> None:
    algorithm = build(policy, {"t2i": folders["one"]}, states="teacher")
    asked = prompts("t2i", "general")
    plan = RolloutConfig(num_steps=STEPS, group_size=2, window=0, keep="all", guidance_scale=1.0)
    drawn = drawn_by(algorithm, policy, asked, plan)
    teacher = QwenImage21Policy.load(folders["one"], resolution=64)
    guided = plan.model_copy(update={"guidance_scale": SCALE})
    wanted = sample(teacher, asked, guided, seed=0, step=0)
    before = policy.work.evaluations
    signals, _ = algorithm.credit(drawn, 0)
    assert policy.work.evaluations == before
    paths = [path for group in wanted for path in group.trajectories]
    for signal, path in zip(signals, paths, strict=True):
        torch.testing.assert_close(signal.latents, path.latents)
        torch.testing.assert_close(signal.fields["target"], path.guided)
    # The student asks the teacher at its own states; from pure noise on, they part.
    own = build(policy, {"t2i": folders["one"]})
    ours, _ = own.credit(drawn_by(own, policy, asked, plan), 0)
    torch.testing.assert_close(ours[0].latents[0], signals[0].latents[0])
    assert not torch.allclose(ours[0].latents[1], signals[0].latents[1])


def test_a_teacher_learns_nothing(policy: QwenImage21Policy, folders: dict[str, Path]) -> None:
    student = policy.sibling()
    student.transformer.requires_grad_(True)
    algorithm = build(student, {"t2i": folders["one"]})
    first = targets(algorithm.credit(groups(student), 0)[0])
    drawn = groups(student)
    optimizer = torch.optim.SGD([p for _, p in student.trainable()], lr=0.1)
    for _ in range(2):
        algorithm.loss(student, stack(algorithm.credit(drawn, 0)[0])).loss.backward()
        optimizer.step()
    assert not equal(state(student), state(policy))
    assert torch.equal(targets(algorithm.credit(drawn, 0)[0]), first)


def test_a_teacher_of_another_schedule_is_refused(
    policy: QwenImage21Policy, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = QwenImage21Policy.tiny()
    other.pipeline.scheduler.register_to_config(max_shift=9.0)
    other.save(tmp_path)
    with pytest.raises(ConfigError, match="need models of one base, got another scheduler"):
        build(policy, {"t2i": tmp_path})


def test_a_negative_prompt_is_part_of_the_teacher(
    policy: QwenImage21Policy, folders: dict[str, Path]
) -> None:
    """Target and path are led away from it; a student has no branch that could be."""
    (asked,) = prompts("t2i", "general", count=1)
    away = Guidance(SCALE, "a large red circle")
    teacher = TeacherConfig(path=str(folders["one"]), **away.settings())
    context = StageContext(
        policy=policy, guidance=Guidance(), num_steps=STEPS, steps=10, kernel="ode",
        noise_level=0.0, num_updates=1, micro_batch=16, seed=0, rewards={},
    )  # fmt: skip
    plan = RolloutConfig(num_steps=STEPS, group_size=1, window=0, keep="all", guidance_scale=1.0)
    algorithm = Distill(DistillConfig(teachers={"t2i": teacher}, states="teacher"), context)
    (group,) = drawn_by(algorithm, policy, [asked], plan)
    (path,) = group.trajectories
    wanted = QwenImage21Policy.load(folders["one"], resolution=64).pipeline_latents(
        asked,
        policy.noise([torch.Generator().manual_seed(path.seed)]),
        num_steps=STEPS,
        guidance_scale=SCALE,
        negative_prompt=away.negative_prompt,
    )
    torch.testing.assert_close(path.clean[None], wanted, atol=1e-4, rtol=1e-4)
    (signal,), _ = algorithm.credit([group], 0)
    empty = build(policy, {"t2i": folders["one"]})
    (other,), _ = empty.credit([group], 0)
    own = Distill(DistillConfig(teachers={"t2i": teacher}), context)
    (same,), _ = own.credit([group], 0)
    torch.testing.assert_close(same.fields["target"], signal.fields["target"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(other.fields["target"], signal.fields["target"], atol=1e-3)
