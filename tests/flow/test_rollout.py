"""Groups as training receives them: right paths, right steps kept, and no memory of the batch."""

import io
import re
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image

from burnish.batches import by_kind, chunks, velocities
from burnish.buckets import Buckets, Size
from burnish.config import ConfigError, parse
from burnish.flow import KERNELS
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.rollout import draw, sample
from burnish.rollout_config import RolloutConfig
from burnish.types import Group, Guidance, Prompt, Signal, Trajectory

torch.set_num_threads(1)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


PROMPTS = [
    Prompt(id="cat", text="a cat"),
    Prompt(id="turn", text="turn it green", task="edit", sources=(png((200, 30, 30)),)),
    Prompt(id="night", text="a blue house by a lake at night"),
    Prompt(id="hat", text="no hat", task="edit", sources=(png((20, 30, 200)),)),
]
TENSORS = [field.name for field in fields(Trajectory) if field.name != "seed"]


@pytest.fixture(scope="module")
def policy() -> QwenImage21Policy:
    return QwenImage21Policy.tiny()


def config(**changes) -> RolloutConfig:
    return RolloutConfig(**{"num_steps": 6, "group_size": 2, "window": 2, **changes})


def assert_same(groups: list[Group], others: list[Group], atol: float) -> None:
    for group, other in zip(groups, others, strict=True):
        assert group.prompt == other.prompt
        for path, twin in zip(group.trajectories, other.trajectories, strict=True):
            assert path.seed == twin.seed
            for name in TENSORS:
                left, right = getattr(path, name), getattr(twin, name)
                torch.testing.assert_close(left, right, rtol=0, atol=atol)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_without_noise_a_rollout_is_the_pipelines_call(policy, scale):
    plain = config(guidance_scale=scale, noise_level=0.0, keep="none")
    for group in sample(policy, PROMPTS, plain, seed=0, step=0):
        for path in group.trajectories:
            noise = policy.noise([torch.Generator().manual_seed(path.seed)])
            wanted = policy.pipeline_latents(
                group.prompt, noise, num_steps=6, guidance_scale=scale
            )[0]
            assert (path.clean - wanted).abs().max() <= 1e-4
            with torch.no_grad():
                image = policy.decode(wanted[None])[0]
            torch.testing.assert_close(path.image, image, rtol=0, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch(policy):
    wanted = sample(policy, PROMPTS, config(), seed=3, step=1)
    assert [group.prompt.id for group in wanted] == [prompt.id for prompt in PROMPTS]
    # 1 splits groups, 3 leaves a remainder, and the order of prompts is another.
    for micro_batch in (1, 3):
        again = sample(policy, PROMPTS[::-1], config(micro_batch=micro_batch), seed=3, step=1)
        assert_same(wanted, again[::-1], atol=1e-4)
    # A larger group has the smaller one's members.
    more = sample(policy, PROMPTS[:1], config(group_size=3), seed=3, step=1)
    assert_same(
        wanted[:1], [Group(prompt=PROMPTS[0], trajectories=more[0].trajectories[:2])], atol=1e-4
    )


SHAPES = ("1:1", "2:1", "1:2", None)
SIZES = [Size(64, 64), Size(32, 96), Size(96, 32), Size(32, 96)]


@pytest.fixture
def shaped(policy, monkeypatch) -> list[Prompt]:
    """Prompts of several shapes, the last of which says none and has a wide source."""
    monkeypatch.setattr(policy, "buckets", Buckets(64, ("1:1", "2:1", "1:2")))
    asked = [replace(prompt, aspect=aspect) for prompt, aspect in zip(PROMPTS, SHAPES, strict=True)]
    return [*asked[:3], replace(asked[3], sources=(png((20, 30, 200), (128, 64)),))]


def test_pictures_of_many_shapes_are_drawn_as_each_alone(policy, shaped):
    found = sample(policy, shaped, config(keep="all"), seed=3, step=1)
    for group, size in zip(found, SIZES, strict=True):
        assert {path.image.shape[1:] for path in group.trajectories} == {size}
        alone = sample(policy, [group.prompt], config(keep="all"), seed=3, step=1)
        assert_same([group], alone, atol=1e-4)
    seeds = [group.trajectories[0].seed for group in found]
    plain = {"num_steps": 3, "guidance": Guidance(2.0)}
    drawn = draw(policy, shaped, seeds=seeds, **plain)
    assert [image.shape[1:] for image in drawn] == SIZES
    for prompt, seed, image, size in zip(shaped, seeds, drawn, SIZES, strict=True):
        noise = policy.noise([torch.Generator().manual_seed(seed)], size)
        clean = policy.pipeline_latents(prompt, noise, num_steps=3, guidance_scale=2.0)
        with torch.no_grad():
            torch.testing.assert_close(image, policy.decode(clean)[0], rtol=0, atol=1e-4)


def test_states_of_many_shapes_are_asked_for_as_each_alone(policy, shaped):
    groups = sample(policy, shaped, config(), seed=3, step=1)
    paths = [(group.prompt, path) for group in groups for path in group.trajectories]
    # Members of all groups in turn, so that neighbours differ in shape.
    mixed = [
        Signal(prompt=prompt, latents=path.latents, sigmas=path.sigmas)
        for turn in range(2)
        for prompt, path in paths[turn::2]
    ]
    ordered = by_kind(mixed)
    assert sorted(map(id, ordered)) == sorted(map(id, mixed))
    assert len(list(chunks(ordered, 64))) == 3 < len(list(chunks(mixed, 64)))
    for signals in (mixed, ordered):
        for signal, found in zip(signals, velocities(policy, signals, 64), strict=True):
            (alone,) = velocities(policy, [signal], 64)
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_seed_step_prompt_and_member_each_change_the_sample(policy):
    def clean(seed: int, step: int) -> list[torch.Tensor]:
        groups = sample(policy, PROMPTS[::2], config(), seed=seed, step=step)
        return [path.clean for group in groups for path in group.trajectories]

    once = clean(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(once, clean(0, 0), strict=True))
    different = [*once, *clean(1, 0), *clean(0, 1)]
    for row, latents in enumerate(different):
        assert all((latents - other).abs().max() > 0.1 for other in different[row + 1 :])


def test_kept_steps_replay(policy):
    settings = config(keep="all", noise_level=1.2)
    schedule = policy.schedule(6)
    starts = set()
    for group in sample(policy, PROMPTS, settings, seed=0, step=0):
        for path in group.trajectories:
            assert len(path.sigmas) == 6
            torch.testing.assert_close(path.sigmas, schedule[:-1])
            torch.testing.assert_close(path.sigmas_next, schedule[1:])
            after = torch.cat([path.latents[1:], path.clean[None]])
            is_stochastic = path.noise.flatten(1).abs().sum(1) > 0
            # Two neighbours in the first half, and so never the last step.
            steps = is_stochastic.nonzero().flatten().tolist()
            assert len(steps) == 2 and steps[1] == steps[0] + 1 and steps[1] < 3
            starts.add(steps[0])
            levels = {"sigma": path.sigmas, "sigma_next": path.sigmas_next}
            for name, rows in (("ode", ~is_stochastic), ("precise", is_stochastic)):
                transition = KERNELS[name](
                    path.latents[rows],
                    path.guided[rows],
                    **{level: values[rows] for level, values in levels.items()},
                    noise_level=1.2,
                )
                wanted = transition.advance(path.noise[rows])
                torch.testing.assert_close(after[rows], wanted)
            assert path.noise[is_stochastic].std().item() == pytest.approx(1, abs=0.1)
    assert len(starts) == 2, "windows start at random among the two places"


def test_kept_velocities_are_the_policys(policy):
    group = sample(policy, PROMPTS[1:2], config(guidance_scale=3.0), seed=0, step=0)[0]
    prefix = policy.prefix(policy.encode([group.prompt]))
    null = policy.prefix(policy.encode_null([group.prompt]))
    path = group.trajectories[0]
    rows = [0] * len(path.sigmas)
    with torch.no_grad():
        found = policy.guided(path.latents, path.sigmas, prefix.take(rows), null.take(rows), 3.0)
    for name, velocity in found._asdict().items():
        torch.testing.assert_close(getattr(path, name), velocity, rtol=0, atol=1e-4)
    assert (path.guided - path.conditional).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"window_start": "first", "window_range": (2, 5)}, [2, 3]),
        ({"window_start": "first", "window_range": (3, 5)}, [3, 4]),
        ({"window_start": "first"}, [0, 1]),
        ({"window_steps": (0, 3)}, [0, 3]),
        ({"window": 3, "window_steps": (1, 2, 4)}, [1, 2, 4]),
        ({"window": 0}, []),
        ({"keep": "none"}, []),
        ({"keep": "all"}, [0, 1, 2, 3, 4, 5]),
        ({"keep": 6}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_wanted_steps_are_kept(policy, changes, steps):
    (group,) = sample(policy, PROMPTS[:1], config(**changes), seed=0, step=0)
    schedule = policy.schedule(6)
    for path in group.trajectories:
        torch.testing.assert_close(path.sigmas, schedule[steps])
        for name in ("latents", "noise", "guided", "conditional"):
            assert getattr(path, name).shape == (len(steps), *path.clean.shape)


def test_a_sliding_window_moves_on_with_training_and_begins_again(policy):
    schedule, starts = policy.schedule(6), []
    sliding = config(window_start="sliding", window_range=(0, 4), window_every=2, group_size=1)
    for step in range(8):
        (group,) = sample(policy, PROMPTS[:1], sliding, seed=0, step=step)
        (path,) = group.trajectories
        starts.append(int((schedule[:-1] - path.sigmas[0]).abs().argmin()))
    assert starts == [0, 0, 1, 1, 2, 2, 0, 0]


def test_a_number_keeps_one_step_of_every_part(policy):
    schedule = policy.schedule(6)[:-1]
    seen = set()
    for step in range(8):
        (group,) = sample(
            policy, PROMPTS[:1], config(keep=3, window=0, group_size=1), seed=0, step=step
        )
        kept = [int((schedule == sigma).nonzero()) for sigma in group.trajectories[0].sigmas]
        assert [place // 2 for place in kept] == [0, 1, 2]
        seen |= set(kept)
    assert seen == set(range(6))


def test_shared_noise_leaves_the_window_as_the_only_difference(policy):
    shared = config(shared_noise=True, keep="all", window_start="first", window_range=(1, 3))
    for group in sample(policy, PROMPTS[:2], shared, seed=0, step=0):
        first, second = group.trajectories
        torch.testing.assert_close(first.latents[:2], second.latents[:2], rtol=0, atol=1e-5)
        assert (first.latents[2] - second.latents[2]).abs().max() > 0.1
        assert (first.noise[1] - second.noise[1]).abs().max() > 0.1
    own = sample(policy, PROMPTS[:1], config(keep="all"), seed=0, step=0)[0].trajectories
    assert (own[0].latents[0] - own[1].latents[0]).abs().max() > 0.1


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[::2]], ids=["one", "two"])
def test_a_common_path_is_computed_once(policy, prompts):
    """Members that start alike are one row of every call until the window has parted them, and what
    is kept of them is what each would have had alone."""
    plan = config(shared_noise=True, keep="all", window_steps=(3, 4), group_size=3)
    before = policy.work.evaluations
    groups = sample(policy, prompts, plan, seed=0, step=0)
    branches, alone, parted = 2, 4, 2
    rows = branches * len(prompts) * (alone + 3 * parted)
    assert policy.work.evaluations - before == rows
    one_by_one = plan.model_copy(update={"micro_batch": 1})
    assert_same(groups, sample(policy, prompts, one_by_one, seed=0, step=0), atol=1e-5)
    for group in groups:
        first, second, _ = group.trajectories
        assert torch.equal(first.latents[:4], second.latents[:4])
        assert not torch.equal(first.latents[4], second.latents[4])


