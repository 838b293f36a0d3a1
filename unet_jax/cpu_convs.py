"""Convolutions as matrix products, the forms that are fastest on a CPU: XLA's own convolution runs there at two thirds
of what its matrix product reaches, and its kernel gradient at a third.

The 3x3 convolution of stride 1 goes by Winograd's F(m x m, 3x3) (Lavin and Gray 2016, arXiv:1509.09308): overlapping
tiles of m+2 squared of the picture and the 3x3 kernel are transformed, multiplied over the features, and transformed
back to m x m outputs; the kernel's gradient is the same in reverse. Of 9 products an output, F(4x4) leaves 36/16 and
F(2x2) 4. Their rounding depends on the points at which the transforms evaluate polynomials: at the usual 0, +-1, +-2
F(4x4) errs ten times as much as the direct form, at 0, +-2/3, +-3/2 two to three times (up to F4_FEATURES).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

WINOGRAD_FEATURES = 32  # the least of a convolution's input and output: the transforms grow with them, products faster
CHUNK_BYTES = 2**23  # of transformed tiles at once: what a processor's cache holds
PICTURE_BYTES = 20 * 2**20  # of one picture's tiles: beyond, `conv` is no faster than XLA's own
F4_FEATURES = 128  # that `conv` sums over by F(4x4): with more, its errors reach 1e-5 of outputs of size 1
TURNED_KERNEL = 2**13  # input times output features: beyond, `kernel_gradient` does not compute it turned around
F4_KERNEL = 2**16  # input times output features: beyond, a cache does not hold the 36 sums of the kernel gradient

Grid = Sequence[Sequence[Array]]  # by row and column of the tiles
Join = Callable[..., Array]  # makes one array of several, picture by picture, their features side by side


class Winograd(NamedTuple):
    """Matrices of F(m, 3): outputs = output @ ((kernel @ weights) * (input @ inputs)), of m, 3 and m+2 numbers."""

    output: np.ndarray
    kernel: np.ndarray
    input: np.ndarray


def _winograd(*points: float) -> Winograd:
    """Toom and Cook's interpolation at the points and infinity; Lavin and Gray's section 5.1 has the derivation."""
    a, n = np.array(points), len(points) + 1
    scale = [math.prod(p - q for q in points if q != p) for p in points]
    at_infinity = np.eye(n)[-1:]
    output = np.vstack([np.vander(a, n - 2, increasing=True), at_infinity[:, 2:]]).T
    kernel = np.vstack([np.vander(a, 3, increasing=True) / np.array(scale)[:, None], np.eye(3)[-1:]])
    others = [np.append(np.poly(a[a != p])[::-1], 0) for p in points]
    tiles = np.vstack([*others, np.poly(a)[::-1]])
    return Winograd(output, kernel, np.where(abs(tiles) < 1e-12, 0, tiles))  # what should cancel, and nearly does


F2, F4 = _winograd(0, 1, -1), _winograd(0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)


def _turned_around(form: Winograd) -> tuple[Winograd, np.ndarray]:
    """The form for kernels turned around, and the order in which it wants the kernels that `form` has transformed.

    At p a kernel turned around has p^2 times the kernel's value at 1/p, and the points come in such pairs.
    """
    lengths = np.linalg.norm(form.kernel, axis=1)
    directions = form.kernel / lengths[:, None]
    cosines = directions[:, ::-1] @ directions.T
    order = abs(cosines).argmax(1)
    scale = lengths / lengths[order] * cosines[np.arange(len(order)), order]
    return form._replace(input=scale[:, None] * form.input), order


def _form(x: Array, suits: bool) -> Winograd:
    """F(4x4) if it `suits` and x [N, H, W, C] has many tiles: with few, the work on the kernels is the larger part."""
    n, h, w, _ = x.shape
    return F4 if suits and n * -(-h // 4) * -(-w // 4) >= 64 else F2


def _combine(matrix: np.ndarray, arrays: Sequence[Array] | Array) -> list[Array]:
    """matrix @ arrays, one operation an element: what XLA fuses."""
    return [sum(float(weight) * a for weight, a in zip(row, arrays, strict=True) if weight) for row in matrix]


def _multiply(matrix: np.ndarray, rows: Array) -> Array:
    """matrix @ rows as a product, which XLA computes once; `_combine` it would compute again for each column."""
    return jnp.tensordot(jnp.asarray(matrix, rows.dtype), rows, 1)


def _both_axes(matrix: np.ndarray, grid: Grid | Array) -> Grid:
    """matrix @ grid @ matrix.T, of a grid of arrays."""
    columns = [_combine(matrix, row) for row in grid]
    return list(zip(*(_combine(matrix, column) for column in zip(*columns, strict=True)), strict=True))


def _transform_tiles(matrix: np.ndarray, x: Array, low: int, m: int) -> Grid:
    """[i][j]: the m x m tiles of x [N, H, W, C], `low` zeros before it, under the matrix on both axes, [N*T*S, C]."""
    n, h, w, c = x.shape
    count = matrix.shape[1]  # rows and columns of a tile, which may overlap the next
    t, s, more = -(-h // m), -(-w // m), (count - 1) // m
    x = jnp.pad(x, ((0, 0), (low, m * (t + more) - h - low), (low, m * (s + more) - w - low), (0, 0)))
    x = x.reshape(n, t + more, m, -1)
    rows = _multiply(matrix, jnp.stack([x[:, i // m : i // m + t, i % m] for i in range(count)]))
    rows = rows.reshape(-1, n, t, s + more, m, c)
    columns = [rows[:, :, :, j // m : j // m + s, j % m].reshape(len(matrix), -1, c) for j in range(count)]
    return [_combine(matrix, [column[i] for column in columns]) for i in range(len(matrix))]


def _chunk(n: int, nbytes: float) -> int:
    """How many of n pictures go at once: the largest divisor of n whose intermediate results fit CHUNK_BYTES."""
    return max(size for size in range(1, n + 1) if n % size == 0 and (size == 1 or size * nbytes <= CHUNK_BYTES * n))


def _growth(form: Winograd) -> float:
    """How much larger a picture's tiles are than the picture."""
    return form.input.size / len(form.output) ** 2


