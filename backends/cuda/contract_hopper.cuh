// Contractions by the matrix units of Hopper: products of a warpgroup over weights packed as layout.ts packs them.
//
// Blocks of 128 columns of the result (128 lines of the weight: B of the products) meet tiles of up to 256 rows (A: 64 lines each), so that a thread
// has two scales for all that it adds up of 64 rows. A thread brings lines of 128 bytes of each through a ring in shared memory, two warps the
// scales; two warpgroups multiply: half of the rows each, or half of the columns where the 64s of rows are an odd number. Where there are fewer tiles
// than processors, blocks of a cluster share the sum over k, and each finishes a part of the columns. How rows, columns and k are cut depends on
// sizes and the processor, never on the number of rows there are. Rows are taken where they lie; those of experts, and rows that do not start at
// multiples of 16 bytes, are first gathered by a small kernel (pack_rows.cuh).
//
// Several weights that meet the same rows are done in one launch: the blocks of columns of one follow those of the other.
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
constexpr int block_rows = 64, block_bytes = block_rows * line_bytes; // of A
constexpr uint32_t most_stages = 9;

constexpr int32_t most_blocks = 4; // 64s of rows of a tile
constexpr int staged_rows = 4, staged_stride = 136; // of a warp: 128 columns and what keeps banks apart
constexpr uint32_t staging_bytes = 8 * staged_rows * staged_stride * 4;
constexpr uint32_t ring_bytes = (227 << 10) - (4 << 10) - staging_bytes; // with what aligns it; barriers and groups lie beside it

/// The ring for tiles of so many 64s of rows: at least four stages, since the warps that bring scales take turns with two steps each.
struct RingSize {
  uint32_t stages, stage_bytes, scales; // scales of a stage
  __host__ __device__ RingSize(int32_t blocks, bool step_scales) : stage_bytes(tile_bytes + blocks * block_bytes), scales(step_scales ? blocks * block_rows : 0) {
    const uint32_t fit = (ring_bytes - 1024) / (stage_bytes + 4 * scales);
    stages = fit < most_stages ? fit : most_stages;
  }
};

static_assert((ring_bytes - 1024) / (tile_bytes + most_blocks * block_bytes + 4 * most_blocks * block_rows) >= 4);

/// Sizes of boxes of rows, in which they are brought.
constexpr int row_sizes = 6;
__host__ __device__ constexpr int32_t row_size(int index) { return index < 2 ? 16 << index : 64 * (index - 1); }
__host__ __device__ constexpr int size_index(int32_t rows) { return rows <= 16 ? 0 : rows <= 32 ? 1 : (rows + 63) / 64 + 1; }

/// A matrix of the contraction, or several of one size that rows choose among.
struct Weight {
  CUtensorMap lines; // of packed tiles, in boxes of a tile: copies of plain runs of bytes are slower
  const float *scales;
  int32_t columns, tiles, first; // columns of the result, blocks of 128 of them, and the number of the first block among those of all weights
};
constexpr int most_weights = 4;

struct Problem {
  Weight w[most_weights];
  CUtensorMap x[row_sizes]; // rows of x as they are or as they were packed, in boxes of each size
  bool direct;              // rows are taken as they are, with scales `xs` [row][step]
  const s3_head *heads;     // of segments of rows; null: there are `heads_rows`, else so many for each of theirs
  int32_t heads_rows, distance, capacity; // from the start of one segment to that of the next, and of all
  const float *xs;
  Packed packed;
  int32_t weights, tiles, steps; // weights, their blocks of columns altogether, lines along k
  int32_t groups;                // matrices of each weight, or segments
  int32_t blocks, row_tiles;     // 64s of rows of a tile at most, tiles of a segment
  uint32_t parts;                // blocks of a cluster: they share k
  bool zeros;                    // rows that meet no matrix get results of zeros

  /// the weight that a block of columns is of
  __device__ __forceinline__ int weight_of(int32_t tile) const {
    int which = 0;
    while (which + 1 < weights && tile >= w[which + 1].first) ++which;
    return which;
  }
};

/// A tile of work: rows of one matrix against a block of columns.
struct Item {
  int32_t matrix, tile, row, end;
  int32_t blocks, rows; // 64s of rows, and rows as they are brought: at least those from `row` to `end`
  bool alone;           // no other item has the same weights
};

/// Items in order: matrices, blocks of columns, tiles of rows, which in segments are cut whether there are rows or not. Every block of a cluster takes
/// the same.
class Items {
  const Problem &p;
  const Group *groups;
  uint32_t index, before = 0;
  int32_t matrix = 0;
  bool first = true;

