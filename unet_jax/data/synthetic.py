"""Synthetic pets: drawn cats and dogs with the classes of Oxford-IIIT Pet, for tests and demos without a download.

A scene lives in the unit square and is drawn from signed distances (negative inside), so the same scene can be drawn at
any resolution, with smooth edges in the image and crisp labels. Pixels are computed only by operations that IEEE 754
rounds exactly (no sin, no exp, no matrix product), so a picture is the same on every machine.
"""

import zlib
from typing import NamedTuple

import numpy as np

from unet_jax.data.source import Example, Source
from unet_jax.errors import InputError

VERSION = 1  # raise it whenever a picture changes: prepared copies are keyed by it
CLASS_NAMES = ("pet", "background", "border")
_PET, _BACKGROUND, _BORDER = np.arange(3, dtype=np.uint8)
_BORDER_WIDTH = 0.033  # of the picture's side; the border then has about its share in the real data, 12 %

_Limb = tuple[float, float, float, float, float, float]  # x, y of both ends, then the radius at each


class _Pose(NamedTuple):
    """Where things are in a pet that fills [-1, 1]. Legs are mirrored: one stands for two."""

    neck: tuple[float, float]
    torso: _Limb
    hind_legs: _Limb
    front_legs: _Limb
    tail: tuple[_Limb, _Limb]


_SITS = _Pose(
    neck=(0, -0.5),
    torso=(0, -0.1, 0, 0.5, 0.28, 0.42),
    hind_legs=(0.36, 0.78, 0.46, 0.84, 0.16, 0.13),
    front_legs=(0.13, 0.2, 0.17, 0.85, 0.11, 0.12),
    tail=((0.3, 0.76, 0.8, 0.75, 0.1, 0.08), (0.8, 0.75, 0.95, 0.3, 0.08, 0.06)),
)
_STANDS = _Pose(
    neck=(-0.5, -0.45),
    torso=(-0.45, 0.08, 0.45, 0.08, 0.34, 0.31),
    hind_legs=(0.5, 0.2, 0.52, 0.85, 0.15, 0.11),
    front_legs=(0.26, 0.2, 0.28, 0.82, 0.12, 0.1),
    tail=((0.6, 0, 0.95, -0.2, 0.1, 0.08), (0.95, -0.2, 0.95, -0.65, 0.08, 0.06)),
)


def _palette(*colours: str) -> np.ndarray:
    """Float32 [n, 3, 1, 1] in [0, 1] from hexadecimal RGB."""
    return np.array([list(bytes.fromhex(colour)) for colour in colours], np.float32)[..., None, None] / 255


_FUR = _palette("e8954a", "f3e8d6", "45403f", "8f6544", "9a9ca3", "e0be8a", "6e4a38", "bc7a4c")
_DECOR = np.concatenate([_FUR, _palette("8db07a", "7fa9b8", "d29a94", "a596ba", "e3cf9d", "c9cfd2")])
_EYES = _palette("8cb84c", "e6ad33", "66a8cc", "8a5a34")
_INK, _LIGHT, _PINK = _palette("1c1718", "f8efe2", "e89a96")


def _disc(p: np.ndarray, x: float | np.ndarray, y: float | np.ndarray, r: float | np.ndarray) -> np.ndarray:
    """Signed distance [n, n] of points [2, n, n]."""
    dx, dy = p[0] - x, p[1] - y
    return np.sqrt(dx * dx + dy * dy) - r


