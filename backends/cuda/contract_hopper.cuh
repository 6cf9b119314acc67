// Contractions by the matrix units of Hopper: products of a warpgroup over weights packed as layout.ts packs them.
//
// Blocks of 128 columns of the result (128 lines of the weight: A of the products) meet tiles of up to `Most` rows (B): so few rows waste little.
// One thread brings lines of 128 bytes of both through a ring in shared memory, a warp the scales; two warpgroups multiply, 64 columns each. Two
// blocks of a cluster that have neighbouring columns bring each other half of the rows. Where there are fewer tiles than processors, blocks of a
// cluster share the sum over k, and each finishes a part of the rows; how k is cut depends on sizes and the processor, never on the number of rows
// there are. Rows are taken where they lie; those of experts are first gathered by a small kernel (pack_rows.cuh).
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
  static constexpr int stages_that_fit = ((227 << 10) - 1024 - staging_bytes - 4 * Most * 4 - 4096) / (stage_bytes + scales_bytes);
  static constexpr int stages = stages_that_fit < 8 ? stages_that_fit : 8;
  static constexpr int bytes = 1024 + stages * (stage_bytes + scales_bytes) + staging_bytes;
};

/// Numbers of rows that products take.
__host__ __device__ constexpr int32_t row_size(int index) { return index == 0 ? 16 : 32 * index; }
__host__ __device__ constexpr int size_index(int32_t rows) { return rows <= 16 ? 0 : rows <= 32 ? 1 : rows <= 64 ? 2 : rows <= 96 ? 3 : 4; }

struct Problem {
  CUtensorMap w;    // lines of the packed weight, in boxes of a tile: copies of plain runs of bytes are slower
  CUtensorMap x[5]; // rows of x as they are, in boxes of what a block brings of each size
  bool direct;      // rows are taken from there, with scales `xs` [row][step], not from what was packed
  const s3_head *heads;      // of each segment of them
  int32_t heads_rows, distance;
  const float *xs;
  const float *ws;
  Packed packed;
  int32_t columns, tiles, steps; // columns of the result, blocks of 128 of them, lines along k
  int32_t groups;                // of rows: by matrix, or by segment
  uint32_t neighbours, parts;              // blocks of a cluster: those with neighbouring columns, times those that share k
  bool early;                              // there is one tile of rows: weights are known before rows are
  bool zeros;                              // rows that meet no matrix get results of zeros
};

/// A tile of work: rows of one matrix against neighbouring blocks of columns.
struct Item {
  int32_t matrix, pair, row, end, rows; // `rows` as multiplied: at least those from `row` to `end`
  bool alone;                           // no other item has the same weights
};


/// Items in order: groups of rows, pairs of column blocks, tiles of rows; every block of a cluster takes the same.
template <int Most>
class Items {
  const Group *groups;
  int32_t count, least, group = 0;
  bool direct;
  uint32_t pairs, clusters, index, before = 0;

