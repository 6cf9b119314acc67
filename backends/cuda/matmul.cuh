// Products of row-major matrices of any sizes, neither of them a weight: tiles of 64 x 64 by 256 threads, each 4 x 4 sums in registers.
//
// A sum is one ascending chain over k: the same bits whatever the other rows and columns are.
#pragma once
#include "tensors.cuh"

namespace s3 {

constexpr int tile_side = 64, tile_depth = 16;

/// The tiles of a result, column after column of them.
struct ProductTiles {
  int64_t down, count;
  __device__ __forceinline__ ProductTiles(int64_t height, int64_t columns)
      : down((height + tile_side - 1) / tile_side), count(down * ((columns + tile_side - 1) / tile_side)) {}
  __device__ __forceinline__ int64_t row(int64_t tile) const { return tile % down * tile_side; }
  __device__ __forceinline__ int64_t column(int64_t tile) const { return tile / down * tile_side; }
};

/// Where the rows of a result are: `count` for each token of each segment, or `count` altogether.
struct ProductRows {
  const Launched &c;
  bool by_segments;
  int64_t count;
  __device__ __forceinline__ uint32_t segments() const { return by_segments ? c.segments : 1; }
  __device__ __forceinline__ int64_t start(uint32_t i) const { return by_segments ? static_cast<int64_t>(i) * c.stride * count : 0; }
  __device__ __forceinline__ int64_t size(uint32_t i) const { return by_segments ? c.heads[i].rows * count : count; }
};

/// sums[m][n] of row + 4 (thread / 16) + m and column + 4 (thread % 16) + n of a [height, inner] times b [inner, columns].
template <class Sum, class X>
__device__ __forceinline__ void multiply_tile(const X *a, const X *b, int64_t height, int64_t columns, int64_t inner, int64_t row, int64_t column,
    Sum (&sums)[4][4]) {
  __shared__ Sum of_a[tile_depth][tile_side + 4], of_b[tile_depth][tile_side];
  const int thread = threadIdx.x, down = thread / 16 * 4, across = thread % 16 * 4;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n) sums[m][n] = 0;
  for (int64_t k = 0; k < inner; k += tile_depth) {
    __syncthreads();
#pragma unroll
    for (int i = thread; i < tile_side * tile_depth; i += 256) {
      const int m = i / tile_depth, ka = i % tile_depth, kb = i / tile_side, n = i % tile_side;
      of_a[ka][m] = row + m < height && k + ka < inner ? static_cast<Sum>(value(a[(row + m) * inner + k + ka])) : Sum{0};
      of_b[kb][n] = column + n < columns && k + kb < inner ? static_cast<Sum>(value(b[(k + kb) * columns + column + n])) : Sum{0};
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < tile_depth; ++i) {
      Sum x[4], y[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) x[m] = of_a[i][down + m];
#pragma unroll
      for (int n = 0; n < 4; ++n) y[n] = of_b[i][across + n];
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[m][n] += x[m] * y[n];
    }
  }
}

}  // namespace s3