  /// tiles of rows of a matrix, and 64s of rows of each but the last, which may have fewer
  struct Tiles {
    int32_t count, blocks;
  };
  __device__ Tiles tiles_of(const Group &g) const {
    const int32_t blocks = (g.count + block_rows - 1) / block_rows;
    if (blocks <= p.blocks) return {min(blocks, 1), blocks};
    const int32_t count = (blocks + p.blocks - 1) / p.blocks;
    return {count, (blocks + count - 1) / count};
  }
  __device__ static Item item_of(int32_t matrix, int32_t tile, const Group &g, int32_t from, int32_t most, bool alone) {
    const int32_t rows = max(min(most, g.count - from), 0);
    return {matrix, tile, g.base + from, g.base + from + rows, max((rows + block_rows - 1) / block_rows, 1), row_size(size_index(rows)), alone};
  }

 public:
  __device__ Items(const Problem &of, const Group *in) : p(of), groups(in), index(blockIdx.x / of.parts) {}
  /// 64s of rows of the largest tile. All lanes of a warp.
  __device__ int32_t largest() const {
    if (p.direct) return p.blocks;
    int32_t blocks = 1;
    for (int32_t i = threadIdx.x % 32; i < p.groups; i += 32) blocks = max(blocks, tiles_of(groups[i]).blocks);
    return __reduce_max_sync(0xFFFFFFFFu, blocks);
  }
  __device__ bool next(Item &item) {
    const uint32_t clusters = gridDim.x / p.parts;
    if (p.direct) {
      const int32_t row_tiles = p.groups * p.row_tiles;
      for (; index < static_cast<uint32_t>(p.tiles * row_tiles); index += clusters) {
        const int32_t tile = index / row_tiles, r = index % row_tiles, from = r % p.row_tiles * p.blocks * block_rows;
        item = item_of(0, tile, groups[r / p.row_tiles], from, p.blocks * block_rows, row_tiles == 1);
        if (item.row == item.end && !first) continue;
        first = false; // what is brought for the first one is on its way already
        index += clusters;
        return true;
      }
      return false;
    }
    for (; matrix < p.groups; ++matrix) {
      const Tiles tiles = tiles_of(groups[matrix]);
      const uint32_t items = tiles.count * p.tiles;
      if (index < before + items) {
        const int32_t local = static_cast<int32_t>(index - before), most = tiles.blocks * block_rows;
        item = item_of(matrix, local / tiles.count, groups[matrix], local % tiles.count * most, most, tiles.count == 1);
        index += clusters;
        return true;
      }
      before += items;
    }
    return false;
  }
};

template <class T>
struct alignas(8) TwoOf {
  T first, second;
};

/// The place in a ring.
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

/// What a thread of the multiplying warpgroups knows.
template <class O, class Finish>
struct Multiplier {
  const Problem &p;
  const Finish &finish;
  uint8_t *ring;
  RingSize size;
  const float *scales; // [stage][row]
  Barrier *full, *empty;
  float *staging; // four rows for each warp
  int thread, half; // thread of the warpgroup, and which of two it is
  Place at{};

  using Sum = typename O::Sum;
  using Two = TwoOf<Sum>;
  using Row = typename Finish::Row;
  using Beside = typename Finish::Beside;

  template <int Blocks>
  __device__ __forceinline__ void item(const Item &item, uint32_t part) {
    Sum sums[sets<Blocks>][width<Blocks> / 2];
    int32_t targets[sets<Blocks>][2];
    const auto find_targets = [&] {
#pragma unroll
      for (int s = 0; s < sets<Blocks>; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t row = item.row + line<Blocks>(s) + 8 * i;
          targets[s][i] = row >= item.end ? -1 : p.direct ? row : p.packed.targets[row];
        }
    };
    if constexpr (sets<Blocks> == 1) find_targets();
    const uint32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
    multiply<Blocks>(sums, last - first);
    if constexpr (!Finish::quantises)
      if (p.parts > 1) return share<Blocks>(sums, item, part);
    if constexpr (sets<Blocks> > 1) find_targets(); // no registers are left for them before
    store<Blocks>(sums, item, targets);
  }

 private:
  /// Whether the warpgroups have half of the columns each and all rows, not half of the rows; 64s of rows and columns of a warpgroup.
  template <int Blocks>
  static constexpr bool halves_columns = Blocks % 2 != 0;
  template <int Blocks>
  static constexpr int sets = halves_columns<Blocks> ? Blocks : Blocks / 2;
  template <int Blocks>
  static constexpr int width = halves_columns<Blocks> ? tile_columns / 2 : tile_columns;

  template <int Blocks>
  __device__ __forceinline__ int block_of(int s) const { return halves_columns<Blocks> ? s : half * sets<Blocks> + s; }
  /// Sum 4j + i of set s of thread t is of row line(s) + 8(i / 2) of the tile, column first_column + 8j + 2(t % 4) + i % 2 of the block.
  template <int Blocks>
  __device__ __forceinline__ int line(int s) const { return block_of<Blocks>(s) * block_rows + thread / 32 * 16 + thread % 32 / 4; }
  template <int Blocks>
  __device__ __forceinline__ int first_column() const { return halves_columns<Blocks> ? half * width<Blocks> : 0; }

