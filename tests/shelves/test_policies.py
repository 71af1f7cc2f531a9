"""One contract for every model family: whatever file lies on the shelf is held to it."""

import contextlib
import importlib
import io
import itertools
import json
import pkgutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import burnish.policies
from burnish import images, shelves
from burnish.buckets import Size
from burnish.config import ConfigError
from burnish.flow import shift_sigmas
from burnish.policies.base import Policy
from burnish.policies.parts import pipelines, reading
from burnish.policies.parts.execution import (
    check_attention,
    checkpoint_blocks,
    set_attention,
    visiting,
)
from burnish.policies.parts.qwen_encoding import SLOT_TOKENS
from burnish.policies.parts.reading import EncodedPrompt
from burnish.tracking import RunError
from burnish.types import MAX_SOURCES, Prompt

torch.set_num_threads(1)
STEPS = 4


def shelf() -> list[type[Policy]]:
    """The policy of every file that holds one; the file name is the key."""
    found = []
    for module in pkgutil.iter_modules(burnish.policies.__path__):
        if module.ispkg:
            continue
        contents = vars(importlib.import_module(f"burnish.policies.{module.name}")).values()
        found += [
            item
            for item in contents
            if isinstance(item, type)
            and issubclass(item, Policy)
            and vars(item).get("family") == module.name
        ]
    return found


