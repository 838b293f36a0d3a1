// What bfloat16.cc asks of matrix units (AMX), done with AVX512-BF16: test_matrix_units.py includes it before that
// file, so that processors without such units test its other half, too. Tiles are of 16 rows of 64 bytes, as that file
// sets them up.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace matrix_units {

struct Tile {
  unsigned char rows[16][64];
};
inline thread_local Tile tiles[8];

inline void load(int tile, const void* from, std::int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(tiles[tile].rows[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store(int tile, void* to, std::int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(static_cast<char*>(to) + r * stride, tiles[tile].rows[r], 64);
}

inline void multiply(int sums, int left, int right) {
  for (int r = 0; r < 16; r++) {
    __m512 total = _mm512_loadu_ps(tiles[sums].rows[r]);
    for (int k = 0; k < 16; k++) {
      std::int32_t two;
      std::memcpy(&two, tiles[left].rows[r] + 4 * k, sizeof two);
      total = _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)),
                               reinterpret_cast<__m512bh>(_mm512_loadu_si512(tiles[right].rows[k])));
    }
    _mm512_storeu_ps(tiles[sums].rows[r], total);
  }
}

}  // namespace matrix_units

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(tile) matrix_units::tiles[tile] = {}
#define _tile_loadd(tile, from, stride) matrix_units::load(tile, from, stride)
#define _tile_stored(tile, to, stride) matrix_units::store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) matrix_units::multiply(sums, left, right)
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define syscall(...) 0L  // Linux's permission
