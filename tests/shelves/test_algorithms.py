"""One contract for every algorithm on the shelf, and the laws of each."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.algorithms.base import (
    AdvantagesConfig,
    AlgorithmConfig,
    SelfCheckError,
    StageContext,
    reward_advantages,
)
from burnish.algorithms.distill import Distill, DistillConfig, TeacherConfig
from burnish.algorithms.grpo import GrpoConfig
from burnish.algorithms.nft import NftConfig
from burnish.batches import guided_velocities, stack
from burnish.config import ConfigError, located, parse, shelf
from burnish.flow import KERNELS, Transition, log_ratio
from burnish.guidance import VelocityPair, compose
from burnish.objectives import velocity_matching
from burnish.policies.base import Policy
from burnish.policies.qwen_image import QwenImagePolicy
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import read_prompts
from burnish.residency import Source, Teachers
from burnish.rewards.oracle import OracleConfig
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig
from burnish.runtime import ALONE
from burnish.types import Failed, Group, Guidance, Prompt, Scored, Trajectory
from burnish.updates import check_ratio

GUIDANCE = 3.0
KINDS = [
    config.model_fields["kind"].default for config in shelf("burnish.algorithms", AlgorithmConfig)
]


@pytest.fixture(scope="module")
def policy() -> QwenImage21Policy:
    return QwenImage21Policy.tiny()


@pytest.fixture(scope="module")
def folder(policy: QwenImage21Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    policy.save(path)
    return path


def prompts(task: str, count: int = 2) -> list[Prompt]:
    every = read_prompts(located("embedded:prompts/train.jsonl"))
    return [prompt for prompt in every if prompt.task == task][:count]


def context(policy: Policy[Any, Any], num_updates: int = 1) -> StageContext:
    return StageContext(
        policy=policy,
        guidance=Guidance(GUIDANCE),
        num_steps=3,
        steps=10,
        kernel="precise",
        noise_level=1.5,
        num_updates=num_updates,
        micro_batch=16,
        seed=0,
        rewards={"composite": OracleConfig()},
    )


def groups(
    policy: Policy[Any, Any], kind: str, task: str = "t2i", flat: bool = False
) -> list[Group]:
    """Groups as the algorithm wants them, with planted scores."""
    config = {
        "grpo": RolloutConfig(num_steps=4, group_size=4, window=2),
        "nft": RolloutConfig(num_steps=3, group_size=4, window=0, keep="none"),
        "distill": RolloutConfig(
            num_steps=3, group_size=2, window=0, keep="all", guidance_scale=1.0
        ),
    }[kind]
    drawn = sample(policy, prompts(task), config, seed=0, step=0)
    if kind == "distill":
        return drawn
    return [
        replace(
            group,
            scores={
                "composite": tuple(
                    Scored(value=0.5 if flat else 0.2 * member)
                    for member in range(len(group.trajectories))
                )
            },
        )
        for group in drawn
    ]


def build(kind: str, policy: QwenImage21Policy, folder: Path, num_updates: int = 1) -> Any:
    configs: Mapping[str, AlgorithmConfig] = {
        "grpo": GrpoConfig(),
        "nft": NftConfig(),
        "distill": DistillConfig(
            teachers={"t2i": TeacherConfig(path=str(folder), guidance_scale=GUIDANCE)}
        ),
    }
    return configs[kind].build(context(policy, num_updates))


def test_a_plain_sum_lets_the_reward_with_the_larger_unit_rule(
    policy: QwenImage21Policy,
) -> None:
    """Normalised each, two rewards share evenly; both shares are logged."""
    configs = {"points": OracleConfig(), "hundredths": OracleConfig()}
    drawn = groups(policy, "nft")
    values = {"points": [1.0, 5.0, 1.0, 5.0], "hundredths": [0.01, 0.01, 0.02, 0.02]}
    said = {name: tuple(Scored(value=v) for v in row) for name, row in values.items()}
    scored = [replace(group, scores=said) for group in drawn]
    each = reward_advantages(scored, configs, AdvantagesConfig(), ALONE)
    plain = reward_advantages(scored, configs, AdvantagesConfig(combination="sum"), ALONE)
    assert each[1]["advantage/share_points"] == pytest.approx(0.5, abs=1e-3)
    assert plain[1]["advantage/share_points"] > 0.99
    clamped = reward_advantages(scored, configs, AdvantagesConfig(clamp=0.5), ALONE)[0].advantages
    assert float(clamped.abs().max()) == 0.5


def test_a_sum_needs_all_its_terms() -> None:
    with pytest.raises(ConfigError, match="need missing=sample for combination=sum"):
        parse(AdvantagesConfig, {"combination": "sum", "missing": "reward"})


def gradients(policy: Policy[Any, Any], algorithm: Any, signals: list[Any]) -> list[torch.Tensor]:
    policy.transformer.requires_grad_(True).zero_grad(set_to_none=True)
    algorithm.loss(policy, stack(signals)).loss.backward()
    found = [p.grad for p in policy.transformer.parameters() if p.grad is not None]
    policy.transformer.requires_grad_(False)
    return found


@pytest.mark.parametrize("kind", KINDS)
class TestEveryAlgorithm:
    def test_a_signal_moves_weights(
        self, kind: str, policy: QwenImage21Policy, folder: Path
    ) -> None:
        algorithm = build(kind, policy, folder)
        signals, metrics = algorithm.credit(groups(policy, kind), 0)
        assert signals and all(torch.isfinite(torch.tensor(list(metrics.values()))))
        assert sum(float(grad.abs().sum()) for grad in gradients(policy, algorithm, signals)) > 0

    def test_the_unconditional_branch_is_not_run_in_training(
        self, kind: str, policy: QwenImage21Policy, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        algorithm = build(kind, policy, folder)
        signals, _ = algorithm.credit(groups(policy, kind), 0)
        calls: list[str] = []
        monkeypatch.setattr(policy, "encode_null", lambda *_: calls.append("null"))
        monkeypatch.setattr(policy, "guided", lambda *_: calls.append("guided"))
        assert gradients(policy, algorithm, signals)
        assert calls == []

    def test_what_the_policy_drew_is_not_changed_by_credit(
        self, kind: str, policy: QwenImage21Policy, folder: Path
    ) -> None:
        before = {k: v.clone() for k, v in policy.transformer.state_dict().items()}
        build(kind, policy, folder).credit(groups(policy, kind), 0)
        after = policy.transformer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_signals_are_a_function_of_groups_and_step(
        self, kind: str, policy: QwenImage21Policy, folder: Path
    ) -> None:
        drawn = groups(policy, kind)
        first, _ = build(kind, policy, folder).credit(drawn, 3)
        again, _ = build(kind, policy, folder).credit(drawn, 3)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert all(torch.equal(one.fields[k], other.fields[k]) for k in one.fields)


def test_a_trainer_of_another_model_than_the_sampler_is_found_out(
    policy: QwenImage21Policy, folder: Path
) -> None:
    drawn = groups(policy, "grpo")
    stranger = QwenImage21Policy.tiny(seed=1)
    with pytest.raises(SelfCheckError, match="replayed velocity"):
        build("grpo", stranger, folder).credit(drawn, 0)


@pytest.mark.parametrize("kind", ["grpo", "nft"])
def test_a_constant_group_is_dropped(kind: str, policy: QwenImage21Policy, folder: Path) -> None:
    signals, _ = build(kind, policy, folder).credit(groups(policy, kind, flat=True), 0)
    assert signals == []


@pytest.mark.parametrize("kind", ["grpo", "nft"])
def test_a_failed_score_has_no_advantage(
    kind: str, policy: QwenImage21Policy, folder: Path
) -> None:
    drawn = groups(policy, kind)
    broken = [
        replace(g, scores={"composite": (Failed(reason="lost"), *g.scores["composite"][1:])})
        for g in drawn
    ]
    signals, metrics = build(kind, policy, folder).credit(broken, 0)
    assert signals[0].advantage == 0.0
    assert sum(signal.advantage for signal in signals[1:4]) == pytest.approx(0.0, abs=1e-5)
    assert metrics["reward/missing"] == pytest.approx(0.25)


class TestGrpo:
    def test_the_first_ratio_is_exactly_one(self, policy: QwenImage21Policy, folder: Path) -> None:
        algorithm = build("grpo", policy, folder)
        signals, _ = algorithm.credit(groups(policy, "grpo"), 0)
        metrics = algorithm.loss(policy, stack(signals)).metrics
        assert metrics["policy/ratio_max"] == metrics["policy/ratio_min"] == 1.0
        assert metrics["policy/clipped"] == 0.0

    def test_recomputed_old_velocities_give_a_ratio_near_one(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        algorithm = build("grpo", policy, folder, num_updates=2)
        signals, _ = algorithm.credit(groups(policy, "grpo"), 0)
        metrics = algorithm.loss(policy, stack(signals)).metrics
        assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)

    def test_positive_advantage_moves_the_mean_towards_the_sample(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        algorithm = build("grpo", policy, folder)
        signals, _ = algorithm.credit(groups(policy, "grpo"), 0)
        good = [replace(s, advantage=1.0) for s in signals if s.advantage > 0][:1]
        learner = policy.sibling()
        learner.transformer.requires_grad_(True)
        batch = stack(good)
        old = batch.velocity(learner).detach()
        algorithm.loss(learner, batch).loss.backward()
        with torch.no_grad():
            for parameter in learner.transformer.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
            # The mean moves by jacobian * dv, jacobian < 0; the noise points to the sample.
            towards = -(batch.velocity(learner) - old) * batch.fields["noise"]
        assert float(towards.sum()) > 0


MODES = ("residual", "detached", "conditional", "guided")


def grpo(policy: Policy[Any, Any], num_updates: int = 1, **changes: Any) -> Any:
    return GrpoConfig(**changes).build(context(policy, num_updates))


class TestGuidanceModes:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode_starts_at_a_ratio_of_one_and_moves_weights(
        self, mode: str, policy: QwenImage21Policy
    ) -> None:
        drawn = groups(policy, "grpo")
        for num_updates, allowed in ((1, 0.0), (2, 1e-5)):
            algorithm = grpo(policy, num_updates, guidance=mode)
            signals, _ = algorithm.credit(drawn, 0)
            metrics = algorithm.loss(policy, stack(signals)).metrics
            assert abs(metrics["policy/ratio_max"] - 1) <= allowed
            assert abs(metrics["policy/ratio_min"] - 1) <= allowed
            assert sum(float(g.abs().sum()) for g in gradients(policy, algorithm, signals)) > 0

    @pytest.mark.parametrize("mode", MODES)
    def test_a_family_that_rescales_is_scored_as_it_is_drawn(self, mode: str) -> None:
        policy = QwenImagePolicy.tiny()
        drawn = groups(policy, "grpo")
        for num_updates, allowed in ((1, 0.0), (2, 1e-5)):
            algorithm = grpo(policy, num_updates, guidance=mode)
            signals, _ = algorithm.credit(drawn, 0)
            batch = stack(signals)
            metrics = algorithm.loss(policy, batch).metrics
            assert abs(metrics["policy/ratio_max"] - 1) <= allowed
            assert abs(metrics["policy/ratio_min"] - 1) <= allowed
            assert sum(float(g.abs().sum()) for g in gradients(policy, algorithm, signals)) > 0
        # Away from the weights that drew: what moves is the composition with the length of the
        # conditional branch, and of its branches those that the mode trains.
        learner = policy.sibling()
        with torch.no_grad():
            for parameter in learner.transformer.parameters():
                parameter.mul_(1.05)
            drawer, moved = (batch.guided(p, Guidance(GUIDANCE)) for p in (policy, learner))
            pair = algorithm._velocities(learner, batch)[1]
        wanted = {
            "residual": drawer.guided + moved.conditional - drawer.conditional,
            "detached": compose(moved.conditional, drawer.unconditional, GUIDANCE, True),
            "conditional": moved.conditional,
            "guided": moved.guided,
        }
        torch.testing.assert_close(pair.new, wanted[mode], rtol=0, atol=1e-4)
        others = [velocity for name, velocity in wanted.items() if name != mode]
        assert all(float((pair.new - other).abs().max()) > 1e-3 for other in others)

    def test_without_rescale_detached_is_residual_with_the_scale_as_gain(
        self, policy: QwenImage21Policy
    ) -> None:
        drawn = groups(policy, "grpo")
        found = []
        arms: tuple[dict[str, Any], ...] = (
            {"guidance": "detached"},
            {"guidance": "residual", "gain": GUIDANCE},
        )
        for changes in arms:
            algorithm = grpo(policy, **changes)
            signals, _ = algorithm.credit(drawn, 0)
            found.append(torch.cat([g.flatten() for g in gradients(policy, algorithm, signals)]))
        one, other = found
        assert float((one - other).norm() / other.norm()) < 1e-3

    def test_only_guided_runs_the_unconditional_branch(
        self, policy: QwenImage21Policy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn, calls = groups(policy, "grpo"), []
        real = policy.encode_null

        def counted(*arguments: Any) -> Any:
            calls.append("null")
            return real(*arguments)

        for mode in MODES:
            algorithm = grpo(policy, guidance=mode)
            signals, _ = algorithm.credit(drawn, 0)
            with monkeypatch.context() as patch:
                patch.setattr(policy, "encode_null", counted)
                calls.clear()
                gradients(policy, algorithm, signals)
            assert len(calls) == (mode == "guided")

    @pytest.mark.parametrize("mode", ["residual", "conditional"])
    def test_noise_is_measured_around_the_mean_of_what_is_scored(
        self, mode: str, policy: QwenImage21Policy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn, scored = groups(policy, "grpo"), []
        real = log_ratio

        def seen(noise: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            scored.append(noise.detach())
            return real(noise, *rest, **more)

        monkeypatch.setattr("burnish.algorithms.grpo.log_ratio", seen)
        algorithm = grpo(policy, guidance=mode)
        signals, _ = algorithm.credit(drawn, 0)
        algorithm.loss(policy, stack(signals))
        paths = [t for group in drawn for t in group.trajectories]

        def step(path: Trajectory, velocity: torch.Tensor) -> Transition:
            levels = {"sigma": path.sigmas, "sigma_next": path.sigmas_next}
            return KERNELS["precise"](path.latents, velocity, **levels, noise_level=1.5)

        wanted = torch.cat(
            [
                step(t, t.guided if mode == "residual" else t.conditional).injected_noise(
                    step(t, t.guided).advance(t.noise)
                )
                for t in paths
            ]
        )
        torch.testing.assert_close(scored[0], wanted, atol=2e-4, rtol=0)

    def test_a_guided_old_velocity_with_a_conditional_new_one_is_found_out(
        self, policy: QwenImage21Policy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The naive pairing is wrong before any update: it clips nearly half of the states."""

        def naive(mode: str, **velocities: Any) -> VelocityPair:
            return VelocityPair(velocities["conditional"], velocities["guided_old"])

        algorithm = grpo(policy)
        signals, _ = algorithm.credit(groups(policy, "grpo"), 0)
        with monkeypatch.context() as patch:
            patch.setattr("burnish.algorithms.grpo.velocity_pair", naive)
            metrics = algorithm.loss(policy, stack(signals)).metrics
        with pytest.raises(SelfCheckError, match="need a ratio of 1 before the first update"):
            check_ratio(metrics, 1)
        # Also where no ratio is above 1, and with several updates.
        for end in ({}, {"policy/ratio_min": 1.0, "policy/ratio_max": 1.01}):
            with pytest.raises(SelfCheckError):
                check_ratio({"policy/ratio_min": 0.99, "policy/ratio_max": 1.0} | end, 4)
        print(f"naive pairing: {metrics['policy/clipped']:.0%} of the states clipped at once")
        # Half of them lie on the side that is not clipped for the sign of their advantage.
        assert metrics["policy/clipped"] > 0.3

    @pytest.mark.parametrize(
        ("mode", "scale", "needed"),
        [("none", 3.0, "of 1 for"), ("detached", 1.0, "other than 1"), ("guided", 1.0, "other")],
    )
    def test_a_mode_that_does_not_fit_the_rollout_is_refused(
        self, mode: str, scale: float, needed: str
    ) -> None:
        config = GrpoConfig(guidance=mode)  # type: ignore[arg-type]
        rollout = RolloutConfig(guidance_scale=scale)
        with pytest.raises(ValueError, match=f"need rollout.guidance_scale {needed}"):
            config.check_rollout(rollout, ["t2i"], draws_average=False)
        GrpoConfig().check_rollout(rollout, ["t2i"], draws_average=False)

    def test_a_gain_belongs_to_the_residual(self) -> None:
        with pytest.raises(ConfigError, match="need guidance=residual for a gain"):
            parse(GrpoConfig, {"guidance": "none", "gain": 2.0})