def test_complete_groups_are_handed_on_early(policy):
    batches: list[list[str]] = []

    def on_batch(groups: list[Group]) -> None:
        batches.append([group.prompt.id for group in groups])
        assert all(len(group.trajectories) == 2 for group in groups)
        assert all(group.trajectories[0].image.shape == (3, 64, 64) for group in groups)

    sample(policy, PROMPTS, config(micro_batch=2), seed=0, step=0, on_batch=on_batch)
    assert batches == [["cat"], ["night"], ["turn"], ["hat"]]
    batches.clear()
    sample(policy, PROMPTS, config(micro_batch=5), seed=0, step=0, on_batch=on_batch)
    assert batches == [["cat", "night"], ["turn", "hat"]]


def test_prompts_are_read_once_for_their_group(policy):
    rows: list[int] = []
    handle = policy.transformer.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    try:
        sample(policy, PROMPTS[::2], config(group_size=3, guidance_scale=3.0), seed=0, step=0)
        # Two prompts, the empty one of both, then six samples with their unconditional twins.
        assert rows == [2, 1] + [12] * 6
        rows.clear()
        sample(policy, PROMPTS[::2], config(group_size=3, guidance_scale=1.0), seed=0, step=0)
        assert rows == [2] + [6] * 6
    finally:
        handle.remove()


