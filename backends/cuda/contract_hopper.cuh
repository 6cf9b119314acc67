// Contractions by the matrix units of Hopper: products of a warpgroup over weights packed as layout.ts packs them.
//
// Blocks of 128 columns of the result (128 lines of the weight: B of the products) meet tiles of up to 256 rows (A: 64 lines each), so that a thread
// has two scales for all that it adds up of 64 rows. A thread brings lines of 128 bytes of weights through a ring in shared memory, a warp those of
// rows, two warps the scales; two warpgroups multiply (multiply_hopper.cuh). deal_hopper.cuh says which block does what. Rows are taken where they lie;
// those of experts, and rows that do not start at multiples of 16 bytes, are first gathered by a small kernel (pack_rows.cuh).
//
// Several weights that meet the same rows are done in one launch: the blocks of columns of one follow those of the other. Where the results of two
// meet, a block has the same columns of both, of up to 128 rows.
#pragma once
#include <algorithm>

#include "multiply_hopper.cuh"

namespace s3::hopper {

constexpr uint32_t most_cluster = 8; // blocks: the most that every GPU with clusters has

/// 64s of rows of a tile: sums by two weights leave registers for half as many.
template <class Finish>
constexpr int32_t most_of = Finish::pairs ? most_blocks / 2 : most_blocks;

constexpr int contract_threads = 384;

/// Rows that a lane of the warps that bring scales has: 4 lane .. 4 lane + 3 of the first 128 of an item and of the next. Where they lie, and how many
/// there are of them.
struct ScaledRows {
  int32_t at[2], count[2];

