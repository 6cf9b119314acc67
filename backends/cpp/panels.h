/*
 * Packed matrices: what decodes them, and the sums of products over them.
 */
#ifndef S3_PANELS_H
#define S3_PANELS_H
#include "scalar.h"
#include "simd.h"

namespace s3 {
inline namespace S3_ISA {

/* --- elements to f32 -------------------------------------------------------------------------------------------------------- */

/* 16 elements, in order, as f32 times `unit_of` their format */
template <class X>
S3_INLINE void widen_each(const X *p, vec (&out)[parts]) {
  for (int i = 0; i < parts; ++i)
    for (int j = 0; j < lanes; ++j) out[i][j] = value(p[i * lanes + j]);
}
S3_INLINE void widen(const f16 *p, vec (&out)[parts]) { widen_each(p, out); }
S3_INLINE void widen(const e5m2 *p, vec (&out)[parts]) { widen_each(p, out); }

S3_INLINE void widen(const float *p, vec (&out)[parts]) {
  for (int i = 0; i < parts; ++i) out[i] = load(p + i * lanes);
}

S3_INLINE void widen(const bf16 *p, vec (&out)[parts]) {
#if defined(S3_AVX512)
  out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
#elif defined(S3_AVX2)
  for (int i = 0; i < parts; ++i)
    out[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i))), 16));
#else
  widen_each(p, out);
#endif
}

S3_INLINE void widen(const int8_t *p, vec (&out)[parts]) {
#if defined(S3_AVX512)
  out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(S3_AVX2)
  for (int i = 0; i < parts; ++i) out[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i))));
#else
  widen_each(p, out);
#endif
}

/*
 * e4m3 seen as f16 (sign, a zero, exponent and mantissa) is the value times 2^-8, subnormals included, and the processor's f16
 * conversion makes it f32. Codes 0x7f and 0xff are NaN.
 */
#if defined(S3_AVX512) || defined(S3_AVX2)
constexpr float e4m3_unit = 1.0f / 256;
#else
constexpr float e4m3_unit = 1;
#endif

#if defined(S3_AVX512)
/* 32 codes as 32 words of f16, with NaN taken for 480 */
S3_INLINE __m512i e4m3_as_f16(__m256i codes) {
  return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7), _mm512_set1_epi16((short)0xbf80));
}
S3_INLINE __m512i e4m3_as_f16_or_nan(__m256i codes) {
  const __m512i half = e4m3_as_f16(codes), magnitude = _mm512_set1_epi16(0x3f80);
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, magnitude), magnitude);
  return _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
}
#elif defined(S3_AVX2)
/* 8 codes in the low half of `codes` */
S3_INLINE __m256 e4m3_to_vec(__m128i codes) {
  const __m128i moved = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
  const __m128i magnitude = _mm_set1_epi16(0x3f80);
  const __m128i half = _mm_and_si128(moved, _mm_set1_epi16((short)0xbf80));
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(moved, magnitude), magnitude);
  return _mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00))));
}
#endif

S3_INLINE void widen(const e4m3 *p, vec (&out)[parts]) {
#if defined(S3_AVX512)
  const __m512i half = e4m3_as_f16_or_nan(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)));
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
#elif defined(S3_AVX2)
  for (int i = 0; i < parts; ++i) out[i] = e4m3_to_vec(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
#else
  widen_each(p, out);
#endif
}

template <class X> constexpr float unit_of = 1;
template <> inline constexpr float unit_of<e4m3> = e4m3_unit;

/* --- panels ----------------------------------------------------------------------------------------------------------------- */

/*
 * A packed matrix [N, K] is ceil(N / 16) panels; a panel is ceil(K / step) cells of `bytes` bytes, each holding `step` values of k for
 * 16 columns of the result. Absent rows and columns are zero. `decode` gives the 16 columns of each k of a cell, times `unit`.
 * `pairs`: the values of k of one column are side by side, as matrix units want them; otherwise the columns of one k are.
 */
struct f32_panel {
  typedef float element;
  static constexpr int step = 1, bytes = 64;
  static constexpr bool pairs = false;
  static constexpr float unit = 1;
  static S3_INLINE void decode(const uint8_t *cell, vec (&out)[step][parts]) {
    for (int i = 0; i < parts; ++i) out[0][i] = load(reinterpret_cast<const float *>(cell) + i * lanes);
  }
};

