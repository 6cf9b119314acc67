/*
 * Vectors of f32 for one instruction set. `lanes` floats make a vector, `parts` vectors a row of a panel: 16 columns.
 */
#ifndef S3_SIMD_H
#define S3_SIMD_H
#include "formats.h"
#if defined(__x86_64__)
#include <immintrin.h>
/* the undefined operands of g++ 12's own intrinsics */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace s3 {
inline namespace S3_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define S3_AVX512 1
constexpr int lanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define S3_AVX2 1
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

constexpr int columns_of_panel = 16;
constexpr int parts = columns_of_panel / lanes;

typedef float vec __attribute__((vector_size(4 * lanes), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * lanes), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * lanes), may_alias));
typedef float vec_unaligned __attribute__((vector_size(4 * lanes), may_alias, aligned(4)));
typedef int32_t ivec_unaligned __attribute__((vector_size(4 * lanes), may_alias, aligned(1)));

S3_INLINE vec load(const float *p) { return *reinterpret_cast<const vec_unaligned *>(p); }
S3_INLINE void store(float *p, vec v) { *reinterpret_cast<vec_unaligned *>(p) = v; }
S3_INLINE vec set(float x) {
#if defined(S3_AVX512)
  return _mm512_set1_ps(x);
#elif defined(S3_AVX2)
  return _mm256_set1_ps(x);
#else
  return vec{x, x, x, x};
#endif
}
S3_INLINE ivec load_bits(const void *p) { return *static_cast<const ivec_unaligned *>(p); }
S3_INLINE void store_bits(void *p, ivec v) { *static_cast<ivec_unaligned *>(p) = v; }

/* a * b + c: one rounding where the processor has it (avx2 and up), two in the baseline; the same for every element of a program */
S3_INLINE vec fma(vec a, vec b, vec c) {
#if defined(S3_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(S3_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace S3_ISA
}  // namespace s3
#endif
