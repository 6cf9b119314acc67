// Contractions by the matrix units of Hopper: products of a warpgroup over weights packed as layout.ts packs them.
//
// Blocks of 128 columns of the result meet tiles of up to `Most` rows. Up to 96 rows are B of the products, 128 lines of the weight A, so few rows
// waste little; 128 rows are A themselves, which leaves a thread two scales to read instead of 32. One thread brings lines of 128 bytes of both
// through a ring in shared memory, three warps the scales; two warpgroups multiply, half of the lines of A each. Two blocks of a cluster that have
// neighbouring columns bring each other half of the rows. Where there are fewer tiles than processors, blocks of a cluster share the sum over k,
// and each finishes a part of the rows; how k is cut depends on sizes and the processor, never on the number of rows there are. Rows of one segment
// are taken where they lie; others, and those of experts, are first gathered by a small kernel (pack_rows.cuh).
//
// Several weights that meet the same rows are done in one launch. Either their blocks of columns follow one another, or (`Both` = 2) a block has
// the same columns of two, whose sums become one result.
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
constexpr int staged_stride = 132; // of rows of sums in shared memory: 128 columns and what keeps banks apart

template <int Most, int Both>
struct Ring {
  static constexpr int weight_bytes = Both * tile_bytes, stage_bytes = weight_bytes + Most * line_bytes, scales = Both * Most, scales_bytes = 4 * scales;
  /// on a processor: with two, one brings its weights while that of the kernel before it ends
  static constexpr int blocks = Most <= 64 && Both == 1 ? 2 : 1;
  static constexpr int producer_registers = Both == 2 ? 72 : 56, multiplier_registers = blocks == 2 ? 88 : Both == 2 ? 216 : 224;
  static constexpr int staged_rows = blocks == 2 ? 16 : 32, staging_bytes = staged_rows * staged_stride * 4;
  static constexpr int stages_that_fit = ((228 << 10) / blocks - 1024 - 1024 - staging_bytes - 4 * Most * 4 - 4096) / (stage_bytes + scales_bytes);
  static constexpr int stages = stages_that_fit < 8 ? stages_that_fit : 8;
  static constexpr int bytes = 1024 + stages * (stage_bytes + scales_bytes) + staging_bytes;
};

/// Numbers of rows that products take.
__host__ __device__ constexpr int32_t row_size(int index) { return index == 0 ? 16 : 32 * index; }
__host__ __device__ constexpr int size_index(int32_t rows) { return rows <= 16 ? 0 : rows <= 32 ? 1 : rows <= 64 ? 2 : rows <= 96 ? 3 : 4; }

/// A matrix of the contraction, or several of one size that rows choose among.
struct Weight {
  CUtensorMap lines; // of packed tiles, in boxes of a tile: copies of plain runs of bytes are slower
  const float *scales;
  int32_t columns, tiles, first; // columns of the result, blocks of 128 of them, and the number of the first block among those of all weights
};
constexpr int most_weights = 4;

struct Problem {
  Weight w[most_weights];
  CUtensorMap x[5]; // rows of x as they are, in boxes of what a block brings of each size
  bool direct;      // rows are taken from there, with scales `xs` [row][step], not from what was packed
  const s3_head *heads;
  int32_t heads_rows;
  const float *xs;
  Packed packed;
  int32_t weights, tiles, steps, matrices; // weights, their blocks of columns altogether, lines along k, matrices of each weight
  uint32_t neighbours, parts;              // blocks of a cluster: those with neighbouring columns, times those that share k
  bool early;                              // there is one tile of rows: weights are known before rows are
  bool zeros;                              // rows that meet no matrix get results of zeros

  /// the weight that a block of columns is of
  __device__ __forceinline__ int weight_of(int32_t tile) const {
    int which = 0;
    while (which + 1 < weights && tile >= w[which + 1].first) ++which;
    return which;
  }
};

/// A tile of work: rows of one matrix against neighbouring blocks of columns.
struct Item {
  int32_t matrix, pair, row, end, rows; // `rows` as multiplied: at least those from `row` to `end`
  bool alone;                           // no other item has the same weights
};

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
        item = {matrix, local / tiles, g.base + first, g.base + first + rows, row_size(size_index(rows)), tiles == 1};
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
    if (i < count) largest = fmaxf(largest, fabsf(values[i]));
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

