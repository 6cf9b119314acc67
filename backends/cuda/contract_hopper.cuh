// Contractions by the matrix units of Hopper: products of a warpgroup over weights packed as layout.ts packs them.
//
// A first small kernel gathers the rows of x by matrix (pack_rows.cuh). Then blocks of 128 columns of the result (128 lines of the weight: A of
// the products) meet tiles of up to `Most` rows (B): so few rows waste little. One thread brings lines of 128 bytes of both through a ring in
// shared memory; two warpgroups multiply, 64 columns each. Two blocks of a cluster that have neighbouring columns bring each other half of the
// rows. Where there are fewer tiles than processors, blocks of a cluster share the sum over k, and each finishes a part of the rows; how k is
// cut depends on sizes and the processor, never on the number of rows there are.
#pragma once
#include "pack_rows.cuh"
#include "products.cuh"

namespace s3::hopper {

/// Types of operands. A step is a line of 128 bytes.
struct E4m3 {
  using Sum = float;
  static constexpr int values = 128;
  static constexpr bool step_scales = true, row_scales = false; // scales of each step, or of whole rows and columns
  template <int Sums>
  static __device__ __forceinline__ void product(float (&d)[Sums], uint64_t a, uint64_t b, bool add) { product_e4m3(d, a, b, add); }
};
struct Bf16 {
  using Sum = float;
  static constexpr int values = 64;
  static constexpr bool step_scales = false, row_scales = false;
  template <int Sums>
  static __device__ __forceinline__ void product(float (&d)[Sums], uint64_t a, uint64_t b, bool add) { product_bf16(d, a, b, add); }
};
struct Int8 {
  using Sum = int32_t;
  static constexpr int values = 128;
  static constexpr bool step_scales = false, row_scales = true;
  template <int Sums>
  static __device__ __forceinline__ void product(int32_t (&d)[Sums], uint64_t a, uint64_t b, bool add) { product_i8(d, a, b, add); }
};

constexpr int line_bytes = 128, tile_columns = 128, tile_bytes = tile_columns * line_bytes;
constexpr int staged_rows = 32, staged_stride = 68; // of a warpgroup: 64 columns and what keeps banks apart
constexpr int shared_stride = 132;                  // of rows that a cluster adds up: 128 columns, likewise

template <int Most>
struct Ring {
  static constexpr int rows_bytes = Most * line_bytes, stage_bytes = tile_bytes + rows_bytes, scales_bytes = Most * 4;
  static constexpr int staging_bytes = 2 * staged_rows * staged_stride * 4;
  static constexpr int stages_that_fit = ((227 << 10) - 1024 - staging_bytes - 5120) / (stage_bytes + scales_bytes);
  static constexpr int stages = stages_that_fit < 8 ? stages_that_fit : 8;
  static constexpr int bytes = 1024 + stages * (stage_bytes + scales_bytes) + staging_bytes;
};

struct Problem {
  const uint8_t *w;
  const float *ws;
  Packed x;
  int32_t columns, tiles, steps, matrices; // columns of the result, blocks of 128 of them, lines along k
  uint32_t neighbours, parts;              // blocks of a cluster: those with neighbouring columns, times those that share k
  bool early;                              // there is one tile of rows: weights are known before rows are
  bool zeros;                              // rows that meet no matrix get results of zeros
};

/// A tile of work: rows of one matrix against neighbouring blocks of columns.
struct Item {
  int32_t matrix, pair, row, end, rows; // `rows` as multiplied: at least those from `row` to `end`
};

/// Rows as products take them.
__device__ __forceinline__ int32_t whole_rows(int32_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : rows <= 96 ? 96 : rows <= 128 ? 128 : rows <= 192 ? 192 : 256; }

/// Items in order: matrices, pairs of column blocks, tiles of rows; every block of a cluster takes the same.
template <int Most>
class Items {
  const Group *groups;
  int32_t matrices, least, matrix = 0;
  uint32_t pairs, clusters, index, before = 0;

