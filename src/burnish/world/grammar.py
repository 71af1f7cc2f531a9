"""Say a scene in words, in several ways.

What a prompt leaves out is in `Scene.free`; everything else it states, except what can never be
said (`NEVER_SAID`) and the look of a named person, which a model must know.
"""

from collections.abc import Iterator

import numpy as np

from burnish.world.scenes import DOMAINS, PEOPLE, Scene, Value, sample_scene

_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

_PLACE_WORDS = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
_STYLE_WORDS = {
    "flat": ("",),
    "outline": (", drawn with dark outlines", ", in outline style"),
    "night": (", in dim light at night", ", in night style"),
    "blueprint": (", as a blueprint", ", in blueprint style"),
}
_HAIR_WORDS = {
    "short": ("short {} hair",),
    "long": ("long {} hair",),
    "curly": ("curly {} hair", "{} curls"),
    "bald": ("no hair", "a bald head"),
}
_MOUTH_WORDS = {
    "smile": ("smiling", "with a smile"),
    "frown": ("frowning", "with a frown"),
    "open": ("with an open mouth", "looking surprised"),
}
_TIME_WORDS = {
    "day": ("by day", "on a sunny day"),
    "sunset": ("at sunset", "as the sun sets"),
    "night": ("at night", "under the moon"),
}


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of several ways of saying the same."""
    return options[int(rng.integers(len(options)))]


def number_word(count: Value) -> str:
    """3 -> three."""
    return _NUMBERS[int(count)]


def object_phrase(scene: Scene, index: int, rng: np.random.Generator) -> str:
    """A large red circle; three small blue stars."""
    v = scene.values
    size = pick(rng, ("small", "little") if v[f"{index}.size"] == "small" else ("large", "big"))
    count = int(v[f"{index}.count"])
    noun = f"{size} {v[f'{index}.colour']} {v[f'{index}.shape']}"
    if count > 1:
        plural = "crosses" if noun.endswith("cross") else noun.rsplit(" ", 1)[1] + "s"
        return f"{number_word(count)} {noun.rsplit(' ', 1)[0]} {plural}"
    return f"a {noun}"


def _say_general(scene: Scene, rng: np.random.Generator) -> str:
    v = scene.values
    first = object_phrase(scene, 0, rng)
    if "1.shape" in v:
        second = object_phrase(scene, 1, rng)
        if v["0.place"] == "left":
            ways = (
                f"{first} to the left of {second}",
                f"{second} to the right of {first}",
                f"{first} on the left and {second} on the right",
            )
        else:
            ways = (
                f"{first} above {second}",
                f"{second} below {first}",
                f"{first} at the top and {second} at the bottom",
            )
        text = pick(rng, ways)
    elif int(v["0.count"]) > 1:
        text = pick(rng, (f"{first} in a row", f"a row of {first}"))
    else:
        text = f"{first} {pick(rng, _PLACE_WORDS[str(v['0.place'])])}"
    if "background" not in scene.free:
        ground = v["background"]
        text += pick(rng, (f" on a {ground} background", f", {ground} background"))
    return text


def _say_typography(scene: Scene, rng: np.random.Generator) -> str:
    v = scene.values
    word = f'"{v["word"]}"'
    where = pick(rng, _PLACE_WORDS[str(v["level"])])
    colour = v["colour"]
    ways = (
        f"the word {word} in {colour} letters {where}",
        f"{colour} text reading {word} {where}",
        f"a {colour} sign that says {word} {where}",
    )
    text = pick(rng, ways)
    if "background" not in scene.free:
        text += f" on a {v['background']} ground"
    if v["frame"] == "framed":
        text += pick(rng, (", framed", ", with a frame"))
    return text


def _look_phrase(scene: Scene, rng: np.random.Generator) -> str:
    v = scene.values
    hair = pick(rng, _HAIR_WORDS[str(v["hair"])]).format(v["hair_colour"])
    parts = [] if "skin" in scene.free else [f"{v['skin']} skin"]
    parts.append(hair)
    if "eyes" not in scene.free:
        parts.append(f"{v['eyes']} eyes")
    return "a person with " + ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1]


def _say_portrait(scene: Scene, rng: np.random.Generator) -> str:
    v = scene.values
    text = pick(rng, ("a portrait of ", "a picture of ")) + (
        scene.person or _look_phrase(scene, rng)
    )
    text += ", " + pick(rng, _MOUTH_WORDS[str(v["mouth"])])
    worn = []
    if v["glasses"] == "glasses":
        worn.append("glasses")
    if v["hat"] != "none":
        worn.append(f"a {v['hat']} hat")
    if worn:
        text += ", wearing " + " and ".join(worn)
    fingers = int(v["fingers"])
    if fingers:
        noun = "finger" if fingers == 1 else "fingers"
        text += f", {pick(rng, ('holding up', 'raising'))} {number_word(fingers)} {noun}"
    if "background" not in scene.free:
        text += f", {v['background']} background"
    return text


def _say_landscape(scene: Scene, rng: np.random.Generator) -> str:
    v = scene.values
    when = pick(rng, _TIME_WORDS[str(v["time"])])
    text = pick(rng, (f"a {v['season']} landscape {when}", f"{v['season']} countryside {when}"))
    parts = []
    if v["mountains"] != "none":
        parts.append(f"{v['mountains']} mountains")
    if int(v["trees"]):
        count = int(v["trees"])
        parts.append(f"{number_word(count)} {'tree' if count == 1 else 'trees'}")
    if v["water"] == "lake":
        parts.append("a lake")
    if parts:
        text += " with " + ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1]
    return text


_SPEAKERS = {
    "general": _say_general,
    "typography": _say_typography,
    "portrait": _say_portrait,
    "landscape": _say_landscape,
}


def say(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt for the scene; another draw of `rng` gives another wording."""
    return _SPEAKERS[scene.category](scene, rng) + pick(
        rng, _STYLE_WORDS[str(scene.values["style"])]
    )


def corpus(num_scenes: int, seed: int = 0) -> Iterator[str]:
    """Prompts and words of the whole grammar, for building a tokenizer."""
    rng = np.random.default_rng(seed)
    for _ in range(num_scenes):
        yield say(sample_scene(rng), rng)
    for person in PEOPLE:
        yield say(sample_scene(rng, person=person), rng)
    for values in DOMAINS.values():
        yield " ".join(str(value) for value in values)
