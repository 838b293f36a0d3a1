// The network's convolutions and their gradients in bfloat16 on x86 processors, as custom calls of XLA (see
// bfloat16.py). Products are summed in float32, by matrix units (AMX) if there are, else in vectors (AVX512-BF16).
//
// Pictures [N, H, W, C] are gathered in blocks of rows, in which each row is followed by a pixel of zeros and each
// picture by a row of zeros. All taps of a kernel then lie at fixed distances from a position, also where it is at a
// border, and a product of matrices reads its left one right from the block, once for each tap. Any number of features
// does: the missing ones of the last 32 are zeros.

#include "shared.h"

#if defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace {

using Half = std::uint16_t;  // the bits of a bfloat16
using HalfArray = ffi::Buffer<ffi::BF16>;

constexpr int64_t kPair = 32;           // a product of tiles is of 32 x 32: two tiles of 16 each way
constexpr int64_t kTiles = 1024;        // Halfs of two tiles
constexpr int64_t kCached = 400 << 10;  // Halfs of a block, for it and the kernels to stay in a core's cache
constexpr int64_t kSummed = 2048;       // positions that a kernel's gradient sums over before it stores its sums

int64_t padded(int64_t features) { return ceil_div(features, kPair) * kPair; }

// The first `count` of 32 or of 16 lanes.
__mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
__mmask16 first_of_16(int64_t count) { return count >= 16 ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1; }

// Pictures that are read as x if there is no gain, else as gain * r + shift (batch norm) with r = max(x, 0) if relu,
// else x.
struct Pictures {
  const Half* x;
  const float *gain, *shift;
  bool relu;
  int64_t n, h, w, c;

  void copy(int64_t picture, int64_t i, int64_t j, Half* to) const {
    const Half* pixel = x + ((picture * h + i) * w + j) * c;
    for (int64_t feature = 0; feature < c; feature += 16) {
      __mmask16 some = first_of_16(c - feature);
      __m256i value = _mm256_maskz_loadu_epi16(some, pixel + feature);
      if (gain) {
        __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
        if (relu) v = _mm512_max_ps(_mm512_setzero_ps(), v);  // NaN stays: it is the second
        v = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(some, gain + feature),
                            _mm512_maskz_loadu_ps(some, shift + feature));
        value = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
      }
      _mm256_mask_storeu_epi16(to + feature, some, value);
    }
  }
};
using Parts = std::vector<Pictures>;  // concatenated along the features

int64_t features(const Parts& parts) {
  int64_t sum = 0;
  for (auto& part : parts) sum += part.c;
  return sum;
}

// ---- Blocks ----

// A tap of a kernel: its index, and the offset from a position to the input that the tap reads there, in positions.
struct Tap {
  int64_t index, from;
};

// Rows [first, last) of n pictures of h x w positions, each picture with its row of zeros, and the rows beside them.
// With a step of 2 there are four phases: of pixels 2i, 2j; 2i, 2j + 1; 2i + 1, 2j; 2i + 1, 2j + 1.
struct Block {
  int64_t n, h, w, step, first, last, in;

  int64_t width() const { return w + 1; }
  int64_t positions() const { return (last - first) * width(); }
  // Halfs of a position: an odd number of cache lines, so that the rows of a tile spread over all sets of the cache.
  int64_t pixel() const { return padded(in) + (padded(in) / kPair % 2 ? 0 : kPair); }
  int64_t origin() const { return 1 + width(); }  // the position before all, and the row before
  int64_t phase() const { return origin() + positions() + width() + 2 * kPair; }  // whole tiles at the end, of zeros
  int64_t size() const { return step * step * phase() * pixel(); }
  Block of(int64_t first, int64_t last) const { return {n, h, w, step, first, last, in}; }