 public:
  __device__ Items(const Problem &p, const Group *in) : groups(in), matrices(p.matrices), least(p.early ? 1 : 0) {
    pairs = ceil_div(static_cast<uint32_t>(p.tiles), p.neighbours);
    clusters = gridDim.x / (p.neighbours * p.parts);
    index = blockIdx.x / (p.neighbours * p.parts);
  }
  __device__ bool next(Item &item) {
    for (; matrix < matrices; ++matrix) {
      const Group g = groups[matrix];
      const int32_t tiles = max((g.count + Most - 1) / Most, least);
      const uint32_t items = tiles * pairs;
      if (index < before + items) {
        const int32_t local = static_cast<int32_t>(index - before), each = ((g.count + tiles - 1) / tiles + 7) / 8 * 8, first = local % tiles * each;
        const int32_t rows = min(each, g.count - first);
        item = {matrix, local / tiles, g.base + first, g.base + first + rows, whole_rows(rows)};
        index += clusters;
        return true;
      }
      before += items;
    }
    return false;
  }
};

/// The place in a ring, and how often it came round.
struct Place {
  uint32_t stage = 0, phase = 0;
  __device__ __forceinline__ void advance(uint32_t stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

/// Sums of four neighbouring columns of a row become results.
template <class O, class Finish>
__device__ __forceinline__ void finish_four(const Problem &p, const Finish &finish, const Item &item, int32_t row, int32_t column, const Four<typename O::Sum> &sums) {
  if (row >= item.end || column >= p.columns) return;
  const int count = min(4, p.columns - column);
  float scaled[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scaled[i] = static_cast<float>(sums[i]);
    if constexpr (O::row_scales) scaled[i] *= p.x.scales[row] * p.ws[int64_t{item.matrix} * p.columns + column + min(i, count - 1)];
  }
  finish(int64_t{p.x.targets[row]}, int64_t{column}, scaled, count);
}

/// What a thread of the multiplying warpgroups knows.
template <class O, int Most, class Finish>
struct Multiplier {
  const Problem &p;
  const Finish &finish;
  uint8_t *ring;
  const float *scales;
  float *staging; // of the warpgroup
  Barrier *full, *empty;
  int thread, half; // thread of the warpgroup, and which of two it is
  Place at{};

  using Sum = typename O::Sum;
  using R = Ring<Most>;

  /// Sums of Parts times Size rows: of thread t, 4j + i is column 16(t / 32) + t % 32 / 4 + 8(i / 2) of the half, row 8j + 2(t % 4) + i % 2
  template <int Size, int Parts>
  __device__ __forceinline__ void item(const Item &item, uint32_t tile, uint32_t part) {
    Sum sums[Parts][Size / 2];
#pragma unroll
    for (int i = 0; i < Parts; ++i)
#pragma unroll
      for (int j = 0; j < Size / 2; ++j) sums[i][j] = 0;
    const uint32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
    const float *const ws = O::step_scales ? p.ws + (int64_t{item.matrix} * p.tiles + min(tile, p.tiles - 1)) * p.steps + first : nullptr;
    multiply<Size, Parts>(sums, last - first, ws);
    if (p.parts > 1)
      share<Size, Parts>(sums, item, tile, part);
    else
      store<Size, Parts>(sums, item, tile);
  }

 private:
  static __device__ __forceinline__ uint32_t before(uint32_t stage) { return stage == 0 ? R::stages - 1 : stage - 1; }
  __device__ __forceinline__ void release(uint32_t stage) {
    const int lane = thread % 32;
    if (p.neighbours == 1) {
      if (lane == 0) empty[stage].arrive();
    } else if (lane < 2) {
      empty[stage].arrive_at((block_of_cluster() & ~1u) + lane);
    }
  }

  template <int Size, int Parts>
  __device__ __forceinline__ void multiply(Sum (&sums)[Parts][Size / 2], uint32_t steps, const float *ws) {
    const int lane = thread % 32;
    float line_scales = 0;
    for (uint32_t step = 0; step < steps; ++step) {
      if constexpr (O::step_scales) {
        if (step % 32 == 0) line_scales = step + lane < steps ? ws[step + lane] : 0;
      }
      full[at.stage].wait(at.phase);
      const uint32_t lines = shared_address(ring) + at.stage * R::stage_bytes;
      const uint64_t a = matrix(lines + half * (tile_bytes / 2), 16, 1024, Swizzle::b128);
      if constexpr (O::step_scales) {
        const float ws_now = __shfl_sync(0xFFFFFFFFu, line_scales, step % 32);
        const float *const xs = scales + at.stage * Most + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < Parts; ++i) {
          const uint64_t b = matrix(lines + tile_bytes + i * Size * line_bytes, 16, 1024, Swizzle::b128);
          float now[Size / 2];
          product_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) O::product(now, a + 2 * k, b + 2 * k, k > 0);
          product_commit();
          product_wait<0>();
#pragma unroll
          for (int j = 0; j < Size / 2; ++j) pin(now[j]);
#pragma unroll
          for (int j = 0; j < Size / 8; ++j) {
            const float2 s = *reinterpret_cast<const float2 *>(xs + i * Size + 8 * j);
            const float left = s.x * ws_now, right = s.y * ws_now;
            sums[i][4 * j] += now[4 * j] * left;
            sums[i][4 * j + 1] += now[4 * j + 1] * right;
            sums[i][4 * j + 2] += now[4 * j + 2] * left;
            sums[i][4 * j + 3] += now[4 * j + 3] * right;
          }
        }
        release(at.stage);
      } else {
        product_fence();
#pragma unroll
        for (int i = 0; i < Parts; ++i) {
          const uint64_t b = matrix(lines + tile_bytes + i * Size * line_bytes, 16, 1024, Swizzle::b128);
#pragma unroll
          for (int k = 0; k < 4; ++k) O::product(sums[i], a + 2 * k, b + 2 * k, true);
        }
        product_commit();
        if (step > 0) {
          product_wait<1>();
          release(before(at.stage));
        }
      }
      at.advance(R::stages);
    }
    if constexpr (!O::step_scales) {
      product_wait<0>();
#pragma unroll
      for (int i = 0; i < Parts; ++i)
#pragma unroll
        for (int j = 0; j < Size / 2; ++j) pin(sums[i][j]);
      release(before(at.stage));
    }
  }

