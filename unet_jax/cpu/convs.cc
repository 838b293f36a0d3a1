// The network's 3x3 convolutions and their gradients in float32 on a CPU, as custom calls of XLA (see convs.py).
//
// Those of stride 1 use Winograd's F(m x m, 3x3) (Lavin and Gray 2016, arXiv:1509.09308): overlapping tiles of
// (m+2) x (m+2) pixels and the kernel are transformed, multiplied and summed over the input features, and transformed
// back to m x m outputs. That is 36/16 = 2.25 products an output for m = 4 and 16/4 = 4 for m = 2, instead of 9. Those
// of stride 2 gather the pixels that each output needs, and multiply.
//
// Pictures are [N, H, W, C], kernels [3, 3, in, out], every number of features a multiple of 16.

#include "shared.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

struct Place {
  int64_t picture, i, j;
  Place(int64_t index, int64_t h, int64_t w) : picture(index / (h * w)), i(index / w % h), j(index % w) {}
};

// Of the registers, kSums hold sums and kStrip a row of the right matrix. One more is for the left one's element.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 24, kStrip = 4;  // of 32
#elif defined(__AVX__)
constexpr int kLanes = 8, kSums = 12, kStrip = 2;  // of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kSums = 24, kStrip = 4;
#else
constexpr int kLanes = 4, kSums = 12, kStrip = 2;
#endif
using Vector = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

Vector& at(float* p) { return *reinterpret_cast<Vector*>(p); }
const Vector& at(const float* p) { return *reinterpret_cast<const Vector*>(p); }

// Numbers that XLA has or gets: float32, or bfloat16 if `half`, which only processors with AVX512-BF16 are asked for.
// What is computed is float32.
struct Numbers {
  void* p;
  bool half;

  std::uint16_t* halves(int64_t i) const { return static_cast<std::uint16_t*>(p) + i; }
  float* floats(int64_t i) const { return static_cast<float*>(p) + i; }
  Vector load(int64_t i) const {
#if defined(__AVX512BF16__)  // intrinsics, since GCC 12 makes five instructions of its own conversion of vectors
    if (half) {
      __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves(i)));
      return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
#endif
    return at(floats(i));
  }
  void store(int64_t i, Vector v) const {
#if defined(__AVX512BF16__)
    if (half) {
      __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves(i)), reinterpret_cast<__m256i>(rounded));
      return;
    }
#endif
    at(floats(i)) = v;
  }
};

// a b + c, fused where the processor can. Fusing is explicit, and the compiler's own is off (-ffp-contract=off): it may
// fuse differently in each copy of a loop that it makes, and results would depend on the copy that a thread runs. It is
// assembly because GCC 12 copies registers around its own intrinsics: products then take 1.5 times as long.
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__FMA__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
#elif defined(__aarch64__)
  asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(c) : "w"(a), "w"(b));
  return c;
#else
  return a * b + c;
#endif
}
inline Vector fma(float a, Vector b, Vector c) { return fma(a - Vector{}, b, c); }

// ---- Products ----

struct Left {  // element [r, k] of a product's left matrix is at p[r * row + k * column]
  const float* p;
  int64_t row, column;
};
struct Matrix {  // row r begins at p + r * row
  float* p;
  int64_t row;
};