  /// of the rows from `row` to `end`, which lie so
  __device__ __forceinline__ ScaledRows(int32_t row, int32_t end) {
#pragma unroll
    for (int f = 0; f < 2; ++f) at[f] = row + 128 * f + 4 * (threadIdx.x % 32), count[f] = end - at[f];
  }
  __device__ __forceinline__ ScaledRows(const Problem &p, const Table &table, const Item &item) : ScaledRows(item.row, item.end) {
    if (p.direct && p.dealt)
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        if (count[f] <= 0) continue;
        const int32_t segment = table.segment_of(p.groups, at[f]), place = at[f] - table.before[segment];
        at[f] = table.groups[segment].base + place, count[f] = table.groups[segment].count - place;
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
__device__ __forceinline__ int cut_boxes(const Problem &p, const Table &table, const Item &item, Box &own) {
  const int32_t room = item.blocks * block_rows;
  int32_t segment = table.segment_of(p.groups, item.row);
  int count = 0;
  for (int32_t row = item.row; row < item.end; ++count) {
    while (segment + 1 < p.groups && table.before[segment + 1] <= row) ++segment;
    const int32_t stop = segment + 1 < p.groups ? min(table.before[segment + 1], item.end) : item.end, to = row - item.row;
    int size = size_index(stop - row);
    if (row_size(size) > stop - row && (stop < item.end || to + row_size(size) > room)) --size; // more would be over others
    if (count == threadIdx.x % 32) own = {to, table.groups[segment].base + row - table.before[segment], size};
    row += row_size(size);
  }
  return count;
}

template <class O, class Finish>
__global__ void __launch_bounds__(contract_threads, 1) contract_kernel(const __grid_constant__ Problem p, const __grid_constant__ Finish finish) {
  extern __shared__ uint8_t shared_memory[];
  constexpr int weights = Finish::pairs ? 2 : 1, most = most_of<Finish>; // of a tile
  __shared__ Barrier full[most_stages], empty[most_stages];
  __shared__ Table table;
  __shared__ uint32_t maxima[4 * 2 * 16];
  uint8_t *const ring = shared_memory + (1024 - shared_address(shared_memory) % 1024) % 1024;

  const bool clustered = p.together * p.parts > 1;
  const uint32_t rank = block_of_cluster(), part = rank / p.together, of_couple = rank % p.together;
  RingSize size = RingSize::of(p.blocks, O::step_scales, weights);
  let_successor_start();
  const auto tile_of = [&](int32_t tile) { return min(tile, p.tiles - 1); };
  const auto weight_of = [&](int32_t tile) { return weights > 1 ? 0 : p.weight_of(tile); };
  // What both of a couple need, they bring in turns.
  const auto in_turn = [&](int32_t step) { return static_cast<uint32_t>(step) % 2 == of_couple; };
  const auto bring = [&](uint8_t *to, const CUtensorMap *map, int32_t x, int32_t y, bool common, uint32_t stage, uint64_t hint) {
    if (common) tensor_copy_to(static_cast<uint16_t>(3 << (rank - of_couple)), to, map, x, y, full[stage], hint);
    else tensor_copy(to, map, x, y, full[stage], hint);
  };
  const auto bring_weights = [&](int32_t matrix, int32_t tile, bool alone, bool common, int32_t step, uint32_t stage) {
    full[stage].expect(weights * tile_bytes);
    if (common && !in_turn(step)) return;
#pragma unroll
    for (int n = 0; n < weights; ++n) {
      const Weight &w = p.w[weight_of(tile) + n];
      bring(ring + stage * size.stage_bytes + n * tile_bytes, &w.lines, 0, ((matrix * w.tiles + tile - w.first) * p.steps + step) * tile_columns, common, stage, alone ? read_once : read_again);
    }
  };
  const auto bring_rows = [&](const Box &box, bool common, int32_t step, uint32_t stage) {
    if (common && !in_turn(step)) return;
    const int32_t x = p.direct ? step * line_bytes : 0, y = p.direct ? box.row : static_cast<int32_t>(step * p.packed.places) + box.row;
    bring(ring + stage * size.stage_bytes + weights * tile_bytes + box.to * line_bytes, &p.x[box.size], x, y, common, stage, read_often);
  };
  const auto scales_of = [&](int32_t matrix, int32_t tile, const float *(&ws)[weights]) {
#pragma unroll
    for (int n = 0; n < weights; ++n) {
      const Weight &w = p.w[weight_of(tile) + n];
      ws[n] = w.scales + int64_t{matrix * w.tiles + tile - w.first} * p.steps;
    }
  };
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < most_stages; ++i) {
      full[i].init(O::step_scales ? 3 : 2); // lines of weights, lines of rows, scales
      empty[i].init(8 * p.together);        // warps that add up
    }
    publish_barriers();
    table.ring = size;
  }
  if (clustered) arrive_with_barriers();
  __syncthreads();
  if (threadIdx.x >= 64 && threadIdx.x < 64 + row_sizes) prefetch_map(&p.x[threadIdx.x - 64]);
  if (threadIdx.x >= 32 && threadIdx.x < 32 + p.weights) prefetch_map(&p.w[threadIdx.x - 32].lines);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool brings_weights = threadIdx.x == 0, brings_scales = O::step_scales && (warp == 1 || warp == 2), brings_rows = warp == 3;
  // Where the only item is known before anything of rows is: weights are brought before the predecessor has ended, and as many rows as there may be
  // before it is known how many there are.
  const int32_t row_tiles = p.groups * p.row_tiles, item_rows = p.blocks * block_rows, known = cluster_of_block();
  const int32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
  const int32_t ahead = p.dealt ? 0 : min(last - first, static_cast<int32_t>(size.stages));
  int32_t turn = warp - 1; // of a warp that brings scales: pairs of steps of the other before its next one
  Scales<weights> own;
  const float *ws[weights];
  if (!p.dealt) {
    const int32_t tile = tile_of(known / row_tiles * p.together + of_couple), place = known % row_tiles;
    const int32_t row = place / p.row_tiles * p.distance + place % p.row_tiles * item_rows;
    if (brings_weights)
      for (int32_t i = 0; i < ahead; ++i) bring_weights(0, tile, row_tiles == 1, false, first + i, i);
    __syncwarp();
    if (clustered) wait_for_cluster(); // the barriers of others can be used
    if (brings_rows && lane == 0) {
      const Box box{0, row, size_index(item_rows)};
      after_predecessor();
      for (int32_t i = 0; i < ahead; ++i) {
        full[i].expect(item_rows * line_bytes);
        bring_rows(box, p.together > 1, first + i, i);
      }
    } else if (brings_scales) {
      scales_of(0, tile, ws);
      const int32_t ahead_of = first + 32 * lane;
      if (warp == 1 && ahead_of < last)
#pragma unroll
        for (int n = 0; n < weights; ++n) prefetch(ws[n] + ahead_of);
      after_predecessor();
      const ScaledRows rows(row, min(row + item_rows, p.capacity));
      const int32_t mine = first / 2 + turn;
      own.load(p, ws, mine, rows);
      for (int k = 0; k < 2; ++k) {
        const int32_t step = 2 * mine + k;
        if (step < first || step >= last) continue;
        own.store(reinterpret_cast<float *>(ring + size.stages * size.stage_bytes) + (step - first) * weights * size.scales, size.scales, k, item_rows);
        if (lane == 0) full[step - first].arrive();
      }
      if (2 * mine < last) {
        turn += 2;
        own.load(p, ws, mine + 2, rows);
      }
    }
    __syncwarp();
  }
  after_predecessor();
  if (p.direct) {
    for (int i = threadIdx.x; i < p.groups; i += contract_threads)
      table.groups[i] = {i * p.distance, p.heads == nullptr ? p.heads_rows : static_cast<int32_t>(p.heads[i].rows) * p.heads_rows};
  } else {
    for (int i = threadIdx.x; i <= p.groups; i += contract_threads) table.groups[i] = p.packed.groups[i];
  }
  __syncthreads();
  if (warp == 0) {
    if (p.dealt) deal<weights>(p, O::step_scales, table);
    Items<weights>::list(p, table, 0);
  }
  __syncthreads();
  if (p.dealt) wait_for_cluster();
  size = table.ring;

