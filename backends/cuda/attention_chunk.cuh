// Attention of chunks on Hopper: two consecutive tokens of a sequence at a time, a warpgroup each, over the same tiles of keys and values.
//
// Rows 2p and 2p + 1 of a launch are a pair when the second is one position further in the same pages; that is found out here, from positions
// and the page table. Other rows are units of one row, of which one warpgroup takes all tiles. Blocks take whole units.
// Each warpgroup multiplies a tile's weights by its values while it makes the softmax of the next tile. For bf16 only: codes need registers for
// the sums of each tile besides, and the softmax takes as long as the products.
#pragma once
#include "attention_hopper.cuh"

namespace s3 {

/// Whether the pages of two rows are the same, up to that of a position.
__device__ __forceinline__ bool same_pages(const int32_t *a, const int32_t *b, int last) {
  constexpr int at_once = 32;
  int32_t differences = 0;
  for (int i = 0; differences == 0 && i <= last / page_tokens; i += at_once) {
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      const int page = min(i + j, last / page_tokens);
      differences |= a[page] ^ b[page];
    }
  }
  return differences == 0;
}

/// Notes the tiles of each row alone, and which rows are pairs; by all threads. Whether rows are to be attended in pairs: when nearly all of them
/// are, there are more rows than blocks, and all blocks have about the same number of tiles of whole pairs. (Were these divided, there would be two
/// rows' sums to add up, which costs more than pairs save.)
template <int Parts>
__device__ __forceinline__ bool find_pairs(const PairedRows &rows, const int32_t *pages, int pages_of_row, uint32_t *notes, uint32_t *pairs, uint32_t blocks) {
  const uint32_t lane = threadIdx.x % 32;
  bool any = false, any_pair = false;
  for (uint32_t first = threadIdx.x - lane; 2 * first < min(rows.count, max(rows.noted, 2 * most_pairs)); first += blockDim.x) {
    const uint32_t row = 2 * (first + lane), a = min(row, rows.count - 1), b = min(row + 1, rows.count - 1);
    const int32_t *const a_pages = pages + static_cast<int64_t>(a) * pages_of_row, *const b_pages = pages + static_cast<int64_t>(b) * pages_of_row;
    // loads of all of these at once: what lies past the rows is not used
    const int32_t a_last = rows.position[a], b_last = rows.position[b], a_page = a_pages[0], b_page = b_pages[0];
    const bool a_there = row < rows.count && is_token(rows.heads, rows.stride, a), b_there = row + 1 < rows.count && is_token(rows.heads, rows.stride, b);
    if (row < min(rows.count, rows.noted)) notes[row] = a_there ? static_cast<uint32_t>(a_last) / page_tokens + 1 : 0;
    if (row + 1 < min(rows.count, rows.noted)) notes[row + 1] = b_there ? static_cast<uint32_t>(b_last) / page_tokens + 1 : 0;
    const bool paired = a_there && b_there && row / 2 < most_pairs && a_last + 1 == b_last && a_page == b_page && same_pages(a_pages, b_pages, b_last);
    const uint32_t all = __ballot_sync(0xffffffffu, paired);
    if (lane == 0 && first < most_pairs) pairs[first / 32] = all;
    any |= a_there;
    any_pair |= paired;
  }
  const int with_rows = __syncthreads_count(any), with_pairs = __syncthreads_count(any_pair);
  if (with_pairs == 0 || 8 * with_pairs < 7 * with_rows) return false; // the same for all blocks
  return Load::of<Parts>(static_cast<const Rows &>(rows), blocks).units > blocks && Load::of<Parts>(rows, blocks).whole(pair_slack);
}

/// The results of a row of a unit, which lie in shared memory as keys in a page; by a warpgroup.
template <int Dim>
__device__ __forceinline__ void write_row(const uint8_t *results, int rows, bf16 *out, int thread) {
#pragma unroll 4
  for (int i = thread; i < rows * Dim / 8; i += 128) {
    const int row = i / (Dim / 8), d = i % (Dim / 8) * 8;
    *reinterpret_cast<uint4 *>(out + i * 8) = *reinterpret_cast<const uint4 *>(results + Page<bf16, Dim>::key(row, d));
  }
}

/// `count` tiles of a row from number `tile` of the ring on, of which `left` tokens take part and `there` hold anything.
template <int Dim>
__device__ __forceinline__ void attend_tiles(Running<Dim> &r, typename HopperShape<bf16, Dim>::Control &control, uint8_t *ring, uint32_t tile, int count, int left,
                                             int there, uint32_t q, float factor, int thread) {
  using namespace hopper;
  using S = HopperShape<bf16, Dim>;
  if (count == 0) return;
  RingPlace<S::chunk_stages> key(tile), value(tile);
  const float factors[2] = {factor, factor};
  float s[32], kept[2];
  uint32_t p[16];
  const auto stage_at = [&](const RingPlace<S::chunk_stages> &place) { return ring + place.stage() * (2 * S::half); };
  const auto begin_scores = [&] {
    control.key_full[key.full].wait(key.phase);
    product_fence();
    multiply_keys<bf16, Dim>(s, q, same_in_warp(shared_address(stage_at(key))));
    product_commit();
  };
  const auto end_scores = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) pin(s[i]);
    give_back(control.empty[key.stage()]);
    key.advance(1);
    if (left < page_tokens) leave_out(s, left, thread);
    return soften(r, s, factors, 0.0f, kept);
  };
  const auto take_weights = [&] {
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
  };
  const auto begin_values = [&] {
    control.value_full[value.full].wait(value.phase);
    product_fence();
    multiply_values<Dim>(r.sums, p, values_at<bf16, Dim>(same_in_warp(shared_address(stage_at(value)))));
    product_commit();
  };
  const auto end_values = [&] {
#pragma unroll
    for (int i = 0; i < Dim / 2; ++i) pin(r.sums[i]);
    give_back(control.value_empty[value.stage()]);
    value.advance(1);
  };

  begin_scores();
  product_wait<0>();
  end_scores();
  take_weights();
  for (int i = 1; i < count; ++i) {
    begin_scores();
    begin_values();
    left -= page_tokens;
    product_wait<1>();
    const bool moved = end_scores();
    product_wait<0>();
    end_values();
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int j = 0; j < Dim / 2; ++j) r.sums[j] *= kept[j / 2 % 2];
    }
    take_weights();
  }
  // the last tile; not in the loop, which is slower with it
  if (const int rest = there - (count - 1) * page_tokens; rest < page_tokens) { // the other warpgroup may write the same zeros
    control.value_full[value.full].wait(value.phase);
    clear_values<bf16, Dim>(stage_at(value) + S::half, nullptr, rest, thread);
    fence_async();
    meet(2 + threadIdx.x / 128, 128);
  }
  begin_values();
  product_wait<0>();
  end_values();
}