 public:
  __device__ Items(const Problem &p, const Group *in) : groups(in), count(p.groups), least(p.early ? 1 : 0), direct(p.direct) {
    pairs = ceil_div(static_cast<uint32_t>(p.tiles), p.neighbours);
    clusters = gridDim.x / (p.neighbours * p.parts);
    index = blockIdx.x / (p.neighbours * p.parts);
  }
  __device__ bool next(Item &item) {
    for (; group < count; ++group) {
      const Group g = groups[group];
      const int32_t tiles = max((g.count + Most - 1) / Most, least);
      const uint32_t items = tiles * pairs;
      if (index < before + items) {
        const int32_t local = static_cast<int32_t>(index - before), each = ((g.count + tiles - 1) / tiles + 7) / 8 * 8, first = local % tiles * each;
        const int32_t rows = min(each, g.count - first);
        item = {direct ? 0 : group, local / tiles, g.base + first, g.base + first + rows, row_size(size_index(rows)), tiles == 1 && (!direct || count == 1)};
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

__device__ __forceinline__ float largest_of(const Four<float> &values, int count) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) largest = larger_of(largest, fabsf(values[i]));
  return largest;
}
/// Codes of four columns of a group, and of its first ones the scale too, from the group's largest magnitude: as ir/ops/quantise.ts.
template <bool Whole>
__device__ __forceinline__ void quantise_four(const Four<float> &values, float largest, int count, bool first, e4m3 *codes, float *scale) {
  const float raw = largest / 448.0f, divisor = raw == 0 ? 1.0f : raw;
  Four<e4m3> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = to_e4m3(values[i] / divisor);
  write_four<Whole>(codes, count, four);
  if (first) *scale = divisor;
}

/// What a result's row needs beside four sums; nothing of rows and columns that are not there.
template <class Finish>
__device__ __forceinline__ typename Finish::Beside read_beside(const Problem &p, const Finish &finish, const Item &item, const int32_t *targets, int32_t row, int32_t column) {
  const int count = min(4, p.columns - column);
  return count > 0 && row < item.end ? finish.beside(int64_t{targets[row - item.row]}, int64_t{column}, count) : typename Finish::Beside{};
}

/// Sums of four neighbouring columns of a row become results. Where those are quantised, a warp has a row's group of columns and comes as one.
template <class O, class Finish>
__device__ __forceinline__ void finish_four(const Problem &p, const Finish &finish, const Item &item, const int32_t *targets, int32_t row, int32_t column,
                                            const Four<typename O::Sum> &sums, const typename Finish::Beside &beside) {
  if (row >= item.end || (!Finish::quantises && column >= p.columns)) return;
  const int count = min(4, p.columns - column);
  float scaled[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scaled[i] = static_cast<float>(sums[i]);
    if constexpr (O::row_scales) scaled[i] *= p.packed.scales[row] * p.ws[int64_t{item.matrix} * p.columns + column + min(i, count - 1)];
  }
  const int64_t target = targets[row - item.row];
  if constexpr (Finish::quantises) {
    Four<float> values{};
    if (count > 0) values = finish.values(target, int64_t{column}, scaled, beside, count);
    float largest = largest_of(values, count);
#pragma unroll
    for (int by = 16; by > 0; by /= 2) largest = larger_of(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, by));
    if (count > 0) finish.quantised(target, int64_t{column}, values, largest, count);
  } else {
    finish(target, int64_t{column}, scaled, beside, count);
  }
}

/// What a thread of the multiplying warpgroups knows.
template <class O, int Most, class Finish>
struct Multiplier {
  const Problem &p;
  const Finish &finish;
  uint8_t *ring;
  const float *scales;
  float *staging;    // of the warpgroup
  int32_t *targets;  // rows of the result, of this item and the one before
  Barrier *full, *empty;
  int thread, half; // thread of the warpgroup, and which of two it is
  Place at{};
  bool odd = false;

  using Sum = typename O::Sum;
  using R = Ring<Most>;

  /// Of thread t, 4j + i is column 16(t / 32) + t % 32 / 4 + 8(i / 2) of the half, row 8j + 2(t % 4) + i % 2
  template <int Size>
  __device__ __forceinline__ void item(const Item &item, uint32_t tile, uint32_t part) {
    Sum sums[Size / 2];
#pragma unroll
    for (int j = 0; j < Size / 2; ++j) sums[j] = 0;
    targets += odd ? -Most : Most;
    odd = !odd;
    for (int32_t row = item.row + thread; row < item.end; row += 128) targets[row - item.row] = p.direct ? row : p.packed.targets[row];
    const uint32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
    multiply<Size>(sums, last - first);
    if (p.parts > 1)
      share<Size>(sums, item, tile, part);
    else
      store<Size>(sums, item, tile);
  }

 private:
  __device__ __forceinline__ void release(uint32_t stage) {
    __syncwarp(); // every lane has read its scales
    if (thread % 32 == 0) empty[stage].arrive();
  }
  /// Enqueues the products of the stage at `place` once they are there.
  template <int Size>
  __device__ __forceinline__ void begin(Sum (&to)[Size / 2], const Place &place) {
    full[place.stage].wait(place.phase);
    const uint32_t lines = shared_address(ring) + place.stage * R::stage_bytes;
    const uint64_t a = matrix(lines + half * (tile_bytes / 2), 16, 1024, Swizzle::b128), b = matrix(lines + tile_bytes, 16, 1024, Swizzle::b128);
    product_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) O::product(to, a + 2 * k, b + 2 * k, !O::step_scales || k > 0);
    product_commit();
  }
  /// Adds up the products of a stage, which have ended, with the scales of its step.
  template <int Size>
  __device__ __forceinline__ void add(Sum (&sums)[Size / 2], Sum (&products)[Size / 2]) {
#pragma unroll
    for (int j = 0; j < Size / 2; ++j) pin(products[j]);
    const float *const xs = scales + at.stage * Most + 2 * (thread % 4);
#pragma unroll
    for (int j = 0; j < Size / 8; ++j) {
      const float2 s = *reinterpret_cast<const float2 *>(xs + 8 * j);
      sums[4 * j] += products[4 * j] * s.x;
      sums[4 * j + 1] += products[4 * j + 1] * s.y;
      sums[4 * j + 2] += products[4 * j + 2] * s.x;
      sums[4 * j + 3] += products[4 * j + 3] * s.y;
    }
    release(at.stage);
    at.advance(R::stages);
  }

