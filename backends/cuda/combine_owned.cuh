// The sum of a token's experts, of those that a contraction has written: pairs of other experts are not read.
#pragma once
#include "contract.cuh"

namespace s3 {

constexpr int combine_threads = 256;

/// out[t, n] = sum over j, ascending, of weights[t, j] y[t choices + j, n], of pairs that have a matrix. Blocks (x, y): token, columns.
template <bool Whole>
__global__ void __launch_bounds__(combine_threads) combine_owned_kernel(Rows tokens, Choice choice, int64_t columns, const float *y, const float *weights, float *out) {
  let_successor_start();
  after_predecessor();
  const int64_t token = blockIdx.x, column = 4 * (int64_t{blockIdx.y} * combine_threads + threadIdx.x);
  if (!tokens.has(token) || column >= columns) return;
  const int count = static_cast<int>(columns - column < 4 ? columns - column : 4);
  Four<float> sum{};
#pragma unroll 4
  for (int32_t j = 0; j < choice.choices; ++j) {
    const int64_t pair = token * choice.choices + j;
    if (choice.matrix(pair) < 0) continue;
    const float weight = weights[pair];
    const Four<float> more = read_four<Whole>(y + pair * columns + column, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += weight * more[i];
  }
  write_four<Whole>(out + token * columns + column, count, sum);
}

template <bool Whole>
cudaError_t combine_owned(const Call &c, const Rows &tokens, const Choice &choice, int64_t columns, const float *y, const float *weights, float *out) {
  const dim3 blocks(static_cast<uint32_t>(tokens.capacity()), static_cast<uint32_t>(ceil_div(columns, int64_t{4 * combine_threads})));
  return launch(combine_owned_kernel<Whole>, blocks, dim3(combine_threads), 0, c, tokens, choice, columns, y, weights, out);
}

}  // namespace s3