  /// Through shared memory, so that neighbouring threads write neighbouring columns.
  template <int Size, int Parts>
  __device__ __forceinline__ void store(const Sum (&sums)[Parts][Size / 2], const Item &item, uint32_t tile) {
    constexpr int rows = Size < staged_rows ? Size : staged_rows;
    Sum *const stage = reinterpret_cast<Sum *>(staging);
    const int lane = thread % 32, column = thread / 32 * 16 + lane / 4, row = 2 * (lane % 4);
    const int32_t first_column = tile * tile_columns + half * 64;
#pragma unroll
    for (int i = 0; i < Parts; ++i)
#pragma unroll
      for (int chunk = 0; chunk < Size / rows; ++chunk) {
        const int32_t first_row = item.row + i * Size + chunk * rows;
        if (first_row >= item.end) return; // all threads alike
        meet(1 + half, 128);
#pragma unroll
        for (int j = 0; j < rows / 8; ++j)
#pragma unroll
          for (int n = 0; n < 4; ++n) stage[(8 * j + row + n % 2) * staged_stride + column + n / 2 * 8] = sums[i][chunk * rows / 2 + 4 * j + n];
        meet(1 + half, 128);
#pragma unroll
        for (int r = 0; r < rows / 8; ++r) {
          const int own = 8 * r + thread / 16, four = thread % 16 * 4;
          finish_four<O>(p, finish, item, first_row + own, first_column + four, *reinterpret_cast<const Four<Sum> *>(stage + own * staged_stride + four));
        }
      }
  }

