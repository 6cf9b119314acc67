// Instructions of the matrix units that all processors from Ampere on have, and of what brings their operands.
#pragma once
#include <type_traits>

#include "launch.h"
#include "scalar.h"

namespace s3 {

namespace warp {
__device__ __forceinline__ uint32_t address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(row)) : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(row)) : "memory");
}
/// 16 x 8 sums += a b over 16, of bf16 or f16
template <bool Half>
__device__ __forceinline__ void multiply(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
  if constexpr (Half)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
/// Four codes as two pairs of f16: e4m3 as 1 / 256 of them, which only shifts bits; integers as they are.
template <class E>
__device__ __forceinline__ void widen(uint32_t codes, uint32_t &low, uint32_t &high) {
  if constexpr (std::is_same_v<E, e4m3>) {
    const uint32_t x = __byte_perm(codes, 0, 0x1404), y = __byte_perm(codes, 0, 0x3424);
    low = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
    high = (y & 0x80008000u) | (y >> 1 & 0x3f803f80u);
  } else {
    const uint32_t from_zero = codes ^ 0x80808080u; // 1024 + 128 + code in the low bits of an f16
    low = __byte_perm(from_zero, 0x64646464u, 0x4140);
    high = __byte_perm(from_zero, 0x64646464u, 0x4342);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x64806480u));
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x64806480u));
  }
}
__device__ __forceinline__ void copy_16(void *to, const void *from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory"); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}
}  // namespace warp

}  // namespace s3