  template <int Size>
  __device__ __forceinline__ void multiply(Sum (&sums)[Size / 2], uint32_t steps) {
    if constexpr (O::step_scales) {
      // the products of a step run while those of the one before are added up
      Sum even[Size / 2], odd[Size / 2];
      Place ahead = at;
      const auto next = [&](Sum (&to)[Size / 2]) {
        begin<Size>(to, ahead);
        ahead.advance(R::stages);
      };
      next(even);
      uint32_t step = 0;
      for (; step + 2 < steps; step += 2) {
        next(odd);
        product_wait<1>();
        add<Size>(sums, even);
        next(even);
        product_wait<1>();
        add<Size>(sums, odd);
      }
      if (step + 2 == steps) {
        next(odd);
        product_wait<1>();
        add<Size>(sums, even);
        product_wait<0>();
        add<Size>(sums, odd);
      } else {
        product_wait<0>();
        add<Size>(sums, even);
      }
    } else {
      begin<Size>(sums, at);
      for (uint32_t step = 1; step < steps; ++step) {
        const uint32_t stage = at.stage;
        at.advance(R::stages);
        begin<Size>(sums, at);
        product_wait<1>();
        release(stage);
      }
      product_wait<0>();
#pragma unroll
      for (int j = 0; j < Size / 2; ++j) pin(sums[j]);
      release(at.stage);
      at.advance(R::stages);
    }
  }

  /// Through shared memory, so that neighbouring threads write neighbouring columns: a half's, or those of both when a warp must have a whole row
  /// of the tile. What is read beside the sums is on its way meanwhile.
  template <int Size>
  __device__ __forceinline__ void store(const Sum (&sums)[Size / 2], const Item &item, uint32_t tile) {
    constexpr bool both = Finish::quantises;
    constexpr int rows = Size < staged_rows ? Size : staged_rows, stride = both ? shared_stride : staged_stride;
    constexpr int at_once = 8; // rows that the threads have at a time
    Sum *const stage = reinterpret_cast<Sum *>(both ? staging - half * staged_rows * staged_stride : staging);
    const int lane = thread % 32, column = (both ? half * 64 : 0) + thread / 32 * 16 + lane / 4, row = 2 * (lane % 4);
    const int own = both ? half * 4 + thread / 32 : thread / 16, four = both ? lane * 4 : thread % 16 * 4;
    const int32_t first_column = static_cast<int32_t>(tile) * tile_columns + (both ? 0 : half * 64) + four;
    const auto meet_all = [&] { both ? meet(5, 256) : meet(1 + half, 128); };
#pragma unroll
    for (int chunk = 0; chunk < Size / rows; ++chunk) {
      const int32_t first_row = item.row + chunk * rows + own;
      if (first_row - own >= item.end) return; // all threads alike
      meet_all();
      typename Finish::Beside beside[rows / at_once];
#pragma unroll
      for (int r = 0; r < rows / at_once; ++r) beside[r] = read_beside(p, finish, item, targets, first_row + r * at_once, first_column);
#pragma unroll
      for (int j = 0; j < rows / 8; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) stage[(8 * j + row + n % 2) * stride + column + n / 2 * 8] = sums[chunk * rows / 2 + 4 * j + n];
      meet_all();
#pragma unroll
      for (int r = 0; r < rows / at_once; ++r)
        finish_four<O>(p, finish, item, targets, first_row + r * at_once, first_column, *reinterpret_cast<const Four<Sum> *>(stage + (own + r * at_once) * stride + four), beside[r]);
    }
  }