  /// Eights of rows are dealt out to the blocks that share k; each gets the others' sums and adds them up in the order of k.
  template <int Size, int Parts>
  __device__ __forceinline__ void share(const Sum (&sums)[Parts][Size / 2], const Item &item, uint32_t tile, uint32_t part) {
    constexpr uint32_t eights = Parts * Size / 8, eight_floats = 8 * shared_stride;
    const uint32_t parts = p.parts, slots = (eights + parts - 1) / parts, block = block_of_cluster() % p.neighbours;
    const int lane = thread % 32, column = half * 64 + thread / 32 * 16 + lane / 4, row = 2 * (lane % 4);
    meet_cluster(); // the rings of all are read
    uint32_t owner = 0, slot = 0;
#pragma unroll
    for (uint32_t e = 0; e < eights; ++e) {
      const uint32_t to = address_in(owner * p.neighbours + block, shared_address(ring)) + 4 * ((part * slots + slot) * eight_floats + row * shared_stride + column);
#pragma unroll
      for (int n = 0; n < 4; ++n) store_in_cluster(to + 4 * (n % 2 * shared_stride + n / 2 * 8), sums[e * 8 / Size][e * 4 % (Size / 2) + n]);
      if (++owner == parts) owner = 0, ++slot;
    }
    meet_cluster(); // sums have arrived
    const Sum *const arrived = reinterpret_cast<const Sum *>(ring);
    const int all = half * 128 + thread, own = all / 32, four = all % 32 * 4;
    for (uint32_t s = 0; s < slots; ++s) {
      const int32_t first_row = item.row + (s * parts + part) * 8;
      if (first_row >= item.end) break;
      Four<Sum> line{};
      for (uint32_t from = 0; from < parts; ++from) {
        const Four<Sum> more = *reinterpret_cast<const Four<Sum> *>(arrived + (from * slots + s) * eight_floats + own * shared_stride + four);
#pragma unroll
        for (int n = 0; n < 4; ++n) line[n] += more[n];
      }
      finish_four<O>(p, finish, item, first_row + own, tile * tile_columns + four, line);
    }
  }
};

constexpr int contract_threads = 384;

template <class O, int Most, class Finish>
__global__ void __launch_bounds__(contract_threads, 1) contract_kernel(const __grid_constant__ Problem p, const __grid_constant__ Finish finish) {
  using R = Ring<Most>;
  extern __shared__ uint8_t shared_memory[];
  __shared__ Barrier full[R::stages], empty[R::stages];
  __shared__ Group groups[most_matrices + 1];
  uint8_t *const ring = shared_memory + (1024 - shared_address(shared_memory) % 1024) % 1024;
  float *const scales = reinterpret_cast<float *>(ring + R::stages * R::stage_bytes);
  float *const staging = scales + R::stages * Most;

  const uint32_t cluster_blocks = p.neighbours * p.parts;
  const uint32_t block = cluster_blocks == 1 ? 0 : block_of_cluster();
  const uint32_t neighbour = block % p.neighbours, part = block / p.neighbours;
  const uint32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
  let_successor_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::stages; ++i) {
      full[i].init(1);
      empty[i].init(8 * p.neighbours);
    }
    publish_barriers();
  }
  __syncthreads();
  const auto bring_weights = [&](const Item &item, uint32_t step, uint32_t stage) {
    const int64_t tile = min(static_cast<int32_t>(item.pair * p.neighbours + neighbour), p.tiles - 1);
    bulk_copy(ring + stage * R::stage_bytes, p.w + ((int64_t{item.matrix} * p.tiles + tile) * p.steps + step) * tile_bytes, tile_bytes, full[stage], read_once);
  };
  const uint32_t ahead = p.early ? min(last - first, static_cast<uint32_t>(R::stages)) : 0;
  if (threadIdx.x == 0) {
    const Item known{0, static_cast<int32_t>(blockIdx.x / cluster_blocks), 0, 0, 0};
    for (uint32_t i = 0; i < ahead; ++i) {
      full[i].announce(tile_bytes);
      bring_weights(known, first + i, i);
    }
  }
  if (cluster_blocks > 1) meet_cluster();
  after_predecessor();
  for (int i = threadIdx.x; i <= p.matrices; i += contract_threads) groups[i] = p.x.groups[i];
  __syncthreads();

  Items<Most> items(p, groups);
  Item item;
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      Place at;
      uint32_t brought = ahead;
      const uint16_t both = static_cast<uint16_t>(3u << (block - neighbour));
      while (items.next(item)) {
        for (uint32_t step = first; step < last; ++step) {
          empty[at.stage].wait(at.phase ^ 1);
          const uint32_t row_bytes = item.rows * line_bytes, scale_bytes = O::step_scales ? item.rows * 4 : 0;
          if (brought > 0) {
            --brought;
            full[at.stage].expect(row_bytes + scale_bytes);
          } else {
            full[at.stage].expect(tile_bytes + row_bytes + scale_bytes);
            bring_weights(item, step, at.stage);
          }
          uint8_t *const rows = ring + at.stage * R::stage_bytes + tile_bytes;
          float *const xs = scales + at.stage * Most;
          const uint8_t *const lines = p.x.lines + (int64_t{step} * p.x.places + item.row) * line_bytes;
          const float *const line_scales = p.x.scales + int64_t{step} * p.x.places + item.row;
          if (p.neighbours == 1) {
            bulk_copy(rows, lines, row_bytes, full[at.stage], read_often);
            if (O::step_scales) bulk_copy(xs, line_scales, scale_bytes, full[at.stage], read_often);
          } else {
            const uint32_t share = row_bytes / 2 * neighbour, scale_share = scale_bytes / 2 * neighbour;
            bulk_copy_to(both, rows + share, lines + share, row_bytes / 2, full[at.stage], read_often);
            if (O::step_scales) bulk_copy_to(both, xs + scale_share / 4, line_scales + scale_share / 4, scale_bytes / 2, full[at.stage], read_often);
          }
          at.advance(R::stages);
        }
      }
    }
    if (p.parts > 1) { // blocks that share k meet twice while they add up
      meet_cluster();
      meet_cluster();
    }
  } else {
    take_registers<232>();
    const int half = threadIdx.x / 128 - 1;
    Multiplier<O, Most, Finish> multiplier{p, finish, ring, scales, staging + half * staged_rows * staged_stride, full, empty, static_cast<int>(threadIdx.x % 128), half};
    while (items.next(item)) {
      const uint32_t tile = item.pair * p.neighbours + neighbour;
      switch (item.rows) {
        case 16: multiplier.template item<16, 1>(item, tile, part); break;
        case 32: multiplier.template item<32, 1>(item, tile, part); break;
        case 64: multiplier.template item<64, 1>(item, tile, part); break;
        default:
          if constexpr (Most > 64) {
            if (item.rows == 96) multiplier.template item<96, 1>(item, tile, part);
            else if (item.rows == 128) multiplier.template item<128, 1>(item, tile, part);
            else if constexpr (Most > 128) {
              if (item.rows == 192) multiplier.template item<96, 2>(item, tile, part);
              else multiplier.template item<128, 2>(item, tile, part);
            }
          }
      }
    }
    const Group none = p.zeros ? groups[p.matrices] : Group{0, 0};
    const uint32_t fours = ceil_div(p.columns, 4), thread = threadIdx.x - 128;
    const float zeros[4] = {};
    for (int32_t row = blockIdx.x; row < none.count; row += gridDim.x)
      for (uint32_t four = thread; four < fours; four += 256)
        finish(int64_t{p.x.targets[none.base + row]}, int64_t{4 * four}, zeros, min(4, p.columns - static_cast<int32_t>(4 * four)));
  }
  if (cluster_blocks > 1) meet_cluster(); // neighbours may still arrive at this block's barriers
}

