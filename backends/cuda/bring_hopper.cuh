// What the four warps that do not multiply do in a contraction on Hopper: a thread brings lines of weights through the ring in shared memory, a warp
// those of rows, two warps the scales.
#pragma once
#include "deal_hopper.cuh"
#include "multiply_hopper.cuh"

namespace s3::hopper {

/// Rows that a lane of the warps that bring scales has: 4 lane .. 4 lane + 3 of the first 128 of an item and of the next. Where they lie, and how many
/// there are of them.
struct ScaledRows {
  int32_t at[2], count[2];

  /// of the rows from `row` to `end`, which lie so
  __device__ __forceinline__ ScaledRows(int32_t row, int32_t end) {
#pragma unroll
    for (int f = 0; f < 2; ++f) at[f] = row + 128 * f + 4 * (threadIdx.x % 32), count[f] = end - at[f];
  }
  template <class Of>
  __device__ __forceinline__ ScaledRows(const Problem &p, const Of &of, const Item &item) : ScaledRows(item.row, item.end) {
    if (p.direct && p.dealt)
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        if (count[f] <= 0) continue;
        const int32_t segment = of.segment_of(p.groups, at[f]), place = at[f] - of.before[segment];
        at[f] = of.groups[segment].base + place, count[f] = of.groups[segment].count - place;
      }
  }
};

/// What one of the warps that bring scales has of two steps: those of eight rows a lane.
template <int Weights>
struct Scales {
  float x[2][2][4], w[Weights][2]; // x[.][step][row]

  /// Of steps 2 pair and 2 pair + 1; `ws`: of the block of columns.
  __device__ __forceinline__ void load(const Problem &p, const float *const (&ws)[Weights], int32_t pair, const ScaledRows &rows) {
    const int32_t step = 2 * pair;
    if (step >= p.steps) return;
    const bool both = step + 1 < p.steps;
#pragma unroll
    for (int n = 0; n < Weights; ++n) {
      w[n][0] = ws[n][step];
      if (both) w[n][1] = ws[n][step + 1];
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if (rows.count[f] <= 0) continue;
      if (p.direct) {
        const float *const xs = p.xs + int64_t{rows.at[f]} * p.steps + step;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (r >= rows.count[f]) continue;
          if (p.steps % 2 == 0) {
            const float2 two = *reinterpret_cast<const float2 *>(xs + r * p.steps);
            x[f][0][r] = two.x, x[f][1][r] = two.y;
          } else {
            x[f][0][r] = xs[r * p.steps];
            if (both) x[f][1][r] = xs[r * p.steps + 1];
          }
        }
      } else {
        const float *const xs = p.packed.scales + int64_t{step} * p.packed.places + rows.at[f];
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (k == 0 || both) {
            const float4 four = *reinterpret_cast<const float4 *>(xs + k * p.packed.places);
            x[f][k][0] = four.x, x[f][k][1] = four.y, x[f][k][2] = four.z, x[f][k][3] = four.w;
          }
      }
    }
  }
  /// Those of step k of the two, to `to` and for each further weight `apart` behind.
  __device__ __forceinline__ void store(float *to, uint32_t apart, int k, int32_t rows) const {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int from = 128 * f + 4 * (threadIdx.x % 32);
      if (from >= rows) continue;
#pragma unroll
      for (int n = 0; n < Weights; ++n)
        *reinterpret_cast<float4 *>(to + n * apart + from) = {x[f][k][0] * w[n][k], x[f][k][1] * w[n][k], x[f][k][2] * w[n][k], x[f][k][3] * w[n][k]};
    }
    __syncwarp();
  }
};