// C (+)= A B for R rows and V Vectors a row, whose sums stay in registers.
template <int R, int V>
void tile_product(Left a, Matrix b, Matrix c, int64_t count, bool add) {
  Vector sums[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sums[r][v] = Vector{};
  for (int64_t k = 0; k < count; k++, a.p += a.column, b.p += b.row) {
    Vector right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) right[v] = at(b.p + v * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[r][v] = fma(a.p[r * a.row], right[v], sums[r][v]);
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      Vector& to = at(c.p + r * c.row + v * kLanes);
      to = add ? to + sums[r][v] : sums[r][v];
    }
}

template <int R, int V>
void tiles_of(int64_t& r, int64_t rows, Left a, Matrix b, Matrix c, int64_t count, bool add) {
  for (; r + R <= rows; r += R)
    tile_product<R, V>({a.p + r * a.row, a.row, a.column}, b, {c.p + r * c.row, c.row}, count, add);
}

// The same for any number of rows.
template <int V>
void strip_product(int64_t rows, Left a, Matrix b, Matrix c, int64_t count, bool add) {
  int64_t r = 0;
  tiles_of<kSums / V, V>(r, rows, a, b, c, count, add);
  tiles_of<4, V>(r, rows, a, b, c, count, add);
  tiles_of<2, V>(r, rows, a, b, c, count, add);
  tiles_of<1, V>(r, rows, a, b, c, count, add);
}

// Products to sum before C adds the sum. Few of them round less, which Winograd needs in float32; many take less time.
constexpr int64_t kSummed = 32;
int64_t summed_for(Numbers x) { return x.half ? 4 * kSummed : kSummed; }

// C [rows, columns] (+)= A [rows, count] B [count, columns], for columns a multiple of kLanes.
void product(int64_t rows, int64_t columns, Left a, Matrix b, Matrix c, int64_t count, bool add,
             int64_t summed = kSummed) {
  for (int64_t k = 0; k < count; k += summed, a.p += summed * a.column, b.p += summed * b.row, add = true) {
    int64_t o = 0;
    auto strips = [&](auto strip, int64_t width) {
      for (; o + width <= columns; o += width)
        strip(rows, a, Matrix{b.p + o, b.row}, Matrix{c.p + o, c.row}, std::min(summed, count - k), add);
    };
    strips(strip_product<kStrip>, kStrip * kLanes);
    if (kStrip > 2) strips(strip_product<2>, 2 * kLanes);
    strips(strip_product<1>, kLanes);
  }
}

// ---- Pictures ----

// Pictures that are read as r = max(x, 0) if relu, else x; then as gain * r + shift if there is a gain (batch norm).
// Outside the picture they are 0.
struct Pictures {
  Numbers x;
  const float *gain, *shift;
  bool relu;
  int64_t n, h, w, c;

  // Where a pixel's features begin in x, or -1 outside the picture.
  int64_t pixel(int64_t picture, int64_t i, int64_t j) const {
    return i < 0 || i >= h || j < 0 || j >= w ? -1 : ((picture * h + i) * w + j) * c;
  }
  Vector value(int64_t pixel, int64_t feature) const { return pixel < 0 ? Vector{} : inner_value(pixel, feature); }
  Vector inner_value(int64_t pixel, int64_t feature) const {
    Vector v = x.load(pixel + feature);
    if (relu) v = v < 0 ? Vector{} : v;  // NaN stays
    return gain ? fma(v, at(gain + feature), at(shift + feature)) : v;
  }
  void copy(int64_t pixel, float* to) const {
    for (int64_t feature = 0; feature < c; feature += kLanes) at(to + feature) = value(pixel, feature);
  }
};
using Parts = std::vector<Pictures>;  // side by side in the features

int64_t features(const Parts& parts) {
  int64_t sum = 0;
  for (auto& part : parts) sum += part.c;
  return sum;
}

// ---- Winograd ----

// The transforms of F(m, 3) along an axis: from[0], from[s], ... to to[0], to[t], ... Polynomials are evaluated at 0,
// +-1 and infinity for m = 2. For m = 4 at 0, +-2/3, +-3/2 and infinity: at the usual +-1, +-2 it rounds three times as
// much (LOG.md). For the kernel's gradient, `output` and `kernel` have transposes too. Form<4> leaves out the
// factors a2 b2, which are 1.
template <int M>
struct Form;

template <>
struct Form<2> {
  static void input(const Vector* from, int s, Vector* to, int t) {
    to[0] = from[2 * s] - from[0];
    to[t] = from[s] + from[2 * s];
    to[2 * t] = from[2 * s] - from[s];
    to[3 * t] = from[3 * s] - from[s];
  }
  static void output(const Vector* from, int s, Vector* to, int t) {
    to[0] = from[0] + from[s] + from[2 * s];
    to[t] = from[s] - from[2 * s] + from[3 * s];
  }
  static void output_transposed(const Vector* from, int s, Vector* to, int t) {
    to[0] = from[0];
    to[t] = from[0] + from[s];
    to[2 * t] = from[0] - from[s];
    to[3 * t] = from[s];
  }
  static void kernel(const Vector* from, int s, Vector* to, int t) {
    to[0] = -from[0];
    to[t] = .5f * (from[0] + from[s] + from[2 * s]);
    to[2 * t] = .5f * (from[0] - from[s] + from[2 * s]);
    to[3 * t] = from[2 * s];
  }
  static void kernel_transposed(const Vector* from, int s, Vector* to, int t) {
    Vector even = .5f * (from[s] + from[2 * s]);
    to[0] = even - from[0];
    to[t] = .5f * (from[s] - from[2 * s]);
    to[2 * t] = even + from[3 * s];
  }
};

template <>
struct Form<4> {
  static constexpr float a = 2.f / 3, b = 3.f / 2, a2 = a * a, b2 = b * b, a3 = a * a2, b3 = b * b2;
  // Factors of the kernel's values at +-a and +-b: 1 over the product of the distances to the other finite points.
  static constexpr float at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

  static void input(const Vector* from, int s, Vector* to, int t) {
    Vector even_a = fma(-b2, from[2 * s], from[4 * s]), odd_a = a * fma(-b2, from[s], from[3 * s]);
    Vector even_b = fma(-a2, from[2 * s], from[4 * s]), odd_b = b * fma(-a2, from[s], from[3 * s]);
    to[0] = fma(-(a2 + b2), from[2 * s], from[0] + from[4 * s]);
    plus_minus(even_a, odd_a, even_b, odd_b, to, t);
    to[5 * t] = fma(-(a2 + b2), from[3 * s], from[s] + from[5 * s]);
  }
  static void output(const Vector* from, int s, Vector* to, int t) {
    Vector even_a = from[s] + from[2 * s], odd_a = from[s] - from[2 * s];
    Vector even_b = from[3 * s] + from[4 * s], odd_b = from[3 * s] - from[4 * s];
    to[0] = from[0] + even_a + even_b;
    to[t] = fma(a, odd_a, b * odd_b);
    to[2 * t] = fma(a2, even_a, b2 * even_b);
    to[3 * t] = fma(a3, odd_a, fma(b3, odd_b, from[5 * s]));
  }
  static void output_transposed(const Vector* from, int s, Vector* to, int t) {
    Vector even_a = fma(a2, from[2 * s], from[0]), odd_a = a * fma(a2, from[3 * s], from[s]);
    Vector even_b = fma(b2, from[2 * s], from[0]), odd_b = b * fma(b2, from[3 * s], from[s]);
    to[0] = from[0];
    plus_minus(even_a, odd_a, even_b, odd_b, to, t);
    to[5 * t] = from[3 * s];
  }
  static void kernel(const Vector* from, int s, Vector* to, int t) {
    Vector even_a = at_a * fma(a2, from[2 * s], from[0]), odd_a = (at_a * a) * from[s];
    Vector even_b = at_b * fma(b2, from[2 * s], from[0]), odd_b = (at_b * b) * from[s];
    to[0] = from[0];
    plus_minus(even_a, odd_a, even_b, odd_b, to, t);
    to[5 * t] = from[2 * s];
  }
  static void kernel_transposed(const Vector* from, int s, Vector* to, int t) {
    Vector even_a = at_a * (from[s] + from[2 * s]), odd_a = at_a * (from[s] - from[2 * s]);
    Vector even_b = at_b * (from[3 * s] + from[4 * s]), odd_b = at_b * (from[3 * s] - from[4 * s]);
    to[0] = from[0] + even_a + even_b;
    to[t] = fma(a, odd_a, b * odd_b);
    to[2 * t] = fma(a2, even_a, fma(b2, even_b, from[5 * s]));
  }

 private:
  static void plus_minus(Vector even_a, Vector odd_a, Vector even_b, Vector odd_b, Vector* to, int t) {
    to[t] = even_a + odd_a;
    to[2 * t] = even_a - odd_a;
    to[3 * t] = even_b + odd_b;
    to[4 * t] = even_b - odd_b;
  }
};

using Transform = void(const Vector*, int, Vector*, int);

// put(i, j, v) for each v of the transform, on both axes, of the S x S Vectors that value(i, j) gives, to T x T.
template <Transform* transform, int S, int T, typename Value, typename Put>
inline __attribute__((always_inline)) void both_axes(const Value& value, const Put& put) {
  Vector half[T * S];
#pragma GCC unroll 6
  for (int j = 0; j < S; j++) {
    Vector column[S];
#pragma GCC unroll 6
    for (int i = 0; i < S; i++) column[i] = value(i, j);
    transform(column, 1, half + j, S);
  }
#pragma GCC unroll 6
  for (int i = 0; i < T; i++) {
    Vector row[T];
    transform(half + i * S, 1, row, 1);
#pragma GCC unroll 6
    for (int j = 0; j < T; j++) put(i, j, row[j]);
  }
}

// Floats of a plane of rows * columns. The 16 more keep planes from falling into the same sets of a cache.
int64_t plane_of(int64_t rows, int64_t columns) { return rows * columns + 16; }

// Tiles of m x m outputs, numbered; a tile's transform is P numbers a feature, each in a plane of its own.
template <int M>
struct Tiles {
  static constexpr int N = M + 2, P = N * N;
  int64_t n, h, w, rows = ceil_div(h, M), columns = ceil_div(w, M), count = n * rows * columns;

  // Tile t of x to to[p * plane + feature]: S x S pixels from `before` pixels before its first output on.
  template <Transform* transform, int S, int before>
  void gather(const Pictures& x, int64_t t, float* to, int64_t plane) const {
    Place place(t, rows, columns);
    int64_t top = M * place.i - before, left = M * place.j - before;
    auto each_feature = [&](auto value) {
      for (int64_t feature = 0; feature < x.c; feature += kLanes)
        both_axes<transform, S, N>([&](int i, int j) { return value(i, j, feature); },
                                   [&](int i, int j, Vector v) { at(to + (i * N + j) * plane + feature) = v; });
    };
    if (top >= 0 && left >= 0 && top + S <= x.h && left + S <= x.w) {  // as most tiles, then read without checks
      int64_t first = x.pixel(place.picture, top, left);
      each_feature([&](int i, int j, int64_t feature) { return x.inner_value(first + (i * x.w + j) * x.c, feature); });
    } else {
      int64_t pixels[S * S];
      for (int i = 0; i < S; i++)
        for (int j = 0; j < S; j++) pixels[i * S + j] = x.pixel(place.picture, top + i, left + j);
      each_feature([&](int i, int j, int64_t feature) { return x.value(pixels[i * S + j], feature); });
    }
  }

  void gather_inputs(const Parts& parts, int64_t t, float* to, int64_t plane) const {
    for (auto& part : parts) {
      gather<Form<M>::input, N, 1>(part, t, to, plane);
      to += part.c;
    }
  }

  // Tile t's outputs from from[p * plane + feature], for the y of so many features.
  void scatter(const float* from, int64_t plane, int64_t t, const float* bias, Numbers y, int64_t features) const {
    Place place(t, rows, columns);
    int64_t top = M * place.i, left = M * place.j, first = ((place.picture * h + top) * w + left) * features;
    auto each_feature = [&](auto is_there) {
      for (int64_t feature = 0; feature < features; feature += kLanes) {
        Vector add = bias ? at(bias + feature) : Vector{};
        both_axes<Form<M>::output, N, M>([&](int i, int j) { return at(from + (i * N + j) * plane + feature); },
                                         [&](int i, int j, Vector v) {
                                           if (is_there(i, j))
                                             y.store(first + (i * w + j) * features + feature, v + add);
                                         });
      }
    };
    if (top + M <= h && left + M <= w)
      each_feature([](int, int) { return true; });
    else
      each_feature([&](int i, int j) { return top + i < h && left + j < w; });
  }
};

// Transforms the kernel [3, 3, in, out] to P planes [in, out]. If `turned`, the kernel is rotated by 180 degrees, its
// features change places, and the planes are [out, in]: the convolution is then the gradient with respect to the input.
template <int M>
void transform_kernel(ffi::ThreadPool& pool, const float* kernel, int64_t in, int64_t out, bool turned, float* to) {
  constexpr int N = Tiles<M>::N;
  int64_t rows = turned ? out : in, columns = turned ? in : out;
  parallel_blocks(pool, rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t c = 0; c < columns; c += kLanes)
      for (int64_t r = first; r < last; r++) {
        Vector taps[9];
        for (int tap = 0; tap < 9; tap++)
          if (turned)
            for (int lane = 0; lane < kLanes; lane++) taps[8 - tap][lane] = kernel[(tap * in + c + lane) * out + r];
          else
            taps[tap] = at(kernel + (tap * in + r) * out + c);
        both_axes<Form<M>::kernel, 3, N>(
            [&](int i, int j) { return taps[3 * i + j]; },
            [&](int i, int j, Vector v) { at(to + (i * N + j) * plane_of(rows, columns) + r * columns + c) = v; });
      }
  });
}

