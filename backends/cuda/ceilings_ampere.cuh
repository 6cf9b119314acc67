// What the matrix units of Ampere, and by the same instructions of later GPUs, can do at best: products of a warp from registers.
#pragma once
#include "ceilings.cuh"

namespace s3 {
namespace {

struct Bf16Tile {
  using Sum = float;
  static constexpr double operations = 2.0 * 16 * 8 * 16;
  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct Int8Tile {
  using Sum = int32_t;
  static constexpr double operations = 2.0 * 16 * 8 * 32;
  static __device__ __forceinline__ void product(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

template <class Tile>
__global__ void __launch_bounds__(256) product_ceiling(const s3_head *heads, const uint4 *in, double *out) {
  let_successor_start();
  after_predecessor();
  constexpr int tiles = 8;  // independent ones, in two rows of four
  uint32_t a[2][4], b[4][2];
  typename Tile::Sum sums[tiles][4] = {};
  for (int i = 0; i < 2; ++i) {
    const uint4 v = in[(i * blockDim.x + threadIdx.x) % 4096];
    a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
  }
  for (int i = 0; i < 4; i += 2) {
    const uint4 v = in[((2 + i) * blockDim.x + threadIdx.x) % 4096];
    b[i][0] = v.x, b[i][1] = v.y, b[i + 1][0] = v.z, b[i + 1][1] = v.w;
  }
  const int64_t steps = static_cast<int64_t>(heads->rows) * 64;
  for (int64_t n = 0; n < steps; ++n)
#pragma unroll
    for (int i = 0; i < tiles; ++i) Tile::product(sums[i], a[i / 4], b[i % 4]);
  float rest = 0;
  for (const auto &tile : sums)
    for (const auto x : tile) rest += static_cast<float>(x);
  finish_ceiling(out, Tile::operations * tiles * steps * (blockDim.x / 32) * gridDim.x, rest);
}

}  // namespace

cudaError_t ceiling_bf16(const Call &c) { return launch(product_ceiling<Bf16Tile>, 4 * c.processors, 256, 0, c, c.heads, c.args[0], c.args[1]); }
cudaError_t ceiling_int8(const Call &c) { return launch(product_ceiling<Int8Tile>, 4 * c.processors, 256, 0, c, c.heads, c.args[0], c.args[1]); }

}  // namespace s3
