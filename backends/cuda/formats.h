// What scalar.h starts from, on a GPU: the storage of small floats.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#define S3_ISA device
#define S3_INLINE __device__ __forceinline__
#define S3_C(function) ::function

namespace s3 {
inline namespace S3_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };
struct e5m2 { uint8_t bits; };

S3_INLINE float as_float(uint32_t bits) { return __uint_as_float(bits); }
S3_INLINE uint32_t as_bits(float x) { return __float_as_uint(x); }

// Rounding by the processor's instructions: to nearest, ties to even, as scalar.h has it. By those for pairs, of which the first operand becomes the upper
// half: those for one value are of the unit for reciprocals and powers, at an eighth of the pace.
#define S3_OWN_BF16
S3_INLINE float round_bf16(float x) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x), "f"(0.0f));
  return as_float(pair);
}
S3_INLINE bf16 to_bf16(float x) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(x));
  return {static_cast<uint16_t>(pair)};
}

#define S3_OWN_F16
S3_INLINE f16 to_f16(float x) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(x));
  return {static_cast<uint16_t>(pair)};
}

#if __CUDA_ARCH__ >= 890
#define S3_OWN_E4M3
S3_INLINE e4m3 to_e4m3(float x) {
  uint16_t pair; // the second operand is the lower byte
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return {static_cast<uint8_t>(pair)};
}
#endif

}  // namespace S3_ISA
}  // namespace s3