  /// Enqueues products of the stage with one set of rows, which are there; to be added to what is there, or not.
  template <int Blocks>
  __device__ __forceinline__ void enqueue(Sum (&to)[width<Blocks> / 2], uint32_t stage, int s, bool add) {
    const uint32_t w = shared_address(ring) + stage * size.stage_bytes, x = w + tile_bytes;
    const uint64_t a = matrix(x + block_of<Blocks>(s) * block_bytes, 16, 1024, Swizzle::b128);
    const uint64_t b = matrix(w + first_column<Blocks>() * line_bytes, 16, 1024, Swizzle::b128);
#pragma unroll
    for (int k = 0; k < 4; ++k) O::product(to, a + 2 * k, b + 2 * k, add || k > 0);
  }

  template <int Blocks>
  __device__ __forceinline__ void multiply(Sum (&sums)[sets<Blocks>][width<Blocks> / 2], uint32_t steps) {
    if constexpr (O::step_scales) {
#pragma unroll
      for (auto &set : sums)
#pragma unroll
        for (Sum &sum : set) sum = 0;
      // while a warpgroup adds up, the products of the other run
      Sum products[width<Blocks> / 2];
      for (uint32_t step = 0; step < steps; ++step) {
        full[at.stage].wait(at.phase);
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s) {
          product_fence();
          enqueue<Blocks>(products, at.stage, s, false);
          product_commit();
          const float *const scale = scales + at.stage * size.scales + line<Blocks>(s);
          const float upper = scale[0], lower = scale[8];
          product_wait<0>();
#pragma unroll
          for (Sum &product : products) pin(product);
#pragma unroll
          for (int j = 0; j < width<Blocks> / 2; ++j) sums[s][j] += products[j] * (j % 4 < 2 ? upper : lower);
        }
        __syncwarp(); // every lane has read its scales
        if (thread % 32 == 0) empty[at.stage].arrive();
        at.advance(size.stages);
      }
    } else {
      const auto next = [&](bool add) {
        full[at.stage].wait(at.phase);
        product_fence();
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s) enqueue<Blocks>(sums[s], at.stage, s, add);
        product_commit();
      };
      next(false);
      for (uint32_t step = 1; step < steps; ++step) {
        Barrier &before = empty[at.stage];
        at.advance(size.stages);
        next(true);
        product_wait<1>();
        if (thread % 32 == 0) before.arrive();
      }
      product_wait<0>();
#pragma unroll
      for (auto &set : sums)
#pragma unroll
        for (Sum &sum : set) pin(sum);
      if (thread % 32 == 0) empty[at.stage].arrive();
      at.advance(size.stages);
    }
  }
  /// The columns of a block: of which weight, from which on, and how many.
  struct Columns {
    int which;
    int32_t first, count;
  };
  __device__ __forceinline__ Columns columns_of(const Item &item) const {
    const int which = p.weight_of(item.tile);
    const int32_t first = (item.tile - p.w[which].first) * tile_columns;
    return {which, first, p.w[which].columns - first};
  }
  /// How many of the four columns from `column` of the block on there are; none when it is not positive.
  __device__ __forceinline__ int count_of(const Columns &columns, int32_t column) const { return min(4, columns.count - column); }
  /// What is read beside four sums of a row; nothing of rows and columns that are not there.
  __device__ __forceinline__ Beside beside(const Columns &columns, int32_t target, const Row &row, int32_t column) const {
    const int count = count_of(columns, column);
    return target >= 0 && count > 0 ? finish.beside(columns.which, row, int64_t{columns.first + column}, count) : Beside{};
  }
  __device__ __forceinline__ Row row_of(int32_t target) const { return finish.row_of(max(target, 0)); }
  /// Four neighbouring sums of a row, which is number `packed` of the packed ones, with the scales of rows and columns; `column`: of the block.
  __device__ __forceinline__ void scale(const Item &item, const Columns &columns, int32_t packed, int32_t column, const Four<Sum> &sums, float (&scaled)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scaled[i] = static_cast<float>(sums[i]);
      if constexpr (O::row_scales) {
        const Weight &w = p.w[columns.which];
        scaled[i] *= p.packed.scales[packed] * w.scales[int64_t{item.matrix} * w.columns + columns.first + column + min(i, count_of(columns, column) - 1)];
      }
    }
  }
  __device__ __forceinline__ void finish_four(const Item &item, const Columns &columns, int32_t packed, int32_t target, const Row &row, int32_t column, const Four<Sum> &sums,
                                              const Beside &read) {
    const int count = count_of(columns, column);
    if (target < 0 || count <= 0) return;
    float scaled[4];
    scale(item, columns, packed, column, sums, scaled);
    finish(columns.which, row, int64_t{columns.first + column}, scaled, read, count);
  }

  struct Eight {
    Four<Sum> sums[2]; // of the upper and the lower row
  };
  /// Lanes of a pair exchange halves of sums 4j .. 4j + 7 of a set, so that each has four neighbouring columns of both of its rows, and the four lanes
  /// of a row have sixteen.
  __device__ __forceinline__ Eight exchange(const Sum *own) const {
    const bool second = thread % 2 != 0;
    const auto other = [&](Sum of_first, Sum of_second) { return __shfl_xor_sync(0xFFFFFFFFu, second ? of_second : of_first, 1); };
    const Sum a = other(own[2], own[0]), b = other(own[3], own[1]), c = other(own[4], own[6]), d = other(own[5], own[7]);
    const Four<Sum> upper = second ? Four<Sum>{c, d, own[4], own[5]} : Four<Sum>{own[0], own[1], a, b};
    const Four<Sum> lower = second ? Four<Sum>{a, b, own[2], own[3]} : Four<Sum>{own[6], own[7], c, d};
    return {{upper, lower}};
  }
  /// The first of those columns, of either row.
  template <int Blocks>
  __device__ __forceinline__ int column_of(int j, int i) const {
    return first_column<Blocks>() + 8 * j + thread % 4 / 2 * 4 + (thread % 2 != i ? 8 : 0);
  }
  template <int Blocks>
  __device__ __forceinline__ void finish_eight(const Item &item, const Columns &columns, const int32_t (&targets)[2], const Row (&rows)[2], int s, int j, const Sum *own,
                                               const Beside (&read)[2]) {
    const Eight eight = exchange(own);
#pragma unroll
    for (int i = 0; i < 2; ++i) finish_four(item, columns, item.row + line<Blocks>(s) + 8 * i, targets[i], rows[i], column_of<Blocks>(j, i), eight.sums[i], read[i]);
  }
  /// Four rows of a warp at a time go through shared memory, so that a row's columns of the block are in one warp, and so that what follows is a
  /// loop: spelled out for every sum it is far more than the instruction cache holds. Where warpgroups have half of the columns each, two warps have
  /// the rows together and take half of them.
  template <int Blocks>
  __device__ __forceinline__ void store(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, const int32_t (&targets)[sets<Blocks>][2]) {
    constexpr bool halves = halves_columns<Blocks>;
    constexpr int own = halves ? staged_rows / 2 : staged_rows;
    const Columns columns = columns_of(item);
    const int warp = thread / 32, lane = thread % 32, first_own = halves ? half * own : 0;
    Sum *const stage = reinterpret_cast<Sum *>(staging) + (halves ? warp : half * 4 + warp) * staged_rows * staged_stride;
    const auto meet_rows = [&] {
      if constexpr (halves) meet(6 + warp, 64);
      else __syncwarp();
    };
#pragma unroll 1
    for (int eight = 0; eight < 2 * sets<Blocks>; ++eight) {
      const int32_t row_of_eight = item.row + block_of<Blocks>(eight / 2) * block_rows + warp * 16 + eight % 2 * 8;
#pragma unroll 1
      for (int part = 0; part < 8 / staged_rows; ++part) {
        const int32_t first_row = row_of_eight + part * staged_rows;
        if (first_row >= item.end) break; // all of the warps that meet
        int32_t target = 0;
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (eight == 2 * s + i) {
              target = targets[s][i];
              Sum *const to = stage + lane / 4 % staged_rows * staged_stride + first_column<Blocks>() + lane % 4 * 2;
              const bool mine = lane / 4 / staged_rows == part;
#pragma unroll
              for (int j = 0; j < width<Blocks> / 8; ++j)
                if (mine) *reinterpret_cast<Two *>(to + 8 * j) = {sums[s][4 * j + 2 * i], sums[s][4 * j + 2 * i + 1]};
            }
        meet_rows();
        int32_t of[own];
        Row rows[own];
        Beside read[own];
#pragma unroll
        for (int e = 0; e < own; ++e) {
          of[e] = __shfl_sync(0xFFFFFFFFu, target, 4 * (part * staged_rows + first_own + e));
          rows[e] = row_of(of[e]);
        }
#pragma unroll
        for (int e = 0; e < own; ++e) read[e] = beside(columns, of[e], rows[e], 4 * lane);
#pragma unroll
        for (int e = 0; e < own; ++e) {
          const Four<Sum> four = *reinterpret_cast<const Four<Sum> *>(stage + (first_own + e) * staged_stride + 4 * lane);
          if constexpr (Finish::quantises) quantise(columns, of[e], rows[e], 4 * lane, four, read[e]);
          else finish_four(item, columns, first_row + first_own + e, of[e], rows[e], 4 * lane, four, read[e]);
        }
        meet_rows(); // before others take their place
      }
    }
  }
  /// Four columns of a row, of which the warp has the block's.
  __device__ __forceinline__ void quantise(const Columns &columns, int32_t target, const Row &row, int32_t column, const Four<Sum> &sums, const Beside &read) {
    const int count = count_of(columns, column);
    const float of_row[4] = {static_cast<float>(sums[0]), static_cast<float>(sums[1]), static_cast<float>(sums[2]), static_cast<float>(sums[3])};
    const Four<float> values = finish.values(row, int64_t{columns.first + column}, of_row, read, count);
    float largest = largest_of(values, count);
#pragma unroll
    for (int by = 16; by > 0; by /= 2) largest = larger_of(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, by));
    if (target >= 0 && count > 0) finish.quantised(row, int64_t{columns.first + column}, values, largest, count);
  }

  /// Eights of sums of a thread are dealt out to the blocks that share k; each adds up those of all in the order of k.
  template <int Blocks>
  __device__ __forceinline__ void share(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, uint32_t part) {
    constexpr uint32_t eights = width<Blocks> / 16, units = sets<Blocks> * eights, together = 4, piece = 256 * 16; // a four of every thread
    const uint32_t place = (half * 128 + thread) * 16;
    meet(5, 256); // the ring is read
#pragma unroll
    for (int s = 0; s < sets<Blocks>; ++s)
#pragma unroll
      for (int j = 0; j < width<Blocks> / 8; ++j)
        *reinterpret_cast<Four<Sum> *>(ring + place + (s * (width<Blocks> / 8) + j) * piece) = {sums[s][4 * j], sums[s][4 * j + 1], sums[s][4 * j + 2], sums[s][4 * j + 3]};
    meet_cluster();
    const Columns columns = columns_of(item);
    // several at once, so that loads wait for each other's; the same for all threads, whose lanes exchange what they have
    for (uint32_t unit = part; unit < units; unit += together * p.parts) {
      Sum eight[together][8] = {};
#pragma unroll 2
      for (uint32_t from = 0; from < p.parts; ++from) {
        const uint32_t there = address_in(from, shared_address(ring) + place);
#pragma unroll
        for (uint32_t u = 0; u < together; ++u) {
          if (unit + u * p.parts >= units) break;
#pragma unroll
          for (int four = 0; four < 2; ++four) {
            const uint4 more = load_in_cluster(there + (2 * (unit + u * p.parts) + four) * piece);
            const Four<Sum> values = *reinterpret_cast<const Four<Sum> *>(&more);
#pragma unroll
            for (int n = 0; n < 4; ++n) eight[u][4 * four + n] += values[n];
          }
        }
      }
#pragma unroll
      for (uint32_t u = 0; u < together; ++u) {
        if (unit + u * p.parts >= units) break;
        const int s = static_cast<int>((unit + u * p.parts) / eights), row = item.row + line<Blocks>(s);
        const int32_t targets[2] = {row < item.end ? row : -1, row + 8 < item.end ? row + 8 : -1}; // rows are taken as they are
        const int j = 2 * static_cast<int>((unit + u * p.parts) % eights);
        const Row rows[2] = {row_of(targets[0]), row_of(targets[1])};
        const Beside read[2] = {beside(columns, targets[0], rows[0], column_of<Blocks>(j, 0)), beside(columns, targets[1], rows[1], column_of<Blocks>(j, 1))};
        finish_eight<Blocks>(item, columns, targets, rows, s, j, eight[u], read);
      }
    }
  }
};

