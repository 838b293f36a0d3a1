"""Picture files as arrays, read in the same way for training and for prediction."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_jax.errors import InputError

Image.init()
# The common formats, without those whose reader starts other programs.
FORMATS: list[str] = [
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM") if name in Image.OPEN
]
MAX_PIXELS = 89_478_485  # of a picture; Pillow's own limit for what may be a decompression bomb
WHITE = 65535  # the 16-bit value that becomes 255, by default
DEPTHS = (8, 10, 12, 14)  # bits that cameras and microscopes use of the 16 that they store
COLOUR_MODES = ("RGB", "RGBA", "LA", "CMYK")  # which Pillow cuts to 8 bits
SUBFILE_TYPE, REDUCED_OR_MASK = 254, 0b101  # of TIFF: they mark pages that belong to the first
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # of TIFF


class Pixels(NamedTuple):
    """An upright picture, with what decides how it is scaled.

    values is uint8 [H, W, 3], or uint16 [H, W] for 16-bit grey. cut is true for 16-bit colours: Pillow reads only the
    upper 8 bits. brightest is the largest 16-bit value where the picture is not transparent; 0 for a picture of 8 bits.
    transparent says whether parts of it were, and are laid on white.
    """

    values: np.ndarray
    cut: bool
    brightest: int
    transparent: bool


def uses_a_part(brightest: int) -> bool:
    """Whether 16-bit colours with this largest value use so few bits that the upper 8 of 16 do not hold the picture."""
    return brightest < 1 << max(DEPTHS)


def read_picture(path: Path, white: int = WHITE) -> np.ndarray:
    """The picture in a file as uint8 [H, W, 3]: upright, transparent parts on white, 16-bit grey by `scale`.

    Raises:
      InputError: as `decode_alone` does.
    """
    return scale(decode_alone(path).values, white)


def scale(values: np.ndarray, white: int) -> np.ndarray:
    """uint8 [H, W, 3] from the values of `decode`: 16-bit grey is divided so that `white` and above become 255."""
    if values.ndim == 3:
        return values
    grey = (values.clip(0, white).astype(np.uint32) * 255 // white).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def white_of(brightest: int) -> int:
    """The white of 16-bit pictures with this largest value: the largest value of the fewest usual bits that hold it.

    It depends on bits and on all pictures together: each picture's own range would make the light differ between them.
    """
    return next((2**bits - 1 for bits in DEPTHS if brightest < 2**bits), WHITE)


def decode_alone(path: Path) -> Pixels:
    """`decode` of a picture that is read alone: its own values must show that 16-bit colours are not cut to black.

    Raises:
      InputError: as `decode` does, or for 16-bit colours that use a part of the range.
    """
    pixels = decode(path)
    if pixels.cut and uses_a_part(pixels.brightest):
        raise InputError(f"{path}: has 16-bit colours that use a part of the range: save it with 8 bits")
    return pixels


def decode(path: Path) -> Pixels:
    """The picture in a file, its 16-bit grey not yet scaled.

    Raises:
      InputError: it cannot be read whole, is one of several in its file, or is larger than MAX_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"has {image.width}x{image.height} pixels, the limit is {MAX_PIXELS / 1e6:.0f} million"
                    " (--max-megapixels of predict)"
                )
            one_of_one(image)
            cut = image.format in ("PNG", "TIFF") and image.mode in COLOUR_MODES and ";16" in str(image.tile)
            image.load()
            check_sums(image, path)
            if image.mode.startswith("I"):  # Pillow inverts those of 8 bits alone
                check_black_is_zero(image)
            values = upright(image)
            brightest = _brightest(image) * 257 if cut else int(values.max()) if values.ndim == 2 else 0
            clear = image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255
            return Pixels(values, cut, brightest, bool(clear))
    except UnidentifiedImageError:
        reason = "is no picture of a known format" if path.stat().st_size else "is empty"
    except Image.DecompressionBombError:  # Pillow's own, for twice the limit
        reason = f"has over {MAX_PIXELS / 1e6:.0f} million pixels, which is the limit (--max-megapixels of predict)"
    except Exception as error:  # damaged files fail in as many ways as there are formats
        text = str(getattr(error, "strerror", None) or error)
        reason = text.split("\n")[0].replace(str(path), "it")[:150] or type(error).__name__
    raise InputError(f"{path}: {reason}")


def check_sums(image: Image.Image, path: Path) -> None:
    """Raises an exception for a PNG whose checksums show damage, which loading it does not notice."""
    if image.format == "PNG":
        with Image.open(path, formats=["PNG"]) as again:
            again.verify()


def check_black_is_zero(image: Image.Image) -> None:
    """Raises InputError for a TIFF whose values say how dark a pixel is."""
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # type: ignore[attr-defined]
        raise InputError("is a TIFF in which 0 is white: save it with black as 0")


def one_of_one(image: Image.Image) -> None:
    """Raises InputError for a file of several pictures: only the first would be read.

    A TIFF's thumbnails and transparency masks do not count as pictures, nor do the previews beside a phone's JPEG.
    """
    frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    if image.format == "TIFF":
        count = 0
        for i in range(frames):
            image.seek(i)
            count += not image.tag_v2.get(SUBFILE_TYPE, 0) & REDUCED_OR_MASK  # type: ignore[attr-defined]
        image.seek(0)
        frames = count
    if frames > 1:
        raise InputError(f"holds {frames} pictures (pages or frames): save each in a file of its own")


def kinds(paths: Sequence[Path]) -> str:
    """How many files there are of each kind: "3 .heic, 1 folder"."""
    counts = Counter("folder" if p.is_dir() else p.suffix.lower() or "without an ending" for p in paths)
    return ", ".join(f"{count} {kind}{'s' * (kind == 'folder' and count > 1)}" for kind, count in counts.most_common())


def _brightest(image: Image.Image) -> int:
    """The largest value of 8-bit colours, before transparent parts are laid on white."""
    rgba = np.asarray(image.convert("RGBA"))
    return int(rgba[..., :3].max(axis=-1, initial=0, where=rgba[..., 3:] > 0).max())


def upright(image: Image.Image) -> np.ndarray:
    """The values of a Pillow picture as in `Pixels`, turned as its EXIF orientation says.

    Raises:
      InputError: its values do not fit 16 bits, or are floating-point.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # grey of 16 bits, or of 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > WHITE:
            raise InputError(f"has values from {values.min()} to {values.max()}: save it with 8 or 16 bits")
        return values.astype(np.uint16)
    if image.mode == "F":
        raise InputError("has floating-point values: save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return np.asarray(white)
