"""Laws of the embedded world: drawing, words, edits, flaws, and the oracle that measures them."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from burnish.world.edits import EDITABLE, Edit, sample_edit
from burnish.world.facets import UNSEEN, facets_of_scene
from burnish.world.flaws import PIXEL_FLAWS, misspellings, spoil
from burnish.world.grammar import say
from burnish.world.oracle import ANATOMY, measure_edit, measure_scene
from burnish.world.raters import Raters, alignment_truth, rate_edit, rate_scene
from burnish.world.render import render
from burnish.world.scenes import (
    CATEGORIES,
    COMBINED,
    DOMAINS,
    LOOK,
    PEOPLE,
    STYLES,
    WORDS,
    Scene,
    attribute,
    domain,
    held_out_combinations,
    held_out_keys,
    is_held_out,
    sample_scene,
)

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
categories = st.sampled_from(CATEGORIES)


@few
@given(seeds, categories)
def test_every_scene_renders_and_survives_json(seed: int, category: str) -> None:
    scene = sample_scene(np.random.default_rng(seed), category=category)
    picture = render(scene)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.float32
    assert picture.min() >= 0 and picture.max() <= 1
    assert Scene.from_json(scene.to_json()) == scene
    assert all(value in domain(key) for key, value in scene.values.items())


@few
@given(seeds, categories)
def test_the_right_picture_is_perfect(seed: int, category: str) -> None:
    scene = sample_scene(np.random.default_rng(seed), category=category)
    measures = measure_scene(render(scene), scene)
    assert all(value == pytest.approx(1.0) for value in measures.values()), measures


@few
@given(seeds, categories)
def test_any_value_of_what_is_left_open_is_right(seed: int, category: str) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, category=category, style="flat")
    other = scene.changed(
        {key: domain(key)[int(rng.integers(len(domain(key))))] for key in scene.free}
    )
    assert measure_scene(render(other), scene)["composite"] == pytest.approx(1.0)


@few
@given(seeds, categories)
def test_a_flaw_of_content_is_seen_as_such(seed: int, category: str) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, category=category, style="flat")
    flawed = spoil(scene, rng)
    measures = measure_scene(render(flawed), scene)
    worst = min(measures["alignment"], measures.get("portrait", 1.0))
    assert worst < 0.6, (scene.values, flawed.values)


@few
@given(seeds, categories, st.sampled_from(sorted(PIXEL_FLAWS)))
def test_a_flaw_of_the_picture_lowers_quality_and_not_alignment(
    seed: int, category: str, flaw: str
) -> None:
    scene = sample_scene(np.random.default_rng(seed), category=category, style="flat")
    measures = measure_scene(PIXEL_FLAWS[flaw](render(scene)), scene)
    assert measures["quality"] < 0.35
    assert measures["alignment"] > 0.3


@few
@given(seeds, categories)
def test_a_perfect_edit_is_perfect_and_the_source_earns_only_quality(
    seed: int, category: str
) -> None:
    edit = sample_edit(np.random.default_rng(seed), category=category)
    assert Edit.from_json(edit.to_json()) == edit
    assert measure_edit(render(edit.target), edit)["composite"] == pytest.approx(1.0)
    untouched = measure_edit(render(edit.source), edit)
    assert untouched["instruction"] == pytest.approx(0.0, abs=1e-6)
    assert untouched["preservation"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_kind_of_edit_occurs(category: str) -> None:
    rng = np.random.default_rng(0)
    changed = {
        next(iter(sample_edit(rng, category=category).changes)).rsplit(".", 1)[-1]
        for _ in range(400)
    }
    assert changed >= set(EDITABLE[category]) - {"remove"}


@pytest.mark.parametrize("person", PEOPLE)
def test_a_stranger_is_not_the_named_person(person: str) -> None:
    rng = np.random.default_rng(1)
    scene = sample_scene(rng, person=person, style="flat")
    assert measure_scene(render(scene), scene)["likeness"] == pytest.approx(1.0)
    other = next(name for name in PEOPLE if name != person)
    stranger = scene.changed({key: PEOPLE[other][key] for key in LOOK})
    assert measure_scene(render(stranger), scene)["likeness"] < 0.6


@pytest.mark.parametrize("style", STYLES[1:])
def test_a_flat_picture_misses_a_style(style: str) -> None:
    scene = sample_scene(np.random.default_rng(2), category="general", style=style)
    flat = scene.changed({"style": "flat"})
    assert measure_scene(render(flat), scene)["style"] < 0.1


@few
@given(seeds, categories)
def test_a_prompt_says_what_is_not_left_open(seed: int, category: str) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, category=category, style="flat")
    texts = {say(scene, rng) for _ in range(12)}
    assert len(texts) > 1, "paraphrases"
    for text in texts:
        if "background" in scene.values and "background" not in scene.free:
            assert str(scene.values["background"]) in text
        if "word" in scene.values:
            assert f'"{scene.values["word"]}"' in text


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_eighth_of_the_combinations_is_held_out_and_asked_for_in_words(category: str) -> None:
    rng = np.random.default_rng(3)
    combinations = math.prod(len(DOMAINS[name]) for name in COMBINED[category])
    assert combinations // 11 <= len(held_out_combinations(category)) <= combinations // 8
    scenes = [sample_scene(rng, category=category) for _ in range(400)]
    held = [scene for scene in scenes if is_held_out(scene)]
    assert 0.05 < len(held) / len(scenes) < 0.3
    assert not any(scene.free & set(COMBINED[category]) for scene in held)


def test_a_combination_nobody_trained_on_is_judged_by_its_own_object() -> None:
    rng = np.random.default_rng(3)
    drawn = (sample_scene(rng, category="general", style="flat") for _ in range(400))
    # One of two objects, the other is one that models know.
    scenes = [
        scene for scene in drawn if len(held_out_keys(scene)) == 2 and "1.shape" in scene.values
    ]
    assert len(scenes) > 10
    for scene in scenes:
        unseen = held_out_keys(scene)[0].split(".")[0]
        for number in ("0", "1"):
            key = f"{number}.colour"
            # No colour that the other object has, which would be the other's place.
            others = {scene.values["0.colour"], scene.values["1.colour"]}
            wrong = next(colour for colour in domain(key) if colour not in others)
            found = facets_of_scene(render(scene.changed({key: wrong})), scene)[UNSEEN]
            assert (found < 0.5) == (number == unseen), (scene, number)


@pytest.mark.parametrize("word", WORDS)
def test_misspellings_differ_from_the_word_and_can_be_drawn(word: str) -> None:
    scene = sample_scene(np.random.default_rng(4), category="typography", style="flat")
    for wrong in misspellings(word):
        assert wrong != word
        assert render(scene.changed({"word": wrong})).shape == (64, 64, 3)


PANEL = Raters.hire()


@few
@given(seeds, categories)
def test_raters_praise_the_right_picture(seed: int, category: str) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, category=category, style="flat")
    for opinion in rate_scene(render(scene), scene, PANEL, rng):
        assert opinion.truth == pytest.approx(5.0)
        assert opinion.mean > 4 and "wrong" not in opinion.reasoning


@few
@example(seed=462, category="portrait")
@example(seed=56, category="general")
@given(seeds, categories)
def test_raters_mark_down_a_flaw_and_name_it(seed: int, category: str) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, category=category, style="flat")
    flawed = spoil(scene, rng)
    (wrong,) = [key for key in scene.values if scene.values[key] != flawed.values[key]]
    found = {o.dimension: o for o in rate_scene(render(flawed), scene, PANEL, rng)}
    opinion = found["portrait" if attribute(wrong) in ANATOMY else "alignment"]
    # The least is a wrong mouth beside a right mark: 4 * 0.10 / 0.85 * 0.75 points.
    assert opinion.truth < 4.65
    named = f"{attribute(wrong).replace('_', ' ')} {scene.values[wrong]} seen "
    # Two objects may share a value; the other one is right.
    said = [part for part in opinion.reasoning.split(", ") if part.startswith(named)]
    assert sum(part.endswith(" wrong") for part in said) == 1


def test_what_is_missing_caps_alignment() -> None:
    assert alignment_truth({"0.shape": 0.0, "0.colour": 1.0, "0.place": 1.0}) <= 2
    assert alignment_truth({"0.shape": 1.0, "0.colour": 0.0, "0.place": 1.0}) > 2


@few
@given(seeds, categories)
def test_an_edit_left_undone_is_capped(seed: int, category: str) -> None:
    rng = np.random.default_rng(seed)
    edit = sample_edit(rng, category=category)
    done, undone = (
        rate_edit(render(scene), edit, PANEL, rng)[0] for scene in (edit.target, edit.source)
    )
    assert done.truth == pytest.approx(5.0) and undone.truth <= 2


def test_raters_differ_in_what_a_fault_costs_and_agree_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    truths = rng.uniform(2.5, 4.5, 400)
    opinions = [PANEL.rate("alignment", float(truth), "", rng) for truth in truths]
    means = [opinion.mean for opinion in opinions]
    assert spearmanr(means, truths).statistic > 0.9
    # Strictness multiplies, so the mean of a panel is a little below its middle.
    assert -0.3 < float(np.mean(np.asarray(means) - truths)) < 0.05
    assert 0.3 < float(np.mean([opinion.std for opinion in opinions])) < 0.8
    flawless = [PANEL.rate("alignment", 5.0, "", rng) for _ in range(20)]
    assert {(opinion.mean, opinion.std) for opinion in flawless} == {(5.0, 0.0)}