  // Row `row` of parts, from first - 1 to last, to its place in the block at x.
  void gather(const Parts& parts, int64_t row, Half* x) const {
    int64_t picture = row / (h + 1), i = row % (h + 1);
    bool zeros = row < 0 || picture >= n || i == h;
    for (int64_t p = 0; p < step * step; p++) {
      Half* to = x + (p * phase() + 1 + (row - first + 1) * width()) * pixel();
      if (row == first - 1) std::memset(to - pixel(), 0, 2 * pixel());
      if (row == last) std::memset(to + width() * pixel(), 0, 4 * kPair * pixel());
      for (int64_t j = 0; j <= w; j++, to += pixel()) {
        int64_t from_i = step * i + p / step, from_j = step * j + p % step;
        if (zeros || j == w || from_i >= parts[0].h || from_j >= parts[0].w) {
          std::memset(to, 0, 2 * pixel());
          continue;
        }
        if (in % kPair) std::memset(to + in / kPair * kPair, 0, 2 * kPair);
        int64_t feature = 0;
        for (auto& part : parts) {
          part.copy(picture, from_i, from_j, to + feature);
          feature += part.c;
        }
      }
    }
  }

  // For each position (i, j): the index in [n, out_h, out_w] of output pixel scale * (i, j) + (odd_row, odd_column), or
  // -1 if there is none.
  std::vector<int64_t> outputs(int64_t scale, int64_t odd_row, int64_t odd_column, int64_t out_h, int64_t out_w) const {
    std::vector<int64_t> all(positions(), -1);
    for (int64_t row = first; row < last; row++) {
      int64_t i = row % (h + 1), to_i = scale * i + odd_row,
              start = (row / (h + 1) * out_h + to_i) * out_w + odd_column;
      if (i == h || to_i >= out_h) continue;
      for (int64_t j = 0; j < w && scale * j + odd_column < out_w; j++)
        all[(row - first) * width() + j] = start + scale * j;
    }
    return all;
  }

  // The taps of a kernel of side 1 or 3 in a convolution of stride `step`.
  std::vector<Tap> taps(int64_t side) const {
    if (side == 1) return {{0, 0}};
    std::vector<Tap> all;
    for (int64_t tap = 0; tap < 9; tap++) {
      int64_t i = tap / 3 - 1, j = tap % 3 - 1;
      if (step == 1)
        all.push_back({tap, i * width() + j});
      else  // a tap at -1 or 1 reads an odd phase; one at -1 reads it a row (or a column) earlier
        all.push_back({tap, (2 * (i != 0) + (j != 0)) * phase() - (i < 0) * width() - (j < 0)});
    }
    return all;
  }

  // The taps of the transposed convolution of stride 2 for its outputs (2i + odd_row, 2j + odd_column).
  std::vector<Tap> transposed_taps(bool odd_row, bool odd_column) const {
    std::vector<Tap> all;
    for (int64_t down = 0; down <= odd_row; down++)
      for (int64_t right = 0; right <= odd_column; right++)
        all.push_back({3 * (odd_row ? 2 - 2 * down : 1) + (odd_column ? 2 - 2 * right : 1), down * width() + right});
    return all;
  }
};

// Rows of a block that a cache holds.
int64_t rows_at_once(const Block& block) {
  return std::max<int64_t>(1, kCached / (block.step * block.step * block.width() * block.pixel()) - 2);
}

// ---- Convolutions ----

// 16 rows of 16 numbers of 32 bits to 16 columns, `stride` of them from one to the next.
void transpose(__m512i* r, void* to, int64_t stride) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {  // column 4 lane + k, of which r[k], r[4 + k], ... have four each
    __m512i a = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x88), b = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x88);
    __m512i c = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xdd), d = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xdd);
    __m512i columns[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(c, d, 0x88),
                          _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0xdd)};
    for (int lane = 0; lane < 4; lane++)
      _mm512_storeu_si512(static_cast<std::uint32_t*>(to) + (4 * lane + k) * stride, columns[lane]);
  }
}

// Up to 32 features of an output from `from` on; with all outputs' side by side they are those from `column` on.
struct Strip {
  Half* y;
  int64_t features, from, column;
  int64_t count() const { return std::min(kPair, features - from); }
};