/* column 0 (k, k+1), column 1 (k, k+1), ... */
struct bf16_panel {
  typedef bf16 element;
  static constexpr int step = 2, bytes = 64;
  static constexpr bool pairs = true;
  static constexpr float unit = 1;
  static S3_INLINE void decode(const uint8_t *cell, vec (&out)[step][parts]) {
    for (int i = 0; i < parts; ++i) {
      const ivec pairs = load_bits(cell + i * 4 * lanes);
      out[0][i] = (vec)(pairs << 16);
      out[1][i] = (vec)(pairs & (int32_t)0xffff0000);
    }
  }
};

/* 16 codes of k, then 16 codes of k+1 */
struct i8_panel {
  typedef int8_t element;
  static constexpr int step = 2, bytes = 32;
  static constexpr bool pairs = false;
  static constexpr float unit = 1;
  static S3_INLINE void decode(const uint8_t *cell, vec (&out)[step][parts]) {
    widen(reinterpret_cast<const int8_t *>(cell), out[0]);
    widen(reinterpret_cast<const int8_t *>(cell) + 16, out[1]);
  }
};

struct e4m3_panel {
  typedef e4m3 element;
  static constexpr int step = 2, bytes = 32;
  static constexpr bool pairs = false;
  static constexpr float unit = e4m3_unit;
  static S3_INLINE void decode(const uint8_t *cell, vec (&out)[step][parts]) {
#if defined(S3_AVX512)
    const __m512i half = e4m3_as_f16_or_nan(_mm256_loadu_si256((const __m256i *)cell));
    out[0][0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    out[1][0] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
#else
    widen(reinterpret_cast<const e4m3 *>(cell), out[0]);
    widen(reinterpret_cast<const e4m3 *>(cell) + 16, out[1]);
#endif
  }

#if defined(S3_AVX512)
  /* 16 k (8 cells) as f16, to be widened from memory: that takes the processor fewer steps than from registers. */
  static S3_INLINE void stage(const uint8_t *cells, uint16_t *out) {
    __m512i most = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      most = _mm512_max_epu8(most, _mm512_or_si512(_mm512_loadu_si512(cells + i * 64), _mm512_set1_epi8((char)0x80)));
      for (int half = 0; half < 2; ++half)
        _mm512_store_si512(out + i * 64 + half * 32, e4m3_as_f16(_mm256_loadu_si256((const __m256i *)(cells + i * 64 + half * 32))));
    }
    if (_mm512_cmpeq_epi8_mask(most, _mm512_set1_epi8(-1)) != 0) [[unlikely]]
      for (int i = 0; i < 8; ++i)
        _mm512_store_si512(out + i * 32, e4m3_as_f16_or_nan(_mm256_loadu_si256((const __m256i *)(cells + i * 32))));
  }
  static S3_INLINE vec staged(const uint16_t *row) { return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)row)); }
#endif
};

#if defined(S3_AVX512)
template <class W> constexpr bool is_staged = false;
template <> inline constexpr bool is_staged<e4m3_panel> = true;
#endif

/*
 * acc[m][p] += sum over k of a[m][k] * panel p, for M rows and P panels; k ascends in one chain per element, so a result does not
 * depend on M or P. Rows of `a` are `stride` floats apart and hold 16 values of k; the next 16 are `advance` floats further on.
 * `a` reads as zero past k up to a multiple of W::step. Panels are fetched `ahead` bytes before they are needed.
 */
template <class W, int M, int P, int ahead>
S3_INLINE void multiply(const float *a, int64_t stride, int64_t advance, const uint8_t *const (&panels)[P], int64_t k,
                        vec (&acc)[M][P * parts]) {
  const uint8_t *at[P];
  for (int p = 0; p < P; ++p) at[p] = panels[p];
  /* inlined where it stands: g++ would take the call for one without effect and drop it */
  const auto fetch = [&](int bytes) __attribute__((always_inline)) {
    for (int p = 0; p < P; ++p)
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at[p] + ahead + i);
  };
  const auto add_row = [&](const float *x, const vec *w) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vec factor = set(x[m * stride]);
#pragma GCC unroll 32
      for (int i = 0; i < P * parts; ++i) acc[m][i] = fma(factor, w[i], acc[m][i]);
    }
  };
#if defined(S3_AVX512)
  if constexpr (is_staged<W>) {
    alignas(64) uint16_t stage[P][16 * columns_of_panel];
    for (; k >= 16; k -= 16, a += advance) {
      if constexpr (ahead > 0) fetch(8 * W::bytes);
#pragma GCC unroll 1
      for (int p = 0; p < P; ++p) {
        W::stage(at[p], stage[p]);
        at[p] += 8 * W::bytes;
      }
#pragma GCC unroll 1
      for (int j = 0; j < 16; ++j) {
        vec w[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) w[p] = W::staged(stage[p] + j * columns_of_panel);
        add_row(a + j, w);
      }
    }
  }