constexpr int contract_threads = 384;

/// What one of the warps that bring scales has of two steps: those of eight rows a lane, 4 lane .. 4 lane + 3 of the first 128 and of the next.
struct Scales {
  float x[2][2][4], w[2]; // x[.][step][row]

  /// Of steps 2 pair and 2 pair + 1, and of rows from `row` to `end`; `ws`: of the block of columns.
  __device__ __forceinline__ void load(const Problem &p, const float *ws, int32_t pair, int32_t row, int32_t end) {
    const int32_t step = 2 * pair;
    if (step >= p.steps) return;
    const bool both = step + 1 < p.steps;
    w[0] = ws[step];
    if (both) w[1] = ws[step + 1];
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int32_t from = row + 128 * f + 4 * (threadIdx.x % 32);
      if (from >= end) continue;
      if (p.direct) {
        const float *const xs = p.xs + int64_t{from} * p.steps + step;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (from + r >= end) continue;
          if (p.steps % 2 == 0) {
            const float2 two = *reinterpret_cast<const float2 *>(xs + r * p.steps);
            x[f][0][r] = two.x, x[f][1][r] = two.y;
          } else {
            x[f][0][r] = xs[r * p.steps];
            if (both) x[f][1][r] = xs[r * p.steps + 1];
          }
        }
      } else {
        const float *const xs = p.packed.scales + int64_t{step} * p.packed.places + from;
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (k == 0 || both) {
            const float4 four = *reinterpret_cast<const float4 *>(xs + k * p.packed.places);
            x[f][k][0] = four.x, x[f][k][1] = four.y, x[f][k][2] = four.z, x[f][k][3] = four.w;
          }
      }
    }
  }
  /// Those of step k of the two.
  __device__ __forceinline__ void store(float *to, int k, int32_t rows) const {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int from = 128 * f + 4 * (threadIdx.x % 32);
      if (from < rows) *reinterpret_cast<float4 *>(to + from) = {x[f][k][0] * w[k], x[f][k][1] * w[k], x[f][k][2] * w[k], x[f][k][3] * w[k]};
    }
    __syncwarp();
  }
};