def png(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


T2I = [
    Prompt(id="short", text="a cat"),
    Prompt(id="long", text="two red squares to the left of a small blue circle, at night"),
    Prompt(id="empty", text=""),
]
EDIT = [
    Prompt(
        id="edit-long", text="turn the circle into a large star", task="edit", sources=(png(1),)
    ),
    Prompt(id="edit-short", text="no hat", task="edit", sources=(png(2),)),
    Prompt(id="edit-wide", text="make it blue", task="edit", sources=(png(3, (128, 64)),)),
]
# One, two and three references; the second and the third would share a layout if their order or
# their sizes were forgotten.
REFERENCES = [
    Prompt(id="one", text="put a hat on", task="edit", sources=(png(4),)),
    Prompt(id="two", text="put it there", task="edit", sources=(png(4), png(5, (128, 64)))),
    Prompt(id="turned", text="put it there", task="edit", sources=(png(5, (128, 64)), png(4))),
    Prompt(
        id="three",
        text="put the first and the second into the third",
        task="edit",
        sources=(png(6, (64, 128)), png(7), png(5, (128, 64))),
    ),
]


@pytest.fixture(params=shelf(), ids=lambda policy: policy.family)
def policy(request, small_sources) -> Policy:
    return request.param.tiny()


COMPILED = list({policy.block_classes: policy for policy in shelf()}.values())
"""One family of all whose transformers have the same blocks, which are what is compiled."""


@pytest.fixture(params=["t2i", "edit"])
def prompts(request, policy) -> list[Prompt]:
    if request.param not in policy.tasks:
        pytest.skip(f"{policy.family} does no {request.param}")
    return T2I if request.param == "t2i" else EDIT


@pytest.fixture
def own(policy) -> list[Prompt]:
    """Prompts of a task that the family does."""
    return T2I if "t2i" in policy.tasks else EDIT


def given(prompt: Prompt) -> dict[str, Image.Image]:
    """What a pipeline's call is given besides text."""
    return {"image": [images.decode(s, where="") for s in prompt.sources]} if prompt.sources else {}


@pytest.fixture
def references(policy) -> list[Prompt]:
    """Those that the family reads."""
    found = [prompt for prompt in REFERENCES if len(prompt.sources) <= policy.max_sources]
    return found if len(found) > 1 else pytest.skip(f"{policy.family} reads {len(found)}")


TALL = Size(height=96, width=32)


def start(policy: Policy, count: int, seed: int = 0, size: Size | None = None) -> torch.Tensor:
    return policy.noise([torch.Generator().manual_seed(seed + row) for row in range(count)], size)


def levels(count: int) -> torch.Tensor:
    return torch.linspace(0.9, 0.3, count)


def rows_per_call(policy: Policy) -> list[int]:
    """Filled with the batch size of every call of the transformer."""
    rows: list[int] = []
    policy.transformer.register_forward_hook(
        lambda _module, _args, output: rows.append(len(output[0]))
    )
    return rows


def reads(policy: Policy) -> torch.nn.Module:
    """Called once for every text that is read."""
    return getattr(policy.text_encoder, "model", policy.text_encoder)


def equal(row: EncodedPrompt, other: EncodedPrompt) -> bool:
    mine, theirs = row.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of equal weights; those of a file lie where it has them, which can change the last bit."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def gradient(policy: Policy, loss: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for _, parameter in policy.trainable()]
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def test_every_family_is_found_and_can_be_named_in_a_recipe():
    names = {policy.family for policy in shelf()}
    assert {"qwen_image21", "qwen_image", "qwen_image_edit", "flux2_klein"} <= names
    assert names == set(shelves.families())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("size", [None, TALL], ids=["square", "tall"])
@torch.no_grad()
def test_one_batch_draws_what_single_pipeline_calls_draw(policy, prompts, scale, size):
    # Lengths and sources differ within the batch; a pipeline call knows only its own prompt.
    noise = latents = start(policy, len(prompts), size=size)
    prefix = policy.prefix(policy.encode(prompts))
    null = policy.prefix(policy.encode_null(prompts))
    schedule = policy.schedule(STEPS, size)
    for sigma, sigma_next in itertools.pairwise(schedule):
        found = policy.guided(latents, sigma.expand(len(prompts)), prefix, null, scale)
        latents = latents + (sigma_next - sigma) * found.guided
    for row, prompt in enumerate(prompts):
        wanted = policy.pipeline_latents(
            prompt, noise[row : row + 1], num_steps=STEPS, guidance_scale=scale
        )
        assert (latents[row] - wanted[0]).abs().max() <= 1e-4
        # Were the prompt ignored, all this would pass too.
        other = policy.pipeline_latents(
            replace(prompt, text="something else"),
            noise[row : row + 1],
            num_steps=STEPS,
            guidance_scale=scale,
        )
        assert (other - wanted).abs().max() > 1e-3


def test_every_velocity_is_counted(policy, prompts):
    latents, sigmas, count = start(policy, len(prompts)), levels(len(prompts)), len(prompts)
    prefix = policy.prefix(policy.encode(prompts))
    null = policy.prefix(policy.encode_null(prompts))
    seen = [policy.work.evaluations]
    with torch.no_grad():
        policy.velocity(latents, sigmas, prefix)
        seen.append(policy.work.evaluations)
        policy.guided(latents, sigmas, prefix, null, 3.0)
        seen.append(policy.work.evaluations)
        policy.sibling().velocity(latents, sigmas, prefix)
        seen.append(policy.work.evaluations)
    policy.velocity(latents, sigmas, prefix)
    seen.append(policy.work.evaluations)
    assert [b - a for a, b in itertools.pairwise(seen)] == [count, 2 * count, count, 3 * count]


@torch.no_grad()
def test_tasks_share_a_batch_after_joining(policy):
    if len(policy.tasks) < 2:
        pytest.skip("one task only")
    mixed = policy.join([policy.prefix(policy.encode(group)) for group in (T2I, EDIT)])
    latents, sigmas = start(policy, 6), levels(6)
    together = policy.velocity(latents, sigmas, mixed)
    for row, prompt in enumerate([*T2I, *EDIT]):
        alone = policy.prefix(policy.encode([prompt]))
        single = policy.velocity(latents[row : row + 1], sigmas[row : row + 1], alone)
        torch.testing.assert_close(together[row : row + 1], single, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_repeated_prefix_is_that_of_each_sample(policy, prompts):
    rows = [2, 0, 0, 1, 2, 0]
    shared = policy.prefix(policy.encode(prompts)).take(rows)
    assert shared.num_rows == len(rows)
    repeated = policy.prefix(policy.encode([prompts[row] for row in rows]))
    latents, sigmas = start(policy, 6), levels(6)
    own = torch.cat(
        [
            policy.velocity(
                latents[place : place + 1],
                sigmas[place : place + 1],
                policy.prefix(policy.encode([prompts[row]])),
            )
            for place, row in enumerate(rows)
        ]
    )
    for prefix in (shared, repeated):
        velocity = policy.velocity(latents, sigmas, prefix)
        torch.testing.assert_close(velocity, own, rtol=0, atol=1e-5)
    assert (own[1] - own[2]).abs().max() > 1e-2


@torch.no_grad()
def test_a_row_does_not_know_its_batch(policy, prompts):
    prefix = policy.prefix(policy.encode(prompts))
    latents, sigmas = start(policy, 3), levels(3)
    whole = policy.velocity(latents, sigmas, prefix)
    for row in range(3):
        part = policy.velocity(latents[row : row + 1], sigmas[row : row + 1], prefix.take([row]))
        torch.testing.assert_close(part, whole[row : row + 1], rtol=0, atol=1e-5)
    assert whole.shape == latents.shape and whole.dtype == torch.float32


def test_gradient_through_a_shared_prefix_is_that_of_separate_ones(policy, prompts):
    rows = [0, 1, 0, 2, 1, 0]
    latents, sigmas = start(policy, 6), levels(6)
    condition = policy.encode(prompts)
    shared = policy.prefix(condition).take(rows)
    together = gradient(policy, policy.velocity(latents, sigmas, shared).square().sum())
    losses = [
        policy.velocity(
            latents[place : place + 1],
            sigmas[place : place + 1],
            policy.prefix(policy.encode([prompts[row]])),
        )
        .square()
        .sum()
        for place, row in enumerate(rows)
    ]
    apart = gradient(policy, torch.stack(losses).sum())
    assert (together - apart).norm() <= 1e-5 * apart.norm()
    # A prefix that is shared work has a share in it: a detached one would change the gradient.
    with torch.no_grad():
        constant = policy.prefix(condition).take(rows)
    without = gradient(policy, policy.velocity(latents, sigmas, constant).square().sum())
    share = (without - apart).norm() / apart.norm()
    assert share > 1e-3 if policy.has_shared_prefix else share <= 1e-5


def test_a_prefix_need_not_be_shared(policy, prompts, references, monkeypatch):
    """Where a family shares none, the setting changes nothing."""
    asked = [*prompts, *references[:1]] if prompts[0].task == "edit" else prompts
    rows = [0, 1, 0, 2, len(asked) - 1]
    latents, sigmas = start(policy, 5, size=TALL), levels(5)

    def found() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        prefix = policy.prefix(policy.encode(asked))
        null = policy.prefix(policy.encode_null(asked))
        velocity = policy.velocity(latents, sigmas, prefix.take(rows))
        guided = policy.guided(latents, sigmas, prefix.take(rows), null.take(rows), 3.0).guided
        return velocity, guided, gradient(policy, velocity.square().sum())

    shared, before = found(), policy.layout(asked[0])
    monkeypatch.setattr(policy, "share_prefix", False)
    for mine, theirs in zip(shared, found(), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * mine.norm()
    assert (policy.layout(asked[0]) == before) != policy.has_shared_prefix
    calls = rows_per_call(policy)
    policy.velocity(latents, sigmas, policy.prefix(policy.encode(asked)).take(rows))
    assert len(calls) == len({policy.layout(asked[row]) for row in rows})


def test_checkpointing_changes_no_gradient_and_keeps_less(policy, prompts):
    latents, sigmas, kept = start(policy, 6), levels(6), []

    def once() -> torch.Tensor:
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prefix = policy.prefix(policy.encode(prompts)).take([0, 1, 0, 2, 1, 0])
            loss = policy.velocity(latents, sigmas, prefix).square().sum()
        kept.append(sum(storages.values()))
        return gradient(policy, loss)

    found = []
    for share in (False, 0.5, True):
        checkpoint_blocks(policy.transformer, policy.block_classes, share)
        found.append(once())
    checkpoint_blocks(policy.transformer, policy.block_classes, False)
    for again in found[1:]:
        assert (again - found[0]).norm() <= 1e-5 * found[0].norm()
    assert kept[2] < kept[1] < kept[0] and kept[2] < 0.7 * kept[0]


def test_the_unconditional_branch_runs_only_where_guidance_asks_for_it(policy, prompts):
    prefix = policy.prefix(policy.encode(prompts))
    null = policy.prefix(policy.encode_null(prompts))
    latents, sigmas = start(policy, 3), levels(3)
    rows = rows_per_call(policy)
    conditional = policy.velocity(latents, sigmas, prefix)
    calls = len(rows)
    assert sum(rows) == 3 and (calls == 1 or not policy.has_shared_prefix)
    alone = policy.guided(latents, sigmas, prefix, null, 1.0)
    assert sum(rows) == 6 and len(rows) == 2 * calls
    assert all(torch.equal(velocity, conditional) for velocity in alone)
    both = policy.guided(latents, sigmas, prefix, null, 3.0)
    # Both branches of a sample are in one call.
    assert sum(rows) == 12 and len(rows) == 3 * calls
    torch.testing.assert_close(both.conditional, conditional, rtol=0, atol=1e-5)
    unconditional = policy.velocity(latents, sigmas, null)
    torch.testing.assert_close(both.unconditional, unconditional, rtol=0, atol=1e-5)
    wanted = unconditional + 3 * (conditional - unconditional)
    if policy.rescales_guidance:
        wanted = wanted * conditional.norm(dim=-1, keepdim=True) / wanted.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(both.guided, wanted, rtol=0, atol=1e-4)
    before = len(rows)
    policy.batch_guidance = False
    with torch.no_grad():
        apart = policy.guided(latents, sigmas, prefix, null, 3.0)
    assert max(rows[before:]) <= 3 < 6 == sum(rows[before:])
    for one, other in zip(apart, both, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_family_of_edits_tells_how_many_sources_it_reads(policy):
    assert (policy.max_sources > 0) == ("edit" in policy.tasks)
    assert policy.max_sources <= MAX_SOURCES
    most = Prompt(id="most", text="x", task="edit", sources=(b"",) * policy.max_sources)
    policy.check_sources([most, *T2I])
    with pytest.raises(ConfigError, match=f"at most {policy.max_sources} source .*'most'"):
        policy.check_sources([replace(most, sources=(*most.sources, b""))])


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_several_sources_are_read_as_the_pipeline_reads_them(policy, references, scale):
    # Rows of one, two and three references in one batch, each as if it were alone.
    noise = latents = start(policy, len(references))
    prefix = policy.prefix(policy.encode(references))
    null = policy.prefix(policy.encode_null(references))
    schedule = policy.schedule(STEPS)
    for sigma, sigma_next in itertools.pairwise(schedule):
        velocity = policy.guided(latents, sigma.expand(len(references)), prefix, null, scale).guided
        # The sources' tokens are conditions: no state, velocity or log-probability has them.
        assert velocity.shape == latents.shape
        latents = latents + (sigma_next - sigma) * velocity
    for row, prompt in enumerate(references):
        wanted = policy.pipeline_latents(
            prompt, noise[row : row + 1], num_steps=STEPS, guidance_scale=scale
        )
        assert (latents[row] - wanted[0]).abs().max() <= 1e-4


@torch.no_grad()
def test_each_source_counts_and_so_does_their_order(policy, references):
    latents, sigmas = start(policy, 1), levels(1)

    def velocity(prompt: Prompt) -> torch.Tensor:
        return policy.velocity(latents, sigmas, policy.prefix(policy.encode([prompt])))

    for prompt in references:
        own = velocity(prompt)
        others = [
            (*prompt.sources[:place], png(8), *prompt.sources[place + 1 :])
            for place in range(len(prompt.sources))
        ]
        others += [prompt.sources[::-1], prompt.sources[:-1]]
        for sources in {given for given in others if given and given != prompt.sources}:
            assert (velocity(replace(prompt, sources=sources)) - own).abs().max() > 1e-4


def test_gradient_of_samples_with_one_and_more_sources_is_that_of_each_alone(policy, references):
    rows = [0, 1, 0, *range(len(references))]
    latents, sigmas = start(policy, len(rows)), levels(len(rows))
    shared = policy.prefix(policy.encode(references)).take(rows)
    together = gradient(policy, policy.velocity(latents, sigmas, shared).square().sum())
    losses = []
    for place, row in enumerate(rows):
        alone = policy.prefix(policy.encode([references[row]]))
        part = slice(place, place + 1)
        losses.append(policy.velocity(latents[part], sigmas[part], alone).square().sum())
    apart = gradient(policy, torch.stack(losses).sum())
    assert (together - apart).norm() <= 1e-5 * apart.norm()


def test_the_key_of_a_prompt_holds_all_its_sources_in_order(policy, references):
    found = {prompt.id: policy.encode([prompt]).prompts[0] for prompt in references}
    assert len({row.key for row in found.values()}) == len(references)
    # Bytes that are the same end to end are still other sources.
    joined = replace(references[1], sources=(b"".join(references[1].sources),))
    assert policy.encode([joined]).prompts[0].key not in {row.key for row in found.values()}
    assert found["two"].shapes == found["turned"].shapes[::-1]


@torch.no_grad()
def test_the_null_prompt_keeps_the_source(policy):
    if "edit" not in policy.tasks:
        pytest.skip("no sources")
    same_words = [replace(prompt, text="no hat") for prompt in EDIT]
    latents, sigmas = start(policy, 1).repeat(3, 1, 1, 1), torch.full((3,), 0.5)
    null = policy.velocity(latents, sigmas, policy.prefix(policy.encode_null(EDIT)))
    again = policy.velocity(latents, sigmas, policy.prefix(policy.encode_null(same_words)))
    assert torch.equal(null, again)
    assert (null[0] - null[1]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [Size(64, 64), TALL], ids=["square", "tall"])
def test_noise_and_schedule_are_the_pipelines(policy, own, size):
    seeds, prompts = [3, 4], own[:2]
    # The pipeline's own preparation, watched at its first step.
    seen = []

    def watch(pipeline, step, time, states):
        seen.append(states["latents"])
        pipeline._interrupt = True
        return states

    for seed, prompt in zip(seeds, prompts, strict=True):
        policy.pipeline(
            prompt=prompt.text,
            **given(prompt),
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=STEPS,
            **size._asdict(),
            output_type="latent",
            callback_on_step_end=watch,
            **{policy.guidance_argument: 1.0},
        )
    schedule = policy.schedule(STEPS, size)
    torch.testing.assert_close(schedule, policy.pipeline.scheduler.sigmas)
    assert schedule[0] == 1 and schedule[-1] == 0 and len(schedule) == STEPS + 1
    noise = policy.noise([torch.Generator().manual_seed(seed) for seed in seeds], size)
    with torch.no_grad():
        velocity = policy.velocity(
            noise, schedule[:1].expand(2), policy.prefix(policy.encode(prompts))
        )
    wanted = noise + (schedule[1] - schedule[0]) * velocity
    # Some pipelines begin with tokens, some with a grid, and all but one tell tokens.
    wanted = policy.pipeline_noise(wanted) if seen[0].ndim == 4 else wanted.flatten(1, 2)
    torch.testing.assert_close(torch.cat(seen), wanted, rtol=0, atol=1e-5)


def test_asking_for_a_schedule_leaves_the_pipeline_alone(policy):
    policy.schedule(STEPS)
    before = policy.pipeline.scheduler.sigmas.clone()
    policy.schedule(STEPS + 3)
    assert torch.equal(policy.pipeline.scheduler.sigmas, before)


def test_the_schedule_follows_the_schedulers_settings(policy):
    plain = policy.schedule(STEPS)
    scheduler = type(policy.pipeline.scheduler)
    policy.pipeline.scheduler = scheduler.from_config(
        policy.pipeline.scheduler.config, shift_terminal=0.2, base_shift=1.0
    )
    changed = policy.schedule(STEPS)
    assert changed[-2] == pytest.approx(0.2, abs=1e-6)
    assert changed[1] != plain[1]


@pytest.mark.parametrize("size", [Size(64, 64), TALL], ids=["square", "tall"])
def test_images_round_trip_in_shape_and_statistics(policy, size):
    pictures = torch.rand(2, 3, *size)
    latents = policy.encode_images(pictures)
    assert latents.shape == start(policy, 2, size=size).shape
    decoded = policy.decode(latents)
    assert decoded.shape == pictures.shape
    assert decoded.min() >= 0 and decoded.max() <= 1
    # Two images are two rows.
    torch.testing.assert_close(policy.encode_images(pictures[1:]), latents[1:], rtol=0, atol=1e-5)


def test_the_image_of_the_pipeline_is_the_image_of_decode(policy, own):
    latents = start(policy, 1, size=TALL)
    with torch.no_grad():
        clean = policy.pipeline_latents(own[0], latents, num_steps=STEPS, guidance_scale=1.0)
        image = policy.decode(clean)
    wanted = policy.pipeline(
        prompt=own[0].text,
        **given(own[0]),
        latents=policy.pipeline_noise(latents),
        num_inference_steps=STEPS,
        **TALL._asdict(),
        output_type="pt",
        **{policy.guidance_argument: 1.0},
    ).images[:, :3]
    torch.testing.assert_close(image, wanted, rtol=0, atol=1e-5)


def test_a_prompt_read_before_is_not_read_again(policy, prompts):
    calls = []
    reads(policy).register_forward_hook(lambda *_: calls.append(1))
    first = policy.encode(prompts)
    # One by one, so that what a prompt becomes does not depend on its company.
    assert len(calls) == len(prompts)
    again = policy.encode(prompts[::-1])
    assert len(calls) == len(prompts)
    assert not any(row.embedding.requires_grad for row in first.prompts)
    for row, other in zip(first.prompts, reversed(again.prompts), strict=True):
        assert equal(row, other)
    with torch.no_grad():
        next(policy.text_encoder.parameters()).mul_(1.5)
    policy.encode(prompts)
    assert len(calls) == 2 * len(prompts), (
        "the encoder's weights changed, so what it read before is stale"
    )


def test_the_disk_cache_outlives_the_policy(policy, prompts, tmp_path):
    def fresh() -> tuple[Policy, list[int]]:
        cached = type(policy)(policy.pipeline, resolution=64, cache_folder=tmp_path)
        calls: list[int] = []
        handle = reads(policy).register_forward_hook(lambda *_: calls.append(1))
        handles.append(handle)
        return cached, calls

    handles: list = []
    cached, calls = fresh()
    missed = cached.encode(prompts)
    assert calls == [1] * len(prompts)
    other, calls = fresh()
    hit = other.encode(prompts)
    assert calls == []
    for row, same in zip(missed.prompts, hit.prompts, strict=True):
        assert equal(row, same) and row.shapes == same.shapes
    # A damaged file is a miss; so is one of another encoder.
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:40])
    damaged, calls = fresh()
    torch.testing.assert_close(
        damaged.encode(prompts).prompts[0].embedding, hit.prompts[0].embedding
    )
    assert calls == [1] * len(prompts)
    with torch.no_grad():
        next(policy.text_encoder.parameters()).add_(0.1)
    changed, calls = fresh()
    changed.encode(prompts)
    assert calls == [1] * len(prompts)


@torch.no_grad()
def test_what_is_saved_draws_the_same_without_burnish(policy, prompts, tmp_path):
    policy.save(tmp_path)
    noise = start(policy, 1)
    wanted = policy.pipeline_latents(prompts[0], noise, num_steps=STEPS, guidance_scale=3.0)
    loaded = type(policy).load(tmp_path, resolution=64)
    assert loaded.fingerprint() == policy.fingerprint()
    again = loaded.pipeline_latents(prompts[0], noise, num_steps=STEPS, guidance_scale=3.0)
    same(again, wanted)
    pipeline = type(policy.pipeline).from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    drawn = type(policy)(pipeline, resolution=64).pipeline_latents(
        prompts[0], noise, num_steps=STEPS, guidance_scale=3.0
    )
    same(drawn, wanted)


def test_what_is_never_trained_is_written_as_it_was_read(policy, tmp_path):
    """Unrounded, and legible to whatever release of a library could read it."""
    hub, out = tmp_path / "hub", tmp_path / "out"
    policy.save(hub)
    for file in hub.rglob("*.json"):
        # As no release of today writes it.
        file.write_text(json.dumps(json.loads(file.read_text())))
    loaded = type(policy).load(hub, dtype=torch.bfloat16, resolution=64)
    # What nobody reads stays behind, and so do modes.
    for name in (
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.fp16.json",
    ):
        (hub / "vae" / name).write_bytes(b"of others")
    for file in hub.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    loaded.save(out)
    assert not [file for file in out.rglob("*") if not file.stat().st_mode & 0o200]
    for file in hub.rglob("*"):
        file.chmod(0o755)
        if file.parent.name == "vae" and ("fp16" in file.name or file.suffix == ".bin"):
            file.unlink()
    before, after = (
        {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        for folder in (hub, out)
    )
    assert before.keys() == after.keys()
    changed = {path.parts[0] for path in before if before[path] != after[path]}
    assert changed == {"transformer"}
    hub.rename(tmp_path / "away")
    with pytest.raises(RunError, match=r"need .*hub.*, which was read at the start"):
        loaded.save(tmp_path / "other")


@torch.no_grad()
def test_bfloat16_weights_give_float32_velocities(policy, prompts, tmp_path):
    policy.save(tmp_path)
    half = type(policy).load(tmp_path, dtype=torch.bfloat16, resolution=64)
    latents, sigmas = start(policy, 3), levels(3)
    velocity = half.velocity(latents, sigmas, half.prefix(half.encode(prompts)))
    wanted = policy.velocity(latents, sigmas, policy.prefix(policy.encode(prompts)))
    assert velocity.dtype == torch.float32
    assert half.decode(latents).dtype == torch.float32
    assert (velocity - wanted).norm() < 0.05 * wanted.norm()


def test_fingerprint_tells_what_changed(policy):
    before = policy.fingerprint()
    assert before == type(policy).tiny().fingerprint()
    with torch.no_grad():
        next(policy.vae.parameters()).add_(1)
    after = policy.fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"vae"}


def test_a_sibling_keeps_the_weights_that_the_policy_leaves(policy, own, tmp_path):
    latents, prompt = start(policy, 1), own[0]
    plain = {"num_steps": 2, "guidance_scale": 1.0}
    before = policy.pipeline_latents(prompt, latents, **plain)
    sibling = policy.sibling()
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.mul_(1.1)
    assert not list(sibling.trainable())
    assert torch.equal(sibling.pipeline_latents(prompt, latents, **plain), before)
    assert not torch.equal(policy.pipeline_latents(prompt, latents, **plain), before)
    sibling.save(tmp_path)
    loaded = type(policy).load(tmp_path, resolution=64)
    same(loaded.pipeline_latents(prompt, latents, **plain), before)
    assert sibling.fingerprint() == policy.fingerprint()


def test_tiny_depends_on_its_seed_and_names_real_modules(policy):
    other = type(policy).tiny(1)
    same = type(policy).tiny(0)
    mine, theirs, again = (dict(p.trainable()) for p in (policy, other, same))
    assert mine and all(torch.equal(mine[name], again[name]) for name in mine)
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)
    blocks = {type(module).__name__ for module in policy.transformer.modules()}
    assert set(policy.block_classes) <= set(blocks)
    names = [name for name, _ in policy.transformer.named_modules()]
    for target in policy.lora_targets:
        assert any(name.endswith(target) for name in names), target


def test_wrong_input_gets_a_clear_line(policy, own, tmp_path):
    with pytest.raises(ConfigError, match=r"model_index\.json"):
        type(policy).load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(ConfigError, match="OtherPipeline"):
        type(policy).load(tmp_path)
    with pytest.raises(ConfigError, match="multiple of 32"):
        type(policy)(policy.pipeline, resolution=50)
    with pytest.raises(ValueError, match="one task"):
        policy.encode([T2I[0], EDIT[0]])
    bare = [Prompt(id="bare", text="x", task="edit")]
    with pytest.raises(ValueError, match="source image" if "edit" in policy.tasks else "task t2i"):
        policy.encode(bare)
    if "t2i" not in policy.tasks:
        with pytest.raises(ValueError, match="need prompts of task edit"):
            policy.encode(T2I)
    prefix = policy.prefix(policy.encode(own))
    with pytest.raises(ValueError, match="one prefix row per sample"):
        policy.velocity(start(policy, 2), levels(2), prefix)


def test_adapters_are_not_written_as_a_pipeline(policy, own, tmp_path):
    from peft import LoraConfig

    policy.transformer.add_adapter(LoraConfig(r=2, target_modules=list(policy.lora_targets)))
    with pytest.raises(ValueError, match="merge"):
        policy.save(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    assert all("lora_" in name for name, _ in policy.trainable())
    # An adapter starts as the identity and has gradient, through the prefix too.
    prefix = policy.prefix(policy.encode(own))
    loss = policy.velocity(start(policy, 3), levels(3), prefix).square().sum()
    assert gradient(policy, loss).abs().max() > 0


# --- What only Qwen-Image 2.1 promises ---------------------------------------------------------


@pytest.mark.parametrize("prompts", [EDIT, REFERENCES[1:]], ids=["one", "several"])
def test_qwen_gradient_is_that_of_full_calls_without_cache(prompts):
    policy = importlib.import_module("burnish.policies.qwen_image21").QwenImage21Policy.tiny()
    rows = [0, 1, 0, 2]
    latents, sigmas = start(policy, 4), levels(4)
    condition = policy.encode(prompts)
    shared = policy.velocity(latents, sigmas, policy.prefix(condition).take(rows))
    together = gradient(policy, shared.square().sum())
    losses = []
    for place, row in enumerate(rows):
        prompt = condition.prompts[row]
        tokens = latents[place].flatten(0, 1)
        target = prompt.is_image.new_ones(len(tokens) // 4)
        (output,) = policy.transformer(
            hidden_states=torch.cat([prompt.source, tokens])[None],
            timestep=sigmas[place : place + 1],
            encoder_hidden_states=prompt.embedding[None],
            img_shapes=[[*prompt.shapes, (1, 4, 4)]],
            img_mask=torch.cat([prompt.is_image, target])[None],
            return_dict=False,
        )
        found = output[0, -len(tokens) :]
        losses.append(found.square().sum())
        torch.testing.assert_close(found, shared[place].flatten(0, 1), rtol=0, atol=1e-5)
    apart = gradient(policy, torch.stack(losses).sum())
    assert (together - apart).norm() <= 1e-5 * apart.norm()


def test_qwen_embedding_carries_gradient_to_a_trained_encoder():
    policy = importlib.import_module("burnish.policies.qwen_image21").QwenImage21Policy.tiny()
    policy.text_encoder.requires_grad_(True)
    velocity = policy.velocity(start(policy, 3), levels(3), policy.prefix(policy.embed(EDIT)))
    velocity.square().sum().backward()
    language = policy.text_encoder.model.language_model.layers[0].mlp.up_proj.weight.grad
    vision = policy.text_encoder.model.visual.patch_embed.proj.weight.grad
    assert language.abs().max() > 0 and vision.abs().max() > 0
    # The final norm is behind the states that the transformer reads.
    assert policy.text_encoder.model.language_model.norm.weight.grad is None


def test_qwen_default_schedule_is_the_shift_for_its_number_of_tokens():
    policy = importlib.import_module("burnish.policies.qwen_image21").QwenImage21Policy.tiny()
    config = policy.pipeline.scheduler.config
    slope = (config.max_shift - config.base_shift) / (4096 - 256)
    wanted = shift_sigmas(torch.linspace(1, 0, STEPS + 1), config.base_shift + slope * (16 - 256))
    torch.testing.assert_close(policy.schedule(STEPS), wanted)


def test_qwen_source_alpha_is_not_lost_in_translation():
    policy = importlib.import_module("burnish.policies.qwen_image21").QwenImage21Policy.tiny()
    pictures = torch.rand(1, 3, 64, 64)
    opaque = torch.cat([2 * pictures - 1, torch.ones(1, 1, 64, 64)], dim=1)[:, :, None]
    config = policy.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    wanted = (policy.vae.encode(opaque).latent_dist.mode() - mean) / std
    latents = policy.encode_images(pictures)
    torch.testing.assert_close(latents, wanted[:, :, 0].permute(0, 2, 3, 1))


# --- What only the families of Qwen-Image promise ---------------------------------------------


@torch.no_grad()
def test_a_prefix_has_more_tokens_than_the_transformer_knows_positions():
    """As four references of a megapixel do: an image advances the position by one side."""
    policy = shelves.policy_class("qwen_image21").tiny()
    side, references = 64, 3
    source = png(0)
    asked = [replace(EDIT[0], text=text, sources=(source,) * references) for text in ("a", "a b c")]
    condition = policy.encode(asked)
    rows = []
    for row in condition.prompts:
        # Every image takes as many slots as a large one does.
        starts = row.is_image & ~row.is_image.roll(1)
        counts = torch.where(starts, side**2 // SLOT_TOKENS, (~row.is_image).long())
        large = {
            "embedding": row.embedding.repeat_interleave(counts, dim=0),
            "is_image": row.is_image.repeat_interleave(counts),
            "source": torch.randn(references * side**2, row.source.shape[1]),
            "shapes": ((1, side, side),) * references,
        }
        rows.append(replace(row, **large))
    large = type(condition)(tuple(rows))
    assert rows[0].num_tokens > len(policy.transformer.pos_embed.freqs[0])
    found = []
    for policy.share_prefix in (True, False):
        found.append(policy.velocity(start(policy, 2), levels(2), policy.prefix(large)))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["qwen_image", "qwen_image_edit"])
def streams(request, small_sources) -> type[Policy]:
    return shelves.policy_class(request.param)


@torch.no_grad()
def test_streams_pad_texts_of_one_call_as_if_each_were_alone(streams):
    policy = streams.tiny()
    prompts = T2I if "t2i" in policy.tasks else EDIT[:2]
    condition = policy.encode(prompts)
    assert len({len(row.embedding) for row in condition.prompts}) == len(prompts)
    rows = rows_per_call(policy)
    latents, sigmas = start(policy, len(prompts)), levels(len(prompts))
    together = policy.velocity(latents, sigmas, policy.prefix(condition))
    assert rows == [len(prompts)]
    for row in range(len(prompts)):
        alone = policy.velocity(
            latents[row : row + 1], sigmas[row : row + 1], policy.prefix(condition.select([row]))
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_streams_lead_away_from_a_blank_or_from_a_negative_prompt(streams):
    policy = streams.tiny()
    prompts = [(T2I if "t2i" in policy.tasks else EDIT)[0]]
    told = [policy.encode_null(prompts), policy.encode_null(prompts, " ")]
    assert equal(*(condition.prompts[0] for condition in told))
    other = policy.encode_null(prompts, "ugly")
    assert not equal(told[0].prompts[0], other.prompts[0])
    noise, drawn = start(policy, 1), []
    for negative in ("", " ", "ugly"):
        drawn.append(
            policy.pipeline_latents(
                prompts[0], noise, num_steps=2, guidance_scale=3.0, negative_prompt=negative
            )
        )
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_streams_take_no_transformer_whose_guidance_is_an_input(streams):
    pipeline = streams.tiny().pipeline
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ConfigError, match="guidance_embeds=false"):
        streams(pipeline, resolution=64)


@torch.no_grad()
def test_streams_read_a_long_text_as_far_as_a_call_does(small_sources):
    policy = shelves.policy_class("qwen_image").tiny()
    text = "a very long text " * 40
    assert len(policy.encode([Prompt(id="long", text=text)]).prompts[0].embedding) == 512
    noise, sigma = start(policy, 1), policy.schedule(1)
    prefix = policy.prefix(policy.encode([Prompt(id="long", text=text)]))
    ours = noise - policy.velocity(noise, sigma[:1], prefix)
    wanted = policy.pipeline_latents(
        Prompt(id="long", text=text), noise, num_steps=1, guidance_scale=1.0
    )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_streams_let_the_time_of_a_source_stand_still(small_sources, scale):
    """As Qwen-Image-Edit-2511 does."""
    family = shelves.policy_class("qwen_image_edit")
    pipeline = family.tiny().pipeline
    kind, config = type(pipeline.transformer), pipeline.transformer.config
    still = kind.from_config(config, zero_cond_t=True).eval()
    still.load_state_dict(pipeline.transformer.state_dict())
    plain = family(pipeline, resolution=64)
    parts = {**pipeline.components, "transformer": still}
    policy = family(type(pipeline)(**parts), resolution=64)
    policy.pipeline.set_progress_bar_config(disable=True)
    latents = noise = start(policy, 3)
    prefix, null = policy.prefix(policy.encode(EDIT)), policy.prefix(policy.encode_null(EDIT))
    other = plain.velocity(noise, levels(3), prefix)
    assert (policy.velocity(noise, levels(3), prefix) - other).abs().max() > 1e-3
    for sigma, sigma_next in itertools.pairwise(policy.schedule(2)):
        found = policy.guided(latents, sigma.expand(3), prefix, null, scale)
        latents = latents + (sigma_next - sigma) * found.guided
    for row, prompt in enumerate(EDIT):
        wanted = policy.pipeline_latents(
            prompt, noise[row : row + 1], num_steps=2, guidance_scale=scale
        )
        torch.testing.assert_close(latents[row : row + 1], wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_streams_read_a_source_at_the_sizes_of_the_published_pipeline():
    """The other tests make them smaller, to read them faster."""
    policy = shelves.policy_class("qwen_image_edit").tiny()
    prompt, noise, sigma = EDIT[2], start(policy, 1), policy.schedule(1)
    condition = policy.encode([prompt])
    assert condition.prompts[0].shapes == ((1, 46, 90),)
    ours = noise - policy.velocity(noise, sigma[:1], policy.prefix(condition))
    wanted = policy.pipeline_latents(prompt, noise, num_steps=1, guidance_scale=1.0)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


def test_frozen_networks_compute_only_where_the_transformer_is(policy, own, monkeypatch):
    """Offloaded, they are elsewhere unless they visit: whatever asks them must invite them."""
    here: list[torch.nn.Module] = []

    @contextlib.contextmanager
    def noted(networks, device):
        assert device == policy.device
        here.extend(networks)
        yield
        here.clear()

    for module in (pipelines, reading):
        monkeypatch.setattr(module, "visiting", noted)
    asked = []
    for network in policy.networks().values():
        if network is not policy.transformer:
            for part in network.modules():
                part.register_forward_pre_hook(
                    lambda *_, network=network: asked.append((network, network in here))
                )
    policy.decode(policy.encode_images(torch.rand(1, 3, 64, 64)))
    policy.velocity(start(policy, 1), levels(1), policy.prefix(policy.encode(own[:1])))
    assert {network for network, _ in asked} == {
        network for network in policy.networks().values() if network is not policy.transformer
    }
    assert all(is_here for _, is_here in asked)


class Traveller(torch.nn.BatchNorm1d):
    """Notes its moves, and has other weights and buffers after each."""

    def to(self, device):
        self.moves = [*getattr(self, "moves", []), str(device)]
        return self._apply(torch.clone)


def test_guests_go_home_whatever_happens():
    """To the very memory that they came from: what is frozen is not copied back."""
    guest, local = Traveller(2), Traveller(2, device="meta")
    home = {name: tensor.data_ptr() for name, tensor in guest.state_dict().items()}
    versions = [parameter._version for parameter in guest.parameters()]
    with pytest.raises(KeyError), visiting([guest, local], torch.device("meta")):
        assert guest.moves == ["meta"]
        assert all(tensor.data_ptr() != home[n] for n, tensor in guest.state_dict().items())
        raise KeyError
    assert {name: tensor.data_ptr() for name, tensor in guest.state_dict().items()} == home
    assert [parameter._version for parameter in guest.parameters()] == versions
    assert not hasattr(local, "moves")


@pytest.mark.parametrize("name", ["flash", "_native_flash"])
def test_a_kernel_that_cannot_be_had_is_refused_before_weights_are_read(policy, name):
    """Where prompts of unequal length share a call it must take a mask; any must be installed."""
    found = r"takes a mask" if policy.is_masked else r"is installed, got policy\.attention=flash"
    if name == "flash" or policy.is_masked:
        with pytest.raises(ConfigError, match=found):
            check_attention(name, is_chosen=True, is_masked=policy.is_masked)
    else:
        check_attention(name, is_chosen=True, is_masked=policy.is_masked)


def test_offloaded_encoders_stay_behind(policy, tmp_path):
    policy.save(tmp_path)
    read = type(policy).load(tmp_path, device="meta", offload=True)
    devices = {
        name: next(network.parameters()).device.type for name, network in read.networks().items()
    }
    assert devices.pop("transformer") == "meta"
    assert set(devices.values()) == {"cpu"}


@pytest.mark.parametrize("policy", COMPILED, indirect=True)
def test_compiled_blocks_change_no_velocity_and_no_gradient(policy, own):
    """Without the last stage of compiling, which takes minutes: every block is one graph that the
    compiler understands, with gradient and without, and so are those of a sibling."""
    policy.transformer.requires_grad_(True)
    results = []
    for _ in range(2):
        prefix = policy.prefix(policy.encode(own[:2]))
        velocity = policy.velocity(start(policy, 2), levels(2), prefix)
        results.append((velocity.detach(), gradient(policy, velocity.square().mean())))
        policy.compile_blocks("aot_eager")
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    blocks = [
        module
        for module in policy.sibling().transformer.modules()
        if type(module).__name__ in policy.block_classes
    ]
    assert blocks
    assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.parametrize("policy", COMPILED, indirect=True)
def test_few_pieces_of_code_serve_every_length_and_size(policy, own):
    """Blocks that are computed again use the same one, also where another was made in between."""
    policy.transformer.requires_grad_(True)
    checkpoint_blocks(policy.transformer, policy.block_classes, True)
    policy.compile_blocks("aot_eager")

    def loss(rows: list[int], words: int, size: Size | None = None) -> torch.Tensor:
        asked = [replace(prompt, text=prompt.text + " red" * words) for prompt in own[:2]]
        prefix = policy.prefix(policy.encode(asked)).take(rows)
        noise = start(policy, len(rows), size=size)
        return policy.velocity(noise, levels(len(rows)), prefix).square().mean()

    torch._dynamo.reset()
    gradient(policy, loss([0, 1], 0) + loss([0, 1, 0], 1, TALL))
    made = []
    for words in (2, 8):
        gradient(policy, loss([0, 1, 0], words))
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[0] == made[1]


def processors(policy):
    return [getattr(module, "processor", None) for module in policy.transformer.modules()]


def test_another_kernel_of_attention_gives_the_same_velocity(policy, own):
    """Of those that can be chosen; where none can, that is said."""
    prefix = policy.prefix(policy.encode(own[:1]))
    expected = policy.velocity(start(policy, 1), levels(1), prefix)
    if not policy.chooses_attention:
        assert not any(hasattr(one, "_attention_backend") for one in processors(policy))
        with pytest.raises(ConfigError, match=r"need policy\.attention=native"):
            check_attention("_native_math", is_chosen=False, is_masked=policy.is_masked)
        return
    assert any(hasattr(one, "_attention_backend") for one in processors(policy))
    set_attention(policy.transformer, "_native_math")
    prefix = policy.prefix(policy.encode(own[:1]))
    same(policy.velocity(start(policy, 1), levels(1), prefix), expected)
