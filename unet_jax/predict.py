"""A run's checkpoint as a function of pictures of any size: `load("runs/mp_tr_dice")(images)`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import Array
from PIL import Image

from unet_jax import device, runs
from unet_jax.checkpoint import Restored
from unet_jax.config import RunConfig, Tta, sides
from unet_jax.data.cache import resize
from unet_jax.data.pictures import WHITE, read_picture, scale, upright
from unet_jax.data.source import Example
from unet_jax.errors import InputError
from unet_jax.model import UNet
from unet_jax.train import TrainState, Views, infer, inference_state, make_model

Mode = Literal["auto", "resize", "tile", "native"]
# Most networks have never seen a picture upside down.
FLIPS: dict[str, Views] = {
    "none": ((),),
    "horizontal": ((), (2,)),
    "all": ((), (1,), (2,), (1, 2)),
}
Images = str | Path | np.ndarray | Sequence[str | Path | np.ndarray]
UNIT = 128  # tile mode pads sides to multiples of it: pictures of many sizes make few shapes to compile


def probabilities_step(state: TrainState, images: Array, views: Views = ((),), *, model: UNet) -> Array:
    """Class probabilities float32 [N, H, W, num_classes] of pictures uint8 [N, H, W, 3]."""
    return jax.nn.softmax(infer(state, images, model, views))


@dataclass(frozen=True)
class Predictor:
    """A trained network; call it with one picture uint8 [H, W, 3], or with a list of pictures of any sizes.

    A picture may be the path of its file, or Pillow's. It is read as training reads files: upright, transparent parts
    on white.

    Mode "resize" resizes pictures to the training size and probabilities back. "tile" predicts in overlapping windows
    of `tile_size` at the scale of training (config.data.scale), "native" in windows at the pictures' own resolution.
    "auto" is "tile" for a network that was trained on tiles, else "resize".
    `tta` averages the probabilities over the picture and its mirror image, or over all four flips.
    """

    config: RunConfig
    restored: Restored = field(repr=False)  # a notebook would print all weights
    placement: device.Placement
    tile_size: int
    forward: Callable[[TrainState, Any, Views], Array] = field(repr=False)

    @property
    def own_mode(self) -> Mode:
        """The mode that sees pictures as training did."""
        return "tile" if self.config.data.tiles else "resize"

    def __call__(self, images: Images, mode: Mode = "auto", tta: Tta = "none", probabilities: bool = False) -> Any:
        """Labels uint8 [H, W] of a picture, or with `probabilities` float32 [H, W, num_classes]. A list gives a list.

        Raises:
          InputError: another mode or tta, something that is no picture, or a file that cannot be read.
        """
        given: Any = images if isinstance(images, (Sequence, Path, Image.Image)) else to_numpy(images)
        if not isinstance(given, (np.ndarray, Sequence, Path, Image.Image)):
            raise InputError(f"{type(images).__name__} is no picture: pictures are uint8 arrays [H, W, 3]")
        single = isinstance(given, (str, Path, Image.Image)) or (isinstance(given, np.ndarray) and given.ndim != 4)
        several: Any = [given] if single else given
        pictures = [self.read(picture) for picture in several]
        for i, picture in enumerate(pictures):
            is_array = isinstance(picture, np.ndarray)
            if not is_array or picture.dtype != np.uint8 or picture.shape[2:] != (3,) or 0 in picture.shape:
                what = f"{picture.dtype} of shape {picture.shape}" if is_array else type(picture).__name__
                raise InputError(f"picture {i} is {what}: pictures are uint8 arrays [H, W, 3]")
        for what, value, choices in (("mode", mode, get_args(Mode)), ("tta", tta, get_args(Tta))):
            if value not in choices:
                raise InputError(f"unknown {what} {value!r}: choose from {', '.join(choices)}")
        mode, answers = self.own_mode if mode == "auto" else mode, []
        count = self.batch_size(*sides(self.config.data.image_size))
        for start in range(0, len(pictures), count):
            some = pictures[start : start + count]
            if mode != "resize":
                bands = [self.windowed(picture, mode, tta) for picture in some]
            else:
                small = self.network(np.stack([self.at_training_size(picture) for picture in some]), tta)
                bands = [grow(answer, *picture.shape[:2]) for answer, picture in zip(small, some, strict=True)]
            answers += [assemble(band, probabilities) for band in bands]
        return answers[0] if single else answers

    def read(self, picture: Any) -> Any:
        """uint8 [H, W, 3] of a file or of Pillow's picture, by the run's white; an array of another kind as NumPy's."""
        white = self.config.data.white or WHITE
        if isinstance(picture, (str, Path)):
            return read_picture(Path(picture), white)
        if isinstance(picture, Image.Image):
            return scale(upright(picture), white)
        return to_numpy(picture)

    def batch_size(self, height: int, width: int) -> int:
        """How many pictures of this size go through the network at once: what a full-width network has memory for."""
        pixels = 2**20 if jax.default_backend() == "cpu" else 2**22
        return min(max(1, pixels // (height * width)), 16) * self.placement.devices

    def at_training_size(self, image: np.ndarray) -> np.ndarray:
        """The picture uint8 [H, W, 3], of any size, resized to the training size as training pictures are."""
        return resize(Example("", image, image[:, :, 0]), self.config.data.image_size).image

    def windowed(self, image: np.ndarray, mode: Mode, tta: Tta = "none") -> Iterator[np.ndarray]:
        """Probabilities at the picture's own size, computed in tiles and given in bands: mode "tile" or "native".

        If the scale is not 1, memory grows with the scaled picture. A run of an older version has no scale: 1 is used.
        """
        height, width = image.shape[:2]
        down, across = (mode == "tile" and self.config.data.scale) or (1, 1)
        size = max(1, round(width * across)), max(1, round(height * down))
        if size == (width, height):
            return self.tiled(image, tta)
        scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        return grow(np.concatenate(list(self.tiled(scaled, tta))), height, width)

    def network(self, images: np.ndarray, tta: Tta = "none") -> np.ndarray:
        """Class probabilities float32 [N, H, W, num_classes] of uint8 [N, H, W, 3], of a size that fits the levels."""
        filled = self.placement.devices
        while filled < len(images):  # to a power of two for each device: few shapes to compile
            filled *= 2
        count, images = len(images), np.pad(images, ((0, filled - len(images)), (0, 0), (0, 0), (0, 0)))
        return np.asarray(self.forward(self.restored.state, images, FLIPS[tta]))[:count]

    def tiled(self, image: np.ndarray, tta: Tta = "none") -> Iterator[np.ndarray]:
        """Probabilities at the picture's own resolution, in bands [h, W, num_classes] from the top.

        They equal those of one pass over the whole picture (padded to multiples of UNIT by reflection), where that is
        exact (see `windows`). Memory grows with a tile and a band, not with the picture.
        """
        height, width = image.shape[:2]
        levels = len(self.config.model.widths)
        unit = max(UNIT, 2 ** (levels - 1))
        padded = np.pad(image, ((0, -height % unit), (0, -width % unit), (0, 0)), mode="symmetric")
        rows, columns = (windows(side, self.tile_size, margin_of(levels)) for side in padded.shape[:2])
        h, w = len(rows[0][1]), len(columns[0][1])
        count = self.batch_size(h, w)
        band = np.zeros((h, padded.shape[1], len(self.config.data.class_names)), np.float32)
        ends = [y for y, _ in rows[1:]] + [len(padded)]
        for (y, row_weights), end in zip(rows, ends, strict=True):
            for start in range(0, len(columns), count):
                some = columns[start : start + count]
                answers = self.network(np.stack([padded[y : y + h, x : x + w] for x, _ in some]), tta)
                for (x, column_weights), answer in zip(some, answers, strict=True):
                    band[:, x : x + w] += answer * (row_weights[:, None] * column_weights)[:, :, None]
            done = end - y  # rows that no later tile reaches
            yield band[: min(end, height) - y, :width]
            band = np.concatenate([band[done:], np.zeros_like(band[:done])])


def load(run: str | Path = "pets", tile_size: int | None = None) -> Predictor:
    """A run's checkpoint (the newest, or the best where validation chose one) as a Predictor.

    Without a run: the network for photographs of cats and dogs that comes with unet_jax.

    Raises:
      InputError: there is no run or no checkpoint that can be read, or the tile size does not suit the network.
    """
    placement = device.placement()
    return predictor(*runs.load(Path(run), placement), placement, tile_size)


def predictor(
    config: RunConfig, restored: Restored, placement: device.Placement, tile_size: int | None = None
) -> Predictor:
    """What `load` gives, for a checkpoint that has been read."""
    margin = margin_of(len(config.model.widths))
    if tile_size is None:
        tile_size = max(512, 8 * margin)
    if not isinstance(tile_size, int | np.integer) or tile_size % UNIT or tile_size < 3 * margin:
        least = -(-3 * margin // UNIT) * UNIT
        raise InputError(f"tiles of {tile_size}: this network needs a multiple of {UNIT} that is {least} or more")
    step = partial(probabilities_step, model=make_model(config.model, len(config.data.class_names), placement))
    forward = jax.jit(
        step,
        static_argnums=2,
        in_shardings=(placement.replicated, placement.batch),
        out_shardings=placement.batch,
        compiler_options=device.compiler_options(placement.platform),
    )
    return Predictor(config, restored._replace(state=inference_state(restored.state)), placement, tile_size, forward)


def to_numpy(picture: Any) -> Any:
    """NumPy's array of a picture of JAX or PyTorch; anything else as it is."""
    is_array = hasattr(picture, "__array__") or hasattr(picture, "__array_interface__")
    return np.asarray(picture) if is_array else picture


def assemble(bands: Iterator[np.ndarray], probabilities: bool = False) -> np.ndarray:
    """Labels uint8 [H, W], or the probabilities [H, W, C] themselves, from their bands [h, W, C] one after another."""
    return np.concatenate([band if probabilities else band.argmax(-1).astype(np.uint8) for band in bands])


def grow(probabilities: np.ndarray, height: int, width: int) -> Iterator[np.ndarray]:
    """Probabilities [H, W, C] resized bilinearly to height x width, in bands [h, width, C] from the top."""
    (h, w), rows = probabilities.shape[:2], max(1, 2**21 // width)
    channels = [Image.fromarray(np.ascontiguousarray(p)) for p in np.moveaxis(probabilities, -1, 0)]
    for y in range(0, height, rows):
        end = min(y + rows, height)
        box = (0, y * h / height, w, end * h / height)
        bands = [c.resize((width, end - y), Image.Resampling.BILINEAR, box) for c in channels]
        yield np.stack([np.asarray(band) for band in bands], axis=-1)


def margin_of(levels: int) -> int:
    """More than the receptive field's radius, which is 2^(levels+2) - 5 at most, and a multiple of the coarsest pixel.

    The radius adds up two 3x3 convs at each stride 1, 2, .. 2^(levels-1) of the encoder and all but the last of these
    in the decoder, one pixel of the finer grid for each step down and each step up, and the head's conv.
    """
    return 2 ** (levels + 2)


def windows(size: int, tile: int, margin: int) -> list[tuple[int, np.ndarray]]:
    """The origin and weights [tile] of each tile that covers a side of `size` pixels. Weights sum to 1 at each pixel.

    A tile's weight is 0 within `margin` of its borders, except at the picture's own. Elsewhere the whole receptive
    field is inside the tile. Origins are multiples of the coarsest pixel, so that tiles share the picture's grid. So
    the blend is exact with transposed convolutions. The aligned-corner resize depends on the size as a whole.
    """
    tile, ramp = min(tile, size), margin // 2
    step = max(1, tile - 2 * margin - ramp)  # it may be 0 where one tile covers the side, and no step is taken
    origins = [*range(0, size - tile, step), size - tile]
    weights, centres = np.zeros((len(origins), size), np.float32), np.arange(tile) + 0.5
    for row, origin in zip(weights, origins, strict=True):
        left = centres - margin if origin > 0 else ramp
        right = tile - margin - centres if origin < size - tile else ramp
        t = np.clip(np.minimum(left, right) / ramp, 0, 1)
        row[origin : origin + tile] = t * t * (3 - 2 * t)
    weights /= weights.sum(0)
    return [(origin, row[origin : origin + tile]) for row, origin in zip(weights, origins, strict=True)]