template <class O, class Finish>
__global__ void __launch_bounds__(contract_threads, 1) contract_kernel(const __grid_constant__ Problem p, const __grid_constant__ Finish finish) {
  extern __shared__ uint8_t shared_memory[];
  __shared__ Barrier full[most_stages], empty[most_stages];
  __shared__ Group groups[most_matrices + 1];
  uint8_t *const ring = shared_memory + (1024 - shared_address(shared_memory) % 1024) % 1024;

  const uint32_t part = p.parts == 1 ? 0 : block_of_cluster();
  const int32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
  RingSize size(p.blocks, O::step_scales);
  let_successor_start();
  const auto bring_weights = [&](int32_t matrix, int32_t tile, bool alone, int32_t step, uint32_t stage) {
    const Weight &w = p.w[p.weight_of(tile)];
    tensor_copy(ring + stage * size.stage_bytes, &w.lines, 0, ((matrix * w.tiles + tile - w.first) * p.steps + step) * tile_columns, full[stage], alone ? read_once : read_again);
  };
  /// `count`: as they are brought
  const auto bring_rows = [&](int32_t row, int32_t count, int32_t step, uint32_t stage) {
    const int32_t x = p.direct ? step * line_bytes : 0, y = p.direct ? row : static_cast<int32_t>(step * p.packed.places) + row;
    tensor_copy(ring + stage * size.stage_bytes + tile_bytes, &p.x[size_index(count)], x, y, full[stage], read_often);
  };
  const auto scales_of = [&](int32_t matrix, int32_t tile) {
    const Weight &w = p.w[p.weight_of(tile)];
    return w.scales + int64_t{matrix * w.tiles + tile - w.first} * p.steps;
  };
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < most_stages; ++i) {
      full[i].init(O::step_scales ? 3 : 2); // lines of weights, lines of rows, scales
      empty[i].init(8);
    }
    publish_barriers();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  const bool brings_weights = threadIdx.x == 0, brings_scales = O::step_scales && (warp == 1 || warp == 2), brings_rows = threadIdx.x == 96;
  // Where rows are taken as they are, the first item is known before anything of them is: weights are brought before the predecessor has ended, and
  // as many rows as there may be before it is known how many there are.
  const int32_t row_tiles = p.groups * p.row_tiles, item_rows = p.blocks * block_rows, known = blockIdx.x / p.parts;
  const int32_t ahead = p.direct ? min(last - first, static_cast<int32_t>(size.stages)) : 0;
  int32_t turn = warp - 1; // of a warp that brings scales: pairs of steps of the other before its next one
  Scales own;
  if (p.direct) {
    const int32_t tile = known / row_tiles, place = known % row_tiles, row = place / p.row_tiles * p.distance + place % p.row_tiles * item_rows;
    if (brings_weights) {
      for (int32_t i = 0; i < ahead; ++i) {
        full[i].expect(tile_bytes);
        bring_weights(0, tile, row_tiles == 1, first + i, i);
      }
    } else if (brings_rows) {
      prefetch_map(&p.x[size_index(item_rows)]);
      after_predecessor();
      for (int32_t i = 0; i < ahead; ++i) {
        full[i].expect(item_rows * line_bytes);
        bring_rows(row, item_rows, first + i, i);
      }
    } else if (brings_scales) {
      const float *const ws = scales_of(0, tile);
      const int32_t ahead_of = first + 32 * (threadIdx.x % 32), end = min(row + item_rows, p.capacity);
      if (warp == 1 && ahead_of < last) prefetch(ws + ahead_of);
      after_predecessor();
      const int32_t mine = first / 2 + turn;
      own.load(p, ws, mine, row, end);
      for (int k = 0; k < 2; ++k) {
        const int32_t step = 2 * mine + k;
        if (step < first || step >= last) continue;
        own.store(reinterpret_cast<float *>(ring + size.stages * size.stage_bytes) + (step - first) * size.scales, k, item_rows);
        if (threadIdx.x % 32 == 0) full[step - first].arrive();
      }
      if (2 * mine < last) {
        turn += 2;
        own.load(p, ws, mine + 2, row, end);
      }
    }
  }
  after_predecessor();
  if (p.direct) {
    for (int i = threadIdx.x; i < p.groups; i += contract_threads) groups[i] = {i * p.distance, p.heads == nullptr ? p.heads_rows : static_cast<int32_t>(p.heads[i].rows) * p.heads_rows};
  } else {
    for (int i = threadIdx.x; i <= p.groups; i += contract_threads) groups[i] = p.packed.groups[i];
  }
  __syncthreads();

  Items items(p, groups);
  if (!p.direct) size = RingSize(items.largest(), O::step_scales);
  float *const scales = reinterpret_cast<float *>(ring + size.stages * size.stage_bytes);
  Item item;
  if (threadIdx.x < 128) {
    give_registers<72>();
    Place at;
    int32_t brought = 0;
    bool loaded = p.direct;
    while (items.next(item)) {
      if (brings_weights || brings_rows) {
        for (int32_t step = first; step < last; ++step, at.advance(size.stages), ++brought) {
          if (brought < ahead) continue;
          empty[at.stage].wait(at.phase ^ 1);
          full[at.stage].expect(brings_weights ? tile_bytes : item.rows * line_bytes);
          if (brings_weights) bring_weights(item.matrix, item.tile, item.alone, step, at.stage);
          else bring_rows(item.row, item.rows, step, at.stage);
        }
      } else if (brings_scales) {
        // The two take turns with pairs of steps; the loads of one are on their way while the other has its own. A phase of a barrier is known by its
        // parity alone: a warp waits for its own steps only, which nobody passes before it, and which are less than a round of the ring apart.
        const float *const ws = scales_of(item.matrix, item.tile);
        const int32_t pairs = (last + 1) / 2;
        int32_t mine = first / 2 + turn;
        if (!loaded) own.load(p, ws, mine, item.row, item.end);
        loaded = false;
        for (int32_t pair = first / 2; pair < pairs; ++pair) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int32_t step = 2 * pair + k;
            if (step < first || step >= last) continue;
            if (pair == mine) {
              empty[at.stage].wait(at.phase ^ 1);
              own.store(scales + at.stage * size.scales, k, item.blocks * block_rows);
              if (threadIdx.x % 32 == 0) full[at.stage].arrive();
            }
            at.advance(size.stages);
          }
          if (pair == mine) {
            mine += 2;
            if (mine < pairs) own.load(p, ws, mine, item.row, item.end);
          }
        }
        turn = mine - pairs;
      }
      if (p.parts > 1) meet_cluster(); // as those who add up do
    }
  } else {
    take_registers<216>();
    Multiplier<O, Finish> multiplier{p, finish, ring, size, scales, full, empty, reinterpret_cast<float *>(ring + ring_bytes - 1024), static_cast<int>(threadIdx.x % 128), static_cast<int>(threadIdx.x / 128) - 1};
    while (items.next(item)) {
      if (item.blocks == 1) multiplier.template item<1>(item, part);
      else if (item.blocks == 2) multiplier.template item<2>(item, part);
      else if (item.blocks == 3) multiplier.template item<3>(item, part);
      else multiplier.template item<4>(item, part);
    }
    if constexpr (!Finish::quantises) {
      const Group none = p.zeros ? groups[p.groups] : Group{0, 0};
      const float zeros[4] = {};
      for (int32_t place = blockIdx.x; place < none.count; place += gridDim.x) {
        const auto row = finish.row_of(p.packed.targets[none.base + place]);
        for (int which = 0; which < p.weights; ++which)
          for (int32_t column = 4 * (threadIdx.x - 128); column < p.w[which].columns; column += 4 * 256) {
            const int count = min(4, p.w[which].columns - column);
            finish(which, row, int64_t{column}, zeros, finish.beside(which, row, int64_t{column}, count), count);
          }
      }
    }
  }
  if (p.parts > 1) meet_cluster(); // others may still read this block's sums
}