struct Output {
  Numbers y;
  int64_t features;
};

// The convolution of parts with the kernel [3, 3, in, out], plus bias if any. If turned: [3, 3, out, in], rotated.
template <int M>
void convolve(ffi::ThreadPool& pool, const Parts& parts, const float* kernel, bool turned, const float* bias,
              const std::vector<Output>& outputs) {
  constexpr int P = Tiles<M>::P;
  int64_t in = features(parts), out = 0;
  for (auto& output : outputs) out += output.features;
  Buffer memory;
  int64_t kernel_plane = plane_of(in, out);
  float* kernels = memory.of(P * kernel_plane);
  transform_kernel<M>(pool, kernel, turned ? out : in, turned ? in : out, turned, kernels);
  Tiles<M> tiles{parts[0].n, parts[0].h, parts[0].w};
  parallel_blocks(pool, tiles.count, 48, [&](int64_t first, int64_t last) {
    int64_t own = last - first, in_plane = plane_of(own, in), out_plane = plane_of(own, out);
    float* inputs = scratch.of(P * (in_plane + out_plane));
    float* sums = inputs + P * in_plane;
    for (int64_t t = 0; t < own; t++) tiles.gather_inputs(parts, first + t, inputs + t * in, in_plane);
    for (int p = 0; p < P; p++)
      product(own, out, {inputs + p * in_plane, in, 1}, {kernels + p * kernel_plane, out}, {sums + p * out_plane, out},
              in, false, summed_for(parts[0].x));
    for (int64_t t = 0; t < own; t++) {
      int64_t offset = 0;
      for (auto& output : outputs) {
        tiles.scatter(sums + t * out + offset, out_plane, first + t, bias ? bias + offset : nullptr, output.y,
                      output.features);
        offset += output.features;
      }
    }
  });
}

