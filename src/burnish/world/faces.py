"""Painter of portraits: a face, its look, what it wears, and a raised hand."""

from PIL import ImageDraw

from burnish.world.scenes import COLOURS, EYES, GROUNDS, HAIR_COLOURS, SKINS, Scene

Number = int | float
Colour = tuple[int, int, int]

_DARK: Colour = (40, 34, 38)
_EYE_DX, _EYE_Y = 30, 122


def _ellipse(
    draw: ImageDraw.ImageDraw, cx: Number, cy: Number, rx: Number, ry: Number, fill: Colour
):
    draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=fill)


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (int(channel * factor) for channel in colour)
    return r, g, b


def _paint_hair_behind(draw: ImageDraw.ImageDraw, cx: Number, kind: str, colour: Colour) -> None:
    if kind == "long":
        draw.rounded_rectangle((cx - 84, 60, cx + 84, 232), 50, fill=colour)
    elif kind == "curly":
        for dx, dy in ((66, 84), (74, 122), (62, 158), (36, 58), (0, 48)):
            for side in (-1, 1):
                _ellipse(draw, cx + side * dx, dy, 27, 27, colour)


def _paint_hair_front(draw: ImageDraw.ImageDraw, cx: Number, kind: str, colour: Colour) -> None:
    if kind in ("short", "long"):
        draw.pieslice((cx - 68, 46, cx + 68, 178), 180, 360, fill=colour)
        draw.rectangle((cx - 58, 100, cx + 58, 112), fill=colour)
    elif kind == "curly":
        for dx, dy in ((-40, 82), (-14, 72), (14, 72), (40, 82)):
            _ellipse(draw, cx + dx, dy, 23, 21, colour)


def _paint_eyes(draw: ImageDraw.ImageDraw, cx: Number, iris: Colour, line: str) -> None:
    for side in (-1, 1):
        x = cx + side * _EYE_DX
        # An uneven face is the flaw of a drawing: one eye slips down and shrinks.
        slip = line == "uneven" and side == 1
        y, size = (_EYE_Y + 18, 0.62) if slip else (_EYE_Y, 1.0)
        _ellipse(draw, x, y, 22 * size, 18 * size, (252, 252, 252))
        _ellipse(draw, x, y, 15 * size, 15 * size, iris)


def _paint_mouth(draw: ImageDraw.ImageDraw, cx: Number, kind: str) -> None:
    lips = (172, 44, 58)
    if kind == "smile":
        draw.chord((cx - 38, 140, cx + 38, 202), 10, 170, fill=lips)
    elif kind == "frown":
        draw.arc((cx - 36, 168, cx + 36, 228), 200, 340, fill=lips, width=14)
    else:
        _ellipse(draw, cx, 180, 19, 23, lips)


def _paint_mark(
    draw: ImageDraw.ImageDraw, cx: Number, kind: str, hair: Colour, skin: Colour
) -> None:
    if kind == "moustache":
        draw.rounded_rectangle((cx - 36, 148, cx + 36, 164), 7, fill=_shade(hair, 0.8))
    elif kind == "freckles":
        for side in (-1, 1):
            for dx, dy in ((34, 150), (46, 146), (42, 160), (28, 162)):
                _ellipse(draw, cx + side * dx, dy, 5, 5, _shade(skin, 0.62))
    elif kind == "beard":
        draw.chord((cx - 62, 86, cx + 62, 220), 20, 160, fill=_shade(hair, 0.9))


def _paint_hand(draw: ImageDraw.ImageDraw, fingers: int, skin: Colour) -> None:
    tone = _shade(skin, 0.8)
    draw.rounded_rectangle((160, 186, 250, 256), 14, fill=tone)
    for k in range(fingers):
        x = 160 + k * 19
        draw.rectangle((x, 130, x + 11, 196), fill=tone)


def paint_portrait(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Fill the 256 x 256 canvas with a portrait; a raised hand moves the face aside."""
    v = scene.values
    draw.rectangle((0, 0, 256, 256), fill=GROUNDS[str(v["background"])])
    skin, hair = SKINS[str(v["skin"])], HAIR_COLOURS[str(v["hair_colour"])]
    fingers = int(v["fingers"])
    cx = 88 if fingers else 128
    _paint_hair_behind(draw, cx, str(v["hair"]), hair)
    draw.rounded_rectangle((cx - 72, 216, cx + 72, 280), 34, fill=(88, 98, 132))
    draw.rectangle((cx - 20, 190, cx + 20, 226), fill=_shade(skin, 0.86))
    _ellipse(draw, cx, 136, 62, 74, skin)
    _paint_hair_front(draw, cx, str(v["hair"]), hair)
    _paint_mark(draw, cx, str(v["mark"]), hair, skin)
    _paint_mouth(draw, cx, str(v["mouth"]))
    _paint_eyes(draw, cx, EYES[str(v["eyes"])], str(v["eye_line"]))
    if v["glasses"] == "glasses":
        for side in (-1, 1):
            x = cx + side * _EYE_DX
            box = (x - 27, _EYE_Y - 24, x + 27, _EYE_Y + 24)
            draw.ellipse(box, outline=_DARK, width=8)
        draw.rectangle((cx - 6, _EYE_Y - 4, cx + 6, _EYE_Y + 3), fill=_DARK)
    if v["hat"] != "none":
        cloth = COLOURS[str(v["hat"])]
        draw.rounded_rectangle((cx - 50, 12, cx + 50, 84), 18, fill=cloth)
        draw.rounded_rectangle((cx - 82, 72, cx + 82, 92), 8, fill=_shade(cloth, 0.8))
    if fingers:
        _paint_hand(draw, fingers, skin)
