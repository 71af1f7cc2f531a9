"""Sizes of pictures: about one area, near the shape that was asked for, sides of whole tokens."""

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from burnish import images
from burnish.buckets import MULTIPLE, Buckets, Size, aspect_ratio, size_of
from burnish.types import Prompt

ASPECTS = ("1:1", "4:3", "3:4", "16:9", "9:16", "2:1", "1:2")


def png(width: int, height: int, orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def asked(aspect: str | None = None, *sources: bytes) -> Prompt:
    task = "edit" if sources else "t2i"
    return Prompt(id="some", text="a cat", task=task, sources=sources, aspect=aspect)


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    resolution=st.sampled_from([512, 768, 1024, 1328]),
)
def test_a_size_has_about_the_area_and_the_shape(width: int, height: int, resolution: int) -> None:
    if not 0.25 <= width / height <= 4:
        with pytest.raises(ValueError, match="between 1:4 and 4:1"):
            size_of(f"{width}:{height}", resolution)
        return
    size = size_of(f"{width}:{height}", resolution)
    assert size.width % MULTIPLE == size.height % MULTIPLE == 0
    # Each side is off by half a multiple at most, of at least half the resolution.
    off = 1 + MULTIPLE / resolution
    assert 1 / off**2 <= size.area / resolution**2 <= off**2
    assert 1 / off**2 <= size.width / size.height / (width / height) <= off**2
    assert size_of(f"{height}:{width}", resolution) == Size(size.width, size.height)


def test_a_size_of_its_own_bucket_is_found_again() -> None:
    buckets = Buckets(1024, ASPECTS)
    for aspect in ASPECTS:
        assert buckets.size(asked(aspect)) == size_of(aspect, 1024)
    assert buckets.size(asked("21:10")) == size_of("2:1", 1024)
    assert buckets.size(asked("1:4")) == size_of("1:2", 1024)
    assert buckets.largest.area == max(size_of(aspect, 1024).area for aspect in ASPECTS)


def test_an_edit_has_the_shape_of_its_first_source_unless_it_says_another() -> None:
    buckets = Buckets(1024, ASPECTS)
    wide, tall = png(320, 160), png(160, 320)
    assert buckets.size(asked(None, wide, tall)) == size_of("2:1", 1024)
    assert buckets.size(asked(None, tall, wide)) == size_of("1:2", 1024)
    assert buckets.size(asked("1:1", wide)) == size_of("1:1", 1024)
    # As it is seen, not as it is stored.
    assert buckets.size(asked(None, png(320, 160, orientation=6))) == size_of("1:2", 1024)


def test_a_prompt_that_says_nothing_gets_the_first_and_one_bucket_takes_all() -> None:
    assert Buckets(1024, ("3:4", "1:1")).size(asked()) == size_of("3:4", 1024)
    assert Buckets(64).size(asked("16:9")) == Buckets(64).size(asked(None, png(320, 160)))
    assert Buckets(64).default == Size(64, 64)


@pytest.mark.parametrize(
    "text", ["16/9", "\uff11:1", "16:", ":9", "0:1", "1:0", "5:1", "1:5", "a:b", "-1:1"]
)
def test_what_is_no_aspect_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="need an aspect of width to height") as caught:
        aspect_ratio(text)
    assert repr(text) in str(caught.value)
    with pytest.raises(ValueError, match="need at least one aspect"):
        Buckets(64, ())
    with pytest.raises(ValueError, match="got 1:1 and 4:3, both 64 x 64; leave one out"):
        Buckets(64, ("1:1", "4:3"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_size_is_told_as_it_would_be_decoded(kind: str, orientation: int) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (48, 16)).save(buffer, kind, exif=exif)
    found = images.size(buffer.getvalue(), where="some")
    assert found == images.decode(buffer.getvalue(), where="some").size
    assert math.prod(found) == 48 * 16


def test_a_size_of_no_picture_is_refused() -> None:
    with pytest.raises(images.ImageError, match=r"^some: need a whole"):
        images.size(b"no picture", where="some")