def tiles_fit(xs: Sequence[Array], features: int) -> bool:
    """Whether `conv` is faster than XLA's own for xs and a kernel of so many other features."""
    own = sum(x.shape[-1] for x in xs)
    nbytes = sum(x.nbytes for x in xs) / len(xs[0])
    return _growth(F4) * nbytes * max(1, features / own) <= PICTURE_BYTES


def in_chunks(f: Callable[..., Any], xs: Sequence[Array], nbytes: float, after: Array | None = None) -> Any:
    """f(*xs), for an f of each picture by itself, a few at a time so that the cache holds what it makes of them.

    nbytes are those of what it makes of all. The memory of the result is not taken before `after` is known.
    """
    size = _chunk(len(xs[0]), nbytes)
    if size == len(xs[0]):
        return f(*xs)
    chunks = [x.reshape(-1, size, *x.shape[1:]) for x in xs]
    # Any value will do, if it is computed: the zeros that lax.map starts with, XLA makes at once for all loops of a
    # program, and keeps.
    after = xs[0] if after is None else after
    value = after[(0,) * after.ndim]
    ys = jax.eval_shape(f, *(x[0] for x in chunks))
    start = jax.tree.map(lambda y: jnp.full((len(chunks[0]), *y.shape), value, y.dtype), ys)

    def body(i: Array, ys: Any) -> Any:
        return jax.tree.map(
            lambda all_, y: lax.dynamic_update_index_in_dim(all_, y, i, 0), ys, f(*(x[i] for x in chunks))
        )

    ys = lax.fori_loop(0, len(chunks[0]), body, start)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def _sum_over_chunks(f: Callable[..., Any], xs: Sequence[Array], size: int) -> Any:
    """f(*xs), for an f that sums over pictures, as the sum over chunks of `size` pictures."""
    if size == len(xs[0]):
        return f(*xs)
    chunks = [x.reshape(-1, size, *x.shape[1:]) for x in xs]
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(f, *(x[0] for x in chunks)))
    return lax.scan(lambda sums, xs: (jax.tree.map(jnp.add, sums, f(*xs)), None), zeros, chunks)[0]


def shift(x: Array, axis: int, step: int) -> Array:
    """x[i + step] at i along the axis for step +-1, zeros beyond the end."""
    n = x.shape[axis]
    inner = lax.slice_in_dim(x, max(step, 0), n + min(step, 0), axis=axis)
    return jnp.pad(inner, [(max(-step, 0), max(step, 0)) if a == axis else (0, 0) for a in range(x.ndim)])


def _interleave(grid: list[list[Array]]) -> Array:
    """[N, 2H, 2W, C] with grid[p][q] [N, H, W, C] at rows 2i+p and columns 2j+q."""
    n, h, w, c = grid[0][0].shape
    # Two neighbours side by side in the features are two neighbours of the row: only rows have to be interleaved.
    rows = [jnp.concatenate(row, -1).reshape(n, h, 1, 2 * w, c) for row in grid]
    return jnp.concatenate(rows, 2).reshape(n, 2 * h, 2 * w, c)


def conv(xs: Sequence[Array], join: Join, kernel: Array, bias: Array) -> Array:
    """`layers.same_conv` of join(*xs) [N, H, W, I] with kernel [3, 3, I, O] and bias [O]: [N, H, W, O]."""
    form = _form(xs[0], kernel.shape[2] <= F4_FEATURES)
    kernels = _both_axes(form.kernel, kernel)
    nbytes = _growth(form) * sum(x.nbytes for x in xs)
    return in_chunks(lambda *xs: _convolve(join(*xs), kernels, form) + bias[None, None, None], xs, nbytes)