// The first `count` of 32 numbers in bfloat16, zeros behind them.
__m512i load(const float* p, int64_t count) {
  __m512 low = _mm512_maskz_loadu_ps(first_of_16(count), p),
         high = _mm512_maskz_loadu_ps(first_of_16(count - 16), p + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Packs the two right tiles of a tap: 32 input features from i on, and the strip's output features. The kernel is
// [in, out], or [out, in] if turned.
void pack(const float* kernel, int64_t in, int64_t out, bool turned, int64_t i, const Strip& strip, Half* to) {
  if (turned) {
    for (int half = 0; half < 2; half++) {
      __m512i rows[16];
      for (int o = 0; o < 16; o++)
        rows[o] = 16 * half + o < strip.count() ? load(kernel + (strip.column + 16 * half + o) * in + i, in - i)
                                                : _mm512_setzero_si512();
      transpose(rows, to + half * kTiles / 2, 16);
    }
    return;
  }
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t pair = 0; pair < 16; pair++) {
    auto row = [&](int64_t r) {
      return r < in ? load(kernel + r * out + strip.column, strip.count()) : _mm512_setzero_si512();
    };
    __m512i even = row(i + 2 * pair), odd = row(i + 2 * pair + 1);
    _mm512_storeu_si512(to + 32 * pair, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_storeu_si512(to + kTiles / 2 + 32 * pair, _mm512_permutex2var_epi16(even, high, odd));
  }
}

// A pair of matrices to multiply: where they are, in Halfs from the first ones, and how many columns of the left one
// and rows of the right one there are before only zeros follow.
struct Operands {
  int64_t left, right, count = kPair;
};

// sums [32, 32] (+)= the sum of the operands' products. Rows of sums are `row` floats apart, rows of left matrices
// `left_row` Halfs. A right matrix is two tiles; the second begins `right_next` Halfs after the first.
#ifdef __AMX_BF16__

void multiply(float* sums, int64_t row, bool add, const Half* left, int64_t left_row, const Half* right,
              int64_t right_next, const std::vector<Operands>& operands) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, sums, 4 * row);
    _tile_loadd(1, sums + 16, 4 * row);
    _tile_loadd(2, sums + 16 * row, 4 * row);
    _tile_loadd(3, sums + 16 * row + 16, 4 * row);
  }
  for (const Operands& pair : operands) {
    _tile_loadd(4, left + pair.left, 2 * left_row);
    _tile_loadd(6, right + pair.right, 64);
    _tile_loadd(7, right + pair.right + right_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + pair.left + 16 * left_row, 2 * left_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 4 * row);
  _tile_stored(1, sums + 16, 4 * row);
  _tile_stored(2, sums + 16 * row, 4 * row);
  _tile_stored(3, sums + 16 * row + 16, 4 * row);
}

// Sets this thread's matrix units up for tiles of 16 rows of 64 bytes.
class Units {
 public:
  Units() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Units() { _tile_release(); }
};

#else

void multiply(float* sums, int64_t row, bool add, const Half* left, int64_t left_row, const Half* right,
              int64_t right_next, const std::vector<Operands>& operands) {
  constexpr int kRows = 8;  // the sums of which are in 16 registers
  for (int64_t first = 0; first < kPair; first += kRows, sums += kRows * row, left += kRows * left_row) {
    __m512 total[kRows][2];
    for (int r = 0; r < kRows; r++)
      for (int half = 0; half < 2; half++)
        total[r][half] = add ? _mm512_loadu_ps(sums + r * row + 16 * half) : _mm512_setzero_ps();
    for (const Operands& pair : operands)
      for (int64_t i = 0; i < pair.count; i += 2) {
        const Half *columns = right + pair.right + 16 * i, *rows = left + pair.left + i;
        auto low = reinterpret_cast<__m512bh>(_mm512_loadu_si512(columns));
        auto high = reinterpret_cast<__m512bh>(_mm512_loadu_si512(columns + right_next));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
          std::int32_t two;
          std::memcpy(&two, rows + r * left_row, sizeof two);
          auto value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
          total[r][0] = _mm512_dpbf16_ps(total[r][0], value, low);
          total[r][1] = _mm512_dpbf16_ps(total[r][1], value, high);
        }
      }
    for (int r = 0; r < kRows; r++)
      for (int half = 0; half < 2; half++) _mm512_storeu_ps(sums + r * row + 16 * half, total[r][half]);
  }
}

struct Units {};  // nothing to set up

#endif