def test_the_policy_is_left_as_it_was(policy):
    policy.transformer.train()
    seen = []
    handle = policy.transformer.register_forward_pre_hook(
        lambda module, _args: seen.append((module.training, torch.is_grad_enabled()))
    )
    try:
        (group,) = sample(policy, PROMPTS[:1], config(), seed=0, step=0)
        assert set(seen) == {(False, False)}
        assert policy.transformer.training
        with pytest.raises(RuntimeError, match="stop"):
            sample(policy, PROMPTS[:1], config(), seed=0, step=0, on_batch=_stop)
        assert policy.transformer.training
    finally:
        handle.remove()
        policy.transformer.eval()
    # What was kept can be trained on: inference tensors could not.
    path = group.trajectories[0]
    assert not path.clean.requires_grad and not path.image.requires_grad
    prefix = policy.prefix(policy.encode([group.prompt])).take([0, 0])
    loss = policy.velocity(path.latents, path.sigmas, prefix).square().mean()
    loss.backward()
    policy.transformer.zero_grad()


def _stop(_groups: list[Group]) -> None:
    raise RuntimeError("stop")


def test_draw_gives_the_pipelines_image_for_each_seed(policy):
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    images = draw(
        policy, prompts, num_steps=3, guidance=Guidance(3.0), seeds=[7, 7, 8], micro_batch=2
    )
    for prompt, seed, image in zip(prompts, [7, 7, 8], images, strict=True):
        noise = policy.noise([torch.Generator().manual_seed(seed)])
        clean = policy.pipeline_latents(prompt, noise, num_steps=3, guidance_scale=3.0)
        with torch.no_grad():
            torch.testing.assert_close(image, policy.decode(clean)[0], rtol=0, atol=1e-4)
    assert (images[1] - images[2]).abs().max() > 0.01