/// Rows of an item that are brought at once: the first of them in the item and in memory, and which of the sizes.
struct Box {
  int32_t to, row;
  int size;
};
/// A lane's box of an item's rows, which lie in segments, and how many boxes there are: one for each lane at most, since segments take whole eights.
template <class Of>
__device__ __forceinline__ int cut_boxes(const Problem &p, const Of &of, const Item &item, Box &own) {
  const int32_t room = item.blocks * block_rows;
  int32_t segment = of.segment_of(p.groups, item.row);
  int count = 0;
  for (int32_t row = item.row; row < item.end; ++count) {
    while (segment + 1 < p.groups && of.before[segment + 1] <= row) ++segment;
    const int32_t stop = segment + 1 < p.groups ? min(of.before[segment + 1], item.end) : item.end, to = row - item.row;
    int size = size_index(stop - row);
    if (row_size(size) > stop - row && (stop < item.end || to + row_size(size) > room)) --size; // more would be over others
    if (count == threadIdx.x % 32) own = {to, of.groups[segment].base + row - of.before[segment], size};
    row += row_size(size);
  }
  return count;
}

/// What a thread of those warps knows. Places in the ring and pairs of steps go on from item to item.
template <class O, int Weights, int Many, class Table>
struct Bringer {
  const Work<Many> &work;
  const Table &table;
  uint8_t *ring;
  RingSize size;
  Barrier *full, *empty;
  uint32_t of_couple, couple; // which of its blocks this is, and its first block in the cluster
  int32_t turn = static_cast<int32_t>(threadIdx.x) / 32 - 1; // of a warp that brings scales: pairs of steps of the other before its next one
  Scales<Weights> own;
  bool loaded = false;  // those of the next pair of steps
  int32_t ahead = 0;    // steps whose lines were brought beforehand
  Place at{};
  int32_t brought = 0;

  __device__ __forceinline__ Bringer(const Work<Many> &work_, const Table &table_, uint8_t *ring_, RingSize size_, Barrier *full_, Barrier *empty_)
      : work(work_), table(table_), ring(ring_), size(size_), full(full_), empty(empty_) {
    const uint32_t rank = block_of_cluster();
    of_couple = rank % work.of[0].together, couple = rank - of_couple;
  }
  static __device__ __forceinline__ bool weights_thread() { return threadIdx.x == 0; }
  static __device__ __forceinline__ bool scales_warp() { return O::step_scales && threadIdx.x >= 32 && threadIdx.x < 96; }
  static __device__ __forceinline__ bool rows_warp() { return threadIdx.x >= 96; }

  /// A block of columns, or the last one for one past it.
  static __device__ __forceinline__ int32_t tile_of(const Problem &p, int32_t tile) { return min(tile, p.tiles - 1); }
  static __device__ __forceinline__ int weight_of(const Problem &p, int32_t tile) { return Weights > 1 ? 0 : p.weight_of(tile); }
  // What both of a couple need, they bring in turns.
  __device__ __forceinline__ bool in_turn(int32_t step) const { return static_cast<uint32_t>(step) % 2 == of_couple; }
  __device__ __forceinline__ void bring(uint8_t *to, const CUtensorMap *map, int32_t x, int32_t y, bool common, uint32_t stage, uint64_t hint) const {
    if (common) tensor_copy_to(static_cast<uint16_t>(3 << couple), to, map, x, y, full[stage], hint);
    else tensor_copy(to, map, x, y, full[stage], hint);
  }
  __device__ __forceinline__ void bring_weights(const Problem &p, int32_t matrix, int32_t tile, bool alone, bool common, int32_t step, uint32_t stage) const {
    full[stage].expect(Weights * tile_bytes);
    if (common && !in_turn(step)) return;
#pragma unroll
    for (int n = 0; n < Weights; ++n) {
      const Weight &w = p.w[weight_of(p, tile) + n];
      bring(ring + stage * size.stage_bytes + n * tile_bytes, &w.lines, 0, ((matrix * w.tiles + tile - w.first) * p.steps + step) * tile_columns, common, stage, alone ? read_once : read_again);
    }
  }
  __device__ __forceinline__ void bring_rows(const Problem &p, const Box &box, bool common, int32_t step, uint32_t stage) const {
    if (common && !in_turn(step)) return;
    const int32_t x = p.direct ? step * line_bytes : 0, y = p.direct ? box.row : static_cast<int32_t>(step * p.packed.places) + box.row;
    bring(ring + stage * size.stage_bytes + Weights * tile_bytes + box.to * line_bytes, &p.x[box.size], x, y, common, stage, read_often);
  }
  __device__ __forceinline__ void scales_of(const Problem &p, int32_t matrix, int32_t tile, const float *(&ws)[Weights]) const {
#pragma unroll
    for (int n = 0; n < Weights; ++n) {
      const Weight &w = p.w[weight_of(p, tile) + n];
      ws[n] = w.scales + int64_t{matrix * w.tiles + tile - w.first} * p.steps;
    }
  }
  __device__ __forceinline__ float *scales_at(uint32_t stage) const { return reinterpret_cast<float *>(ring + size.stages * size.stage_bytes) + stage * Weights * size.scales; }

