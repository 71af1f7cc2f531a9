"""Bytes to pictures and back: the only place that decodes or encodes images.

Image bytes come from users, data sets and servers, so they are untrusted: few formats, caps on
bytes and pixels before any pixel is decoded, and one error class whatever a decoder stumbles on.
Inside Burnish a picture is 8-bit RGB, or a float32 tensor in [0, 1] with the channel first.
"""

import base64
import hashlib
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from burnish.wording import brief

MAX_BYTES = 32 << 20
"""Largest image file that is read."""

MAX_PIXELS = 50_000_000
"""Largest width times height that is decoded."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that are read; each decoder more is a door more."""

# What Pillow's decoders raise on broken bytes; OSError covers truncated and unidentified files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_LYING = (5, 6, 7, 8)
"""Orientations of a picture that is stored on its side, by EXIF."""
_ABOUT = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
"""Where Pillow finds the orientation of a PNG, before its pixels."""
_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


class ImageError(ValueError):
    """Bytes that are not an image we take, or pixels that are not one; the message is one line."""


def decode(
    data: bytes, *, where: str, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode untrusted bytes to RGB: upright, transparency over white, metadata dropped.

    Args:
        data: a PNG, JPEG or WebP file with one picture.
        where: the file or request it came from, for messages.
        max_bytes: refuse more bytes.
        max_pixels: refuse more pixels, before they are decoded.

    Raises:
        ImageError: too large, truncated, animated, or not an image.
    """
    image = _opened(data, where, max_bytes, max_pixels)
    try:
        return _as_rgb(ImageOps.exif_transpose(image))
    except _DECODER_ERRORS as error:
        raise _not_an_image(where, data, error) from None


def size(data: bytes, *, where: str) -> tuple[int, int]:
    """Width and height that `decode` would give, without decoding a pixel.

    Args:
        data: as for `decode`.
        where: likewise.

    Raises:
        ImageError: too large, animated, or not an image.
    """
    image = _opened(data, where, MAX_BYTES, MAX_PIXELS)
    # Pillow would decode a PNG to look for what stands behind its pixels, which is rare.
    if image.format == "PNG" and not _ABOUT & image.info.keys() and b"eXIf" not in data:
        return image.size
    try:
        is_lying = image.getexif().get(ExifTags.Base.Orientation, 1) in _LYING
    except _DECODER_ERRORS as error:
        raise _not_an_image(where, data, error) from None
    width, height = image.size
    return (height, width) if is_lying else (width, height)


def _opened(data: bytes, where: str, max_bytes: int, max_pixels: int) -> Image.Image:
    """One picture whose size is known and whose pixels are not decoded yet."""
    if len(data) > max_bytes:
        raise ImageError(
            f"{where}: need at most {max_bytes} bytes, got {len(data)}; shrink the image"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise ImageError(
            f"{where}: need at most {max_pixels} pixels, got many times more; shrink the image"
        ) from None
    except _DECODER_ERRORS as error:
        raise _not_an_image(where, data, error) from None
    if width * height > max_pixels:
        raise ImageError(
            f"{where}: need at most {max_pixels} pixels, got {width} x {height}; shrink the image"
        )
    # A JPEG with further frames is a photo with a preview; the first frame is the photo.
    if frames > 1 and image.format in ("PNG", "WEBP"):
        raise ImageError(f"{where}: need one picture, got an animation of {frames}; save one frame")
    return image


def read(
    path: str | Path, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image file; its size is checked before it is read."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ImageError(
            f"need a readable image file, got {path}: {problem}; check the path"
        ) from None
    return decode(data, where=str(path), max_bytes=max_bytes, max_pixels=max_pixels)


def encode_png(image: Image.Image) -> bytes:
    """The picture as PNG, without loss; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def encode_webp(image: Image.Image, *, quality: int | None = 90) -> bytes:
    """The picture as WebP; `quality` None keeps every pixel."""
    buffer = io.BytesIO()
    options = {"lossless": True} if quality is None else {"quality": quality}
    image.convert("RGB").save(buffer, "WEBP", **options)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, *, quality: int = 90) -> bytes:
    """The bytes of a JPEG file, with colours at full resolution."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def to_tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """A picture as float32 in [0, 1]."""
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def to_pil(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """A tensor in [0, 1] as a picture, undoing `to_tensor` exactly; values outside are clipped."""
    if not bool(torch.isfinite(image).all()):
        bad = int((~torch.isfinite(image)).sum())
        raise ImageError(f"need finite pixels, got {bad} that are not; look for a diverged model")
    levels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().contiguous().numpy())


def grid(
    images: Sequence[Image.Image],
    columns: int,
    *,
    gap: int = 2,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """The pictures in rows, in reading order; cells are as large as the largest picture."""
    if not images or columns < 1:
        raise ImageError(
            f"need one picture and one column at least, got {len(images)} and {columns};"
            " leave out the empty grid"
        )
    cell_width = max(image.width for image in images) + gap
    cell_height = max(image.height for image in images) + gap
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * cell_width - gap, rows * cell_height - gap)
    sheet = Image.new("RGB", size, background)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        sheet.paste(image.convert("RGB"), (column * cell_width, row * cell_height))
    return sheet


def media_type(data: bytes) -> str:
    """The media type of encoded image bytes, by their first bytes."""
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature):
            return name
    raise ImageError(f"need PNG, JPEG or WebP bytes, got {data[:8]!r}; encode the picture first")


def digest(pictures: Sequence[bytes]) -> str:
    """SHA-256 of encoded images in their order, which also tells where each ends."""
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in pictures)).hexdigest()


def data_url(data: bytes) -> str:
    """Encoded image bytes as a URL that carries them, for self-contained pages and for judges."""
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode('ascii')}"


def _not_an_image(where: str, data: bytes, error: BaseException) -> ImageError:
    reason = brief(error) or type(error).__name__
    if "cannot identify" in reason:
        # Pillow's text holds the address of the buffer, which tells nobody anything.
        reason = f"{len(data)} bytes of something else"
    return ImageError(
        f"{where}: need a whole {', '.join(FORMATS)} image, got {reason}; save or copy it again"
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    """A plain RGB copy without metadata."""
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys to 255 instead of scaling them.
        values = np.asarray(image, dtype=np.float64).clip(0, 65535)
        # One level may stand for what is clear.
        values[values == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image.alpha_composite(layer)
    plain = image.convert("RGB")
    plain.load()
    plain.info = {}
    return plain