constexpr int64_t kCached = 160000;  // floats that a core's cache holds beside what else is in use
constexpr int64_t kChunk = 3 << 19;  // floats of gathered inputs that all threads work on at once: 6 MB

template <int M>
void kernel_gradient(ffi::ThreadPool& pool, const Parts& parts, const Pictures& g, float* kernel) {
  constexpr int N = Tiles<M>::N, P = N * N;
  int64_t in = features(parts), out = g.c, sum_plane = plane_of(in, out), size = P * sum_plane;
  Tiles<M> tiles{g.n, g.h, g.w};
  // If a thread's cache holds all sums, each thread sums over a group of tiles by itself, and the groups are added.
  // Else there is one set of sums: all threads work on the same tiles, and each computes a part of the sums.
  bool own_tiles = size <= kCached;
  int64_t groups = own_tiles ? std::min(kGroups, ceil_div(tiles.count, 128)) : 1, share = ceil_div(tiles.count, groups);
  int64_t most = std::min(share, std::max<int64_t>(24, (own_tiles ? kCached : kChunk) / (P * (in + out))));
  int64_t in_plane = plane_of(most, in), out_plane = plane_of(most, out), workspace = P * (in_plane + out_plane);
  Buffer memory;
  float* all_sums = memory.of(groups * size + (own_tiles ? 0 : workspace));
  auto sum = [&](int64_t group, auto run) {
    float *sums = all_sums + group * size, *inputs = own_tiles ? scratch.of(workspace) : sums + size;
    float* outputs = inputs + P * in_plane;
    int64_t begin = group * share, end = std::min(tiles.count, begin + share);
    if (begin >= end) std::fill(sums, sums + size, 0.f);
    for (int64_t first = begin; first < end; first += most) {
      int64_t some = std::min(most, end - first);
      run(ceil_div(some, 8), [&](int64_t block) {
        for (int64_t t = 8 * block; t < std::min(some, 8 * block + 8); t++) {
          tiles.gather_inputs(parts, first + t, inputs + t * in, in_plane);
          tiles.template gather<Form<M>::output_transposed, M, 0>(g, first + t, outputs + t * out, out_plane);
        }
      });
      run(P, [&](int64_t p) {
        product(in, out, {inputs + p * in_plane, 1, in}, {outputs + p * out_plane, out}, {sums + p * sum_plane, out},
                some, first > begin, summed_for(g.x));
      });
    }
  };
  auto alone = [](int64_t count, const auto& item) {
    for (int64_t i = 0; i < count; i++) item(i);
  };
  auto together = [&](int64_t count, const auto& item) { parallel(pool, count, item); };
  if (own_tiles)
    parallel(pool, groups, [&](int64_t group) { sum(group, alone); });
  else
    sum(0, together);
  parallel_blocks(pool, in, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t o = 0; o < out; o += kLanes) {
        both_axes<Form<M>::kernel_transposed, N, 3>(
            [&](int row, int column) {
              const float* sums = all_sums + (row * N + column) * sum_plane + i * out + o;
              Vector total = at(sums);
              for (int64_t group = 1; group < groups; group++) total += at(sums + group * size);
              return total;
            },
            [&](int row, int column, Vector v) { at(kernel + ((row * 3 + column) * in + i) * out + o) = v; });
      }
  });
}

