"""Draw a scene: 64 x 64 RGB, supersampled four times, deterministic.

Every category has a painter that fills a large canvas; the style is applied to the canvas, and a
box filter brings it to size. Nothing here is random: what varies between two pictures of one prompt
is what the prompt left open, or a flaw.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from burnish.world.faces import paint_portrait
from burnish.world.landscapes import paint_landscape
from burnish.world.scenes import COLOURS, GROUNDS, PLACES, Scene

Number = int | float
SIZE = 64
"""Side of a picture in pixels."""
CANVAS = 256
"""Side of the drawing canvas."""

# Letters on a 5 x 7 grid, one string of bits a row.
_GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 11110 10001 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01111 10000 10000 10011 10001 10001 01111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "J": "00111 00010 00010 00010 10010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 10101 10011 10001 10001 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "X": "10001 01010 00100 00100 00100 01010 10001",
}


def _polygon(kind: str, cx: Number, cy: Number, r: Number) -> list[tuple[float, float]]:
    if kind == "triangle":
        angles = [(-90 + 120 * k, 1.15) for k in range(3)]
    elif kind == "star":
        angles = [(-90 + 36 * k, 1.15 if k % 2 == 0 else 0.46) for k in range(10)]
    elif kind == "heart":
        points = [math.tau * k / 40 for k in range(40)]
        return [
            (
                cx + r * math.sin(t) ** 3 * 1.08,
                cy - r * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)) / 15,
            )
            for t in points
        ]
    else:  # cross
        a, b = 0.36 * r, r
        return [
            (cx + x, cy + y)
            for x, y in (
                (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
            )
        ]  # fmt: skip
    return [
        (cx + r * s * math.cos(math.radians(a)), cy + r * s * math.sin(math.radians(a)))
        for a, s in angles
    ]


def _paint_shape(
    draw: ImageDraw.ImageDraw,
    kind: str,
    cx: Number,
    cy: Number,
    r: Number,
    fill: tuple[int, int, int],
) -> None:
    if kind == "none":
        return
    if kind == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
    elif kind == "square":
        s = 0.88 * r
        draw.rectangle((cx - s, cy - s, cx + s, cy + s), fill=fill)
    else:
        draw.polygon(_polygon(kind, cx, cy, r), fill=fill)


def _paint_general(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    v = scene.values
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=GROUNDS[str(v["background"])])
    for i in range(2):
        if f"{i}.shape" not in v:
            continue
        count = int(v[f"{i}.count"])
        dx, dy = PLACES[str(v[f"{i}.place"])]
        radius = 58 if v[f"{i}.size"] == "large" else 30
        for k in range(count):
            cx = CANVAS / 2 + dx * CANVAS / 4 + (k - (count - 1) / 2) * 64
            cy = CANVAS / 2 + dy * CANVAS / 4
            _paint_shape(draw, str(v[f"{i}.shape"]), cx, cy, radius, COLOURS[str(v[f"{i}.colour"])])


def _paint_typography(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    v = scene.values
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=GROUNDS[str(v["background"])])
    ink = COLOURS[str(v["colour"])]
    if v["frame"] == "framed":
        draw.rectangle((0, 0, CANVAS - 1, CANVAS - 1), outline=(90, 92, 104), width=7)
    # Tall letters, one to a column of the latent grid and two of its rows high.
    width, height = 10, 15
    top = {"top": 12, "centre": 76, "bottom": 140}[str(v["level"])]
    for n, letter in enumerate(str(v["word"])):
        for row, bits in enumerate(_GLYPHS[letter].split()):
            for column, bit in enumerate(bits):
                if bit == "1":
                    x, y = 13 + 60 * n + column * width, top + row * height
                    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=ink)


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, Scene], None]] = {
    "general": _paint_general,
    "typography": _paint_typography,
    "portrait": paint_portrait,
    "landscape": paint_landscape,
}


def _edges(canvas: Image.Image) -> np.ndarray:
    """Where neighbouring colours differ, in [0, 1], about two output pixels wide."""
    pixels = np.asarray(canvas.filter(ImageFilter.BoxBlur(2)), dtype=np.float32) / 255
    horizontal = np.abs(np.roll(pixels, 4, axis=1) - np.roll(pixels, -4, axis=1)).max(axis=2)
    vertical = np.abs(np.roll(pixels, 4, axis=0) - np.roll(pixels, -4, axis=0)).max(axis=2)
    edge = np.maximum(horizontal, vertical)
    edge[:5], edge[-5:], edge[:, :5], edge[:, -5:] = 0, 0, 0, 0
    return np.clip(edge * 4 - 0.35, 0, 1)[..., None]


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    factor = CANVAS // SIZE
    return pixels.reshape(SIZE, factor, SIZE, factor, 3).mean(axis=(1, 3), dtype=np.float32)


def _styled(canvas: Image.Image, style: str) -> np.ndarray:
    if style in ("flat", "night"):
        pixels = np.asarray(canvas.reduce(CANVAS // SIZE), dtype=np.float32) / 255
        if style == "flat":
            return pixels
        tint = np.array([0.44, 0.47, 0.70], dtype=np.float32)
        return pixels * tint + np.array([0.0, 0.0, 0.07], dtype=np.float32)
    pixels = np.asarray(canvas, dtype=np.float32) / 255
    edge = _edges(canvas)
    if style == "outline":
        pastel = 0.45 * pixels + 0.55
        return _shrunk(pastel * (1 - edge) + 0.10 * edge)
    if style == "blueprint":
        light = (pixels @ np.array([0.30, 0.59, 0.11], dtype=np.float32))[..., None]
        paper = np.array([0.08, 0.24, 0.56], dtype=np.float32)
        ground = paper + light * np.array([0.10, 0.18, 0.22], dtype=np.float32)
        return _shrunk(ground * (1 - edge) + np.array([0.92, 0.96, 1.0], dtype=np.float32) * edge)
    raise ValueError(f"need a style the renderer knows, got {style!r}")


@lru_cache(maxsize=6_000)
def _render(scene: Scene) -> np.ndarray:
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    _PAINTERS[scene.category](ImageDraw.Draw(canvas), scene)
    small = _styled(canvas, str(scene.values["style"]))
    small.setflags(write=False)
    return small


def render(scene: Scene) -> np.ndarray:
    """The clean picture of a scene: read-only float32, `height width 3`, in [0, 1]."""
    return _render(scene)