  /// Eights of rows are dealt out to the blocks that share k; each adds up the sums of all in the order of k.
  template <int Size>
  __device__ __forceinline__ void share(const Sum (&sums)[Size / 2], const Item &item, uint32_t tile, uint32_t part) {
    constexpr uint32_t eights = Size / 8, eight_bytes = 8 * shared_stride * 4;
    const uint32_t block = block_of_cluster() % p.neighbours;
    const int lane = thread % 32, column = half * 64 + thread / 32 * 16 + lane / 4, row = 2 * (lane % 4);
    Sum *const own = reinterpret_cast<Sum *>(ring);
    meet(5, 256); // the ring is read
#pragma unroll
    for (uint32_t e = 0; e < eights; ++e)
#pragma unroll
      for (int n = 0; n < 4; ++n) own[(8 * e + row + n % 2) * shared_stride + column + n / 2 * 8] = sums[4 * e + n];
    meet_cluster();
    const int all = half * 128 + thread, in_eight = all / 32, four = all % 32 * 4;
    const uint32_t at = shared_address(ring) + (in_eight * shared_stride + four) * 4;
#pragma unroll 2
    for (uint32_t e = part; e < eights; e += p.parts) {
      const int32_t first_row = item.row + static_cast<int32_t>(e) * 8;
      if (first_row >= item.end) break;
      const typename Finish::Beside beside = read_beside(p, finish, item, targets, first_row + in_eight, static_cast<int32_t>(tile) * tile_columns + four);
      Four<Sum> line{};
#pragma unroll 4
      for (uint32_t from = 0; from < p.parts; ++from) {
        const uint4 more = load_in_cluster(address_in(from * p.neighbours + block, at + e * eight_bytes));
        const Four<Sum> values = *reinterpret_cast<const Four<Sum> *>(&more);
#pragma unroll
        for (int n = 0; n < 4; ++n) line[n] += values[n];
      }
      finish_four<O>(p, finish, item, targets, first_row + in_eight, tile * tile_columns + four, line, beside);
    }
  }
};

constexpr int contract_threads = 384;

