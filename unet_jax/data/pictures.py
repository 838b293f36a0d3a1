"""Picture files as arrays, read in one way for training and for predictions."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_jax.errors import InputError

Image.init()
# The common formats, and none whose reader starts other programs.
FORMATS: list[str] = [
    name for name in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM") if name in Image.OPEN
]
MAX_PIXELS = 89_478_485  # of a picture; Pillow's own limit for what may be a decompression bomb
WHITE = 65535  # the value of 16 bits that becomes 255, where nothing else is said
DEPTHS = (8, 10, 12, 14)  # bits of cameras and microscopes that store 16
COLOUR_MODES = ("RGB", "RGBA", "LA", "CMYK")  # that Pillow cuts to 8 bits
SUBFILE_TYPE, REDUCED_OR_MASK = 254, 0b101  # of TIFF: pages that belong to the first


class Pixels(NamedTuple):
    """A picture upright, with what tells how it is to be scaled.

    values is uint8 [H, W, 3], or of 16 bits of grey uint16 [H, W]; cut is true of 16 bits of colour, of which Pillow
    reads the upper 8 alone.
    """

    values: np.ndarray
    cut: bool

    @property
    def brightest(self) -> int:
        """The largest value in 16 bits; 0 of a picture of 8 bits."""
        return int(self.values.max()) * (257 if self.cut else 1) if self.cut or self.values.ndim == 2 else 0


def read_picture(path: Path, white: int = WHITE) -> np.ndarray:
    """The picture in a file as uint8 [H, W, 3]: upright, transparent parts on white, 16 bits of grey by `scale`.

    Raises:
      InputError: it cannot be read whole, is one of several in its file, or is larger than MAX_PIXELS.
    """
    return scale(decode(path).values, white)


def scale(values: np.ndarray, white: int) -> np.ndarray:
    """uint8 [H, W, 3] of what `decode` gives: 16 bits of grey are divided so that `white` and above become 255."""
    if values.ndim == 3:
        return values
    grey = (values.clip(0, white).astype(np.uint32) * 255 // white).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def white_of(brightest: int) -> int:
    """The white of pictures of 16 bits whose largest value this is: that of the fewest usual bits that hold it.

    A power of two, and of all pictures together: a picture's own range would change the light from one to the next.
    """
    return next((2**bits - 1 for bits in DEPTHS if brightest < 2**bits), WHITE)


def decode(path: Path) -> Pixels:
    """The picture in a file, 16 bits of grey not yet scaled; raises as `read_picture` does."""
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
            return Pixels(_array(ImageOps.exif_transpose(image)), cut)
    except UnidentifiedImageError:
        reason = "is no picture of a known format" if path.stat().st_size else "is empty"
    except Exception as error:  # damaged files fail in as many ways as there are formats
        reason = f"{error}".split("\n")[0].replace(str(path), "it")[:150] or type(error).__name__
    raise InputError(f"{path}: {reason}")


def one_of_one(image: Image.Image) -> None:
    """Raises InputError for a file of several pictures, of which the first alone would be read.

    A TIFF's thumbnails and transparency masks are no pictures, nor are the previews beside a phone's JPEG.
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


def _array(image: Image.Image) -> np.ndarray:
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