@pytest.mark.parametrize("config", [GrpoConfig(kl_weight=0.5), NftConfig(kl_weight=0.5)])
def test_the_anchor_costs_nothing_at_the_start_and_pulls_back(
    config: Any, policy: QwenImage21Policy
) -> None:
    learner = policy.sibling()
    algorithm = config.build(context(learner))
    signals, _ = algorithm.credit(groups(learner, config.kind), 0)
    batch = stack(signals)
    assert algorithm.loss(learner, batch).metrics["policy/velocity_kl"] < 1e-12
    with torch.no_grad():
        for parameter in learner.transformer.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    free = config.model_copy(update={"kl_weight": 0.0}).build(context(learner))
    moved, plain = algorithm.loss(learner, batch), free.loss(learner, batch)
    distance = moved.metrics["policy/velocity_kl"]
    assert distance > 0 and "policy/velocity_kl" not in plain.metrics
    assert float(moved.loss - plain.loss) == pytest.approx(0.5 * distance, rel=1e-3)


class TestNft:
    def test_states_lie_on_the_path_of_the_sample(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        drawn = groups(policy, "nft")
        signals, _ = build("nft", policy, folder).credit(drawn, 0)
        clean = [t.clean for group in drawn for t in group.trajectories]
        for signal, end in zip(signals, clean, strict=True):
            back = signal.latents - signal.sigmas[:, None, None, None] * signal.fields["target"]
            torch.testing.assert_close(back, end.expand_as(back), atol=1e-5, rtol=1e-5)

    def test_the_guided_anchor_and_the_plain_one_push_with_the_same_sign(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        drawn = groups(policy, "nft")
        for anchor in ("conditional", "guided"):
            algorithm = NftConfig(anchor=anchor).build(context(policy))
            signals, _ = algorithm.credit(drawn, 0)
            assert ("guided" in signals[0].fields) == (anchor == "guided")
            assert gradients(policy, algorithm, signals)


class TestDistill:
    def test_no_loss_where_student_and_teacher_agree_without_guidance(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        config = DistillConfig(
            teachers={"t2i": TeacherConfig(path=str(folder), guidance_scale=1.0)}
        )
        algorithm = Distill(config, context(policy))
        signals, _ = algorithm.credit(groups(policy, "distill"), 0)
        assert float(algorithm.loss(policy, stack(signals)).loss) < 1e-10
        assert max(float(g.abs().max()) for g in gradients(policy, algorithm, signals)) < 1e-6

    def test_the_loss_of_the_teacher_itself_is_its_guidance(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        algorithm = build("distill", policy, folder)
        signals, _ = algorithm.credit(groups(policy, "distill"), 0)
        found = float(algorithm.loss(policy, stack(signals)).loss)
        pairs = guided_velocities(policy, signals, 64, Guidance(2.0))
        # guided - conditional at scale 2 is v_c - v_u.
        gap = torch.cat([guided - conditional for guided, conditional in pairs])
        expected = (GUIDANCE - 1) ** 2 * float(velocity_matching(gap, torch.zeros_like(gap)).mean())
        assert found == pytest.approx(expected, rel=1e-3)

    def test_states_and_targets_carry_no_gradient(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        signals, _ = build("distill", policy, folder).credit(groups(policy, "distill"), 0)
        assert not any(s.latents.requires_grad or s.fields["target"].requires_grad for s in signals)

    def test_swapping_teachers_brings_bitwise_the_same_one_back(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        configs = {task: Source(folder) for task in ("t2i", "edit")}
        teachers = Teachers(policy, configs)
        first = {k: v.clone() for k, v in teachers.activate("t2i").transformer.state_dict().items()}
        teachers.activate("edit")
        again = teachers.activate("t2i").transformer
        assert all(torch.equal(first[name], value) for name, value in again.state_dict().items())
        assert not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())

    def test_a_task_without_teacher_is_an_error(
        self, policy: QwenImage21Policy, folder: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"need a teacher for edit/\w+, the label of prompt"):
            build("distill", policy, folder).credit(groups(policy, "distill", task="edit"), 0)

    def test_a_teacher_of_another_architecture_is_refused(
        self, policy: QwenImage21Policy, folder: Path, tmp_path: Path
    ) -> None:
        other = policy.sibling()
        del other.transformer.transformer_blocks[-1]
        other.transformer.register_to_config(num_layers=len(other.transformer.transformer_blocks))
        other.save(tmp_path)
        with pytest.raises(ConfigError, match="need models of one architecture"):
            Teachers(policy, {"t2i": Source(tmp_path)})
