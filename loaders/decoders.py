"""Images: bytes to RGB pixels, by Pillow, and for training plain JPEGs by simplejpeg."""

import functools
import io
import itertools
import struct
import warnings
from collections.abc import Callable

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from loaders.crops import Picture, to_pixels

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MiB of RGB
# A progressive JPEG may repeat a scan of a few bytes a thousand times, and each takes as long as
# the whole image (0.25 s at MAX_PIXELS). Real ones have about ten, hardly any are that large.
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
# No others: Pillow would start an external program for some (EPS) that may hide behind `.jpg`.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_TILE = 2048  # pixels
_SEGMENT = struct.Struct(">HH")  # marker, length from there on
_FRAME = struct.Struct(">BHHB")  # bits, height, width, layers
_PASSED_OVER = (0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE)  # both kinds of tables, restarts, a comment

Decoder = Callable[[bytes], Picture]


class BadImage(Exception):
    """An image that cannot be used; `reason` is one short word for the counts."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}" if str(detail) else reason)
        self.reason = reason


def decode(data: bytes, upright: bool = True) -> Image.Image:
    """Decode an image to RGB, first frame, transparency composited on white.

    `upright`: turned as its EXIF data says; False for annotations of the pixels as stored.
    Raises `BadImage` with reason `zero_bytes`, `not_an_image`, `too_large` (more than
    MAX_PIXELS or MAX_SCANNED_PIXELS; found before decoding), `truncated`, `undecodable` or
    `unsupported_mode`.
    """
    if not data:
        raise BadImage("zero_bytes")
    with warnings.catch_warnings():
        # Pillow warns of large images, refused below, and of damaged meta data, of no use here.
        warnings.simplefilter("ignore")
        return _decode(data, upright)


def rgb(image: Image.Image) -> Image.Image:
    """An image that somebody has opened, as `decode` gives it; `image` itself stays as it is.

    Raises `BadImage` as `decode` does of what is open already.
    """
    _require_size(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged meta data
        return _converted(image, functools.partial(_upright, in_place=False))


@functools.cache
def decoder() -> Decoder:
    """`decode` with plain JPEGs left to simplejpeg, which is faster; the pixels are the same.

    Where the installed versions have different pixels, it is `decode`, with a warning.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8).repeat(4, 0).repeat(3, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85, subsampling="4:2:0")
    plain = decode_plain(file.getvalue())
    if plain is not None and torch.equal(plain, to_pixels(decode(file.getvalue()))):
        return _decode_quickly
    warnings.warn(
        f"simplejpeg {simplejpeg.__version__} and Pillow {PIL.__version__} decode the same JPEG to "
        "different pixels: Pillow decodes all, which is slower; install the versions of "
        "requirements.txt",
        stacklevel=2,
    )
    return decode


def decode_plain(data: bytes) -> Tensor | None:
    """Pixels uint8 (3, H, W) of a plain JPEG; None for any other file, whole or damaged.

    Plain: grey or RGB in 8 bits, not progressive, to be shown as it is stored, at most MAX_PIXELS,
    and decoded without an error. Whoever gets None decodes with Pillow, which knows all the rest.
    Same library (libjpeg-turbo) and settings, so the same pixels as Pillow's, in the layout that
    torch resizes fastest and without two copies on the way. Only whole images: entropy decoding,
    which a smaller part of an image does not save, is most of the work.
    """
    try:
        if not (_has_plain_header(data) or _is_plain(data)):
            return None
        return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except Exception:  # whatever is wrong, Pillow says it
        return None


def _has_plain_header(data: bytes) -> bool:
    """Whether a file is plain by the header that most writers give: JFIF and no other meta data.

    In about a thirtieth of Pillow's time for a header. Whatever is unusual is left to `_is_plain`,
    and what is damaged in the segments that are passed over stops simplejpeg, and so goes to
    Pillow. Raises `struct.error` if the header is cut short.
    """
    if not data.startswith(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"):
        return False
    place = 20
    while True:
        marker, length = _SEGMENT.unpack_from(data, place)
        if marker == 0xFFDA:  # the pixels begin
            return True
        if marker == 0xFFC0:  # the frame, baseline and so not progressive
            bits, height, width, layers = _FRAME.unpack_from(data, place + 4)
            if bits != 8 or layers not in (1, 3) or width * height > MAX_PIXELS:
                return False
        elif marker not in _PASSED_OVER:
            return False
        place += 2 + length


def _is_plain(data: bytes) -> bool:
    """The same for any header, as Pillow reads it, which is how `decode` understands it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged meta data
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")  # MPO is another format
        plain = plain and not image.info.get("progressive")
        plain = plain and image.width * image.height <= MAX_PIXELS
        return plain and image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _decode_quickly(data: bytes) -> Picture:
    pixels = decode_plain(data)
    return decode(data) if pixels is None else pixels


def _decode(data: bytes, upright: bool) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", error) from None
    except Exception as error:  # plug-ins raise anything on made-up headers
        raise BadImage("not_an_image", error) from None
    _require_size(image)
    # In a scan, two bytes FF DA can only begin another: data bytes FF are followed by a zero.
    scans = data.count(b"\xff\xda") if image.info.get("progressive") else 1
    if scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise BadImage("too_large", f"{scans} scans of {image.width} x {image.height} pixels")
    return _converted(image, _upright if upright else None)


def _require_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too_large", f"{image.width} x {image.height} pixels")


def _converted(image: Image.Image, turn: Callable[[Image.Image], Image.Image] | None):
    try:
        image.load()
        return _to_rgb(turn(image) if turn else image)
    except BadImage:
        raise
    except Exception as error:
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadImage(reason, error) from None


def _upright(image: Image.Image, in_place: bool = True) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image, in_place=in_place)
    except Exception:  # damaged EXIF data states no orientation; the pixels are good
        return image
    return image if in_place else turned


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("unsupported_mode", "floating-point pixels have no known range")
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 and so turns nearly all to white.
        values = np.array(image)  # in place from here: the largest images fill a gigabyte
        np.right_shift(values, 8, out=values)
        np.clip(values, 0, 255, out=values)
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB without transparency; in tiles, so that the copies on the way are small."""
    result = Image.new("RGB", image.size)
    starts = itertools.product(range(0, image.width, _TILE), range(0, image.height, _TILE))
    for left, top in starts:
        corner = min(left + _TILE, image.width), min(top + _TILE, image.height)
        tile = image.crop((left, top, *corner)).convert("RGBA")
        white = Image.new("RGBA", tile.size, "white")
        result.paste(Image.alpha_composite(white, tile).convert("RGB"), (left, top))
    return result
