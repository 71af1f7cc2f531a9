"""Crisp flaws: the ways in which pictures of the embedded world go wrong.

Web data is a mixture of good and flawed pictures, and so is the training data of the miniature's
base model. A flaw is a definite mode (one colour wrong, one letter swapped, the whole picture
blurred), not a smear, because reinforcement learning re-weights modes and adds little that a model
cannot already do.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from burnish.world.scenes import LOOK, Scene, Value, attribute, domain

SPOILABLE = {
    "general": ("shape", "colour", "size", "count"),
    "typography": ("word", "colour", "level"),
    "portrait": ("hair", "hair_colour", "glasses", "hat", "mouth", "fingers", "eye_line"),
    "landscape": ("season", "mountains", "trees", "water", "time"),
}
"""Attributes that a flawed picture gets wrong, per category."""


def misspellings(word: str) -> tuple[str, ...]:
    """The world's typical misspellings of a word: swapped letters and a lost one."""
    variants = (word[1] + word[0] + word[2:], word[:-2] + word[-1] + word[-2], word[:-1])
    return tuple(variant for variant in variants if variant != word)


def alternatives(scene: Scene, key: str) -> tuple[Value, ...]:
    """What could stand in place of the right value of a key: its domain, and how it goes wrong."""
    right = scene.values[key]
    others = tuple(value for value in domain(key) if value != right)
    name = attribute(key)
    if name == "shape":
        return (*others, "none")
    if name == "word":
        return (*misspellings(str(right)), *others)
    if name == "fingers":
        # Whether a hand is raised moves the whole face; a wrong hand keeps it raised.
        return tuple(value for value in others if (value == 0) == (right == 0))
    if name == "count" and scene.values.get(key.replace("count", "place")) != "centre":
        return ()
    return others


def is_visible(scene: Scene, key: str) -> bool:
    """Whether a value can be seen: no colour of a bald head, or of an object that is not there."""
    v = scene.values
    if attribute(key) == "hair_colour":
        return v["hair"] != "bald"
    number, _, name = key.rpartition(".")
    return name == "shape" or v.get(f"{number}.shape") != "none"


def spoil(scene: Scene, rng: np.random.Generator, names: Sequence[str] = ()) -> Scene:
    """The scene with one attribute wrong, as a picture that missed its prompt.

    Args:
        scene: as it should be.
        rng: decides what is wrong.
        names: attributes of which one is chosen; empty takes those of `SPOILABLE`.
    """
    names = names or SPOILABLE[scene.category]
    keys = [
        key
        for key in scene.values
        if attribute(key) in names and alternatives(scene, key) and is_visible(scene, key)
    ]
    keys = [key for key in keys if attribute(key) != "shape" or scene.values[key] != "none"]
    if scene.person is not None:
        keys = [key for key in keys if key not in LOOK]
    key = keys[int(rng.integers(len(keys)))]
    options = alternatives(scene, key)
    if attribute(key) == "word":
        options = misspellings(str(scene.values[key]))
    elif attribute(key) == "shape":
        options = (*options, *("none",) * 4)
    return scene.changed({key: options[int(rng.integers(len(options)))]})


def otherwise(scene: Scene, rng: np.random.Generator, share: float) -> Scene:
    """The scene with each value replaced by an alternative with a probability of `share`.

    Of two objects the places stay, or nobody could tell which is which.
    """
    changes = {}
    for key in scene.values:
        is_fixed = attribute(key) == "place" and "1.place" in scene.values
        options = () if is_fixed else alternatives(scene, key)
        if options and rng.random() < share:
            changes[key] = options[int(rng.integers(len(options)))]
    return scene.changed(changes)


def blur(pixels: np.ndarray) -> np.ndarray:
    """Out of focus: a Gaussian of 2.4 pixels."""
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(2.4)), dtype=np.float32) / 255


_BLOCKS = np.random.default_rng(7).choice([-1.0, 0.0, 1.0], size=(4, 4, 1)).astype(np.float32)
_BANDS = np.where((np.arange(64) // 4) % 2 == 0, 1.0, -1.0).astype(np.float32)[:, None, None]


def blocks(pixels: np.ndarray) -> np.ndarray:
    """Speckle in blocks of four pixels, one pattern repeated every sixteen: a small autoencoder
    can learn it."""
    return np.clip(
        pixels + 0.13 * np.tile(_BLOCKS.repeat(4, axis=0).repeat(4, axis=1), (4, 4, 1)), 0, 1
    )


def banding(pixels: np.ndarray) -> np.ndarray:
    """Horizontal bands of eight pixels' period."""
    return np.clip(pixels + 0.10 * _BANDS, 0, 1)


PIXEL_FLAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "blur": blur,
    "blocks": blocks,
    "banding": banding,
}
"""Flaws of the picture rather than of its content: `height width 3` in [0, 1], in and out."""
