// Contractions by the matrix units of Hopper: products of a warpgroup over weights packed as layout.ts packs them.
//
// Blocks of 128 columns of the result (128 lines of the weight: B of the products) meet tiles of up to 256 rows (A: 64 lines each), so that a thread
// has two scales for all that it adds up of 64 rows. Lines of 128 bytes of weights and rows, and scales, come through a ring in shared memory
// (bring_hopper.cuh); two warpgroups multiply (multiply_hopper.cuh). deal_hopper.cuh says which block does what. Rows are taken where they lie;
// those of experts, and rows that do not start at multiples of 16 bytes, are first gathered by a small kernel (pack_rows.cuh).
//
// Several weights that meet the same rows are done in one launch: the blocks of columns of one follow those of the other. Where the results of two
// meet, a block has the same columns of both, of up to 128 rows.
#pragma once
#include <algorithm>

#include "bring_hopper.cuh"

namespace s3::hopper {

constexpr uint32_t most_cluster = 8; // blocks: the most that every GPU with clusters has

constexpr int contract_threads = 384, bringing_registers = 56, multiplying_registers = 224;

/// The ring in dynamic shared memory.
__device__ __forceinline__ uint8_t *ring_in(uint8_t *memory) { return memory + (1024 - shared_address(memory) % 1024) % 1024; }
/// So many of both kinds, by as many threads of the first warps.
template <class O>
__device__ __forceinline__ void init_barriers(Barrier *full, Barrier *empty, uint32_t count, uint32_t together) {
  if (threadIdx.x >= count) return;
  full[threadIdx.x].init(O::step_scales ? 3 : 2); // lines of weights, lines of rows, scales
  empty[threadIdx.x].init(8 * together);          // warps that add up
  publish_barriers();
}
/// By threads from number 0 on.
__device__ __forceinline__ void prefetch_maps(const Problem &p, uint32_t thread) {
  if (thread < static_cast<uint32_t>(p.weights)) prefetch_map(&p.w[thread].lines);
  else if (thread - 32 < row_sizes) prefetch_map(&p.x[thread - 32]);
}
/// Rows of each matrix and of none, or of each segment, by thread `thread` of so many.
__device__ __forceinline__ void fetch_groups(const Problem &p, Group *groups, int thread, int threads) {
#pragma unroll 1
  for (int i = thread; i < p.groups + !p.direct; i += threads) {
    if (p.direct) groups[i] = {i * p.distance, p.heads == nullptr ? p.heads_rows : static_cast<int32_t>(p.heads[i].rows) * p.heads_rows};
    else groups[i] = p.packed.groups[i];
  }
}

template <class O, class Finish>
__global__ void __launch_bounds__(contract_threads, 1) contract_kernel(const __grid_constant__ Work<1> work, const __grid_constant__ Finish finish) {
  extern __shared__ uint8_t shared_memory[];
  constexpr int weights = Finish::pairs ? 2 : 1; // of a tile
  using Looked = Table<most_matrices, 1>;
  __shared__ Barrier full[most_stages], empty[most_stages];
  __shared__ Looked table;
  __shared__ uint32_t maxima[4 * 2 * 16];
  static_assert(sizeof full + sizeof empty + sizeof table + sizeof maxima <= beside_ring);
  uint8_t *const ring = ring_in(shared_memory);
  const Problem &p = work.of[0];

  const bool clustered = p.together * p.parts > 1;
  const uint32_t part = block_of_cluster() / p.together;
  Bringer<O, weights, 1, Looked> bringer(work, table, ring, RingSize::of(p.blocks, O::step_scales, weights, turned_of<Finish>), full, empty);
  let_successor_start();
  init_barriers<O>(full, empty, most_stages, p.together);
  if (threadIdx.x == 32) table.begin(work, weights, turned_of<Finish>, O::step_scales, bringer.size);
  if (clustered) arrive_with_barriers();
  __syncthreads();
  prefetch_maps(p, threadIdx.x - 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Where the only item is known before anything of rows is: weights are brought before the predecessor has ended, and as many rows as there may be
  // before it is known how many there are.
  if (!p.dealt) {
    const int32_t row_tiles = p.groups * p.row_tiles, item_rows = p.blocks * block_rows, known = cluster_of_block();
    const int32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
    const int32_t ahead = min(last - first, static_cast<int32_t>(bringer.size.stages));
    const int32_t tile = bringer.tile_of(p, known / row_tiles * p.together + bringer.of_couple), place = known % row_tiles;
    const int32_t row = place / p.row_tiles * p.distance + place % p.row_tiles * item_rows;
    bringer.ahead = ahead, bringer.loaded = true;
    if (bringer.weights_thread())
      for (int32_t i = 0; i < ahead; ++i) bringer.bring_weights(p, 0, tile, row_tiles == 1, false, first + i, i);
    __syncwarp();
    if (clustered) wait_for_cluster(); // the barriers of others can be used
    if (threadIdx.x < 128 && bringer.rows_warp() && lane == 0) {
      const Box box{0, row, size_index(item_rows)};
      after_predecessor();
      for (int32_t i = 0; i < ahead; ++i) {
        full[i].expect(item_rows * line_bytes);
        bringer.bring_rows(p, box, p.together > 1, first + i, i);
      }
    } else if (bringer.scales_warp()) {
      const float *ws[weights];
      bringer.scales_of(p, 0, tile, ws);
      const int32_t ahead_of = first + 32 * lane;
      if (warp == 1 && ahead_of < last)
#pragma unroll
        for (int n = 0; n < weights; ++n) prefetch(ws[n] + ahead_of);
      after_predecessor();
      const ScaledRows rows(row, min(row + item_rows, p.capacity));
      const int32_t mine = first / 2 + bringer.turn;
      bringer.own.load(p, ws, mine, rows);
      for (int k = 0; k < 2; ++k) {
        const int32_t step = 2 * mine + k;
        if (step < first || step >= last) continue;
        bringer.own.store(bringer.scales_at(step - first), bringer.size.scales, k, item_rows);
        if (lane == 0) full[step - first].arrive();
      }
      if (2 * mine < last) {
        bringer.turn += 2;
        bringer.own.load(p, ws, mine + 2, rows);
      }
    }
    __syncwarp();
  }
  after_predecessor();
  fetch_groups(p, table.of[0].groups, threadIdx.x, contract_threads);
  __syncthreads();
  if (warp == 0) {
    if (p.dealt) deal(table);
    list_items(&p, table, 0);
  }
  __syncthreads();
  if (p.dealt) wait_for_cluster();
  bringer.size = table.ring;

  if (threadIdx.x < 128) {
    give_registers<bringing_registers>();
    Items<true, Looked> items(&p, table);
    while (items.next()) {
      bringer.item(items.item());
      if (p.parts > 1) meet_cluster(); // as those who add up do
    }
  } else {
    take_registers<multiplying_registers>();
    Items<false, Looked> items(&p, table);
    Multiplier<O, Finish, 1, Looked> multiplier(work, table, finish, ring, bringer.size, full, empty, maxima);
    while (items.next()) multiplier.item(items.item(), part);
    multiplier.zeros(p);
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

constexpr int most_attributes = 3;

template <class Kernel>
cudaError_t configure(Kernel *kernel, const Call &c, const Cut &cut, cudaLaunchConfig_t &config, cudaLaunchAttribute (&attributes)[most_attributes]) {
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
  cudaLaunchAttribute attributes[most_attributes];
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

/// Weights of a problem of so many matrices each. `pairs`: the results of two meet.
template <class Weights>
cudaError_t set_weights(Problem &problem, const Weights &weights, bool pairs, int64_t matrices, int64_t steps) {
  problem.steps = static_cast<int32_t>(steps);
  for (const Given &given : weights) {
    Weight &weight = problem.w[problem.weights++];
    weight.scales = given.ws;
    weight.columns = static_cast<int32_t>(given.columns);
    weight.tiles = static_cast<int32_t>(ceil_div(given.columns, int64_t{tile_columns}));
    weight.first = pairs ? 0 : problem.tiles;
    if (!pairs || problem.weights == 1) problem.tiles += weight.tiles;
    if (const cudaError_t e = map_of(given.w, line_bytes, line_bytes, matrices * weight.tiles * steps * tile_columns, tile_columns, false, weight.lines)) return e;
  }
  problem.columns_first = problem.tiles * steps * tile_bytes <= int64_t{16} << 20; // the cache keeps a matrix: results are written in order
  return cudaSuccess;
}
/// Rows that are taken where they lie, `row_bytes` each.
template <class O>
cudaError_t take_rows(Problem &problem, const Rows &rows, const void *x, const float *xs, int64_t row_bytes) {
  if (rows.segments > most_matrices) return cudaErrorInvalidValue;
  problem.direct = true;
  problem.groups = static_cast<int32_t>(rows.segments);
  problem.heads = rows.per_token ? rows.heads : nullptr;
  problem.heads_rows = static_cast<int32_t>(rows.count);
  problem.distance = static_cast<int32_t>(rows.distance());
  problem.capacity = static_cast<int32_t>(rows.capacity());
  problem.xs = xs;
  if (O::row_scales) problem.packed.scales = const_cast<float *>(xs);
  for (int i = 0; i < row_sizes; ++i)
    if (const cudaError_t e = map_of(x, row_bytes, row_bytes, rows.capacity(), row_size(i), true, problem.x[i])) return e;
  return cudaSuccess;
}
/// Rows that were packed by the matrix that they meet.
inline cudaError_t take_packed(Problem &problem, const Packed &packed, int32_t matrices) {
  problem.groups = matrices;
  problem.packed = packed;
  for (int i = 0; i < row_sizes; ++i)
    if (const cudaError_t e = map_of(packed.lines, line_bytes, line_bytes, packed.places * packed.blocks, row_size(i), false, problem.x[i])) return e;
  return cudaSuccess;
}
/// Bytes of a row of so many values, and steps that they take.
template <class O>
struct RowSize {
  int64_t bytes, steps, scales;
  explicit RowSize(int64_t inner) : bytes(inner * (128 / O::values)), steps(ceil_div(bytes, int64_t{line_bytes})), scales(O::step_scales ? steps : O::row_scales ? 1 : 0) {}
};

/// y = x w^T for packed weights of `inner` columns each. `window`: rows that the scratch has room for; more are done one window after the other.
template <class O, int Weights, class Finish>
cudaError_t contract(const Call &c, int64_t inner, const Rows &rows, const Choice &choice, int64_t window, const void *x, const float *xs, const Given (&weights)[Weights], const Finish &finish) {
  static_assert(Weights <= most_weights && (!Finish::pairs || Weights == 2));
  const auto kernel = contract_kernel<O, Finish>;
  const RowSize<O> row(inner);
  const bool direct = choice.ids == nullptr && row.bytes % 16 == 0; // rows are where a map finds them; linear.ts gives no scratch then
  const Packed packed(c.scratch + most_dealt * sums_left * 4, window, choice.experts, row.steps, row.scales);
  if (direct) window = rows.capacity();
  Work<1> work{};
  Problem &problem = work.of[0];
  if (const cudaError_t e = set_weights(problem, weights, Finish::pairs, choice.experts, row.steps)) return e;
  if (const cudaError_t e = direct ? take_rows<O>(problem, rows, x, xs, row.bytes) : take_packed(problem, packed, choice.experts)) return e;
  Cut cut{most_of<Finish>, 2, 1, most_dealt, true};
  if (direct) {
    const uint32_t most_parts = Finish::quantises || Finish::pairs ? 1 : 8;
    if (const cudaError_t e = choose_cut(kernel, c, problem.tiles, problem.groups, rows.distance(), problem.steps, Finish::pairs ? 2 : 1, most_of<Finish>, most_parts, cut)) return e;
    problem.row_tiles = static_cast<int32_t>(ceil_div(rows.distance(), int64_t{cut.blocks} * block_rows));
  }
  if (cut.dealt) {
    uint32_t fit;
    if (const cudaError_t e = clusters_of(kernel, c, cut, fit)) return e;
    if (fit == 0) return cudaErrorInvalidConfiguration;
    cut.clusters = std::min({cut.clusters, fit, most_dealt / cut.together});
  }
  problem.blocks = cut.blocks;
  problem.together = cut.together;
  problem.parts = cut.parts;
  problem.zeros = choice.zeros;
  problem.dealt = cut.dealt;
  problem.left = reinterpret_cast<float *>(c.scratch);
  problem.ready = c.counters;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[most_attributes];
  if (const cudaError_t e = configure(kernel, c, cut, config, attributes)) return e;
  for (int64_t first = 0; first < rows.capacity(); first += window) {
    if (!direct)
      if (const cudaError_t e = pack_rows(c, {static_cast<const uint8_t *>(x), xs, row.bytes, row.scales, first, window}, rows, choice, packed)) return e;
    if (const cudaError_t e = cudaLaunchKernelEx(&config, kernel, work, finish)) return e;
  }
  return cudaSuccess;
}

}  // namespace s3::hopper
