/*
 * What every kernel starts from: the namespace of its instruction set, and the storage of small floats.
 *
 * A program is compiled once per instruction set (-D S3_ISA=baseline|avx2|avx512|amx with the matching -march, and always with
 * -ffp-contract=off); everything lives in a namespace of that name, so no function built for one processor is ever linked into another's path.
 * No header of a processor is included here: they are long, and kernels of plain loops do without.
 */
#ifndef S3_FORMATS_H
#define S3_FORMATS_H
#include <stdint.h>
#include <string.h>
#include "step3.h"

#ifndef S3_ISA
#define S3_ISA baseline
#endif
#define S3_INLINE __attribute__((always_inline)) inline
#define S3_C(function) __builtin_##function /* without the headers that declare it */

namespace s3 {
inline namespace S3_ISA {

/* Storage of one element; arithmetic happens in f32. */
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };
struct e5m2 { uint8_t bits; };

S3_INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
S3_INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

S3_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
S3_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace S3_ISA
}  // namespace s3
#endif