  /// Waits until all that was brought has been read, in both blocks of the couple.
  __device__ __forceinline__ void drain() {
    if (!weights_thread() && !scales_warp() && !rows_warp()) return;
    for (uint32_t i = 0; i < size.stages; ++i, at.advance(size.stages)) empty[at.stage].wait(at.phase ^ 1);
  }
  /// All that an item needs, as far as it is this thread's.
  __device__ __forceinline__ void item(const Item &item) {
    const Problem &p = work.at(item.problem);
    if (weights_thread()) {
      const int32_t tile = tile_of(p, item.tile);
      for (int32_t step = item.first; step < item.last; ++step, at.advance(size.stages), ++brought) {
        if (brought < ahead) continue;
        empty[at.stage].wait(at.phase ^ 1);
        bring_weights(p, item.matrix, tile, item.alone, item.common == Common::weights, step, at.stage);
      }
    } else if (rows_warp()) {
      const int lane = threadIdx.x % 32;
      Box box{0, item.row, size_index(item.rows)};
      const int boxes = p.direct && p.dealt ? cut_boxes(p, table.at(item.problem), item, box) : 1;
      const uint32_t bytes = line_bytes * __reduce_add_sync(0xFFFFFFFFu, lane < boxes ? row_size(box.size) : 0);
      for (int32_t step = item.first; step < item.last; ++step, at.advance(size.stages), ++brought) {
        if (brought < ahead) continue;
        if (lane == 0) {
          empty[at.stage].wait(at.phase ^ 1);
          full[at.stage].expect(bytes);
        }
        __syncwarp();
        if (lane < boxes) bring_rows(p, box, item.common == Common::rows, step, at.stage);
      }
    } else if (scales_warp()) {
      // The two take turns with pairs of steps; the loads of one are on their way while the other has its own. A phase of a barrier is known by its
      // parity alone: a warp waits for its own steps only, which nobody passes before it, and which are less than a round of the ring apart.
      const float *ws[Weights];
      scales_of(p, item.matrix, tile_of(p, item.tile), ws);
      const ScaledRows rows(p, table.at(item.problem), item);
      const int32_t pairs = (item.last + 1) / 2;
      int32_t mine = item.first / 2 + turn;
      if (!loaded && mine < pairs) own.load(p, ws, mine, rows);
      loaded = false;
      for (int32_t pair = item.first / 2; pair < pairs; ++pair) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int32_t step = 2 * pair + k;
          if (step < item.first || step >= item.last) continue;
          if (pair == mine) {
            empty[at.stage].wait(at.phase ^ 1);
            own.store(scales_at(at.stage), size.scales, k, item.blocks * block_rows);
            if (threadIdx.x % 32 == 0) full[at.stage].arrive();
          }
          at.advance(size.stages);
        }
        if (pair == mine) {
          mine += 2;
          if (mine < pairs) own.load(p, ws, mine, rows);
        }
      }
      turn = mine - pairs;
    }
  }
};

}  // namespace s3::hopper
