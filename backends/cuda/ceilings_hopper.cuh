// What Hopper's own instructions can do at best: bulk copies, and products of warpgroups from shared memory.
#pragma once
#include "ceilings.cuh"
#include "hopper.cuh"
#include "products.cuh"

namespace s3 {
namespace {

constexpr uint32_t bulk_bytes = 16 << 10, bulk_stages = 12;

/// One thread of each block keeps its shared memory full of copies that nobody reads.
__global__ void __launch_bounds__(32) bulk_read_ceiling(const s3_head *heads, const uint8_t *in, double *out) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ hopper::Barrier landed[bulk_stages];
  let_successor_start();
  after_predecessor();
  const int64_t pieces = static_cast<int64_t>(heads->rows) << 20 >> 14;
  if (threadIdx.x == 0) {
    for (hopper::Barrier &b : landed) b.init(1);
    hopper::publish_barriers();
    uint32_t n = 0;
    for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x, ++n) {
      hopper::Barrier &b = landed[n % bulk_stages];
      if (n >= bulk_stages) b.wait((n / bulk_stages - 1) & 1);
      b.expect(bulk_bytes);
      hopper::bulk_copy(shared + n % bulk_stages * bulk_bytes, in + piece * bulk_bytes, bulk_bytes, b, hopper::read_once);
    }
    for (uint32_t i = n > bulk_stages ? n - bulk_stages : 0; i < n; ++i) landed[i % bulk_stages].wait(i / bulk_stages & 1);
  }
  finish_ceiling(out, static_cast<double>(pieces) * bulk_bytes, 0);
}

constexpr uint32_t product_rows = 64, product_columns = 128, product_line = 128; // of a warpgroup's tile; bytes of a line
constexpr uint32_t product_bytes = (2 * product_rows + product_columns) * product_line;

/// Two warpgroups multiply the same tiles over and over: 64 rows each, 128 columns, lines of 128 bytes in four steps.
template <class Sum, void (&Product)(Sum (&)[64], uint64_t, uint64_t, bool)>
__global__ void __launch_bounds__(256) product_ceiling(const s3_head *heads, const uint4 *in, double *out, int32_t values) {
  extern __shared__ __align__(1024) uint8_t shared[];
  let_successor_start();
  after_predecessor();
  for (uint32_t i = threadIdx.x; i < product_bytes / 16; i += blockDim.x) reinterpret_cast<uint4 *>(shared)[i] = in[i];
  hopper::fence_async();
  __syncthreads();
  const uint32_t base = hopper::shared_address(shared);
  const uint64_t a = hopper::matrix(base + threadIdx.x / 128 * product_rows * product_line, 16, 1024, hopper::Swizzle::b128);
  const uint64_t b = hopper::matrix(base + 2 * product_rows * product_line, 16, 1024, hopper::Swizzle::b128);
  const int64_t steps = static_cast<int64_t>(heads->rows) * 64;
  Sum sums[64] = {};
  for (int64_t n = 0; n < steps; ++n) {
    hopper::product_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Product(sums, a + 2 * k, b + 2 * k, true);
    hopper::product_commit();
    hopper::product_wait<1>();
  }
  hopper::product_wait<0>();
  float rest = 0;
  for (Sum &x : sums) {
    hopper::pin(x);
    rest += static_cast<float>(x);
  }
  finish_ceiling(out, 2.0 * 2 * product_rows * product_columns * values * steps * gridDim.x, rest);
}

template <class Sum, void (&Product)(Sum (&)[64], uint64_t, uint64_t, bool)>
cudaError_t launch_products(const Call &c, int32_t values) {
  return launch(product_ceiling<Sum, Product>, 2 * c.processors, 256, product_bytes, c, c.heads, c.args[0], c.args[1], values);
}

}  // namespace

cudaError_t ceiling_read_3(const Call &c) {
  return launch(bulk_read_ceiling, c.processors, 32, bulk_bytes * bulk_stages, c, c.heads, c.args[0], c.args[1]);
}
cudaError_t ceiling_bf16(const Call &c) { return launch_products<float, hopper::product_bf16>(c, product_line / 2); }
cudaError_t ceiling_fp8(const Call &c) { return launch_products<float, hopper::product_e4m3>(c, product_line); }
cudaError_t ceiling_int8(const Call &c) { return launch_products<int32_t, hopper::product_i8>(c, product_line); }

}  // namespace s3