  Items<weights> items(p, table);
  float *const scales = reinterpret_cast<float *>(ring + size.stages * size.stage_bytes);
  if (threadIdx.x < 128) {
    give_registers<72>();
    Place at;
    int32_t brought = 0;
    bool loaded = !p.dealt;
    while (items.next()) {
      const Item item = items.item();
      if (brings_weights) {
        const int32_t tile = tile_of(item.tile);
        for (int32_t step = item.first; step < item.last; ++step, at.advance(size.stages), ++brought) {
          if (brought < ahead) continue;
          empty[at.stage].wait(at.phase ^ 1);
          bring_weights(item.matrix, tile, item.alone, item.common == Common::weights, step, at.stage);
        }
      } else if (brings_rows) {
        Box box{0, item.row, size_index(item.rows)};
        const int boxes = p.direct && p.dealt ? cut_boxes(p, table, item, box) : 1;
        const uint32_t bytes = line_bytes * __reduce_add_sync(0xFFFFFFFFu, lane < boxes ? row_size(box.size) : 0);
        for (int32_t step = item.first; step < item.last; ++step, at.advance(size.stages), ++brought) {
          if (brought < ahead) continue;
          if (lane == 0) {
            empty[at.stage].wait(at.phase ^ 1);
            full[at.stage].expect(bytes);
          }
          __syncwarp();
          if (lane < boxes) bring_rows(box, item.common == Common::rows, step, at.stage);
        }
      } else if (brings_scales) {
        // The two take turns with pairs of steps; the loads of one are on their way while the other has its own. A phase of a barrier is known by its
        // parity alone: a warp waits for its own steps only, which nobody passes before it, and which are less than a round of the ring apart.
        scales_of(item.matrix, tile_of(item.tile), ws);
        const ScaledRows rows(p, table, item);
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
              own.store(scales + at.stage * weights * size.scales, size.scales, k, item.blocks * block_rows);
              if (lane == 0) full[at.stage].arrive();
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
      if (p.parts > 1) meet_cluster(); // as those who add up do
    }
  } else {
    take_registers<216>();
    const uint32_t frees = lane < p.together ? rank - of_couple + lane : nowhere;
    Multiplier<O, Finish> multiplier{p, table, finish, ring, {uniform(size.stages), uniform(size.stage_bytes), uniform(size.scales)}, scales, full, empty, maxima, static_cast<int>(threadIdx.x % 128), static_cast<int>(uniform(threadIdx.x / 128)) - 1, frees};
    while (items.next()) {
      const Item &item = items.item();
      if (item.blocks == 1) multiplier.template item<1>(item, part);
      else if (most == 2 || item.blocks == 2) multiplier.template item<2>(item, part);
      else if constexpr (most > 2) {
        if (item.blocks == 3) multiplier.template item<3>(item, part);
        else multiplier.template item<4>(item, part);
      }
    }
    if constexpr (!Finish::quantises) {
      const Group none = p.zeros ? table.groups[p.groups] : Group{0, 0};
      const typename Multiplier<O, Finish>::Scaled zeros{};
      for (int32_t place = blockIdx.x; place < none.count; place += gridDim.x) {
        const auto row = finish.row_of(p.packed.targets[none.base + place]);
        for (int which = 0; which < p.weights; which += weights)
          for (int32_t column = 4 * (threadIdx.x - 128); column < p.w[which].columns; column += 4 * 256) {
            const int count = min(4, p.w[which].columns - column);
            finish(which, row, int64_t{column}, zeros, finish.beside(which, row, int64_t{column}, count), count);
          }
      }
    }
  }
  if (clustered) meet_cluster(); // others may still read this block's sums, and arrive at its barriers
}

/// How a launch is cut into blocks: 64s of rows of a tile, blocks of a couple or 1, how many of those share k, and clusters; whether tiles are dealt out.
struct Cut {
  int32_t blocks;
  uint32_t together, parts, clusters;
  bool dealt;