/// How a launch is cut into blocks.
struct Cut {
  uint32_t neighbours, parts, clusters;
};

template <class Kernel>
cudaError_t configure(Kernel *kernel, const Call &c, const Cut &cut, uint32_t shared_bytes, cudaLaunchConfig_t &config, cudaLaunchAttribute (&attributes)[2]) {
  const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (raised != cudaSuccess) return raised;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cut.neighbours * cut.parts, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config = {};
  config.gridDim = dim3(cut.clusters * cut.neighbours * cut.parts);
  config.blockDim = dim3(contract_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = c.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaSuccess;
}

/// Cuts k so that few tiles keep all processors busy: the least of rounds of blocks times steps of each, counting a round and an exchange of
/// sums as some steps more.
template <class Kernel>
cudaError_t choose_cut(Kernel *kernel, const Call &c, int32_t tiles, int32_t steps, uint32_t shared_bytes, Cut &best) {
  uint32_t least = UINT32_MAX;
  for (uint32_t neighbours = tiles > 1 ? 2 : 1; neighbours >= 1; --neighbours)
    for (uint32_t parts = 1; parts * neighbours <= 8 && (parts == 1 || steps >= static_cast<int32_t>(4 * parts)); ++parts) {
      const Cut cut{neighbours, parts, ceil_div(static_cast<uint32_t>(tiles), neighbours)};
      cudaLaunchConfig_t config;
      cudaLaunchAttribute attributes[2];
      if (const cudaError_t e = configure(kernel, c, cut, shared_bytes, config, attributes)) return e;
      int fit = 0;
      if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&fit, kernel, &config)) return e;
      if (fit == 0) continue;
      const uint32_t rounds = ceil_div(cut.clusters, static_cast<uint32_t>(fit));
      const uint32_t cost = rounds * (ceil_div(static_cast<uint32_t>(steps), parts) + 6) + (parts > 1 ? 3 : 0) + (neighbours == 1 ? 1 : 0);
      if (cost < least) least = cost, best = cut;
    }
  return cudaSuccess;
}

