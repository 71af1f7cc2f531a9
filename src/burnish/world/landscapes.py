"""Painter of landscapes: sky, sun or moon, mountains, trees, water, season and time of day."""

from PIL import ImageDraw

from burnish.world.scenes import Scene

Colour = tuple[int, int, int]

_SKY: dict[str, tuple[Colour, Colour]] = {
    "day": ((116, 184, 246), (206, 232, 252)),
    "sunset": ((244, 112, 72), (252, 206, 130)),
    "night": ((14, 18, 54), (42, 48, 104)),
}
_LAND: dict[str, tuple[Colour, Colour]] = {
    "summer": ((92, 176, 76), (32, 116, 52)),
    "autumn": ((196, 158, 80), (216, 92, 30)),
    "winter": ((240, 246, 252), (150, 182, 206)),
}
"""Season -> (ground, crown of the trees)."""
_HORIZON = 160


def _dimmed(colour: Colour, time: str) -> Colour:
    factor = {"day": 1.0, "sunset": 0.86, "night": 0.5}[time]
    r, g, b = (int(channel * factor) for channel in colour)
    return r, g, b


def _paint_sky(draw: ImageDraw.ImageDraw, time: str) -> None:
    top, low = _SKY[time]
    for y in range(_HORIZON):
        mix = y / _HORIZON
        r, g, b = (int(a + (z - a) * mix) for a, z in zip(top, low, strict=True))
        draw.line((0, y, 256, y), fill=(r, g, b))
    if time == "night":
        draw.ellipse((180, 22, 228, 70), fill=(246, 244, 214))
        draw.ellipse((168, 16, 212, 60), fill=_SKY["night"][0])
        for x, y in ((30, 30), (80, 58), (128, 24), (52, 92), (150, 80)):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(240, 240, 250))
    elif time == "day":
        draw.ellipse((176, 20, 232, 76), fill=(255, 224, 64))
    else:
        draw.ellipse((170, 84, 230, 144), fill=(255, 236, 150))


def _paint_mountains(draw: ImageDraw.ImageDraw, kind: str, time: str) -> None:
    if kind == "none":
        return
    stone = _dimmed((124, 120, 136), time)
    for left, peak, right, height in ((-30, 60, 150, 62), (80, 170, 290, 92)):
        draw.polygon([(left, _HORIZON), (peak, height), (right, _HORIZON)], fill=stone)
        if kind == "snowy":
            cap = (_HORIZON - height) * 0.42
            slope_l = (peak - left) / (_HORIZON - height)
            slope_r = (right - peak) / (_HORIZON - height)
            corners = [
                (peak - slope_l * cap, height + cap),
                (peak, height),
                (peak + slope_r * cap, height + cap),
            ]
            draw.polygon(corners, fill=_dimmed((248, 250, 255), time))


def paint_landscape(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Fill the 256 x 256 canvas with a landscape."""
    v = scene.values
    time = str(v["time"])
    ground, crown = (_dimmed(colour, time) for colour in _LAND[str(v["season"])])
    _paint_sky(draw, time)
    _paint_mountains(draw, str(v["mountains"]), time)
    draw.rectangle((0, _HORIZON, 256, 256), fill=ground)
    if v["water"] == "lake":
        draw.ellipse((96, 186, 300, 250), fill=_dimmed((54, 122, 208), time))
    for k in range(int(v["trees"])):
        x = 30 + 54 * k
        draw.rectangle((x - 6, 172, x + 6, 214), fill=_dimmed((98, 62, 36), time))
        draw.polygon([(x - 27, 184), (x, 96), (x + 27, 184)], fill=crown)
