"""Convolutions as matrix products, the forms that are fastest on a CPU: XLA's own convolution runs there at two thirds
of what its matrix product reaches.

The 3x3 convolution of stride 1 goes by Winograd's F(2x2, 3x3), with 16 products where the direct form has 36 (Lavin and
Gray 2016, arXiv:1509.09308): overlapping 4x4 tiles of the picture and the 3x3 kernel are transformed, multiplied over
the features, and transformed back to 2x2 outputs; the kernel's gradient is the same in reverse. The transforms only add
and halve, so float32 rounds about as it does in the direct form. They are passes over memory that grow with the
features, the products grow with their square: it pays from WINOGRAD_FEATURES on.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

WINOGRAD_FEATURES = 64  # the least of a convolution's input and output
CHUNK_BYTES = 2**23  # of intermediate results at once: what a processor's cache holds

Grid = list[list[Array]]  # 4 x 4, by row and column of the tiles


def _input_transform(d: list[Array]) -> list[Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_transform(m: list[Array]) -> list[Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _output_transform_transposed(y: list[Array]) -> list[Array]:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _kernel_transform(k: list[Array]) -> list[Array]:
    ends, middle = (k[0] + k[2]) / 2, k[1] / 2
    return [k[0], ends + middle, ends - middle, k[2]]


def _kernel_transform_transposed(u: list[Array]) -> list[Array]:
    mean, difference = (u[1] + u[2]) / 2, (u[1] - u[2]) / 2
    return [u[0] + mean, difference, mean + u[3]]


def _both_axes(transform: Callable[[list[Array]], list[Array]], grid: Grid) -> Grid:
    """The transform along the rows and along the columns of a grid."""
    columns = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _taps(x: Array, low: int, count: int) -> Grid:
    """[i][j]: x [N, H, W, C], with `low` zeros before it, at rows 2t+i and columns 2s+j of all tiles, as [N*T*S, C]."""
    n, h, w, c = x.shape
    t, s, more = (h + 1) // 2, (w + 1) // 2, (count - 1) // 2
    x = jnp.pad(x, ((0, 0), (low, 2 * (t + more) - h - low), (low, 2 * (s + more) - w - low), (0, 0)))
    phases = x.reshape(n, t + more, 2, s + more, 2, c)
    return [
        [phases[:, i // 2 : i // 2 + t, i % 2, j // 2 : j // 2 + s, j % 2].reshape(-1, c) for j in range(count)]
        for i in range(count)
    ]


def _chunk(n: int, nbytes: int) -> int:
    """How many of n pictures go at once: the largest divisor of n whose intermediate results fit CHUNK_BYTES."""
    return max(size for size in range(1, n + 1) if n % size == 0 and (size == 1 or size * nbytes <= CHUNK_BYTES * n))


def tiles_fit(x: Array) -> bool:
    """Whether one picture's tiles of x [N, H, W, C] fit CHUNK_BYTES: beyond, `conv` is no faster than XLA's own."""
    return 4 * x.nbytes <= CHUNK_BYTES * len(x)


def _in_chunks(f: Callable[[Array], Array], x: Array, nbytes: int) -> Array:
    """f(x), for an f of each picture by itself, a few pictures at a time; nbytes are those of all of them."""
    size = _chunk(len(x), nbytes)
    if size == len(x):
        return f(x)
    y = lax.map(f, x.reshape(-1, size, *x.shape[1:]))
    return y.reshape(len(x), *y.shape[2:])


def _interleave(grid: list[list[Array]]) -> Array:
    """[N, 2H, 2W, C] with grid[p][q] [N, H, W, C] at rows 2i+p and columns 2j+q."""
    n, h, w, c = grid[0][0].shape
    # Two neighbours side by side in the features are two neighbours of the row: only rows have to be interleaved.
    rows = [jnp.concatenate(row, -1).reshape(n, h, 1, 2 * w, c) for row in grid]
    return jnp.concatenate(rows, 2).reshape(n, 2 * h, 2 * w, c)


def conv(x: Array, kernel: Array) -> Array:
    """`layers.conv(x, kernel, padding=1)`: x [N, H, W, I] with kernel [3, 3, I, O] to [N, H, W, O]."""
    return _products(x, _both_axes(_kernel_transform, [list(row) for row in kernel]))


def input_gradient(kernel: Array, g: Array) -> Array:
    """Of `conv` to x, for g [N, H, W, O]: the convolution of g with the kernel turned around, [N, H, W, I]."""
    grid = _both_axes(_kernel_transform, [list(row) for row in kernel])
    # Turning a kernel around swaps the outer two of its four; transposing the small side of a product costs nothing.
    order = (3, 1, 2, 0)
    return _products(g, [[grid[a][b].T for b in order] for a in order])


def _products(x: Array, transformed: Grid) -> Array:
    h, w = x.shape[1:3]

    def of(x: Array) -> Array:
        tiles = _both_axes(_input_transform, _taps(x, 1, 4))
        products = [[v @ u for v, u in zip(*rows, strict=True)] for rows in zip(tiles, transformed, strict=True)]
        shape = (len(x), (h + 1) // 2, (w + 1) // 2, -1)
        y = [[part.reshape(shape) for part in row] for row in _both_axes(_output_transform, products)]
        return _interleave(y)[:, :h, :w]

    return _in_chunks(of, x, 4 * x.nbytes)


def kernel_gradient(x: Array, g: Array) -> Array:
    """Of `conv` to its kernel, for x [N, H, W, I] and g [N, H, W, O]: [3, 3, I, O]."""

    def of(x: Array, g: Array) -> Grid:
        tiles = _both_axes(_input_transform, _taps(x, 1, 4))
        gradients = _both_axes(_output_transform_transposed, _taps(g, 0, 2))
        return [[v.T @ m for v, m in zip(*rows, strict=True)] for rows in zip(tiles, gradients, strict=True)]

    size = math.gcd(*(_chunk(len(a), 4 * a.nbytes) for a in (x, g)))
    if size == len(x):
        total = of(x, g)
    else:
        chunks = [a.reshape(-1, size, *a.shape[1:]) for a in (x, g)]
        zeros = [[jnp.zeros((x.shape[-1], g.shape[-1]), x.dtype)] * 4] * 4
        total, _ = lax.scan(lambda sums, xg: (jax.tree.map(jnp.add, sums, of(*xg)), None), zeros, chunks)
    return jnp.stack([jnp.stack(row) for row in _both_axes(_kernel_transform_transposed, total)])


def transposed_conv(x: Array, kernel: Array) -> Array:
    """`layers.transposed_conv`: x [N, H, W, I] with kernel [3, 3, O, I] to [N, 2H, 2W, O].

    One product for all nine taps, which are then added up where they belong: 9 taps where the 2x2 form has 16.
    """
    features = kernel.shape[2]

    def next_of(y: Array, axis: int) -> Array:
        pad = [(0, 1) if a == axis else (0, 0) for a in range(4)]
        return jnp.pad(lax.slice_in_dim(y, 1, y.shape[axis], axis=axis), pad)

    def of(x: Array) -> Array:
        taps = jnp.einsum("nhwi,ki->nhwk", x, kernel.reshape(-1, x.shape[-1]))
        t = [[taps[..., (3 * i + j) * features :][..., :features] for j in range(3)] for i in range(3)]
        rows = [[row[1], row[2] + next_of(row[0], 2)] for row in t]
        below = [odd + next_of(even, 1) for odd, even in zip(rows[2], rows[0], strict=True)]
        return _interleave([rows[1], below])

    return _in_chunks(of, x, 9 * features * x.nbytes // x.shape[-1])
