// What scalar.h starts from, on a GPU: the storage of small floats.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#define S3_ISA device
#define S3_INLINE __host__ __device__ __forceinline__
#define S3_C(function) ::function

namespace s3 {
inline namespace S3_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };
struct e5m2 { uint8_t bits; };

#ifdef __CUDA_ARCH__
S3_INLINE float as_float(uint32_t bits) { return __uint_as_float(bits); }
S3_INLINE uint32_t as_bits(float x) { return __float_as_uint(x); }
#else
S3_INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
S3_INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
#endif

}  // namespace S3_ISA
}  // namespace s3