// ---- Stride 2 ----

// y [N, 2H, 2W, out] of x [N, H, W, in] and kernel [3, 3, out, in]: output 2i sees tap 1 of x[i], output 2i + 1 sees
// tap 2 of x[i] and tap 0 of x[i + 1].
void doubling(ffi::ThreadPool& pool, const Pictures& x, const float* kernel, const float* bias, float* y, int64_t out) {
  int64_t in = x.c;
  Buffer memory;
  float* kernels = memory.of(9 * in * out);  // [3, 3, in, out]
  parallel(pool, 9, [&](int64_t tap) {
    for (int64_t i = 0; i < in; i++)
      for (int64_t o = 0; o < out; o++) kernels[(tap * in + i) * out + o] = kernel[(tap * out + o) * in + i];
  });
  parallel_blocks(pool, x.n * x.h * x.w, 48, [&](int64_t first, int64_t last) {
    int64_t own = last - first;
    float* inputs = scratch.of(own * (4 * in + out));  // [x[i, j], x[i, j + 1], x[i + 1, j], x[i + 1, j + 1]]
    float* outputs = inputs + own * 4 * in;
    for (int64_t r = 0; r < own; r++) {
      Place place(first + r, x.h, x.w);
      for (int next = 0; next < 4; next++)
        x.copy(x.pixel(place.picture, place.i + next / 2, place.j + next % 2), inputs + (4 * r + next) * in);
    }
    for (int phase = 0; phase < 4; phase++) {
      bool odd_row = phase / 2, odd_column = phase % 2, add = false;
      for (int down = 0; down <= odd_row; down++)
        for (int right = 0; right <= odd_column; right++, add = true) {
          int tap = 3 * (odd_row ? 2 - 2 * down : 1) + (odd_column ? 2 - 2 * right : 1);
          product(own, out, {inputs + (2 * down + right) * in, 4 * in, 1}, {kernels + tap * in * out, out},
                  {outputs, out}, in, add);
        }
      for (int64_t r = 0; r < own; r++) {
        Place place(first + r, x.h, x.w);
        float* to = y + ((place.picture * 2 * x.h + 2 * place.i + odd_row) * 2 * x.w + 2 * place.j + odd_column) * out;
        for (int64_t o = 0; o < out; o += kLanes)
          at(to + o) = bias ? at(outputs + r * out + o) + at(bias + o) : at(outputs + r * out + o);
      }
    }
  });
}