/// How a launch is cut into blocks: 64s of rows of a tile, blocks that share k, and clusters of those.
struct Cut {
  int32_t blocks;
  uint32_t parts, clusters;
};

template <class Kernel>
cudaError_t configure(Kernel *kernel, const Call &c, const Cut &cut, cudaLaunchConfig_t &config, cudaLaunchAttribute (&attributes)[2]) {
  const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(ring_bytes + staging_bytes));
  if (raised != cudaSuccess) return raised;
  if (const cudaError_t e = prefer_shared(kernel)) return e;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cut.parts, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config = {};
  config.gridDim = dim3(cut.clusters * cut.parts);
  config.blockDim = dim3(contract_threads);
  config.dynamicSmemBytes = ring_bytes + staging_bytes;
  config.stream = c.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaSuccess;
}

/// Chooses the cut by an estimate of its time, in nanoseconds as measured on an H100: rounds of blocks, of so many steps and what ends an item, after
/// what precedes the first; at least as long as memory brings the weights; then exchanges of sums. `length`: rows of each of `groups` segments.
template <class Kernel>
cudaError_t choose_cut(Kernel *kernel, const Call &c, int32_t tiles, int32_t groups, int64_t length, int32_t steps, uint32_t most_parts, Cut &best) {
  constexpr uint64_t step_time[most_blocks] = {330, 490, 670, 830}, before = 3000, end_time = 800, exchange = 2000, exchange_each = 700;
  constexpr uint64_t bytes_a_time = 3000;
  const uint64_t memory = uint64_t{static_cast<uint32_t>(tiles)} * steps * tile_bytes / bytes_a_time;
  uint64_t least = UINT64_MAX;
  for (uint32_t blocks = 1; blocks <= most_blocks; ++blocks)
    for (uint32_t parts = 1; parts <= most_parts && (parts == 1 || steps >= static_cast<int32_t>(4 * parts)); ++parts) {
      const uint32_t items = static_cast<uint32_t>(tiles * groups * ceil_div(length, int64_t{blocks} * block_rows));
      const Cut cut{static_cast<int32_t>(blocks), parts, items};
      uint32_t slots = c.processors;
      if (parts > 1) {
        cudaLaunchConfig_t config;
        cudaLaunchAttribute attributes[2];
        if (const cudaError_t e = configure(kernel, c, cut, config, attributes)) return e;
        int fit = 0;
        if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&fit, kernel, &config)) return e;
        slots = fit;
        if (fit == 0) continue;
      }
      const uint64_t rounds = ceil_div(items, slots), loop = before + rounds * (ceil_div(static_cast<uint32_t>(steps), parts) * step_time[blocks - 1] + end_time * blocks);
      const uint64_t cost = (loop > memory ? loop : memory) + (parts > 1 ? rounds * (exchange + exchange_each * (parts + blocks)) : 0);
      if (cost < least) least = cost, best = cut;
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
  static_assert(Weights <= most_weights);
  const auto kernel = contract_kernel<O, Finish>;
  const int64_t row_bytes = inner * (128 / O::values), steps = ceil_div(row_bytes, int64_t{line_bytes});
  const int64_t scales = O::step_scales ? steps : O::row_scales ? 1 : 0;
  const bool direct = choice.ids == nullptr && row_bytes % 16 == 0; // rows are where a map finds them; linear.ts gives no scratch then
  if (direct && rows.segments > most_matrices) return cudaErrorInvalidValue;
  const Packed packed(c.scratch, window, choice.experts, steps, scales);
  if (direct) window = rows.capacity();
  const int64_t places = rows.capacity() < window ? rows.capacity() : window; // of a launch
  Problem problem{};
  for (const Given &given : weights) {
    Weight &weight = problem.w[problem.weights++];
    weight.scales = given.ws;
    weight.columns = static_cast<int32_t>(given.columns);
    weight.tiles = static_cast<int32_t>(ceil_div(given.columns, int64_t{tile_columns}));
    weight.first = problem.tiles;
    problem.tiles += weight.tiles;
    if (const cudaError_t e = map_of(given.w, line_bytes, line_bytes, choice.experts * weight.tiles * steps * tile_columns, tile_columns, false, weight.lines)) return e;
  }
  problem.groups = direct ? static_cast<int32_t>(rows.segments) : choice.experts;
  Cut cut{most_blocks, 1, 0};
  if (direct) {
    if (const cudaError_t e = choose_cut(kernel, c, problem.tiles, problem.groups, rows.distance(), static_cast<int32_t>(steps), Finish::quantises ? 1 : 8, cut)) return e;
    problem.heads = rows.per_token ? rows.heads : nullptr;
    problem.heads_rows = static_cast<int32_t>(rows.count);
    problem.distance = static_cast<int32_t>(rows.distance());
    problem.capacity = static_cast<int32_t>(rows.capacity());
    problem.row_tiles = static_cast<int32_t>(ceil_div(rows.distance(), int64_t{cut.blocks} * block_rows));
    problem.xs = xs;
  } else {
    cut.clusters = static_cast<uint32_t>(problem.tiles * places);
  }
  if (cut.parts == 1 && cut.clusters > static_cast<uint32_t>(c.processors)) cut.clusters = c.processors; // which then take tiles in turn
  for (int i = 0; i < row_sizes; ++i)
    if (const cudaError_t e = direct ? map_of(x, row_bytes, row_bytes, rows.capacity(), row_size(i), true, problem.x[i])
                                     : map_of(packed.lines, line_bytes, line_bytes, packed.places * steps, row_size(i), false, problem.x[i]))
      return e;
  problem.direct = direct;
  problem.packed = packed;
  if (direct && O::row_scales) problem.packed.scales = const_cast<float *>(xs);
  problem.steps = static_cast<int32_t>(steps);
  problem.blocks = cut.blocks;
  problem.parts = cut.parts;
  problem.zeros = choice.zeros;
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