  uint32_t of_cluster() const { return together * parts; }
};

template <class Kernel>
cudaError_t configure(Kernel *kernel, const Call &c, const Cut &cut, cudaLaunchConfig_t &config, cudaLaunchAttribute (&attributes)[2]) {
  const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(ring_bytes));
  if (raised != cudaSuccess) return raised;
  if (const cudaError_t e = prefer_shared(kernel)) return e;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cut.of_cluster(), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config = {};
  config.gridDim = dim3(cut.clusters * cut.of_cluster());
  config.blockDim = dim3(contract_threads);
  config.dynamicSmemBytes = ring_bytes;
  config.stream = c.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaSuccess;
}

/// How many clusters of a cut run at once.
template <class Kernel>
cudaError_t clusters_of(Kernel *kernel, const Call &c, const Cut &cut, uint32_t &fit) {
  fit = c.processors;
  if (cut.of_cluster() == 1) return cudaSuccess;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[2];
  if (const cudaError_t e = configure(kernel, c, cut, config, attributes)) return e;
  int most = 0;
  const cudaError_t e = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
  fit = most;
  return e;
}

/// Chooses the cut by an estimate of its time, in nanoseconds as measured on an H100: rounds of blocks, of so many steps, which take what shared
/// memory or what the L2 cache needs, and what ends an item, after what precedes the first; at least as long as memory brings the weights; then
/// exchanges of sums. `length`: rows of each of `groups` segments. Tiles are dealt out where there are more than blocks, and where those of segments
/// are fewer when they are cut together.
template <class Kernel>
cudaError_t choose_cut(Kernel *kernel, const Call &c, int32_t tiles, int32_t groups, int64_t length, int32_t steps, int weights, int32_t most, uint32_t most_parts, Cut &best) {
  constexpr uint64_t before = 5000, end_time = 800, sharing = 800, dealing = 3000;
  // memory, and what of it comes to one processor, in bytes
  constexpr uint64_t bytes_a_time = 3000, bytes_of_one = 40;
  const auto memory_time = [&](uint64_t running) { return uint64_t{static_cast<uint32_t>(tiles)} * weights * steps * tile_bytes / std::min(bytes_a_time, bytes_of_one * running); };
  const auto item_time = [&](uint32_t blocks, uint64_t brought, uint64_t of_steps, uint64_t running) {
    const uint64_t moved = 5 * step_moves(weights, blocks) + 30, brings = 19 * brought * running / c.processors;
    return of_steps * std::max(moved, brings);
  };
  const auto end_of = [&](uint32_t blocks, uint32_t parts) -> uint64_t {
    return parts == 1 ? end_time * weights * blocks : 1800 + 420 * parts * blocks + (parts > 4 ? 1500 * (parts - 4) : 0);
  };
  uint64_t least = UINT64_MAX;
  for (uint32_t together = 1; together <= 2; ++together)
    for (uint32_t parts = 1; parts <= most_parts && together * parts <= most_cluster && (parts == 1 || steps >= static_cast<int32_t>(4 * parts)); ++parts) {
      Cut cut{1, together, parts, 1, false};
      uint32_t slots;
      if (const cudaError_t e = clusters_of(kernel, c, cut, slots)) return e;
      if (slots == 0) continue;
      for (uint32_t blocks = 1; blocks <= static_cast<uint32_t>(most); ++blocks) {
        const uint32_t items = static_cast<uint32_t>(ceil_div(tiles, together) * groups * ceil_div(length, int64_t{blocks} * block_rows));
        if (parts == 1 && items > slots) continue;
        cut.blocks = static_cast<int32_t>(blocks), cut.clusters = items;
        const uint64_t rounds = ceil_div(items, slots), running = uint64_t{items < slots ? items : slots} * cut.of_cluster();
        const uint64_t loop = rounds * item_time(blocks, 16 * weights + 8 * blocks / together, ceil_div(static_cast<uint32_t>(steps), parts), running);
        const uint64_t cost = before + std::max(loop, memory_time(running)) + rounds * end_of(blocks, parts) + (together > 1 ? sharing : 0);
        if (cost < least) least = cost, best = cut;
      }
    }
  for (uint32_t blocks = 1; blocks <= static_cast<uint32_t>(most); ++blocks) {
    const uint64_t row_tiles = ceil_div(groups * (length + 7) / 8 * 8, int64_t{blocks} * block_rows), items = uint64_t{static_cast<uint32_t>(tiles)} * row_tiles;
    const uint64_t time = item_time(blocks, std::min(16 * weights + 4 * blocks, 8 * weights + 8 * blocks), steps, c.processors) + end_of(blocks, 1), processors = c.processors;
    const uint64_t loop = items > processors ? items * time / processors : time, cost = before + dealing + std::max(loop, memory_time(processors));
    if (cost < least) least = cost, best = {most, 2, 1, static_cast<uint32_t>(items), true}; // 64s as there are rows
  }
  return least == UINT64_MAX ? cudaErrorInvalidConfiguration : cudaSuccess;
}

/// The map of lines `pitch` bytes apart of `bytes` each: boxes of 128 bytes of `box` lines, with pieces exchanged as in a tile when `swizzle`.
inline cudaError_t map_of(const void *lines, int64_t bytes, int64_t pitch, int64_t count, int box, bool swizzle, CUtensorMap &map) {
  void *function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found)) return e;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(bytes), static_cast<cuuint64_t>(count)}, stride[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t boxes[2] = {line_bytes, static_cast<cuuint32_t>(box)}, every[2] = {1, 1};
  const CUresult made = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void *>(lines), sizes, stride, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

/// A packed weight as a launcher has it.
struct Given {
  const uint8_t *w;
  const float *ws;
  int64_t columns;
};

/// y = x w^T for packed weights of `inner` columns each. `window`: rows that the scratch has room for; more are done one window after the other.
template <class O, int Weights, class Finish>
cudaError_t contract(const Call &c, int64_t inner, const Rows &rows, const Choice &choice, int64_t window, const void *x, const float *xs, const Given (&weights)[Weights], const Finish &finish) {
  static_assert(Weights <= most_weights && (!Finish::pairs || Weights == 2));
  constexpr int weights_of_tile = Finish::pairs ? 2 : 1;
  const auto kernel = contract_kernel<O, Finish>;
  const int64_t row_bytes = inner * (128 / O::values), steps = ceil_div(row_bytes, int64_t{line_bytes});
  const int64_t scales = O::step_scales ? steps : O::row_scales ? 1 : 0;
  const bool direct = choice.ids == nullptr && row_bytes % 16 == 0; // rows are where a map finds them; linear.ts gives no scratch then
  if (direct && rows.segments > most_matrices) return cudaErrorInvalidValue;
  const Packed packed(c.scratch + most_dealt * sums_left * 4, window, choice.experts, steps, scales);
  if (direct) window = rows.capacity();
  const int64_t places = rows.capacity() < window ? rows.capacity() : window; // of a launch
  Problem problem{};
  for (const Given &given : weights) {
    Weight &weight = problem.w[problem.weights++];
    weight.scales = given.ws;
    weight.columns = static_cast<int32_t>(given.columns);
    weight.tiles = static_cast<int32_t>(ceil_div(given.columns, int64_t{tile_columns}));
    weight.first = Finish::pairs ? 0 : problem.tiles;
    if (!Finish::pairs || problem.weights == 1) problem.tiles += weight.tiles;
    if (const cudaError_t e = map_of(given.w, line_bytes, line_bytes, choice.experts * weight.tiles * steps * tile_columns, tile_columns, false, weight.lines)) return e;
  }
  problem.groups = direct ? static_cast<int32_t>(rows.segments) : choice.experts;
  Cut cut{most_of<Finish>, 2, 1, most_dealt, true};
  if (direct) {
    const uint32_t most_parts = Finish::quantises || Finish::pairs ? 1 : 8;
    if (const cudaError_t e = choose_cut(kernel, c, problem.tiles, problem.groups, rows.distance(), static_cast<int32_t>(steps), weights_of_tile, most_of<Finish>, most_parts, cut)) return e;
    problem.heads = rows.per_token ? rows.heads : nullptr;
    problem.heads_rows = static_cast<int32_t>(rows.count);
    problem.distance = static_cast<int32_t>(rows.distance());
    problem.capacity = static_cast<int32_t>(rows.capacity());
    problem.row_tiles = static_cast<int32_t>(ceil_div(rows.distance(), int64_t{cut.blocks} * block_rows));
    problem.xs = xs;
  }
  if (cut.dealt) {
    uint32_t fit;
    if (const cudaError_t e = clusters_of(kernel, c, cut, fit)) return e;
    if (fit == 0) return cudaErrorInvalidConfiguration;
    cut.clusters = std::min({cut.clusters, fit, most_dealt / cut.together});
  }
  for (int i = 0; i < row_sizes; ++i)
    if (const cudaError_t e = direct ? map_of(x, row_bytes, row_bytes, rows.capacity(), row_size(i), true, problem.x[i])
                                     : map_of(packed.lines, line_bytes, line_bytes, packed.places * steps, row_size(i), false, problem.x[i]))
      return e;
  problem.direct = direct;
  problem.packed = packed;
  if (direct && O::row_scales) problem.packed.scales = const_cast<float *>(xs);
  problem.steps = static_cast<int32_t>(steps);
  problem.blocks = cut.blocks;
  problem.together = cut.together;
  problem.parts = cut.parts;
  problem.zeros = choice.zeros;
  problem.dealt = cut.dealt;
  problem.columns_first = problem.tiles * steps * tile_bytes <= int64_t{16} << 20; // the cache keeps a matrix: results are written in order
  problem.left = reinterpret_cast<float *>(c.scratch);
  problem.ready = c.counters;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[2];
  if (const cudaError_t e = configure(kernel, c, cut, config, attributes)) return e;
  for (int64_t first = 0; first < rows.capacity(); first += window) {
    if (!direct)
      if (const cudaError_t e = pack_rows(c, {static_cast<const uint8_t *>(x), xs, row_bytes, scales, first, window}, rows, choice, packed)) return e;
    if (const cudaError_t e = cudaLaunchKernelEx(&config, kernel, problem, finish)) return e;
  }
  return cudaSuccess;
}

}  // namespace s3::hopper
