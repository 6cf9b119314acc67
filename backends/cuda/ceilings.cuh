// What this GPU can do at best, for `step3c bench` to hold kernels against. Each takes (in, out): in is 1 MiB or more of values, of which
// ceiling_read reads `rows` MiB; out[0] is the work done (bytes, or operations), what follows keeps the compiler from leaving the work out.
#pragma once
#include "launch.h"

namespace s3 {
namespace {

/// Ends a ceiling: `work` for all blocks together, and `rest` for a case that does not happen.
__device__ __forceinline__ void finish_ceiling(double *out, double work, float rest) {
  if (threadIdx.x == 0 && blockIdx.x == 0) out[0] = work;
  if (rest == 1.2345e-30f) out[1] = rest;
}

/// A block on each processor that learns how many rows there are, and ends.
__global__ void launch_ceiling(const s3_head *heads, double *out) {
  let_successor_start();
  after_predecessor();
  if (heads->rows == UINT32_MAX) out[1] = 0;
}

/// 16 bytes a load, `Loads` of them in flight on each thread.
template <int Loads>
__global__ void read_ceiling(const s3_head *heads, const uint4 *in, double *out) {
  let_successor_start();
  after_predecessor();
  const int64_t all = static_cast<int64_t>(heads->rows) << 16, threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t sum = 0;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; first < all; first += threads * Loads) {
    uint4 v[Loads];
#pragma unroll
    for (int i = 0; i < Loads; ++i) v[i] = first + i * threads < all ? __ldcs(in + first + i * threads) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < Loads; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  finish_ceiling(out, static_cast<double>(all) * 16, __uint_as_float(sum));
}

/// Chains of multiply-adds.
__global__ void __launch_bounds__(256) f32_ceiling(const s3_head *heads, double *out) {
  let_successor_start();
  after_predecessor();
  constexpr int chains = 8;
  const int64_t steps = static_cast<int64_t>(heads->rows) * 256;
  float sums[chains];
  for (int i = 0; i < chains; ++i) sums[i] = static_cast<float>(threadIdx.x + i);
  const float factor = heads->rows > 0 ? 0.5f : 0.25f;
#pragma unroll 8
  for (int64_t n = 0; n < steps; ++n)
#pragma unroll
    for (int i = 0; i < chains; ++i) sums[i] = fmaf(sums[i], factor, 1.0f);
  for (int i = 1; i < chains; ++i) sums[0] += sums[i];
  finish_ceiling(out, 2.0 * chains * steps * blockDim.x * gridDim.x, sums[0]);
}

}  // namespace

cudaError_t ceiling_launch(const Call &c) { return launch(launch_ceiling, c.processors, 256, 0, c, c.heads, c.args[1]); }
cudaError_t ceiling_read(const Call &c) { return launch(read_ceiling<8>, 4 * c.processors, 512, 0, c, c.heads, c.args[0], c.args[1]); }
cudaError_t ceiling_read_2(const Call &c) { return launch(read_ceiling<4>, 4 * c.processors, 1024, 0, c, c.heads, c.args[0], c.args[1]); }
cudaError_t ceiling_f32(const Call &c) { return launch(f32_ceiling, 8 * c.processors, 256, 0, c, c.heads, c.args[1]); }

}  // namespace s3