// sums [count, 32] plus bias to those pixels of a strip's y that there are.
void write(const float* sums, const int64_t* pixels, int64_t count, const Strip& strip, const float* bias) {
  __m512 add[2] = {};
  for (int half = 0; bias && half < 2; half++)
    add[half] = _mm512_maskz_loadu_ps(first_of_16(strip.count() - 16 * half), bias + strip.column + 16 * half);
  for (int64_t r = 0; r < count; r++, sums += kPair) {
    if (pixels[r] < 0) continue;
    __m512 low = _mm512_add_ps(_mm512_load_ps(sums), add[0]), high = _mm512_add_ps(_mm512_load_ps(sums + 16), add[1]);
    _mm512_mask_storeu_epi16(strip.y + pixels[r] * strip.features + strip.from, first_of_32(strip.count()),
                             reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

// The convolution of parts with the kernel [side, side, in, out], plus bias if there is one. If turned, the kernel is
// [side, side, out, in]: for a step of 1 it is rotated by 180 degrees (the gradient with respect to the input), for a
// step of -2 it is not (the transposed convolution of stride 2).
void convolve(ffi::ThreadPool& pool, const Parts& parts, Array kernel, bool turned, int64_t step, const float* bias,
              std::vector<HalfArray> outputs) {
  bool transposed = step < 0;
  auto shape = outputs[0].dimensions();
  int64_t out_h = shape[1], out_w = shape[2], side = kernel.dimensions()[0], taps = side * side, in = features(parts);
  int64_t scale = transposed ? 2 : 1;
  Block all{parts[0].n, ceil_div(out_h, scale), ceil_div(out_w, scale), transposed ? 1 : step, 0, 0, in};
  std::vector<Strip> strips;
  int64_t out = 0, chunks = ceil_div(in, kPair);
  for (auto& output : outputs) {
    int64_t count = output.dimensions()[3];
    for (int64_t from = 0; from < count; from += kPair)
      strips.push_back({output.typed_data(), count, from, out + from});
    out += count;
  }
  Buffer memory;
  auto* kernels = reinterpret_cast<Half*>(memory.of(strips.size() * chunks * taps * kTiles / 2));
  parallel(pool, strips.size() * chunks, [&](int64_t item) {
    for (int64_t tap = 0; tap < taps; tap++)
      pack(kernel.typed_data() + tap * in * out, in, out, turned, item % chunks * kPair, strips[item / chunks],
           kernels + (item * taps + (turned && !transposed ? taps - 1 - tap : tap)) * kTiles);
  });
  parallel_blocks(pool, all.n * (all.h + 1), rows_at_once(all), [&](int64_t first, int64_t last) {
    Block block = all.of(first, last);
    auto* x = reinterpret_cast<Half*>(scratch.of(block.size() / 2));
    for (int64_t row = first - 1; row <= last; row++) block.gather(parts, row, x);
    Units units;
    alignas(64) float sums[kPair * kPair];
    for (int64_t phase = 0; phase < scale * scale; phase++) {
      int64_t odd_row = phase / 2, odd_column = phase % 2;
      auto seen = transposed ? block.transposed_taps(odd_row, odd_column) : block.taps(side);
      auto pixels = block.outputs(scale, odd_row, odd_column, out_h, out_w);
      std::vector<Operands> operands;
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (const Tap& tap : seen)
          operands.push_back({tap.from * block.pixel() + chunk * kPair, (chunk * taps + tap.index) * kTiles,
                              std::min(kPair, in - chunk * kPair)});
      for (size_t s = 0; s < strips.size(); s++) {
        const Half* own = kernels + s * chunks * taps * kTiles;
        for (int64_t q = 0; q < block.positions(); q += kPair) {
          const Half* from = x + (block.origin() + q) * block.pixel();
          multiply(sums, kPair, false, from, block.pixel(), own, kTiles / 2, operands);
          write(sums, pixels.data() + q, std::min(kPair, block.positions() - q), strips[s], bias);
        }
      }
    }
  });
}

// ---- Kernel gradients ----

// The features from `feature` on of 16 pairs of positions: of each pair and feature both numbers side by side.
void load_pairs(const Half* x, int64_t pixel, int64_t feature, __m512i* pairs) {
  auto row = [&](int64_t position) {
    auto* p = reinterpret_cast<const __m256i*>(x + position * pixel + feature);
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(p));
  };
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) pairs[i] = _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16));
}

