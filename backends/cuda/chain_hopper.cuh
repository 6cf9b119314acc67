// Contractions on Hopper of which the later ones need all that the earlier ones give, in one launch: stages, with all blocks meeting between them. They
// are as many as run at once, and a cooperative launch, so that no other launch keeps some of them waiting.
//
// What a stage does is dealt out to couples as in contract_hopper.cuh, and for all stages at once, before the first: it depends on rows alone. While the
// blocks wait for each other, the lines of weights that the next stage begins with are already on their way. A stage may have several problems, of
// which each has rows and weights of its own: experts and what all rows meet. Results for a contraction of the same packed rows are packed when they
// are made (Problem::keeps).
//
// What all rows meet last is added to what experts gave, of whom a rank has a few: most rows have none. It is multiplied beside the experts' last
// contraction; sums of rows that have some are left in scratch, and completed when all blocks have met (Finish::waits, complete).
#pragma once
#include <utility>

#include "contract_hopper.cuh"

namespace s3::hopper {

template <class Results, int Many>
struct Stage {
  using Finish = Results;
  static constexpr int many = Many, weights = Finish::pairs ? 2 : 1;
  Work<Many> work;
  Finish finish;
};

template <class First, class... Rest>
struct Chain {
  static constexpr int length = 1 + sizeof...(Rest);
  First stage;
  Chain<Rest...> rest;
};
template <class Last>
struct Chain<Last> {
  static constexpr int length = 1;
  Last stage;
};
template <int I, class Stages>
__host__ __device__ __forceinline__ auto &stage_of(Stages &chain) {
  if constexpr (I == 0) return chain.stage;
  else return stage_of<I - 1>(chain.rest);
}
/// The number of a stage, a constant.
template <int I>
struct Number {
  __device__ constexpr operator int() const { return I; }
};
template <int... I, class Body>
__device__ __forceinline__ void each_of(std::integer_sequence<int, I...>, const Body &body) {
  (body(Number<I>{}), ...);
}
/// Calls body for the Number of each stage.
template <class Stages, class Body>
__device__ __forceinline__ void each_stage(const Body &body) {
  each_of(std::make_integer_sequence<int, Stages::length>{}, body);
}

/// Matrices or segments of a problem at most, and problems of a stage, as chain.ts knows; blocks of a couple.
constexpr int most_chained = 48, most_problems = 2;
constexpr uint32_t chained_together = 2;

/// A warp waits until all blocks have arrived, and sees what they wrote, as copies that it starts do.
__device__ __forceinline__ void wait_for_blocks(const uint32_t *arrived) {
  if (threadIdx.x % 32 == 0)
    while (load_acquire(arrived) < gridDim.x) {
    }
  __syncwarp();
  fence_async_global();
}

/// Waits for all blocks, and makes results of rows whose sums have waited for what experts gave: those of the packed rows of problem `p`, which `groups` are
/// of. By the warpgroups that multiply. A lane looks up one of the block's rows, before it has to wait.
template <class Finish>
__device__ __forceinline__ void complete(const Finish &finish, const Problem &p, const Group *groups, const uint32_t *arrived) {
  int32_t all = 0;
  for (int32_t matrix = 0; matrix < p.groups; ++matrix) all += groups[matrix].count;
#pragma unroll 1
  for (int32_t first = blockIdx.x; first < all || first == static_cast<int32_t>(blockIdx.x); first += 32 * gridDim.x) {
    int32_t number = first + threadIdx.x % 32 * gridDim.x, matrix = 0;
    while (matrix < p.groups && number >= groups[matrix].count) number -= groups[matrix++].count;
    const auto own = finish.waiting_of(matrix < p.groups ? p.packed.targets[groups[matrix].base + number] : -1);
    if (first == static_cast<int32_t>(blockIdx.x)) wait_for_blocks(arrived);
#pragma unroll 1
    for (uint32_t some = __ballot_sync(0xFFFFFFFFu, own.owned != 0); some != 0; some &= some - 1) finish.template complete<256>(from_lane(own, __ffs(some) - 1), threadIdx.x - 128);
  }
}

/// `arrived`: blocks that have done each stage, and those that have ended; zeros, before and after.
template <class O, class Stages>
__global__ void __launch_bounds__(contract_threads, 1) chain_kernel(const __grid_constant__ Stages stages, uint32_t *arrived) {
  extern __shared__ uint8_t shared_memory[];
  constexpr int length = Stages::length;
  using Looked = Table<most_chained, most_problems>;
  __shared__ Barrier full[length][most_stages], empty[length][most_stages];
  __shared__ Looked tables[length];
  __shared__ uint32_t maxima[4 * 2 * 16];
  static_assert(sizeof full + sizeof empty + sizeof tables + sizeof maxima <= beside_ring);
  uint8_t *const ring = ring_in(shared_memory);
  const int warp = threadIdx.x / 32;
  let_successor_start();
  init_barriers<O>(full[0], empty[0], length * most_stages, chained_together);
  each_stage<Stages>([&](auto i) {
    const auto &stage = stage_of<i>(stages);
    using Own = std::decay_t<decltype(stage)>;
    if (threadIdx.x == 32 * (i + 1)) tables[i].begin(stage.work, Own::weights, turned_of<typename Own::Finish>, O::step_scales);
  });
  arrive_with_barriers();
  const auto prefetch_of = [&](const auto &work, uint32_t thread) {
    for (const Problem &p : work.of) prefetch_maps(p, thread);
  };
  prefetch_of(stage_of<0>(stages).work, threadIdx.x - 32);
  after_predecessor();
  each_stage<Stages>([&](auto i) { // a warp for each problem
    const auto &stage = stage_of<i>(stages);
    for (int q = 0; q < std::decay_t<decltype(stage)>::many; ++q)
      if (warp == i * most_problems + q) fetch_groups(stage.work.of[q], tables[i].of[q].groups, threadIdx.x % 32, 32);
  });
  __syncthreads();
  if (warp < length) { // a warp for each stage, by the same instructions: they are many, and run once
    deal(tables[warp]);
    list_items(nullptr, tables[warp], 0);
  }
  __syncthreads();
  wait_for_cluster(); // the barriers of others can be used

  if (threadIdx.x < 128) {
    give_registers<bringing_registers>();
    each_stage<Stages>([&](auto i) {
      const auto &stage = stage_of<i>(stages);
      using Own = std::decay_t<decltype(stage)>;
      Bringer<O, Own::weights, Own::many, Looked> bringer(stage.work, tables[i], ring, tables[i].ring, full[i], empty[i]);
      Items<true, Looked> items(nullptr, tables[i]);
      if constexpr (i > 0)
        if (warp != 0) wait_for_blocks(arrived + i - 1); // weights need not wait
      while (items.next()) bringer.item(items.item());
      if constexpr (i + 1 < length) {
        bringer.drain(); // what comes next lies differently in the ring
        prefetch_of(stage_of<i + 1>(stages).work, threadIdx.x - 64);
      }
    });
  } else {
    take_registers<multiplying_registers>();
    each_stage<Stages>([&](auto i) {
      const auto &stage = stage_of<i>(stages);
      using Own = std::decay_t<decltype(stage)>;
      if constexpr (i > 0) wait_for_blocks(arrived + i - 1); // what is read beside the sums
      Items<false, Looked> items(nullptr, tables[i]);
      Place at{};
      while (items.next()) {
        // made anew for every item: registers are for sums
        Multiplier<O, typename Own::Finish, Own::many, Looked> multiplier(stage.work, tables[i], stage.finish, ring, tables[i].ring, full[i], empty[i], maxima);
        multiplier.at = at;
        multiplier.item(items.item(), 0);
        at = multiplier.at;
      }
      if constexpr (i + 1 < length || Own::Finish::waits) {
        fence_async_global();
        __threadfence();
        meet(5, 256);
        if (threadIdx.x == 128) add_at(arrived + i, 1);
      }
      if constexpr (Own::Finish::waits) {
        complete(stage.finish, stage.work.of[0], tables[i].of[0].groups, arrived + i);
      }
    });
  }
  meet_cluster(); // others may still arrive at this block's barriers
  if (threadIdx.x == 0 && add_at(arrived + length, 1) + 1 == gridDim.x)
    for (int i = 0; i <= length; ++i) arrived[i] = 0; // nobody waits any more
}

/// Packs the rows of experts, of which there is room for `window`.
template <class O>
cudaError_t pack_for(const Call &c, int64_t inner, const Rows &rows, const Choice &choice, int64_t window, const void *x, const float *xs, const Packed &packed) {
  const RowSize<O> row(inner);
  if (rows.capacity() > window) return cudaErrorInvalidValue;
  return pack_rows(c, {static_cast<const uint8_t *>(x), xs, row.bytes, row.scales, 0, window}, rows, choice, packed);
}
/// Problem `number` of stage I, but for its rows and weights.
template <int I, class Stages>
Problem &begin_problem(const Call &c, Stages &stages, int number) {
  Problem &problem = stage_of<I>(stages).work.of[number];
  problem.first = number;
  problem.blocks = most_of<typename std::decay_t<decltype(stage_of<I>(stages))>::Finish>;
  problem.together = chained_together;
  problem.parts = 1;
  problem.dealt = true;
  problem.left = reinterpret_cast<float *>(c.scratch) + I * most_dealt * sums_left;
  problem.ready = c.counters + I * most_dealt;
  return problem;
}
/// That of packed rows.
template <class O, int I, class Stages, int Weights>
cudaError_t add_packed(const Call &c, Stages &stages, int number, const Packed &packed, int32_t matrices, bool keeps, const Given (&weights)[Weights]) {
  Problem &problem = begin_problem<I>(c, stages, number);
  problem.keeps = keeps;
  if (const cudaError_t e = set_weights(problem, weights, Weights > 1, matrices, packed.blocks)) return e;
  return take_packed(problem, packed, matrices);
}
/// That of rows that lie in segments.
template <class O, int I, class Stages, int Weights>
cudaError_t add_direct(const Call &c, Stages &stages, int number, int64_t inner, const Rows &rows, const void *x, const float *xs, const Given (&weights)[Weights]) {
  const RowSize<O> row(inner);
  if (rows.segments > most_chained) return cudaErrorInvalidValue;
  Problem &problem = begin_problem<I>(c, stages, number);
  if (const cudaError_t e = set_weights(problem, weights, Weights > 1, 1, row.steps)) return e;
  return take_rows<O>(problem, rows, x, xs, row.bytes);
}

/// Enqueues all stages.
template <class O, class Stages>
cudaError_t run_chain(const Call &c, const Stages &stages) {
  const auto kernel = chain_kernel<O, Stages>;
  Cut cut{most_blocks, chained_together, 1, most_dealt, true};
  uint32_t fit;
  if (const cudaError_t e = clusters_of(kernel, c, cut, fit)) return e;
  if (fit == 0) return cudaErrorInvalidConfiguration;
  cut.clusters = std::min(fit, most_dealt / cut.together);
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[most_attributes];
  if (const cudaError_t e = configure(kernel, c, cut, config, attributes)) return e;
  attributes[config.numAttrs].id = cudaLaunchAttributeCooperative; // blocks wait for each other: all of them run at once, or none
  attributes[config.numAttrs++].val.cooperative = 1;
  return cudaLaunchKernelEx(&config, kernel, stages, c.counters + Stages::length * most_dealt);
}

}  // namespace s3::hopper