def _limb(p: np.ndarray, limb: _Limb) -> np.ndarray:
    ax, ay, bx, by, ra, rb = limb
    dx, dy = bx - ax, by - ay
    along = np.clip(((p[0] - ax) * dx + (p[1] - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return _disc(p, ax + along * dx, ay + along * dy, ra + along * (rb - ra))


def _join(a: np.ndarray, b: np.ndarray, smooth: float = 0.1) -> np.ndarray:
    """Signed distance of the union, with its crease filled smoothly."""
    crease = np.maximum(smooth - np.abs(a - b), 0)
    return np.minimum(a, b) - crease * crease / (4 * smooth)


def _look_from(p: np.ndarray, x: float, y: float, tilt: float) -> np.ndarray:
    """Points [2, n, n] as seen from (x, y), turned by about `tilt` radians."""
    t = tilt / 2
    c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return np.stack([c * (p[0] - x) + s * (p[1] - y), c * (p[1] - y) - s * (p[0] - x)])


def _mirror(p: np.ndarray) -> np.ndarray:
    return np.stack([np.abs(p[0]), p[1]])


def _noise(rng: np.random.Generator, n: int, cells: int) -> np.ndarray:
    """Smooth noise in [-1, 1], float32 [n, n]; what it draws from rng does not depend on n."""
    at = np.arange(0.5, n, dtype=np.float32) * np.float32(cells / n)
    i = at.astype(int)
    f = at - np.floor(at)
    f = f * f * (3 - 2 * f)
    knots = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    columns = knots[:, i] + f * (knots[:, i + 1] - knots[:, i])
    return columns[i] + f[:, None] * (columns[i + 1] - columns[i])


def _between(rng: np.random.Generator, *ranges: tuple[float, float]) -> list[float]:
    return [rng.uniform(low, high) for low, high in ranges]


def _pick(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """Two colours, float32 [2, 3, 1, 1]."""
    return palette[rng.integers(len(palette), size=2)] * rng.uniform(0.85, 1.1, (2, 1, 1, 1)).astype(np.float32)


def _texture(rng: np.random.Generator, p: np.ndarray, colours: np.ndarray, contrast: float = 1) -> np.ndarray:
    """Float32 [3, n, n]: a gradient, stripes or patches of two colours."""
    kind, stripes, across, down = _between(rng, (0, 3), (4, 8), (-1, 1), (-1, 1))
    noise = _noise(rng, p.shape[-1], 5)
    mix = 4 * noise if kind > 2 else across * p[0] + down * p[1] + 0.3 * noise
    if kind < 1:
        mix = stripes * mix
        mix = 6 * np.abs(mix - np.floor(mix) - 0.5) - 1.5
    return colours[0] + np.clip(0.5 + 0.5 * mix, 0, 1) * (contrast * (colours[1] - colours[0]))


def _paint(image: np.ndarray, distance: np.ndarray, colour: np.ndarray, rim: float = 0) -> None:
    """Paints a shape onto image [3, n, n] in place; it is darker over its rim, which makes it look round."""
    n = image.shape[-1]
    touched = distance < 0.5 / n
    rows, columns = touched.any(1).nonzero()[0], touched.any(0).nonzero()[0]
    if not rows.size:
        return
    box = np.s_[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image, distance, colour = image[box], distance[box], colour[box] if colour.shape == image.shape else colour
    if rim:
        shade = np.clip(1 + distance / rim, 0, 1)
        colour = colour * (1.06 - 0.4 * shade * shade)
    image += np.clip(0.5 - distance * n, 0, 1) * (colour - image)


def _head(
    rng: np.random.Generator, h: np.ndarray, scale: float, image: np.ndarray, coat: np.ndarray, dark: np.ndarray
) -> np.ndarray:
    """Paints the head of a cat or a dog, in coordinates from its middle, and returns its signed distance."""

    def paint(distance: np.ndarray, colour: np.ndarray, rim: float = 0) -> None:
        _paint(image, distance * scale, colour, rim)

    m = _mirror(h)
    skull = _limb(m, (0, 0, 0.09, 0.04, 0.36, 0.34))
    eye = _disc(m, 0.18, -0.06, 0)
    out, down = _between(rng, (0, 0.14), (0, 0.14))
    if rng.random() < 0.5:  # a cat
        ears = _limb(m, (0.2, -0.2, 0.25 + out, -0.62 + down, 0.17, 0.03))
        pupil = _limb(m, (0.18, -0.09, 0.18, -0.03, 0.03, 0.03))
        paint(_join(skull, ears, 0.05), coat, rim=0.08)
        paint(np.maximum(ears + 0.07, -0.02 - skull), _PINK)
    else:
        ears = _limb(m, (0.3, -0.24, 0.42 + out, 0.14 + down, 0.09, 0.15))
        pupil = eye - 0.05
        paint(skull, coat, rim=0.08)
        paint(_limb(h, (0, 0.25, 0.01, 0.34, 0.06, 0.065)), _PINK)
        paint(ears, dark, rim=0.06)
    paint(_limb(m, (0, 0.17, 0.07, 0.19, 0.12, 0.12)), _LIGHT)
    paint(np.minimum(_limb(m, (0, 0.1, 0.04, 0.09, 0.035, 0.03)), _limb(h, (0, 0.1, 0, 0.22, 0.012, 0.012))), _INK)
    paint(eye - 0.085, _INK)
    paint(eye - 0.07, _EYES[rng.integers(len(_EYES))])
    paint(pupil, _INK)
    paint(_disc(m, 0.18, -0.1, 0.024), _LIGHT)
    return _join(skull, ears) * scale


def _pet(rng: np.random.Generator, p: np.ndarray, image: np.ndarray, fur: np.ndarray) -> np.ndarray:
    """Paints a cat or a dog in two colours of fur and returns its signed distance [n, n]."""
    scale, x, y = _between(rng, (0.37, 0.54), (0.36, 0.64), (0.48, 0.58))
    tilt, nod = _between(rng, (-0.2, 0.2), (-0.25, 0.25))
    q = _look_from(p, x, y, tilt) / scale
    if rng.random() < 0.5:
        q[0] *= -1
    m = _mirror(q)
    pose = _SITS if rng.random() < 0.5 else _STANDS
    tail = _join(_limb(q, pose.tail[0]), _limb(q, pose.tail[1]))
    body = _join(_join(_limb(q, pose.torso), _limb(m, pose.hind_legs)), tail) * scale
    legs = _limb(m, pose.front_legs) * scale
    coat = _texture(rng, p, fur)
    image *= 1 - np.clip(-3 * _limb(q, (-0.5, 0.95, 0.6, 0.95, 0.25, 0.25)), 0, 0.45)  # its shadow on the floor
    _paint(image, body, coat, rim=0.08)
    _paint(image, legs, coat, rim=0.05)
    head = _head(rng, _look_from(q, *pose.neck, nod), scale, image, coat, fur[1] * np.float32(0.75))
    return _join(_join(body, legs, 0.06), head, 0.06)  # a plain union would leave specks of border in the creases


def _draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 [n, n, 3], labels uint8 [n, n]."""
    axis = np.arange(0.5, n, dtype=np.float32) / n
    p = np.stack(np.meshgrid(axis, axis))
    image = _texture(rng, p, _pick(rng, _DECOR), contrast=0.6)
    floor = rng.uniform(0.45, 0.75) + rng.uniform(-0.1, 0.1) * p[0] - p[1]
    _paint(image, floor, _texture(rng, p, _pick(rng, _DECOR), contrast=0.6))
    fur = _pick(rng, _FUR)
    for own in (True, False, True, False):  # cushions and balls, some in the pet's fur: colour alone must not tell
        x, y, dx, dy, r = _between(rng, (0, 1), (0.1, 0.95), (0.1, 0.3), (-0.1, 0.1), (0.04, 0.12))
        thing = _disc(p, x, y, r) if rng.random() < 0.4 else _limb(p, (x, y, x + dx, y + dy, r, 0.8 * r))
        _paint(image, thing, _texture(rng, p, fur if own else _pick(rng, _FUR)), rim=0.09)
    pet = _pet(rng, p, image, fur)
    ball = _disc(p, *_between(rng, (0, 1), (0.78, 0.95), (0.04, 0.09)))
    _paint(image, ball, _texture(rng, p, _pick(rng, _FUR)), rim=0.09)
    pet = np.maximum(pet, -ball)
    image *= rng.uniform(0.9, 1.1) + rng.uniform(-0.3, 0.3) * (p[0] - 0.5)
    image += 0.05 * _noise(rng, n, 72)
    half = max(_BORDER_WIDTH, 2 / n) / 2  # never so thin that the pet would touch the background
    labels = np.where(pet < -half, _PET, np.where(pet > half, _BACKGROUND, _BORDER))
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), labels


def source(split: str, size: int, image_size: int, seed: int = 0) -> Source:
    """`size` scenes, drawn at `image_size` pixels a side. Any name is a split; no two splits share a scene."""
    if image_size < 16 or size < 1 or seed < 0:
        raise InputError(
            "synthetic pets need image_size >= 16, size >= 1 and seed >= 0, "
            f"not image_size={image_size}, size={size}, seed={seed}"
        )

    def read(i: int) -> Example:
        entropy = [VERSION, seed, zlib.crc32(split.encode()), i]
        rng = np.random.Generator(np.random.PCG64(entropy))  # not default_rng, which may become another generator
        return Example(f"synthetic_{split}_{i:05d}", *_draw(rng, image_size))

    identity = {"generator_version": VERSION, "seed": seed, "image_size": image_size, "split": split}
    return Source("synthetic", split, CLASS_NAMES, identity, size, read)