template <int Heads, int Group, int Dim, class From, class To>
__device__ __forceinline__ void compute_chunk(typename HopperShape<bf16, Dim>::Control &control, uint8_t *queries, uint8_t *ring, const From &from_queries, float scale,
                                              const To &to_results) {
  using S = HopperShape<bf16, Dim>;
  const int thread = static_cast<int>(threadIdx.x % 128), group = static_cast<int>(threadIdx.x / 128), row = thread / 32 * 16 + thread % 32 / 4;
  uint8_t *const second_queries = ring + S::chunk_stages * (2 * S::half), *const own_queries = group == 0 ? queries : second_queries;
  const float to_powers = scale * 1.44269504f; // e^x = 2^(x log2 e)
  Running<Dim> r;
  uint32_t tile = 0, unit = 0, unit_phase = 0;
  after_predecessor();
  for (;;) {
    control.unit_full[unit].wait(unit_phase);
    const Unit &u = control.units[unit];
    if (u.row < 0) return;
    hopper::meet(1, 256); // nobody reads the unit before, its queries and results any more
    if (thread == 0 && tile > 0) control.unit_empty[(unit + units_ahead - 1) % units_ahead].arrive();
    if (++unit == units_ahead) unit = 0, unit_phase ^= 1;

    const auto place_of_row = [&](int i) { return (static_cast<int64_t>(u.row + i) * Heads * Group + head_of<Group>(u.part)) * Dim; };
    const auto heads_of_unit = [&] { return min(group_rows, Group - head_of<Group>(u.part) % Group); };
#pragma unroll 1
    for (int i = 0; i < u.rows; ++i) {
      const int heads = heads_of_unit();
      uint8_t *const to = i == 0 ? queries : second_queries;
      QueryRowsOf<From, Dim> rows;
      load_queries(rows, from_queries, place_of_row(i), heads, u.last_position + i);
      rows.template store<bf16>(to, nullptr, to_powers);
    }
    hopper::fence_async();
    hopper::meet(1, 256);

#pragma unroll
    for (int i = 0; i < Dim / 2; ++i) r.sums[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) r.maximum[i] = -infinity, r.total[i] = 0.0f;

    const bool works = group < u.rows;
    const int tokens = u.last_position + 1 + group, own = works ? (tokens + page_tokens - 1) / page_tokens : 0; // of this row
    attend_tiles<Dim>(r, control, ring, tile, own, tokens, u.last_position + u.rows, hopper::shared_address(own_queries), to_powers, thread);
    for (int i = own; i < u.count; ++i) { // tiles that only the other row has
      const RingPlace<S::chunk_stages> place(tile + i);
      control.key_full[place.full].wait(place.phase);
      control.value_full[place.full].wait(place.phase);
      give_back(control.empty[place.stage()]);
      give_back(control.value_empty[place.stage()]);
    }
    tile += static_cast<uint32_t>(u.count);
    const int heads = heads_of_unit();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      r.total[i] += __shfl_xor_sync(0xffffffffu, r.total[i], 1);
      r.total[i] += __shfl_xor_sync(0xffffffffu, r.total[i], 2);
    }
    if (!works) continue;
    const float norm[2] = {1.0f / r.total[0], 1.0f / r.total[1]};
    hopper::meet(2 + group, 128); // all warps have multiplied the queries
#pragma unroll
    for (int i = 0; i < Dim / 8; ++i) {
      *reinterpret_cast<uint32_t *>(own_queries + Page<bf16, Dim>::key(row, i * 8 + thread % 4 * 2)) = pack_bf16(r.sums[4 * i] * norm[0], r.sums[4 * i + 1] * norm[0]);
      *reinterpret_cast<uint32_t *>(own_queries + Page<bf16, Dim>::key(row + 8, i * 8 + thread % 4 * 2)) = pack_bf16(r.sums[4 * i + 2] * norm[1], r.sums[4 * i + 3] * norm[1]);
    }
    hopper::meet(2 + group, 128);
    if constexpr (To::quantised) quantise_row<Dim, 4>(own_queries, heads, to_results, place_of_row(group));
    else write_row<Dim>(own_queries, heads, to_results.out + place_of_row(group), thread);
  }
}

}  // namespace s3