def test_impossible_settings_get_a_clear_line(policy):
    for wrong in (
        {"window_range": (4, 6)},
        {"window_range": (0, 1)},
        {"window_range": (-1, 3)},
        {"window": 6},
        {"keep": 7},
        {"keep": 0},
        {"kernel": "dance", "noise_level": 1.5},
        {"shared_noise": True, "window": 0},
    ):
        with pytest.raises(ConfigError, match="need"):
            parse(RolloutConfig, {"num_steps": 6, "window": 2, **wrong})
    parse(RolloutConfig, {"num_steps": 6, "window_range": [3, 5]})
    with pytest.raises(ValueError, match="distinct ids"):
        sample(policy, [PROMPTS[0], PROMPTS[0]], config(), seed=0, step=0)
    with pytest.raises(ValueError, match="one seed"):
        draw(policy, PROMPTS, num_steps=2, guidance=Guidance(), seeds=[1])


@pytest.mark.parametrize(
    "given",
    [
        {"kernel": "flow_sde", "num_steps": 3},
        {"kernel": "flow_sde", "num_steps": 10},
        {"kernel": "flow_sde", "num_steps": 6, "window_range": [0, 5]},
        {"kernel": "flow_sde", "num_steps": 6, "window_steps": [0, 3]},
        {"kernel": "flow_sde", "num_steps": 6, "window_steps": [0, 4]},
        {"shared_noise": True, "window": 0},
        {"shared_noise": True, "window": 0, "num_steps": 2, "kernel": "ode"},
        {"shared_noise": True, "kernel": "ode"},
        {"shared_noise": True, "noise_level": 0},
        {"shared_noise": True, "noise_level": 0, "kernel": "cps"},
    ],
)
def test_settings_that_a_refusal_names_are_taken(given):
    with pytest.raises(ConfigError) as refused:
        parse(RolloutConfig, given)
    advice = re.sub(r"rollout\.", "", str(refused.value).split("; set ")[1])
    for remedy in advice.split(" or "):
        if not remedy.startswith("leave"):
            assert parse(RolloutConfig, given, re.findall(r"\w+=(?:\[.*?\]|\S+)", remedy))


def test_what_nobody_looks_at_is_not_decoded_and_is_the_same_path(policy, monkeypatch):
    seen = sample(policy, PROMPTS[:2], config(keep="all"), seed=0, step=0)
    monkeypatch.setattr(QwenImage21Policy, "decode", None)
    bare = sample(policy, PROMPTS[:2], config(keep="all"), seed=0, step=0, is_decoded=False)
    paths = [path for group in bare for path in group.trajectories]
    assert all(path.image.shape == (3, 0, 0) for path in paths)
    for path, twin in zip(paths, [p for group in seen for p in group.trajectories], strict=True):
        for name in TENSORS:
            if name != "image":
                assert torch.equal(getattr(path, name), getattr(twin, name))
