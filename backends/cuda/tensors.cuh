// Pieces of tensors of any rank: units of work that blocks share, and copies.
#pragma once
#include <initializer_list>

#include "rows.cuh"

namespace s3 {

using sixteen_bytes = uint4;

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/// Blocks for as many units as there can be at most, which go on to others where those are more than the device does well at a time.
inline dim3 blocks_for(const Call &c, std::initializer_list<int64_t> units, int of_processor = 8) {
  int64_t most = 0;
  for (const int64_t u : units) most = most < u ? u : most;
  const int64_t enough = static_cast<int64_t>(c.processors) * of_processor;
  return dim3(static_cast<uint32_t>(most < enough ? most : enough));
}

/// The (row, tile) pairs of this block: `for (Units r = ...; r.next();)`. A tile is a part of the columns. Rows count over all segments:
/// segment i starts at row i * stride * per_token.
struct Units {
  int64_t row = 0, tile = 0;

  static __device__ __forceinline__ Units of_tokens(const Launched &c, int64_t per_token, int64_t tiles) {
    const int64_t distance = c.stride * per_token;
    return {c.heads, per_token, distance, tiles, c.segments * distance * tiles};
  }
  static __device__ __forceinline__ Units fixed(const Launched &, int64_t count, int64_t tiles) { return {nullptr, 0, 0, tiles, count * tiles}; }

  /// the same for all threads of a block
  __device__ __forceinline__ bool next() {
    for (; at < units; at += gridDim.x) {
      row = at / tiles;
      if (heads != nullptr && row % distance >= heads[row / distance].rows * per_token) continue;
      tile = at % tiles;
      at += gridDim.x;
      return true;
    }
    return false;
  }

 private:
  const s3_head *heads;
  int64_t per_token, distance, tiles, units, at = blockIdx.x;
  __device__ __forceinline__ Units(const s3_head *heads, int64_t per_token, int64_t distance, int64_t tiles, int64_t units)
      : heads(heads), per_token(per_token), distance(distance), tiles(tiles), units(units) {}
};

/// Elements from .. to - 1, by the threads of a row of the block.
template <class X>
__device__ __forceinline__ void copy_elements(X *out, const X *in, int64_t from, int64_t to) {
  for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) out[i] = in[i];
}

/// out[j * out_step + i] = in[i * in_step + j] for j < width and i < height, both at most 32, by all 256 threads of a block: by way of a
/// square in shared memory, so that both sides are read and written along their neighbours.
template <class X>
__device__ __forceinline__ void transpose_square(const X *in, int64_t in_step, int64_t width, X *out, int64_t out_step, int64_t height) {
  __shared__ X square[32][33];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, lane = thread % 32, line = thread / 32;
  for (int i = line; i < height; i += 8)
    if (lane < width) square[lane][i] = in[i * in_step + lane];
  __syncthreads();
  for (int j = line; j < width; j += 8)
    if (lane < height) out[j * out_step + lane] = square[j][lane];
  __syncthreads();
}

}  // namespace s3
