// What a launch of a contraction on Hopper works on, and how much of it at a time: weights, rows, tiles, and the ring in shared memory.
#pragma once
#include "hopper.cuh"
#include "pack_rows.cuh"

namespace s3::hopper {

constexpr int line_bytes = 128, tile_columns = 128, tile_bytes = tile_columns * line_bytes;
constexpr int block_rows = 64, block_bytes = block_rows * line_bytes; // of A
constexpr uint32_t most_stages = 9;
constexpr int32_t most_blocks = 4; // 64s of rows of a tile
constexpr uint32_t beside_ring = 8 << 10; // bytes of shared memory for barriers and tables
constexpr uint32_t ring_bytes = (227 << 10) - beside_ring; // with what aligns it

/// Sums that a warp turns into results at a time, where they lie in shared memory: lines of columns, as far apart as keeps banks apart.
constexpr int turned_rows = 8, turned_columns = 64, turned_pitch = turned_columns + 8;
constexpr uint32_t turned_bytes = 8 * turned_rows * turned_pitch * 4; // of eight warps

/// The ring for tiles of so many 64s of rows and so many weights, in what `turned` bytes of sums leave: at least four stages, since the warps that bring
/// scales take turns with two steps each.
struct RingSize {
  uint32_t stages, stage_bytes, scales; // scales of a stage and a weight
  static __host__ __device__ constexpr RingSize of(int32_t blocks, bool step_scales, int weights, uint32_t turned) {
    const uint32_t bytes = weights * tile_bytes + blocks * block_bytes, scales = step_scales ? blocks * block_rows : 0, fit = (ring_bytes - 1024 - turned) / (bytes + 4 * weights * scales);
    return {fit < most_stages ? fit : most_stages, bytes, scales};
  }
};
static_assert(RingSize::of(most_blocks, true, 1, turned_bytes).stages >= 4 && RingSize::of(most_blocks / 2, true, 2, 0).stages >= 4);

/// Sizes of boxes of rows, in which they are brought.
constexpr int row_sizes = 7;
__host__ __device__ constexpr int32_t row_size(int index) { return index < 4 ? 8 << index : 64 * (index - 2); }
__host__ __device__ constexpr int size_index(int32_t rows) { return rows <= 8 ? 0 : rows <= 16 ? 1 : rows <= 32 ? 2 : (rows + 63) / 64 + 2; }

/// A matrix of the contraction, or several of one size that rows choose among.
struct Weight {
  CUtensorMap lines; // of packed tiles, in boxes of a tile: copies of plain runs of bytes are slower
  const float *scales;
  int32_t columns, tiles, first; // columns of the result, blocks of 128 of them, and the number of the first block among those of all weights
};
constexpr int most_weights = 4;
/// Blocks that tiles are dealt out to: linear.ts has scratch for their sums.
constexpr uint32_t most_dealt = 144;
constexpr int64_t sums_left = 256 * 128; // by one block at most

struct Problem {
  Weight w[most_weights];
  CUtensorMap x[row_sizes]; // rows of x as they are or as they were packed, in boxes of each size
  bool direct;              // rows are taken as they are, with scales `xs` [row][step]
  const s3_head *heads;     // of segments of rows; null: there are `heads_rows`, else so many for each of theirs
  int32_t heads_rows, distance, capacity; // from the start of one segment to that of the next, and of all
  const float *xs;
  Packed packed;
  int32_t weights, tiles, steps; // weights, their blocks of columns altogether, lines along k
  int32_t first;                 // number of the first weight among those of the launch, where pairs count as one
  int32_t groups;                // matrices of each weight, or segments
  int32_t blocks, row_tiles;     // 64s of rows of a tile at most, tiles of a segment
  uint32_t together, parts;      // blocks of a couple, or 1, and how many of those a cluster has, which share k
  bool zeros;                    // rows that meet no matrix get results of zeros
  bool keeps;                    // results are packed as the rows are, for a contraction of the same rows
  bool columns_first;            // of items that are dealt out; else those with the same weights follow each other
  bool dealt;                    // tiles are dealt out, to couples; else a block knows its only one before it knows how many rows there are
  float *left;                   // sums for each of the blocks to go on with
  uint32_t *ready;               // of each of them, whether they are there

  /// the weight that a block of columns is of
  __device__ __forceinline__ int weight_of(int32_t tile) const {
    int which = 0;
    while (which + 1 < weights && tile >= w[which + 1].first) ++which;
    return which;
  }
};

/// Problems with the same number of steps and weights of a tile, whose tiles are dealt out together.
template <int Many>
struct Work {
  static constexpr int many = Many;
  Problem of[Many];

  __device__ __forceinline__ const Problem &at(int32_t number) const { return of[Many == 1 ? 0 : number]; }
};

}  // namespace s3::hopper