/// Sums of four neighbouring columns of a row become results; no column is there when `count` is not positive. Where results are quantised, the
/// lanes of a warp have the 128 columns of one row among them.
template <int Both, class Finish>
__device__ __forceinline__ void finish_four(const Finish &finish, int which, int64_t row, int32_t column, const float (&sums)[Both][4], int count) {
  if constexpr (Finish::quantises) {
    Four<float> values{};
    if (count > 0) values = finish.values(row, int64_t{column}, sums, count);
    float largest = largest_of(values, count);
#pragma unroll
    for (int by = 16; by > 0; by /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, by));
    if (count > 0) finish.quantised(row, int64_t{column}, values, largest, count);
  } else {
    if (count > 0) finish(which, row, int64_t{column}, sums, count);
  }
}

/// What a thread of the multiplying warpgroups knows.
template <class O, int Most, int Both, class Finish>
struct Multiplier {
  const Problem &p;
  const Finish &finish;
  uint8_t *ring;
  const float *scales;
  float *staging;
  int32_t *targets;  // rows of the result, of this item and the one before
  Barrier *full, *empty;
  int thread, half; // thread of the warpgroup, and which of two it is
  Place at{};
  bool odd = false;

  using Sum = typename O::Sum;
  using R = Ring<Most, Both>;

  template <int Size>
  __device__ __forceinline__ void item(const Item &item, uint32_t tile, uint32_t part) {
    Sum sums[Both][Size / 2];
    targets += odd ? -Most : Most;
    odd = !odd;
    for (int32_t row = item.row + thread; row < item.end; row += 128) targets[row - item.row] = p.direct ? row : p.packed.targets[row];
    const uint32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
    multiply<Size>(sums, last - first);
    if (p.parts > 1)
      share<Size>(sums, item, tile, part);
    else if constexpr (rows_first<Size>)
      store_rows<Size>(sums, item, tile);
    else
      store<Size>(sums, item, tile);
  }

 private:
  /// Whether rows are the lines of A. Then sum 4j + i of thread t is of row 64 half + 16(t / 32) + t % 32 / 4 + 8(i / 2), column
  /// 8j + 2(t % 4) + i % 2; otherwise of that column and that row.
  template <int Size>
  static constexpr bool rows_first = Size == 128;
  __device__ __forceinline__ int line(int i) const { return half * 64 + thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8; }
  __device__ __forceinline__ int other(int i) const { return 2 * (thread % 4) + i % 2; }