def input_gradient(features: Sequence[int], kernel: Array, g: Array, after: Array) -> list[Array]:
    """Of `conv` to what is joined, for g [N, H, W, O]: [N, H, W, I] in pieces of so many features.

    It is the convolution of g with the kernel turned around.
    """
    form = _form(g, kernel.shape[3] <= F4_FEATURES)
    grid = _both_axes(form.kernel, kernel)  # as in the forward pass, so that XLA computes it once
    form, order = _turned_around(form)
    kernels = [[grid[a][b].T for b in order] for a in order]
    ends = np.cumsum(features)[:-1]
    return in_chunks(lambda g: jnp.split(_convolve(g, kernels, form), ends, -1), [g], _growth(form) * g.nbytes, after)


def _convolve(x: Array, kernels: Grid, form: Winograd) -> Array:
    """The convolution of x with the transformed kernels."""
    h, w = x.shape[1:3]
    m = len(form.output)
    tiles = _transform_tiles(form.input, x, 1, m)
    products = [[v @ u for v, u in zip(*rows, strict=True)] for rows in zip(tiles, kernels, strict=True)]
    # Outputs side by side in the features are side by side in the row too.
    rows = jnp.stack([jnp.concatenate(_combine(form.output, row), -1) for row in products])
    y = _multiply(form.output, rows).reshape(m, len(x), -(-h // m), m * -(-w // m), -1)
    return y.transpose(1, 2, 0, 3, 4).reshape(len(x), -1, *y.shape[3:])[:, :h, :w]


def kernel_gradient(xs: Sequence[Array], join: Join, g: Array) -> Array:
    """Of `conv` to its kernel, for join(*xs) [N, H, W, I] and g [N, H, W, O]: [3, 3, I, O]."""
    features = sum(x.shape[-1] for x in xs)
    form = _form(g, features * g.shape[-1] <= F4_KERNEL)
    m = len(form.output)
    # The more features go to the right, since XLA's product is slower at packing the left tiles; turning the kernel
    # back costs more than that where it is large.
    turned = features > g.shape[-1] and features * g.shape[-1] <= TURNED_KERNEL

    def of(g: Array, *xs: Array) -> Grid:
        grids = [_transform_tiles(form.input, join(*xs), 1, m), _transform_tiles(form.output.T, g, 0, m)]
        left, right = reversed(grids) if turned else grids
        return [[v.T @ u for v, u in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]

    size = math.gcd(*(_chunk(len(g), _growth(form) * nbytes) for nbytes in (sum(x.nbytes for x in xs), g.nbytes)))
    total = _sum_over_chunks(of, [g, *xs], size)
    kernel = jnp.stack([jnp.stack(row) for row in _both_axes(form.kernel.T, total)])
    return kernel.swapaxes(2, 3) if turned else kernel


def halving_kernel_gradient(x: Array, g: Array) -> Array:
    """Of `layers.halving_conv` to its kernel, for x [N, 2H, 2W, I] and g [N, H, W, O]: [3, 3, I, O].

    A product for each tap, where XLA would hold x and g transposed, from the forward pass on.
    """

    def of(x: Array, g: Array) -> Array:
        n, h, w, _ = g.shape
        phases = x.reshape(n, h, 2, w, 2, -1)
        rows = [[shift(phases[:, :, p, :, 1], 2, -1), phases[:, :, p, :, 0], phases[:, :, p, :, 1]] for p in (0, 1)]
        taps = [*(shift(odd, 1, -1) for odd in rows[1]), *rows[0], *rows[1]]
        return jnp.stack([jnp.einsum("nhwi,nhwo->io", tap, g) for tap in taps])

    total = _sum_over_chunks(of, [x, g], _chunk(len(x), 9 / 4 * x.nbytes))
    return total.reshape(3, 3, *total.shape[1:])


def transposed_conv(x: Array, kernel: Array) -> Array:
    """`layers.transposed_conv`: x [N, H, W, I] with kernel [3, 3, O, I] to [N, 2H, 2W, O].

    One product for all nine taps, which are then added up where they belong: 9 taps where the 2x2 form has 16.
    """
    features = kernel.shape[2]

    def of(x: Array) -> Array:
        taps = jnp.einsum("nhwi,ki->nhwk", x, kernel.reshape(-1, x.shape[-1]))
        t = [[taps[..., (3 * i + j) * features :][..., :features] for j in range(3)] for i in range(3)]
        rows = [[row[1], row[2] + shift(row[0], 2, 1)] for row in t]
        below = [odd + shift(even, 1, 1) for odd, even in zip(rows[2], rows[0], strict=True)]
        return _interleave([rows[1], below])

    return in_chunks(of, [x], 9 * features * x.nbytes // x.shape[-1])