// The 3x3 pixels of x [N, 2H, 2W, C] that output `index` of [N, H, W] sees, [9, C].
void gather_halving(const Pictures& x, int64_t index, float* to) {
  Place place(index, x.h / 2, x.w / 2);
  for (int tap = 0; tap < 9; tap++)
    x.copy(x.pixel(place.picture, 2 * place.i + tap / 3 - 1, 2 * place.j + tap % 3 - 1), to + tap * x.c);
}

// The kernel gradient of the convolution of stride 2, for its input x [N, 2H, 2W, in] and its output's gradient g
// [N, H, W, out].
void gradient_of_halving(ffi::ThreadPool& pool, const Pictures& x, const Pictures& g, float* kernel) {
  int64_t seen = 9 * x.c, count = g.n * g.h * g.w;
  int64_t most = std::min(count, std::max<int64_t>(48, kChunk / (seen + g.c)));
  Buffer memory;
  float* inputs = memory.of(most * (seen + g.c));
  float* outputs = inputs + most * seen;
  for (int64_t first = 0; first < count; first += most) {
    int64_t own = std::min(most, count - first);
    parallel_blocks(pool, own, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        gather_halving(x, first + r, inputs + r * seen);
        g.copy((first + r) * g.c, outputs + r * g.c);
      }
    });
    parallel_blocks(pool, seen, 48, [&](int64_t begin, int64_t end) {
      product(end - begin, g.c, {inputs + begin, 1, seen}, {outputs, g.c}, {kernel + begin * g.c, g.c}, own, first > 0);
    });
  }
}