// The layout in which kernel gradients sum over positions: `left` has the pictures transposed, features in rows and
// positions along them; `right` has the tiles of g, in which each two neighbouring positions are interleaved.
struct SumLayout {
  Block x_block, g_block;  // of as many rows as there is room for
  int64_t count = ceil_div(x_block.positions(), kPair);
  int64_t stride = padded(count * kPair + 2 * x_block.origin()) + kPair;
  int64_t phases = x_block.step * x_block.step, in = padded(x_block.in), out = padded(g_block.in);
  int64_t x_size = x_block.size(), g_size = g_block.size(), left_size = phases * in * stride;
  int64_t floats = (x_size + g_size + left_size + out * count * kPair) / 2;

  // sums [taps, in, out] (+)= the products of rows [first, last), by run(count, item).
  template <typename Run>
  void add(const Parts& parts, const Pictures& g, int64_t side, int64_t first, int64_t last, float* memory, float* sums,
           bool add, const Run& run) const {
    Half* x = reinterpret_cast<Half*>(memory);
    Half *gradients = x + x_size, *left = gradients + g_size, *right = left + left_size;
    Block from = x_block.of(first, last), g_from = g_block.of(first, last);
    int64_t own = ceil_div(from.positions(), kPair), pixel = from.pixel(), g_pixel = g_from.pixel();
    run(last - first + 2, [&](int64_t row) {
      from.gather(parts, first - 1 + row, x);
      g_from.gather({g}, first - 1 + row, gradients);
    });
    // Positions after the rows' own must add nothing to the sums. It is enough that g is zero there.
    std::memset(gradients + (g_from.origin() + g_from.positions()) * g_pixel, 0, 2 * kPair * g_pixel);
    run(phases * in / 16 + out / 16, [&](int64_t item) {
      __m512i pairs[16];
      if (int64_t tile = item - phases * in / 16; tile >= 0) {
        for (int64_t k = 0; k < own; k++) {
          load_pairs(gradients + (g_from.origin() + k * kPair) * g_pixel, g_pixel, 16 * tile, pairs);
          std::memcpy(right + (tile * count + k) * kTiles / 2, pairs, kTiles);
        }
        return;
      }
      int64_t phase = item / (in / 16), feature = item % (in / 16) * 16;
      for (int64_t p = 0; p < own * kPair + 2 * from.origin(); p += kPair) {
        load_pairs(x + (phase * from.phase() + p) * pixel, pixel, feature, pairs);
        transpose(pairs, left + (phase * in + feature) * stride + p, stride / 2);
      }
    });
    auto taps = from.taps(side);
    std::vector<Operands> operands;
    for (int64_t k = 0; k < own; k++) operands.push_back({k * kPair, k * kTiles / 2});
    run(out / kPair * (in / kPair), [&](int64_t item) {
      int64_t o = item / (in / kPair) * kPair, i = item % (in / kPair) * kPair;
      Units units;
      for (const Tap& tap : taps) {
        int64_t phase = (from.origin() + tap.from) / from.phase(), at = (from.origin() + tap.from) % from.phase();
        const Half *rows = left + (phase * in + i) * stride + at, *tiles = right + o * count * kPair;
        multiply(sums + (tap.index * in + i) * out + o, out, add, rows, stride, tiles, count * kTiles / 2, operands);
      }
    });
  }
};

