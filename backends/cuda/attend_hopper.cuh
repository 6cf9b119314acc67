// The kernel of attention on Hopper: rows on their own as attention_hopper.cuh has them, chunks in pairs of rows as attention_chunk.cuh has them.
#pragma once
#include "attention_chunk.cuh"

namespace s3 {

template <class E, int Heads, int Group, int Dim, class From, class To>
__global__ void __launch_bounds__(384, 1) attend_hopper_kernel(const s3_head *heads, uint32_t segments, uint32_t stride, From queries, const uint8_t *pool,
                                                               const int32_t *pages, const int32_t *position, int pages_of_row, float scale, To results,
                                                               uint8_t *scratch, uint32_t *counters) {
  using S = HopperShape<E, Dim>;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t *const ring = shared + S::query;
  auto &control = *reinterpret_cast<typename S::Control *>(ring + S::stages * S::stage);
  let_successor_start();
  uint32_t *const notes = reinterpret_cast<uint32_t *>(ring); // where the first tile comes later
  const PairedRows rows{{heads, position, stride, segments * stride, S::stage / 4, notes}, control.pairs};
  bool chunk = false;
  if constexpr (!S::codes) {
    chunk = find_pairs<Heads * ((Group + group_rows - 1) / group_rows)>(rows, pages, pages_of_row, notes, control.pairs, gridDim.x);
  } else {
    for (uint32_t row = threadIdx.x; row < min(rows.count, rows.noted); row += blockDim.x) notes[row] = rows.tiles_alone(row);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * S::stages; ++i) control.key_full[i].init(1), control.value_full[i].init(1);
    for (int i = 0; i < S::stages; ++i) control.empty[i].init(chunk ? 8 : 4), control.value_empty[i].init(8); // warps that multiply a tile
    for (int i = 0; i < units_ahead; ++i) control.unit_full[i].init(1), control.unit_empty[i].init(2);
    hopper::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    hopper::give_registers<40>();
    if (threadIdx.x >= 288) return;
    if constexpr (!S::codes)
      if (chunk) return fetch<E, Heads, Group, Dim, true>(control, ring, rows, segments, queries, pool, pages, pages_of_row);
    fetch<E, Heads, Group, Dim, false>(control, ring, static_cast<const Rows &>(rows), segments, queries, pool, pages, pages_of_row);
  } else {
    hopper::take_registers<232>();
    if constexpr (!S::codes)
      if (chunk) return compute_chunk<Heads, Group, Dim>(control, shared, ring, queries, scale, results);
    compute<E, Heads, Group, Dim>(control, shared, ring, queries, scale, results, scratch, counters);
  }
}

/// Attention of every row of a launch over cache positions 0 .. position[row]; `Group` query heads share a KV head. `scale` is above 0.
/// QuantisedResults: the heads of a group of columns share a KV head.
template <class Q, class E, int Heads, int Group, int Dim, class From, class To>
cudaError_t attend_hopper(const Call &c, const From &queries, const uint8_t *pool, const int32_t *pages, const int32_t *position, int pages_of_row, float scale,
                          const To &results) {
  static_assert(!To::quantised || Group * Dim % result_group == 0);
  using S = HopperShape<E, Dim>;
  const uint32_t blocks = static_cast<uint32_t>(c.processors) < most_blocks ? static_cast<uint32_t>(c.processors) : most_blocks;
  return launch(attend_hopper_kernel<E, Heads, Group, Dim, From, To>, dim3(c.stride == 0 ? 0 : blocks), dim3(384), S::shared, c, c.heads, c.segments, c.stride, queries,
                pool, pages, position, pages_of_row, scale, results, c.scratch, c.counters);
}

}  // namespace s3