  __device__ __forceinline__ void release() {
    if (thread % 32 == 0) empty[at.stage].arrive();
    at.advance(R::stages);
  }
  /// Enqueues products of the stage at `place`, which is there, with one of the weights; to be added to what is there, or not.
  template <int Size>
  __device__ __forceinline__ void enqueue(Sum (&to)[Size / 2], const Place &place, int which, bool add) {
    const uint32_t w = shared_address(ring) + place.stage * R::stage_bytes + which * tile_bytes, x = shared_address(ring) + place.stage * R::stage_bytes + R::weight_bytes;
    const uint32_t lines = (rows_first<Size> ? x : w) + half * (tile_bytes / 2), others = rows_first<Size> ? w : x;
    const uint64_t a = matrix(lines, 16, 1024, Swizzle::b128), b = matrix(others, 16, 1024, Swizzle::b128);
#pragma unroll
    for (int k = 0; k < 4; ++k) O::product(to, a + 2 * k, b + 2 * k, add || k > 0);
  }
  /// The same once the stage is there.
  template <int Size>
  __device__ __forceinline__ void begin(Sum (&to)[Size / 2], const Place &place, int which) {
    full[place.stage].wait(place.phase);
    product_fence();
    enqueue<Size>(to, place, which, false);
    product_commit();
  }
  /// Adds up products of the stage, which have ended, with the scales of its step.
  template <int Size>
  __device__ __forceinline__ void add(Sum (&sums)[Size / 2], Sum (&products)[Size / 2], int which) {
#pragma unroll
    for (int j = 0; j < Size / 2; ++j) pin(products[j]);
    const float *const xs = scales + at.stage * R::scales + which * Most;
    float2 s;
    if constexpr (rows_first<Size>) s = {xs[line(0)], xs[line(2)]};
#pragma unroll
    for (int j = 0; j < Size / 8; ++j) {
      if constexpr (!rows_first<Size>) s = *reinterpret_cast<const float2 *>(xs + 8 * j + other(0));
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * j + i] += products[4 * j + i] * ((rows_first<Size> ? i / 2 : i % 2) == 0 ? s.x : s.y);
    }
  }

  template <int Size>
  __device__ __forceinline__ void multiply(Sum (&sums)[Both][Size / 2], uint32_t steps) {
    if constexpr (O::step_scales) {
#pragma unroll
      for (int b = 0; b < Both; ++b)
#pragma unroll
        for (int j = 0; j < Size / 2; ++j) sums[b][j] = 0;
    }
    if constexpr (!O::step_scales) {
      const auto next = [&](bool add) {
        full[at.stage].wait(at.phase);
        product_fence();
#pragma unroll
        for (int b = 0; b < Both; ++b) enqueue<Size>(sums[b], at, b, add);
        product_commit();
      };
      next(false);
      for (uint32_t step = 1; step < steps; ++step) {
        Barrier &before = empty[at.stage];
        at.advance(R::stages);
        next(true);
        product_wait<1>();
        if (thread % 32 == 0) before.arrive();
      }
      product_wait<0>();
#pragma unroll
      for (int b = 0; b < Both; ++b)
#pragma unroll
        for (int j = 0; j < Size / 2; ++j) pin(sums[b][j]);
      release();
    } else if constexpr (Both == 2 || R::blocks == 2) {
      // registers for one set of products: the other warpgroup's run while they are added up
      Sum products[Size / 2];
      for (uint32_t step = 0; step < steps; ++step) {
#pragma unroll
        for (int b = 0; b < Both; ++b) {
          begin<Size>(products, at, b);
          product_wait<0>();
          add<Size>(sums[b], products, b);
        }
        release();
      }
    } else {
      // the products of a step run while those of the one before are added up
      Sum even[Size / 2], odd[Size / 2];
      Place ahead = at;
      const auto next = [&](Sum(&to)[Size / 2]) {
        begin<Size>(to, ahead, 0);
        ahead.advance(R::stages);
      };
      const auto end = [&](Sum(&products)[Size / 2]) {
        add<Size>(sums[0], products, 0);
        release();
      };
      next(even);
      uint32_t step = 0;
      for (; step + 2 < steps; step += 2) {
        next(odd);
        product_wait<1>();
        end(even);
        next(even);
        product_wait<1>();
        end(odd);
      }
      if (step + 2 == steps) {
        next(odd);
        product_wait<1>();
        end(even);
        product_wait<0>();
        end(odd);
      } else {
        product_wait<0>();
        end(even);
      }
    }
  }

  /// Four columns from the `four`-th of a block on, in a row of the item.
  __device__ __forceinline__ void finish_sums(const Item &item, uint32_t tile, int32_t row, int four, const Four<Sum> (&sums)[Both], bool there) {
    const int which = Both > 1 ? 0 : p.weight_of(tile);
    const int32_t column = (static_cast<int32_t>(tile) - p.w[which].first) * tile_columns + four;
    const int count = there ? min(4, p.w[which].columns - column) : 0;
    float scaled[Both][4];
#pragma unroll
    for (int b = 0; b < Both; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scaled[b][i] = static_cast<float>(sums[b][i]);
        if constexpr (O::row_scales)
          if (i < count) scaled[b][i] *= p.packed.scales[row] * p.w[which + b].scales[int64_t{item.matrix} * p.w[which].columns + column + i];
      }
    finish_four<Both>(finish, which, there ? targets[row - item.row] : 0, column, scaled, count);
  }

  /// Through shared memory, so that a warp has a row.
  template <int Size>
  __device__ __forceinline__ void store(const Sum (&sums)[Both][Size / 2], const Item &item, uint32_t tile) {
    constexpr int rows = Size < R::staged_rows / Both ? Size : R::staged_rows / Both;
    Sum *const stage = reinterpret_cast<Sum *>(staging);
    const int warp = half * 4 + thread / 32, four = thread % 32 * 4;
#pragma unroll
    for (int chunk = 0; chunk < Size / rows; ++chunk) {
      const int32_t first_row = item.row + chunk * rows;
      if (first_row >= item.end) return; // all threads alike
      meet(5, 256);
#pragma unroll
      for (int b = 0; b < Both; ++b)
#pragma unroll
        for (int j = 0; j < rows / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) stage[(b * rows + 8 * j + other(i)) * staged_stride + line(i)] = sums[b][chunk * rows / 2 + 4 * j + i];
      meet(5, 256);
#pragma unroll
      for (int row = warp; row < rows; row += 8) {
        if (first_row + row >= item.end) break;
        Four<Sum> fours[Both];
#pragma unroll
        for (int b = 0; b < Both; ++b) fours[b] = *reinterpret_cast<const Four<Sum> *>(stage + (b * rows + row) * staged_stride + four);
        finish_sums(item, tile, first_row + row, four, fours, true);
      }
    }
  }

  /// Where rows are first: pairs of lanes exchange halves, so that each has four neighbouring columns of one row.
  template <int Size>
  __device__ __forceinline__ void store_rows(const Sum (&sums)[Both][Size / 2], const Item &item, uint32_t tile) {
    const bool second = thread % 2 != 0;
    meet(1 + half, 128); // targets are there
    const int32_t row = item.row + line(second ? 2 : 0);
    const bool there = row < item.end;
    const auto fours_of = [&](int j, Four<Sum>(&fours)[Both]) {
#pragma unroll
      for (int b = 0; b < Both; ++b) {
        const Sum *const own = sums[b] + 4 * j;
        const Sum first = __shfl_xor_sync(0xFFFFFFFFu, second ? own[0] : own[2], 1), next = __shfl_xor_sync(0xFFFFFFFFu, second ? own[1] : own[3], 1);
        fours[b][0] = second ? first : own[0];
        fours[b][1] = second ? next : own[1];
        fours[b][2] = second ? own[2] : first;
        fours[b][3] = second ? own[3] : next;
      }
    };
    const int four = thread % 4 / 2 * 4;
    if constexpr (Finish::quantises) {
      // the 128 columns of a row are with two lanes
      const int32_t target = there ? targets[row - item.row] : 0, first = static_cast<int32_t>(tile) * tile_columns + four;
      float kept[Size / 8][4];
      float largest = 0;
#pragma unroll
      for (int j = 0; j < Size / 8; ++j) {
        Four<Sum> fours[Both];
        fours_of(j, fours);
        const int32_t column = first + 8 * j;
        const int count = there ? min(4, p.w[0].columns - column) : 0;
        float scaled[Both][4];
#pragma unroll
        for (int b = 0; b < Both; ++b)
#pragma unroll
          for (int i = 0; i < 4; ++i) scaled[b][i] = static_cast<float>(fours[b][i]);
        static_assert(!O::row_scales);
        Four<float> values{};
        if (count > 0) values = finish.values(target, column, scaled, count);
        largest = fmaxf(largest, largest_of(values, count));
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[j][i] = values[i];
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
#pragma unroll
      for (int j = 0; j < Size / 8; ++j) {
        const int count = there ? min(4, p.w[0].columns - first - 8 * j) : 0;
        if (count > 0) finish.quantised(target, first + 8 * j, {kept[j][0], kept[j][1], kept[j][2], kept[j][3]}, largest, count);
      }
    } else {
#pragma unroll
      for (int j = 0; j < Size / 8; ++j) {
        Four<Sum> fours[Both];
        fours_of(j, fours);
        finish_sums(item, tile, row, 8 * j + four, fours, there);
      }
    }
  }

  /// Eights of rows are dealt out to the blocks that share k; each adds up the sums of all in the order of k.
  template <int Size>
  __device__ __forceinline__ void share(const Sum (&sums)[Both][Size / 2], const Item &item, uint32_t tile, uint32_t part) {
    constexpr uint32_t eights = Size / 8, line_size = staged_stride * 4;
    const uint32_t block = block_of_cluster() % p.neighbours;
    Sum *const own = reinterpret_cast<Sum *>(ring);
    meet(5, 256); // the ring is read
#pragma unroll
    for (int b = 0; b < Both; ++b)
#pragma unroll
      for (int j = 0; j < Size / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = b * Size + (rows_first<Size> ? line(i) : 8 * j + other(i)), column = rows_first<Size> ? 8 * j + other(i) : line(i);
          own[row * staged_stride + column] = sums[b][4 * j + i];
        }
    meet_cluster();
    const int in_eight = half * 4 + thread / 32, four = thread % 32 * 4;
    const uint32_t first = shared_address(ring) + in_eight * line_size + four * 4;
#pragma unroll 2
    for (uint32_t e = part; e < eights; e += p.parts) {
      const int32_t row = item.row + static_cast<int32_t>(e) * 8 + in_eight;
      if (row - in_eight >= item.end) break;
      Four<Sum> lines[Both] = {};
#pragma unroll 4
      for (uint32_t from = 0; from < p.parts; ++from)
#pragma unroll
        for (int b = 0; b < Both; ++b) {
          const uint4 more = load_in_cluster(address_in(from * p.neighbours + block, first + (b * Size + e * 8) * line_size));
          const Four<Sum> values = *reinterpret_cast<const Four<Sum> *>(&more);
#pragma unroll
          for (int n = 0; n < 4; ++n) lines[b][n] += values[n];
        }
      finish_sums(item, tile, row, four, lines, row < item.end);
    }
  }
};