template <class O, int Most, class Finish>
__global__ void __launch_bounds__(contract_threads, 1) contract_kernel(const __grid_constant__ Problem p, const __grid_constant__ Finish finish) {
  using R = Ring<Most>;
  extern __shared__ uint8_t shared_memory[];
  __shared__ Barrier full[R::stages], empty[R::stages], free[R::stages]; // `free`: the neighbour's stage is empty
  __shared__ Group groups[most_matrices + 1];
  __shared__ int32_t targets[4 * Most];
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
      full[i].init(O::step_scales ? 2 : 1); // copies, and the warp that brings scales
      empty[i].init(8);
      free[i].init(1);
    }
    publish_barriers();
  }
  __syncthreads();
  const auto bring_weights = [&](const Item &item, uint32_t step, uint32_t stage) {
    const int32_t tile = min(static_cast<int32_t>(item.pair * p.neighbours + neighbour), p.tiles - 1);
    tensor_copy(ring + stage * R::stage_bytes, &p.w, 0, ((item.matrix * p.tiles + tile) * p.steps + step) * tile_columns, full[stage], item.alone ? read_once : read_again);
  };
  const uint32_t ahead = p.early ? min(last - first, static_cast<uint32_t>(R::stages)) : 0;
  if (threadIdx.x == 0) {
    const Item known{0, static_cast<int32_t>(blockIdx.x / cluster_blocks), 0, 0, 0, true};
    for (uint32_t i = 0; i < ahead; ++i) {
      full[i].announce(tile_bytes);
      bring_weights(known, first + i, i);
    }
  }
  if (cluster_blocks > 1) meet_cluster();
  after_predecessor();
  if (p.direct)
    for (int i = threadIdx.x; i < p.groups; i += contract_threads)
      groups[i] = {i * p.distance, p.heads == nullptr ? p.heads_rows : static_cast<int32_t>(p.heads[i].rows) * p.heads_rows};
  else
    for (int i = threadIdx.x; i <= p.groups; i += contract_threads) groups[i] = p.packed.groups[i];
  __syncthreads();

  Items<Most> items(p, groups);
  Item item;
  if (threadIdx.x < 128) {
    give_registers<40>();
    Place at;
    uint32_t brought = ahead;
    const uint16_t both = static_cast<uint16_t>(3u << (block - neighbour));
    while (items.next(item)) {
      if (threadIdx.x == 0) {
        const uint32_t row_bytes = item.rows * line_bytes;
        for (uint32_t step = first; step < last; ++step) {
          empty[at.stage].wait(at.phase ^ 1);
          if (p.neighbours > 1) free[at.stage].arrive_at(block ^ 1);
          if (brought > 0) {
            --brought;
            full[at.stage].expect(row_bytes);
          } else {
            full[at.stage].expect(tile_bytes + row_bytes);
            bring_weights(item, step, at.stage);
          }
          uint8_t *const rows = ring + at.stage * R::stage_bytes + tile_bytes;
          const uint8_t *const lines = p.packed.lines + (int64_t{step} * p.packed.places + item.row) * line_bytes;
          const CUtensorMap *const map = &p.x[size_index(item.rows)];
          if (p.neighbours == 1) {
            if (p.direct)
              tensor_copy(rows, map, step * line_bytes, item.row, full[at.stage], read_often);
            else
              bulk_copy(rows, lines, row_bytes, full[at.stage], read_often);
          } else {
            const uint32_t share = row_bytes / 2 * neighbour;
            free[at.stage].wait(at.phase);
            if (p.direct)
              tensor_copy_to(both, rows + share, map, step * line_bytes, item.row + item.rows / 2 * neighbour, full[at.stage], read_often);
            else
              bulk_copy_to(both, rows + share, lines + share, row_bytes / 2, full[at.stage], read_often);
          }
          at.advance(R::stages);
        }
      } else if (O::step_scales && threadIdx.x >= 32) {
        // scales of four rows a lane, times that of the weight; three warps take turns, so that loads are six steps ahead
        const int lane = threadIdx.x % 32;
        const uint32_t own = threadIdx.x / 32 - 1;
        const int32_t tile = min(static_cast<int32_t>(item.pair * p.neighbours + neighbour), p.tiles - 1);
        const float *const ws = p.ws + (int64_t{item.matrix} * p.tiles + tile) * p.steps;
        const float *const xs = p.direct ? p.xs + int64_t{item.row + 4 * lane} * p.steps : p.packed.scales + item.row + 4 * lane;
        const int32_t left = item.end - item.row - 4 * lane; // rows of the lane that are there
        const bool mine = 4 * lane < item.rows;
        const auto load = [&](uint32_t step, float4 &x, float &w) {
          if (!mine || step >= last) return;
          if (!p.direct)
            x = *reinterpret_cast<const float4 *>(xs + int64_t{step} * p.packed.places);
          else
            x = {left > 0 ? xs[step] : 0, left > 1 ? xs[p.steps + step] : 0, left > 2 ? xs[2 * p.steps + step] : 0, left > 3 ? xs[3 * p.steps + step] : 0};
          w = ws[step];
        };
        float4 now{}, next{};
        float w_now = 0, w_next = 0;
        load(first + own, now, w_now);
        load(first + own + 3, next, w_next);
        for (uint32_t step = first; step < last; ++step, at.advance(R::stages)) {
          if ((step - first) % 3 != own) continue;
          const float4 product{now.x * w_now, now.y * w_now, now.z * w_now, now.w * w_now};
          now = next, w_now = w_next;
          load(step + 6, next, w_next);
          empty[at.stage].wait(at.phase ^ 1);
          if (mine) *reinterpret_cast<float4 *>(scales + at.stage * Most + 4 * lane) = product;
          __syncwarp();
          if (lane == 0) full[at.stage].arrive();
        }
      }
      if (p.parts > 1) meet_cluster(); // as those who add up do
    }
  } else {
    take_registers<232>();
    const int half = threadIdx.x / 128 - 1;
    Multiplier<O, Most, Finish> multiplier{p, finish, ring, scales, staging + half * staged_rows * staged_stride, targets + half * 2 * Most, full, empty, static_cast<int>(threadIdx.x % 128), half};
    while (items.next(item)) {
      const uint32_t tile = item.pair * p.neighbours + neighbour;
      if (item.rows == 16) multiplier.template item<16>(item, tile, part);
      else if (item.rows == 32) multiplier.template item<32>(item, tile, part);
      else if (item.rows == 64) multiplier.template item<64>(item, tile, part);
      else if constexpr (Most > 64) {
        if (item.rows == 96) multiplier.template item<96>(item, tile, part);
        else multiplier.template item<128>(item, tile, part);
      }
    }
    if constexpr (!Finish::quantises) {
      const Group none = p.zeros ? groups[p.groups] : Group{0, 0};
      const uint32_t fours = ceil_div(p.columns, 4), thread = threadIdx.x - 128;
      const float zeros[4] = {};
      for (int32_t row = blockIdx.x; row < none.count; row += gridDim.x)
        for (uint32_t four = thread; four < fours; four += 256) {
          const int64_t target = p.packed.targets[none.base + row];
          const int count = min(4, p.columns - static_cast<int32_t>(4 * four));
          finish(target, int64_t{4 * four}, zeros, finish.beside(target, int64_t{4 * four}, count), count);
        }
    }
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
cudaError_t choose_cut(Kernel *kernel, const Call &c, int32_t tiles, int32_t most, int32_t row_tiles, int32_t steps, uint32_t shared_bytes, Cut &best) {
  uint32_t least = UINT32_MAX;
  for (uint32_t neighbours = tiles > 1 && most > 64 ? 2 : 1; neighbours >= 1; --neighbours)
    for (uint32_t parts = 1; parts * neighbours <= 8 && (parts == 1 || steps >= static_cast<int32_t>(4 * parts)); ++parts) {
      const Cut cut{neighbours, parts, ceil_div(static_cast<uint32_t>(tiles), neighbours) * row_tiles};
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

/// y = x w^T for packed weights. `window`: rows that the scratch has room for; more are done one window after the other.
template <class O, int Most, class Finish>
cudaError_t contract(const Call &c, const Contraction &d, const Rows &rows, const Choice &choice, int64_t window, const void *x, const float *xs, const uint8_t *w, const float *ws, const Finish &finish) {
  using R = Ring<Most>;
  const auto kernel = contract_kernel<O, Most, Finish>;
  const int64_t row_bytes = d.inner * (128 / O::values), steps = ceil_div(row_bytes, int64_t{line_bytes});
  const int64_t scales = O::step_scales ? steps : O::row_scales ? 1 : 0;
  const bool direct = choice.ids == nullptr && row_bytes % 16 == 0; // rows are where a map finds them
  if (direct && rows.segments > most_matrices) return cudaErrorInvalidValue;
  const Packed packed(c.scratch, window, choice.experts, steps, scales);
  if (direct) window = rows.capacity();
  const int64_t places = rows.capacity() < window ? rows.capacity() : window; // of a launch
  const bool early = choice.ids == nullptr && places <= Most;
  const int32_t tiles = static_cast<int32_t>(ceil_div(d.columns, int64_t{tile_columns}));
  Cut cut{tiles > 1 ? 2u : 1u, 1, 0};
  if (choice.ids == nullptr) {
    const int64_t row_tiles = direct ? rows.segments * ceil_div(rows.distance(), int64_t{Most}) : ceil_div(places, int64_t{Most});
    if (const cudaError_t e = choose_cut(kernel, c, tiles, Most, static_cast<int32_t>(row_tiles), static_cast<int32_t>(steps), R::bytes, cut)) return e;
  } else {
    cut.clusters = static_cast<uint32_t>(ceil_div(tiles, cut.neighbours) * places);
  }
  const uint32_t fit = c.processors / cut.neighbours;
  if (cut.parts == 1 && !early && cut.clusters > fit) cut.clusters = fit; // which then take tiles in turn
  Problem problem{};
  if (const cudaError_t e = map_of(w, line_bytes, line_bytes, choice.experts * tiles * steps * tile_columns, tile_columns, false, problem.w)) return e;
  problem.direct = direct;
  if (direct) {
    for (int i = 0; i < 5; ++i)
      if (const cudaError_t e = map_of(x, row_bytes, row_bytes, rows.capacity(), row_size(i) / static_cast<int>(cut.neighbours), true, problem.x[i])) return e;
    problem.heads = rows.per_token ? rows.heads : nullptr;
    problem.heads_rows = static_cast<int32_t>(rows.count);
    problem.distance = static_cast<int32_t>(rows.distance());
    problem.xs = xs;
  }
  problem.ws = ws;
  problem.packed = packed;
  if (direct && O::row_scales) problem.packed.scales = const_cast<float *>(xs);
  problem.columns = static_cast<int32_t>(d.columns);
  problem.tiles = tiles;
  problem.steps = static_cast<int32_t>(steps);
  problem.groups = direct ? static_cast<int32_t>(rows.segments) : choice.experts;
  problem.neighbours = cut.neighbours;
  problem.parts = cut.parts;
  problem.early = early;
  problem.zeros = choice.zeros;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attributes[2];
  if (const cudaError_t e = configure(kernel, c, cut, R::bytes, config, attributes)) return e;
  for (int64_t first = 0; first < rows.capacity(); first += window) {
    if (!direct)
      if (const cudaError_t e = pack_rows(c, {static_cast<const uint8_t *>(x), xs, row_bytes, scales, first, window}, rows, choice, packed)) return e;
    if (const cudaError_t e = cudaLaunchKernelEx(&config, kernel, problem, finish)) return e;
  }
  return cudaSuccess;
}

}  // namespace s3::hopper
