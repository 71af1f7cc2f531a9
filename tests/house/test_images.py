"""Pictures: what comes in is a whole picture or one clear error, and nothing is lost on the way."""

import base64
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from burnish.images import (
    ImageError,
    data_url,
    decode,
    encode_png,
    encode_webp,
    grid,
    media_type,
    read,
    size,
    to_pil,
    to_tensor,
)


def picture(width: int = 9, height: int = 5, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def refused(data: bytes, **caps: int) -> str:
    """The message of the error that the bytes give."""
    with pytest.raises(ImageError) as caught:
        decode(data, where="a.png", **caps)
    text = str(caught.value)
    assert text.startswith("a.png: need ")
    assert "\n" not in text and ";" in text
    return text


@pytest.mark.parametrize("encode", [encode_png, lambda image: encode_webp(image, quality=None)])
def test_lossless_formats_keep_every_pixel(encode: object) -> None:
    """PNG, and WebP without a quality."""
    image = picture()
    again = decode(encode(image), where="")  # pyright: ignore[reportCallIssue]
    assert again.tobytes() == image.tobytes()
    assert again.mode == "RGB"


def test_lossy_formats_come_close() -> None:
    """WebP with a quality, and JPEG."""
    image = Image.linear_gradient("L").convert("RGB")
    for data in (encode_webp(image), saved(image, "JPEG")):
        off = np.abs(np.asarray(decode(data, where=""), int) - np.asarray(image, int))
        assert off.mean() < 3


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
def test_tensors_round_trip_exactly(width: int, height: int, seed: int) -> None:
    """All 256 levels survive, in the right places."""
    image = picture(width, height, seed)
    tensor = to_tensor(image)
    assert tensor.shape == (3, height, width)
    assert tensor.dtype == torch.float32
    assert float(tensor.min()) >= 0 and float(tensor.max()) <= 1
    assert tensor[1, height - 1, 0] == np.asarray(image)[height - 1, 0, 1] / np.float32(255)
    assert to_pil(tensor).tobytes() == image.tobytes()


def test_tensors_are_clipped_and_must_be_finite() -> None:
    """A decoder overshoots a little; a diverged model gives NaN."""
    assert to_pil(torch.full((3, 1, 1), 1.2)).getpixel((0, 0)) == (255, 255, 255)
    assert to_pil(torch.full((3, 1, 1), -0.2)).getpixel((0, 0)) == (0, 0, 0)
    assert to_pil(torch.full((3, 1, 1), 0.999)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="got 3 that are not"):
        to_pil(torch.full((3, 1, 1), float("nan")))


def test_too_much_is_refused() -> None:
    """By bytes, and by pixels before they are decoded."""
    data = encode_png(picture(9, 5))
    assert "at most 10 bytes, got" in refused(data, max_bytes=10)
    assert "at most 44 pixels, got 9 x 5" in refused(data, max_pixels=44)
    assert decode(data, where="", max_pixels=45).size == (9, 5)


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file."""
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def test_a_bomb_is_refused_unexploded() -> None:
    """A header that promises two thousand million pixels, in a file of a few bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 40000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    refused(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))


def test_a_broken_chunk_between_the_pixels_is_refused() -> None:
    """Where Pillow raises a SyntaxError while it decodes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(64 * 193))[:20])
    refused(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"\0\0\0\0", b"x" * 9))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    """Wherever it was cut in the first two thirds."""
    data = saved(picture(40, 40), kind)
    for count in (len(data) // 3, 2 * len(data) // 3):
        assert "whole" in refused(data[:count])


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"RIFF    WEBP"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    """Text, nothing, and bare signatures."""
    refused(data)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind: str) -> None:
    """Although Pillow reads them."""
    assert "something else" in refused(saved(picture(16, 16), kind))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    """It is not one picture."""
    frames = [picture(8, 8, seed) for seed in range(3)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert "an animation of 3" in refused(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_give_a_picture_or_one_error(kind: str) -> None:
    """Never another exception, whatever the decoder stumbles on."""
    whole = saved(picture(24, 24), kind)
    dice = random.Random(0)
    outcomes = {"picture": 0, "error": 0}
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert decode(bytes(data), where="x", max_pixels=10**6).mode == "RGB"
            outcomes["picture"] += 1
        except ImageError as error:
            assert "\n" not in str(error)
            outcomes["error"] += 1
    assert outcomes["error"] > 0


def test_transparency_lies_over_white() -> None:
    """Instead of showing the colours that were hidden."""
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert decode(saved(image, "PNG"), where="").getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode(saved(half, "PNG"), where="").getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bits_are_scaled() -> None:
    """Instead of clipped to white."""
    image = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    levels = [decode(saved(image, "PNG"), where="").getpixel((x, 0)) for x in range(3)]
    assert levels == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    # The level of what is clear, which lies over white as well.
    clear = decode(saved(image, "PNG", transparency=32896), where="")
    assert [clear.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), *[(255, 255, 255)] * 2]


def test_photos_stand_upright_and_lose_their_metadata() -> None:
    """The orientation is applied, and nothing of the owner stays."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(saved(picture(9, 5), "JPEG", exif=exif), where="")
    assert image.size == (5, 9)
    assert image.info == {} and not image.getexif()
    # In a PNG this may stand behind the pixels, before the last chunk of twelve bytes.
    data = encode_png(picture(9, 5))
    turned = data[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    assert size(turned, where="") == decode(turned, where="").size == (5, 9)


def test_reading_a_file(tmp_path: Path) -> None:
    """A missing file and one that is too large are one line each."""
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(picture()))
    assert read(path).size == (9, 5)
    with pytest.raises(ImageError, match=r"a\.png: need at most 10 bytes"):
        read(path, max_bytes=10)
    with pytest.raises(ImageError, match="No such file"):
        read(tmp_path / "none.png")
    with pytest.raises(ImageError, match=r"need a readable image file.*null byte"):
        read(tmp_path / "no\0ne.png")


def test_a_grid_puts_pictures_in_reading_order() -> None:
    """Rows first; the last row may be short; cells are as large as the largest picture."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (4, 3), colour) for colour in colours]
    sheet = grid(images, 2, gap=1)
    assert sheet.size == (9, 7)
    points = [(0, 0), (5, 0), (0, 4), (5, 4)]
    assert [sheet.getpixel(point) for point in points] == [*colours, (255, 255, 255)]
    assert grid(images, 9).size == (3 * 4 + 2 * 2, 3)
    assert grid([Image.new("RGB", (2, 2)), Image.new("RGB", (5, 4))], 1, gap=0).size == (5, 8)
    with pytest.raises(ImageError):
        grid([], 2)


def test_a_data_url_carries_the_bytes() -> None:
    """With the type that the bytes have."""
    data = encode_webp(picture())
    head, _, body = data_url(data).partition(",")
    assert head == "data:image/webp;base64"
    assert base64.b64decode(body) == data
    assert media_type(encode_png(picture())) == "image/png"
    assert media_type(saved(picture(), "JPEG")) == "image/jpeg"
    with pytest.raises(ImageError):
        media_type(b"GIF89a")