// ---- What XLA calls ----

// No other types come here: see `handles` in convs.py and bfloat16.py.
Numbers numbers(ffi::AnyBuffer x) { return {x.untyped_data(), x.element_type() == ffi::BF16}; }

Pictures pictures(ffi::AnyBuffer x) {
  auto shape = x.dimensions();
  return {numbers(x), nullptr, nullptr, false, shape[0], shape[1], shape[2], shape[3]};
}

Parts all_parts(ffi::RemainingArgs& args, Flags relu) {
  Parts parts;
  for (size_t i = 0; i < relu.size(); i++) {
    Pictures x = pictures(*args.get<ffi::AnyBuffer>(3 * i));
    x.gain = optional(*args.get<Array>(3 * i + 1));
    x.shift = optional(*args.get<Array>(3 * i + 2));
    x.relu = relu[i];
    parts.push_back(x);
  }
  return parts;
}

template <typename T = Array>
T after_parts(ffi::RemainingArgs& args, Flags relu, size_t i) {
  return *args.get<T>(3 * relu.size() + i);
}

std::vector<Output> all_outputs(ffi::RemainingRets& rets) {
  std::vector<Output> outputs;
  for (size_t i = 0; i < rets.size(); i++) {
    ffi::AnyBuffer y = **rets.get<ffi::AnyBuffer>(i);
    outputs.push_back({numbers(y), y.dimensions()[3]});
  }
  return outputs;
}

ffi::Error same_conv(ffi::ThreadPool pool, Flags relu, int64_t m, bool turned, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  auto run = m == 4 ? convolve<4> : convolve<2>;
  Array kernel = after_parts(args, relu, 0), bias = after_parts(args, relu, 1);
  return checked(
      [&] { run(pool, all_parts(args, relu), kernel.typed_data(), turned, optional(bias), all_outputs(rets)); });
}

ffi::Error same_kernel_gradient(ffi::ThreadPool pool, Flags relu, int64_t m, ffi::RemainingArgs args,
                                ffi::RemainingRets rets) {
  auto run = m == 4 ? kernel_gradient<4> : kernel_gradient<2>;
  return checked([&] {
    run(pool, all_parts(args, relu), pictures(after_parts<ffi::AnyBuffer>(args, relu, 0)),
        (**rets.get<Array>(0)).typed_data());
  });
}

ffi::Error transposed_conv(ffi::ThreadPool pool, Flags relu, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Array kernel = after_parts(args, relu, 0), bias = after_parts(args, relu, 1), y = **rets.get<Array>(0);
  return checked([&] {
    doubling(pool, all_parts(args, relu)[0], kernel.typed_data(), optional(bias), y.typed_data(), y.dimensions()[3]);
  });
}

ffi::Error halving_kernel_gradient(ffi::ThreadPool pool, Flags relu, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Parts parts = all_parts(args, relu);
  return checked([&] { gradient_of_halving(pool, parts[0], parts[1], (**rets.get<Array>(0)).typed_data()); });
}

}  // namespace

HANDLER(same_conv, binding().Attr<int64_t>("m").Attr<bool>("turned"));
HANDLER(same_kernel_gradient, binding().Attr<int64_t>("m"));
HANDLER(transposed_conv, binding());
HANDLER(halving_kernel_gradient, binding());