#endif
  for (int64_t k0 = 0; k0 < k; k0 += 16, a += advance) {
    const int64_t left = least(k - k0, 16);
    for (int64_t j = 0; j < left; j += W::step) {
      vec w[W::step][P * parts];
      if constexpr (ahead > 0) fetch(W::bytes);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        vec cell[W::step][parts];
        W::decode(at[p], cell);
        at[p] += W::bytes;
#pragma GCC unroll 8
        for (int i = 0; i < W::step * parts; ++i) w[i / parts][p * parts + i % parts] = cell[i / parts][i % parts];
      }
#pragma GCC unroll 4
      for (int s = 0; s < W::step; ++s) add_row(a + j + s, w[s]);
    }
  }
}

/* --- matrix units ----------------------------------------------------------------------------------------------------------- */

/*
 * AMX: eight tiles of 16 rows of 64 bytes. Tiles 0-3 hold f32 sums [16 rows][16 columns], 4 and 5 bf16 rows [16][32 k], 6 and 7 bf16
 * cells [16 pairs of k][16 columns][2]. -D S3_AMX_EMULATED builds the same steps without the unit, so that any machine can test them.
 */
#if defined(S3_AMX_EMULATED)
#define S3_AMX 1
inline thread_local uint32_t amx_tiles[8][16][16];

S3_INLINE void tiles_begin() {}
S3_INLINE void tiles_end() {}
template <int T> S3_INLINE void tile_zero() { memset(amx_tiles[T], 0, 1024); }
template <int T> S3_INLINE void tile_load(const void *p, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(amx_tiles[T][i], (const uint8_t *)p + i * stride, 64);
}
template <int T> S3_INLINE void tile_store(void *p, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy((uint8_t *)p + i * stride, amx_tiles[T][i], 64);
}
/* the unit takes subnormals for zero and gives zero for them */
S3_INLINE float flushed(float x) { return magnitude_bits(x) < 0x00800000u ? as_float(as_bits(x) & 0x80000000u) : x; }
/* C += A B as the unit does it: even and odd k of the tile apart, each a chain of fused multiply-adds, then both into the sum */
template <int C, int A, int B> inline void tile_dot() {
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = amx_tiles[A][m][k];
      const float a_even = flushed(as_float(a << 16)), a_odd = flushed(as_float(a & 0xffff0000u));
      for (int n = 0; n < 16; ++n) {
        const uint32_t b = amx_tiles[B][k][n];
        even[n] = flushed(__builtin_fmaf(a_even, flushed(as_float(b << 16)), even[n]));
        odd[n] = flushed(__builtin_fmaf(a_odd, flushed(as_float(b & 0xffff0000u)), odd[n]));
      }
    }
    for (int n = 0; n < 16; ++n) amx_tiles[C][m][n] = as_bits(flushed(as_float(amx_tiles[C][m][n]) + flushed(even[n] + odd[n])));
  }
}
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define S3_AMX 1
S3_INLINE void tiles_begin() {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  static_assert(sizeof config == 64);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}
S3_INLINE void tiles_end() { _tile_release(); }
/* written out because the compiler's own functions take only literals for tiles */
template <int T> S3_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> S3_INLINE void tile_load(const void *p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> S3_INLINE void tile_store(void *p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B> S3_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

#if defined(S3_AMX)
/* 16 cells of a panel, from `cell` on, of which `count` exist, as a bf16 tile; `spare` is 1024 bytes to build it in where it must be */
template <class W>
S3_INLINE const void *cells_as_tile(const uint8_t *cell, int64_t count, uint8_t *spare) {
  if constexpr (W::bytes == 64) {
    if (count >= 16) return cell;
    memcpy(spare, cell, (size_t)count * 64);
  } else {
    for (int64_t i = 0; i < least(count, 16); ++i) {
      vec w[2][parts];
      W::decode(cell + i * W::bytes, w);
      for (int j = 0; j < parts; ++j) {
        const ivec even = (ivec)((uvec)w[0][j] >> 16), odd = (ivec)w[1][j] & (int32_t)0xffff0000;
        store_bits(spare + i * 64 + j * 4 * lanes, even | odd);
      }
    }
  }
  if (count < 16) memset(spare + count * 64, 0, (size_t)(16 - count) * 64);
  return spare;
}
#endif

}  // namespace S3_ISA
}  // namespace s3
#endif