constexpr int contract_threads = 384;

template <class O, int Most, int Both, class Finish>
__global__ void __launch_bounds__(contract_threads, (Ring<Most, Both>::blocks)) contract_kernel(const __grid_constant__ Problem p, const __grid_constant__ Finish finish) {
  using R = Ring<Most, Both>;
  extern __shared__ uint8_t shared_memory[];
  __shared__ Barrier full[R::stages], empty[R::stages], free[R::stages]; // `free`: the neighbour's stage is empty
  __shared__ Group groups[most_matrices + 1];
  __shared__ int32_t targets[4 * Most];
  uint8_t *const ring = shared_memory + (1024 - shared_address(shared_memory) % 1024) % 1024;
  float *const scales = reinterpret_cast<float *>(ring + R::stages * R::stage_bytes);
  float *const staging = scales + R::stages * R::scales;

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
  const auto tile_of = [&](const Item &item) { return min(static_cast<int32_t>(item.pair * p.neighbours + neighbour), p.tiles - 1); };
  /// block of columns `tile` of the matrix of weight `which`, among all blocks of that weight
  const auto block_of = [&](const Item &item, int which, int32_t tile) { return item.matrix * p.w[which].tiles + tile - p.w[which].first; };
  const auto bring_weights = [&](const Item &item, uint32_t step, uint32_t stage) {
    const int32_t tile = tile_of(item);
#pragma unroll
    for (int b = 0; b < Both; ++b) {
      const int which = Both > 1 ? b : p.weight_of(tile);
      tensor_copy(ring + stage * R::stage_bytes + b * tile_bytes, &p.w[which].lines, 0, (block_of(item, which, tile) * p.steps + static_cast<int32_t>(step)) * tile_columns, full[stage],
                  item.alone ? read_once : read_again);
    }
  };
  const uint32_t ahead = p.early ? min(last - first, static_cast<uint32_t>(R::stages)) : 0;
  if (threadIdx.x == 0) {
    const Item known{0, static_cast<int32_t>(blockIdx.x / cluster_blocks), 0, 0, 0, true};
    for (uint32_t i = 0; i < ahead; ++i) {
      full[i].announce(R::weight_bytes);
      bring_weights(known, first + i, i);
    }
  }
  if (cluster_blocks > 1) meet_cluster();
  after_predecessor();
  for (int i = threadIdx.x; i <= p.matrices; i += contract_threads)
    groups[i] = !p.direct ? p.packed.groups[i] : Group{0, i > 0 ? 0 : p.heads == nullptr ? p.heads_rows : static_cast<int32_t>(p.heads[0].rows) * p.heads_rows};
  __syncthreads();

  Items<Most> items(p, groups);
  Item item;
  if (threadIdx.x < 128) {
    give_registers<R::producer_registers>();
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
            full[at.stage].expect(R::weight_bytes + row_bytes);
            bring_weights(item, step, at.stage);
          }
          uint8_t *const rows = ring + at.stage * R::stage_bytes + R::weight_bytes;
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
        const int32_t tile = tile_of(item);
        const float *ws[Both];
#pragma unroll
        for (int b = 0; b < Both; ++b) {
          const int which = Both > 1 ? b : p.weight_of(tile);
          ws[b] = p.w[which].scales + int64_t{block_of(item, which, tile)} * p.steps;
        }
        const float *const xs = p.direct ? p.xs + int64_t{item.row + 4 * lane} * p.steps : p.packed.scales + item.row + 4 * lane;
        const int32_t left = item.end - item.row - 4 * lane; // rows of the lane that are there
        const bool mine = 4 * lane < item.rows;
        const auto load = [&](uint32_t step, float4 &x, float (&w)[Both]) {
          if (!mine || step >= last) return;
          if (!p.direct)
            x = *reinterpret_cast<const float4 *>(xs + int64_t{step} * p.packed.places);
          else
            x = {left > 0 ? xs[step] : 0, left > 1 ? xs[p.steps + step] : 0, left > 2 ? xs[2 * p.steps + step] : 0, left > 3 ? xs[3 * p.steps + step] : 0};
#pragma unroll
          for (int b = 0; b < Both; ++b) w[b] = ws[b][step];
        };
        float4 now{}, next{};
        float w_now[Both] = {}, w_next[Both] = {};
        load(first + own, now, w_now);
        load(first + own + 3, next, w_next);
        for (uint32_t step = first; step < last; ++step, at.advance(R::stages)) {
          if ((step - first) % 3 != own) continue;
          float4 products[Both];
#pragma unroll
          for (int b = 0; b < Both; ++b) {
            products[b] = {now.x * w_now[b], now.y * w_now[b], now.z * w_now[b], now.w * w_now[b]};
            w_now[b] = w_next[b];
          }
          now = next;
          load(step + 6, next, w_next);
          empty[at.stage].wait(at.phase ^ 1);
          if (mine)
#pragma unroll
            for (int b = 0; b < Both; ++b) *reinterpret_cast<float4 *>(scales + at.stage * R::scales + b * Most + 4 * lane) = products[b];
          __syncwarp();
          if (lane == 0) full[at.stage].arrive();
        }
      }
      if (p.parts > 1) meet_cluster(); // as those who add up do
    }
  } else {
    take_registers<R::multiplier_registers>();
    const int half = threadIdx.x / 128 - 1;
    Multiplier<O, Most, Both, Finish> multiplier{p, finish, ring, scales, staging, targets + half * 2 * Most, full, empty, static_cast<int>(threadIdx.x % 128), half};
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
    const Group none = p.zeros ? groups[p.matrices] : Group{0, 0};
    const float zeros[Both][4] = {};
    for (int32_t row = blockIdx.x; row < none.count; row += gridDim.x)
      for (int which = 0; which < (Both > 1 ? 1 : p.weights); ++which)
        for (int32_t column = 4 * (threadIdx.x - 128); column < p.w[which].tiles * tile_columns; column += 4 * 256)
          finish_four<Both>(finish, which, p.packed.targets[none.base + row], column, zeros, min(4, p.w[which].columns - column));
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
  if (const cudaError_t e = prefer_shared(kernel)) return e;
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
/// sums as some steps more. Where `blocks` fit on a processor, one is left to the kernel that comes next.
template <class Kernel>
cudaError_t choose_cut(Kernel *kernel, const Call &c, uint32_t blocks, int32_t tiles, uint32_t most_neighbours, int32_t row_tiles, int32_t steps, uint32_t shared_bytes, Cut &best) {
  uint32_t least = UINT32_MAX;
  for (uint32_t neighbours = most_neighbours; neighbours >= 1; --neighbours)
    for (uint32_t parts = 1; parts * neighbours <= 8 && (parts == 1 || steps >= static_cast<int32_t>(4 * parts)); ++parts) {
      const Cut cut{neighbours, parts, ceil_div(static_cast<uint32_t>(tiles), neighbours) * row_tiles};
      cudaLaunchConfig_t config;
      cudaLaunchAttribute attributes[2];
      if (const cudaError_t e = configure(kernel, c, cut, shared_bytes, config, attributes)) return e;
      int fit = 0;
      if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&fit, kernel, &config)) return e;
      if (fit == 0) continue;
      const uint32_t rounds = ceil_div(cut.clusters, ceil_div(static_cast<uint32_t>(fit), blocks));
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

/// A packed weight as a launcher has it.
struct Given {
  const uint8_t *w;
  const float *ws;
  int64_t columns;
};

/// y = x w^T for packed weights of `inner` columns. `window`: rows that the scratch has room for; more are done one window after the other.
template <class O, int Most, int Both, int Weights, class Finish>
cudaError_t contract(const Call &c, int64_t inner, const Rows &rows, const Choice &choice, int64_t window, const void *x, const float *xs, const Given (&weights)[Weights], const Finish &finish) {
  static_assert(Weights <= most_weights && (Both == 1 || Both == Weights));
  using R = Ring<Most, Both>;
  const auto kernel = contract_kernel<O, Most, Both, Finish>;
  const int64_t row_bytes = inner * (128 / O::values), steps = ceil_div(row_bytes, int64_t{line_bytes});
  const int64_t scales = O::step_scales ? steps : O::row_scales ? 1 : 0;
  const bool direct = choice.ids == nullptr && rows.segments == 1 && row_bytes % 16 == 0; // rows are where a map finds them
  const Packed packed(c.scratch, window, choice.experts, steps, scales);
  if (direct) window = rows.capacity();
  const int64_t places = rows.capacity() < window ? rows.capacity() : window; // of a launch
  const bool early = choice.ids == nullptr && places <= Most;
  Problem problem{};
  for (const Given &given : weights) {
    Weight &weight = problem.w[problem.weights++];
    weight.scales = given.ws;
    weight.columns = static_cast<int32_t>(given.columns);
    weight.tiles = static_cast<int32_t>(ceil_div(given.columns, int64_t{tile_columns}));
    weight.first = Both > 1 ? 0 : problem.tiles;
    problem.tiles = weight.first + weight.tiles;
    if (const cudaError_t e = map_of(given.w, line_bytes, line_bytes, choice.experts * weight.tiles * steps * tile_columns, tile_columns, false, weight.lines)) return e;
  }
  const int32_t tiles = problem.tiles;
  const uint32_t most_neighbours = tiles > 1 && Both == 1 && (Most > 64 || choice.ids != nullptr) ? 2 : 1;
  Cut cut{most_neighbours, 1, 0};
  if (choice.ids == nullptr) {
    if (const cudaError_t e = choose_cut(kernel, c, R::blocks, tiles, most_neighbours, static_cast<int32_t>(ceil_div(places, int64_t{Most})), static_cast<int32_t>(steps * Both), R::bytes, cut)) return e;
  } else {
    cut.clusters = static_cast<uint32_t>(ceil_div(tiles, cut.neighbours) * places);
  }
  const uint32_t fit = c.processors / cut.neighbours;
  if (cut.parts == 1 && !early && cut.clusters > fit) cut.clusters = fit; // which then take tiles in turn
  problem.direct = direct;
  if (direct) {
    for (int i = 0; i < 5; ++i)
      if (const cudaError_t e = map_of(x, row_bytes, row_bytes, rows.capacity(), row_size(i) / static_cast<int>(cut.neighbours), true, problem.x[i])) return e;
    problem.heads = rows.per_token ? rows.heads : nullptr;
    problem.heads_rows = static_cast<int32_t>(rows.count);
    problem.xs = xs;
  }
  problem.packed = packed;
  if (direct && O::row_scales) problem.packed.scales = const_cast<float *>(xs);
  problem.steps = static_cast<int32_t>(steps);
  problem.matrices = choice.experts;
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