/// y = x w^T for packed weights. `window`: rows that the scratch has room for; more are done one window after the other.
template <class O, int Most, class Finish>
cudaError_t contract(const Call &c, const Contraction &d, const Rows &rows, const Choice &choice, int64_t window, const void *x, const float *xs, const uint8_t *w, const float *ws, const Finish &finish) {
  using R = Ring<Most>;
  const auto kernel = contract_kernel<O, Most, Finish>;
  const int64_t row_bytes = d.inner * (128 / O::values), steps = ceil_div(row_bytes, int64_t{line_bytes});
  const int64_t scales = O::step_scales ? steps : O::row_scales ? 1 : 0;
  const Packed packed(c.scratch, window, choice.experts, steps, scales);
  const bool early = choice.ids == nullptr && rows.capacity() <= Most;
  const int32_t tiles = static_cast<int32_t>(ceil_div(d.columns, int64_t{tile_columns}));
  Cut cut{tiles > 1 ? 2u : 1u, 1, 0};
  if (early) {
    if (const cudaError_t e = choose_cut(kernel, c, tiles, static_cast<int32_t>(steps), R::bytes, cut)) return e;
  } else {
    const int64_t most = ceil_div(tiles, cut.neighbours) * (choice.ids == nullptr ? ceil_div(rows.capacity(), int64_t{Most}) : rows.capacity());
    const int64_t fit = c.processors / cut.neighbours;
    cut.clusters = static_cast<uint32_t>(most < fit ? most : fit);
  }
  for (int64_t first = 0; first < rows.capacity(); first += window) {
    if (const cudaError_t e = pack_rows(c, {static_cast<const uint8_t *>(x), xs, row_bytes, scales, first, window}, rows, choice, packed)) return e;
    const Problem problem{w,     ws,    packed, static_cast<int32_t>(d.columns), tiles, static_cast<int32_t>(steps), choice.experts, cut.neighbours, cut.parts,
                          early, choice.zeros};
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attributes[2];
    if (const cudaError_t e = configure(kernel, c, cut, R::bytes, config, attributes)) return e;
    if (const cudaError_t e = cudaLaunchKernelEx(&config, kernel, problem, finish)) return e;
  }
  return cudaSuccess;
}

}  // namespace s3::hopper