// The gradient, with respect to the kernel [side, side, in, out], of the convolution of parts with stride `step`. g is
// the gradient of its output.
void kernel_gradient(ffi::ThreadPool& pool, const Parts& parts, const Pictures& g, int64_t step,
                     ffi::Result<Array> kernel) {
  int64_t side = kernel->dimensions()[0], taps = side * side, in = features(parts), out = g.c;
  Block x_block{g.n, g.h, g.w, step, 0, 0, in}, g_block{g.n, g.h, g.w, 1, 0, 0, out};
  int64_t rows = g.n * (g.h + 1), most = std::max<int64_t>(1, kSummed / x_block.width());
  // If a thread's cache holds all sums, each thread sums over a group of rows by itself, and the groups are added.
  // Else there is one set of sums: all threads work on the same rows, and each computes a part of the sums.
  int64_t size = taps * padded(in) * padded(out);
  bool own_rows = size <= kCached / 2;
  int64_t groups = own_rows ? std::min(kGroups, ceil_div(rows, most)) : 1, share = ceil_div(rows, groups);
  most = std::min(most, share);
  SumLayout layout{x_block.of(0, most), g_block.of(0, most)};
  bool is_whole = groups == 1 && in == padded(in) && out == padded(out);  // the sums are the kernel's gradient itself
  Buffer memory;
  float* space = memory.of((is_whole ? 0 : groups * size) + (own_rows ? 0 : layout.floats));
  float* all_sums = is_whole ? kernel->typed_data() : space;
  auto sum = [&](int64_t group, float* workspace, auto run) {
    int64_t begin = group * share, end = std::min(rows, begin + share);
    if (begin >= end) std::fill_n(all_sums + group * size, size, 0.f);
    for (int64_t first = begin; first < end; first += most)
      layout.add(parts, g, side, first, std::min(end, first + most), workspace, all_sums + group * size, first > begin,
                 run);
  };
  if (own_rows)
    parallel(pool, groups, [&](int64_t group) {
      sum(group, scratch.of(layout.floats), [](int64_t count, const auto& item) {
        for (int64_t i = 0; i < count; i++) item(i);
      });
    });
  else
    sum(0, space + (is_whole ? 0 : size), [&](int64_t count, const auto& item) { parallel(pool, count, item); });
  if (is_whole) return;
  parallel_blocks(pool, taps * in, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t o = 0; o < out; o++) {
        const float* from = all_sums + (r / in * padded(in) + r % in) * padded(out) + o;
        float value = *from;
        for (int64_t group = 1; group < groups; group++) value += from[group * size];
        kernel->typed_data()[r * out + o] = value;
      }
  });
}

// ---- What XLA calls ----

Parts all_parts(ffi::RemainingArgs& args, Flags relu) {
  Parts parts;
  for (size_t i = 0; i < relu.size(); i++) {
    HalfArray x = *args.get<HalfArray>(3 * i);
    auto shape = x.dimensions();
    const float *gain = optional(*args.get<Array>(3 * i + 1)), *shift = optional(*args.get<Array>(3 * i + 2));
    parts.push_back({x.typed_data(), gain, shift, relu[i] != 0, shape[0], shape[1], shape[2], shape[3]});
  }
  return parts;
}

ffi::Error bfloat16_conv(ffi::ThreadPool pool, Flags relu, bool turned, int64_t step, ffi::RemainingArgs args,
                         ffi::RemainingRets rets) {
  std::vector<HalfArray> outputs;
  for (size_t i = 0; i < rets.size(); i++) outputs.push_back(**rets.get<HalfArray>(i));
  Array kernel = *args.get<Array>(3 * relu.size()), bias = *args.get<Array>(3 * relu.size() + 1);
  return checked([&] { convolve(pool, all_parts(args, relu), kernel, turned, step, optional(bias), outputs); });
}

// The last part is the gradient of the output.
ffi::Error bfloat16_kernel_gradient(ffi::ThreadPool pool, Flags relu, int64_t step, ffi::RemainingArgs args,
                                    ffi::RemainingRets rets) {
  return checked([&] {
    Parts parts = all_parts(args, relu);
    Pictures g = parts.back();
    parts.pop_back();
    kernel_gradient(pool, parts, g, step, *rets.get<Array>(0));
  });
}

}  // namespace

HANDLER(bfloat16_conv, binding().Attr<bool>("turned").Attr<int64_t>("step"));
HANDLER(bfloat16_kernel_gradient, binding().Attr<int64_t>("step"));

// Whether this process may use them. Matrix units need Linux's permission, for which it is to be asked once.
extern "C" bool unet_jax_has_bfloat16() {
#ifdef __AMX_BF16__
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return true;
#endif
}

#else

extern "C" bool unet_jax_has_bfloat16() { return false; }

#endif

extern "C" const bool unet_jax_has_matrix_units =
#ifdef __AMX_BF16__
    true;
#else
    false;
#endif
