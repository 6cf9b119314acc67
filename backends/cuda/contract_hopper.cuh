// Contractions by the matrix units of Hopper: products of a warpgroup over weights packed as layout.ts packs them.
//
// Blocks of 128 columns of the result (128 lines of the weight: B of the products) meet tiles of up to 256 rows (A: 64 lines each), so that a thread
// has two scales for all that it adds up of 64 rows. A thread brings lines of 128 bytes of weights through a ring in shared memory, a warp those of
// rows, two warps the scales; two warpgroups multiply: half of the rows each, or half of the columns where the 64s of rows are an odd number. Rows are
// taken where they lie; those of experts, and rows that do not start at multiples of 16 bytes, are first gathered by a small kernel (pack_rows.cuh).
//
// Where there are fewer tiles than processors, blocks of a cluster share the sum over k, and each finishes a part of the columns; how k is cut then
// depends on sizes and the processor, never on the number of rows there are. Where there are more, tiles are dealt out: every block gets a share of
// the same length, which may begin and end inside of a tile. Who has the first steps of a tile leaves its sums, and who has the others goes on with
// them, so that each sum is added up in the order of k wherever it is cut.
//
// Several weights that meet the same rows are done in one launch: the blocks of columns of one follow those of the other. Where the results of two
// meet, a block has the same columns of both, of up to 128 rows.
#pragma once
#include <type_traits>

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
constexpr uint32_t ring_bytes = (227 << 10) - (5 << 10) - staging_bytes; // with what aligns it; barriers and the table lie beside it

/// The ring for tiles of so many 64s of rows and so many weights: at least four stages, since the warps that bring scales take turns with two steps each.
struct RingSize {
  uint32_t stages, stage_bytes, scales; // scales of a stage and a weight
  static __host__ __device__ constexpr RingSize of(int32_t blocks, bool step_scales, int weights) {
    const uint32_t bytes = weights * tile_bytes + blocks * block_bytes, scales = step_scales ? blocks * block_rows : 0, fit = (ring_bytes - 1024) / (bytes + 4 * weights * scales);
    return {fit < most_stages ? fit : most_stages, bytes, scales};
  }
};
static_assert(RingSize::of(most_blocks, true, 1).stages >= 4 && RingSize::of(most_blocks / 2, true, 2).stages >= 4);

/// Sizes of boxes of rows, in which they are brought.
constexpr int row_sizes = 7;
__host__ __device__ constexpr int32_t row_size(int index) { return index < 4 ? 8 << index : 64 * (index - 2); }
__host__ __device__ constexpr int size_index(int32_t rows) { return rows <= 8 ? 0 : rows <= 16 ? 1 : rows <= 32 ? 2 : (rows + 63) / 64 + 2; }

/// A matrix of the contraction, or several of one size that rows choose among.
struct Weight {
  CUtensorMap lines; // of packed tiles, in boxes of a tile: copies of plain runs of bytes are slower
  const float *scales;
  int32_t columns, tiles, first; // columns of the result, blocks of 128 of them, and the number of the first block among those of all weights
};
constexpr int most_weights = 4;
/// Blocks that tiles are dealt out to: linear.ts has scratch for their sums.
constexpr uint32_t most_dealt = 144;
constexpr int64_t sums_left = 256 * 128; // by one block at most

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
  bool dealt;                    // tiles are dealt out; else a block knows its first one before it knows how many rows there are
  float *left;                   // sums for each of the blocks to go on with
  uint32_t *ready;               // of each of them, whether they are there

  /// the weight that a block of columns is of
  __device__ __forceinline__ int weight_of(int32_t tile) const {
    int which = 0;
    while (which + 1 < weights && tile >= w[which + 1].first) ++which;
    return which;
  }
};

/// A tile of work: rows of one matrix against a block of columns, or some steps of it.
struct Item {
  int32_t matrix, tile, row, end;
  int32_t blocks, rows; // 64s of rows, and rows as they are brought: at least those from `row` to `end`
  bool alone;           // no other item has the same weights
  int32_t first, last;  // steps
  bool resumes, leaves; // goes on with sums that the block before has left; leaves them to the block after
};

/// A share of the items in order: from step `first_step` of item `first` to step `last_step` of item `last`.
struct Share {
  uint32_t first, last;
  int32_t first_step, last_step;
};

/// What the threads of a block look up.
struct Table {
  Group groups[most_matrices + 1];  // rows of each matrix, and of none, or of each segment
  int32_t before[most_matrices + 1]; // items before those of each matrix, or rows before those of each segment, where segments take whole eights
  int32_t rows, blocks;              // rows of segments in such eights, 64s of rows that tiles are cut to
  Share share;
  RingSize ring;

  /// The segment that has row `row` of those in eights.
  __device__ __forceinline__ int32_t segment_of(int32_t segments, int32_t row) const { return last_until(segments, row); }
  /// The last of so many before which there are no more than `n`.
  __device__ __forceinline__ int32_t last_until(int32_t count, int32_t n) const {
    int32_t low = 0, high = count;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (before[middle] <= n) low = middle;
      else high = middle;
    }
    return low;
  }
};

/// n / d for quotients below 2^21: from that of floats, which is one off at most.
__device__ __forceinline__ uint32_t quotient_of(uint32_t n, uint32_t d) {
  const uint32_t near = static_cast<uint32_t>(__fdividef(static_cast<float>(n), static_cast<float>(d)));
  const int32_t left = static_cast<int32_t>(n - near * d);
  return left < 0 ? near - 1 : left >= static_cast<int32_t>(d) ? near + 1 : near;
}

/// How rows of one matrix are cut: tiles, and 64s of rows of each but the last, which has `rest`.
struct Cuts {
  int32_t count, blocks, rest;
  __device__ __forceinline__ Cuts(int32_t rows, int32_t most) {
    const int32_t all = (rows + block_rows - 1) / block_rows;
    count = quotient_of(all + most - 1, most);
    blocks = count == 0 ? 0 : quotient_of(all + count - 1, count);
    rest = all - (count - 1) * blocks;
  }
};

/// Lengths of items in units of the products of 64 rows with a block of columns, as measured on an H100: steps, and what ends an item.
template <int Weights>
struct Lengths {
  static constexpr int32_t least_cut = 16, least_steps = 4; // steps of items that may be cut, and of their pieces
  static __device__ __forceinline__ uint32_t step(int32_t blocks) { return Weights * blocks + 1; }
  static __device__ __forceinline__ uint32_t of(int32_t steps, int32_t blocks) { return steps * step(blocks) + 5 * blocks + 5; }
  static __device__ __forceinline__ uint32_t of(int32_t steps, const Cuts &cuts) {
    return cuts.count == 0 ? 0 : (cuts.count - 1) * of(steps, cuts.blocks) + of(steps, cuts.rest);
  }
};

/// A value of another lane.
template <class T>
__device__ __forceinline__ T from_lane(const T &own, int lane) {
  static_assert(sizeof(T) % 4 == 0);
  struct Words { uint32_t at[sizeof(T) / 4]; } words = reinterpret_cast<const Words &>(own);
#pragma unroll
  for (uint32_t &word : words.at) word = __shfl_sync(0xFFFFFFFFu, word, lane);
  return reinterpret_cast<const T &>(words);
}

/// Sums over the lanes up to this one's.
__device__ __forceinline__ uint32_t sum_to_lane(uint32_t own) {
  for (int by = 1; by < 32; by *= 2) {
    const uint32_t before = __shfl_up_sync(0xFFFFFFFFu, own, by);
    if (threadIdx.x % 32 >= by) own += before;
  }
  return own;
}

/// 64s of rows of a tile: sums by two weights leave registers for half as many.
template <class Finish>
constexpr int32_t most_of = Finish::pairs ? most_blocks / 2 : most_blocks;

/// Fills in the table of a block to which tiles are dealt, from its groups. All lanes of a warp.
template <class O, int Weights>
__device__ __forceinline__ void deal(const Problem &p, int32_t most, Table &table) {
  using Length = Lengths<Weights>;
  const int32_t lane = threadIdx.x % 32;
  int32_t rows = 0;
  if (p.direct)
    for (int32_t first = 0; first < p.groups; first += 32) {
      const int32_t segment = first + lane, own = segment < p.groups ? (table.groups[segment].count + 7) / 8 * 8 : 0;
      const int32_t sum = rows + static_cast<int32_t>(sum_to_lane(own));
      if (segment < p.groups) table.before[segment] = sum - own;
      rows = __shfl_sync(0xFFFFFFFFu, sum, 31);
    }
  const int32_t matrices = p.direct ? 1 : p.groups;
  const auto rows_of = [&](int32_t matrix) { return p.direct ? rows : table.groups[matrix].count; };
  // the cut that is done first
  const uint32_t blocks = gridDim.x;
  struct Sums {
    uint32_t items, length, largest, time; // `largest`: 64s of rows
  } best{0, 0, 1, UINT32_MAX};
  int32_t best_cut = 1;
  const auto add = [&](Sums &to, const Cuts &cuts) { to = {to.items + cuts.count * p.tiles, to.length + Length::of(p.steps, cuts) * p.tiles, max(to.largest, cuts.blocks), 0}; };
  const auto take = [&](const Sums &sums, int32_t cut) {
    if (sums.time < best.time) best = sums, best_cut = cut;
  };
  const auto time_of = [&](const Sums &sums) {
    if (sums.items > blocks && p.steps >= Length::least_cut) return quotient_of(sums.length, blocks) + 1;
    return quotient_of(sums.items + blocks - 1, blocks) * Length::of(p.steps, sums.largest);
  };
  if (matrices <= 8) { // cuts side by side
    static_assert(most_blocks == 4);
    Sums sums{0, 0, 1, 0};
    if (lane % 8 < matrices) add(sums, Cuts(rows_of(lane % 8), max(most - lane / 8, 1)));
    for (int by = 1; by < 8; by *= 2)
      sums = {sums.items + __shfl_xor_sync(0xFFFFFFFFu, sums.items, by), sums.length + __shfl_xor_sync(0xFFFFFFFFu, sums.length, by),
              max(sums.largest, __shfl_xor_sync(0xFFFFFFFFu, sums.largest, by)), 0};
    sums.time = time_of(sums);
    for (int cut = most; cut > 0; --cut) take(from_lane(sums, 8 * (most - cut)), cut);
  } else {
    for (int32_t cut = most; cut > 0; --cut) {
      Sums sums{0, 0, 1, 0};
      for (int32_t matrix = lane; matrix < matrices; matrix += 32) add(sums, Cuts(rows_of(matrix), cut));
      sums = {__reduce_add_sync(0xFFFFFFFFu, sums.items), __reduce_add_sync(0xFFFFFFFFu, sums.length), __reduce_max_sync(0xFFFFFFFFu, sums.largest), 0};
      sums.time = time_of(sums);
      take(sums, cut);
    }
  }
  // the share of this block
  const uint32_t items = best.items, each = quotient_of(best.length, blocks), over = best.length - each * blocks;
  uint32_t item_before = 0, length_before = 0;
  const uint32_t ends[2] = {each * blockIdx.x + quotient_of(over * blockIdx.x, blocks), each * (blockIdx.x + 1) + quotient_of(over * (blockIdx.x + 1), blocks)};
  Share share{min(blockIdx.x, items), min(blockIdx.x + 1, items), 0, 0};
  if (items > blocks) share = {items, items, 0, 0};
  for (int32_t first = 0; first < matrices; first += 32) {
    const int32_t matrix = first + lane;
    const Cuts cuts(matrix < matrices ? rows_of(matrix) : 0, best_cut);
    const uint32_t own_items = cuts.count * p.tiles, own_length = Length::of(p.steps, cuts) * p.tiles;
    const uint32_t item_sum = item_before + sum_to_lane(own_items), length_sum = length_before + sum_to_lane(own_length);
    if (!p.direct && matrix < matrices) table.before[matrix] = item_sum - own_items;
    if (items > blocks)
#pragma unroll
      for (int end = 0; end < 2; ++end) {
        const bool here = ends[end] >= length_sum - own_length && ends[end] < length_sum;
        uint32_t item = 0;
        int32_t step = 0;
        if (here) {
          uint32_t left = ends[end] - (length_sum - own_length);
          const uint32_t row_tile_length = p.tiles * Length::of(p.steps, cuts.blocks);
          const int32_t row_tile = min(static_cast<int32_t>(quotient_of(left, row_tile_length)), cuts.count - 1), tile_blocks = row_tile + 1 == cuts.count ? cuts.rest : cuts.blocks;
          left -= row_tile * row_tile_length;
          const uint32_t item_length = Length::of(p.steps, tile_blocks), tile = quotient_of(left, item_length);
          left -= tile * item_length;
          item = item_sum - own_items + row_tile * p.tiles + tile;
          step = static_cast<int32_t>(quotient_of(left, Length::step(tile_blocks))) / 2 * 2;
          const bool most = p.steps < Length::least_cut ? 2 * left >= item_length : step > p.steps - Length::least_steps;
          if (most) ++item;
          if (most || p.steps < Length::least_cut || step < Length::least_steps) step = 0;
        }
        const uint32_t holders = __ballot_sync(0xFFFFFFFFu, here);
        if (holders == 0) continue;
        item = __shfl_sync(0xFFFFFFFFu, item, __ffs(holders) - 1), step = __shfl_sync(0xFFFFFFFFu, step, __ffs(holders) - 1);
        if (end == 0) share.first = item, share.first_step = step;
        else share.last = item, share.last_step = step;
      }
    item_before = __shfl_sync(0xFFFFFFFFu, item_sum, 31), length_before = __shfl_sync(0xFFFFFFFFu, length_sum, 31);
  }
  if (lane == 0) table.rows = rows, table.blocks = best_cut, table.share = share, table.ring = RingSize::of(best.largest, O::step_scales, Weights);
}

/// Items of a block. Those of its share, where tiles are dealt: in order of matrices, tiles of rows, blocks of columns. Else every so many, in order
/// of blocks of columns and tiles of rows, which in segments are cut whether there are rows or not; every block of a cluster takes the same.
class Items {
  const Problem &p;
  const Table &table;
  uint32_t number = UINT32_MAX;

  __device__ __forceinline__ Item item_of(int32_t matrix, int32_t tile, const Group &g, int32_t from, int32_t most, bool alone) const {
    const int32_t rows = max(min(most, g.count - from), 0);
    return {matrix, tile, g.base + from, g.base + from + rows, max((rows + block_rows - 1) / block_rows, 1), row_size(size_index(rows)), alone, 0, p.steps, false, false};
  }
  __device__ __forceinline__ uint32_t known() const { return blockIdx.x / p.parts + number * (gridDim.x / p.parts); }

 public:
  __device__ Items(const Problem &of, const Table &in) : p(of), table(in) {}
  /// Goes on to the next one, or says that there is none.
  __device__ __forceinline__ bool next() {
    if (p.dealt) {
      const Share &share = table.share;
      const uint32_t count = share.first == share.last ? share.last_step > share.first_step : share.last - share.first + (share.last_step > 0);
      return ++number < count;
    }
    for (;;) {
      ++number;
      if (known() >= static_cast<uint32_t>(p.tiles * p.groups * p.row_tiles)) return false;
      const Item own = item();
      if (number == 0 || own.row < own.end) return true; // what is brought for the first one is on its way already
    }
  }
  /// Looks it up anew where it is asked for again: nothing is kept in registers meanwhile.
  __device__ __forceinline__ Item again() {
    asm volatile("" : "+r"(number));
    return item();
  }
  __device__ __forceinline__ Item item() const {
    if (!p.dealt) {
      const int32_t row_tiles = p.groups * p.row_tiles, tile = known() / row_tiles, r = known() % row_tiles, from = r % p.row_tiles * p.blocks * block_rows;
      Item own = item_of(0, tile, table.groups[r / p.row_tiles], from, p.blocks * block_rows, row_tiles == 1);
      const uint32_t part = p.parts == 1 ? 0 : block_of_cluster();
      own.first = p.steps * part / p.parts, own.last = p.steps * (part + 1) / p.parts;
      return own;
    }
    const Share share = table.share;
    const bool begins = share.first_step > 0, ends = share.last_step > 0;
    uint32_t index = share.first + number + begins - ends;
    int32_t from = 0, to = p.steps;
    // the first steps of the last one come first, since the next block needs them at its end
    if (share.first == share.last) index = share.first, from = share.first_step, to = share.last_step;
    else if (ends && number == 0) index = share.last, to = share.last_step;
    else if (index == share.last) index = share.first, from = share.first_step;
    const int32_t matrix = p.direct ? 0 : table.last_until(p.groups, index);
    const Group g = p.direct ? Group{0, table.rows} : table.groups[matrix];
    const Cuts cuts(g.count, table.blocks);
    const int32_t local = static_cast<int32_t>(index) - (p.direct ? 0 : table.before[matrix]), most = cuts.blocks * block_rows;
    const int32_t row_tile = quotient_of(local, p.tiles);
    Item own = item_of(matrix, local - row_tile * p.tiles, g, row_tile * most, most, cuts.count == 1);
    own.first = from, own.last = to, own.resumes = from > 0, own.leaves = to < p.steps;
    return own;
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

/// Bits of the largest magnitude; a NaN's are larger than those of any number.
__device__ __forceinline__ uint32_t largest_of(const Four<float> &values, int count) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFFu);
  return largest;
}
/// x / d rounded as a division is, given 1 / d likewise, where neither the quotient nor what it leaves of x gets too small.
__device__ __forceinline__ float quotient(float x, float d, float reciprocal) {
  const float near = x * reciprocal;
  return __fmaf_rn(__fmaf_rn(-near, d, x), reciprocal, near);
}
/// Codes of four columns of a group, and of its first ones the scale too, from the group's largest magnitude: as ir/ops/quantise.ts.
template <bool Whole>
__device__ __forceinline__ void quantise_four(const Four<float> &values, float largest, int count, bool first, e4m3 *codes, float *scale) {
  Four<e4m3> four;
  float divisor;
  if (largest > 0x1p-80f && largest < 0x1p120f) { // quotients that are too small then become zeros anyway
    divisor = quotient(largest, 448.0f, 1.0f / 448.0f);
    const float reciprocal = 1.0f / divisor;
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = to_e4m3(quotient(values[i], divisor, reciprocal));
  } else {
    const float raw = largest / 448.0f;
    divisor = raw == 0 ? 1.0f : raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = to_e4m3(values[i] / divisor);
  }
  write_four<Whole>(codes, count, four);
  if (first) *scale = divisor;
}

/// What a thread of the multiplying warpgroups knows.
template <class O, class Finish>
struct Multiplier {
  static constexpr int weights = Finish::pairs ? 2 : 1; // of which a tile has columns
  const Problem &p;
  const Table &table;
  const Finish &finish;
  uint8_t *ring;
  const RingSize &size; // in shared memory: there are no registers left for it
  const float *scales; // [stage][weight][row]
  Barrier *full, *empty;
  float *staging; // four rows for each warp
  int thread, half; // thread of the warpgroup, and which of two it is
  Place at{};

  using Sum = typename O::Sum;
  using Two = TwoOf<Sum>;
  using Scaled = std::conditional_t<Finish::pairs, float[2][4], float[4]>; // what Finish gets of four columns
  using Row = typename Finish::Row;
  using Beside = typename Finish::Beside;

  template <int Blocks>
  __device__ __forceinline__ void item(Items &items, uint32_t part) {
    Sum sums[sets<Blocks>][width<Blocks> / 2];
    const Item before = items.item();
    if (before.resumes) {
      fetch<Blocks>(sums);
    } else {
#pragma unroll
      for (auto &set : sums)
#pragma unroll
        for (Sum &sum : set) sum = 0;
    }
    multiply<Blocks>(sums, before.last - before.first);
    const Item item = items.again();
    if constexpr (!Finish::quantises && !Finish::pairs)
      if (p.parts > 1) return share<Blocks>(sums, item, part);
    if (item.leaves) leave<Blocks>(sums);
    else store<Blocks>(sums, item);
  }

 private:
  /// Whether the warpgroups have half of the columns each and all rows, not half of the rows; 64s of rows, sets of sums and columns of a warpgroup.
  template <int Blocks>
  static constexpr bool halves_columns = Blocks % 2 != 0;
  template <int Blocks>
  static constexpr int row_sets = halves_columns<Blocks> ? Blocks : Blocks / 2;
  template <int Blocks>
  static constexpr int sets = row_sets<Blocks> * weights;
  template <int Blocks>
  static constexpr int width = halves_columns<Blocks> ? tile_columns / 2 : tile_columns;

  /// Set s is of weight s % weights and of the 64 rows of block_of(s / weights).
  template <int Blocks>
  __device__ __forceinline__ int block_of(int rows) const { return halves_columns<Blocks> ? rows : half * row_sets<Blocks> + rows; }
  /// Sum 4j + i of set s of thread t is of row line(s) + 8(i / 2) of the tile, column first_column + 8j + 2(t % 4) + i % 2 of the block.
  template <int Blocks>
  __device__ __forceinline__ int line(int s) const { return block_of<Blocks>(s / weights) * block_rows + thread / 32 * 16 + thread % 32 / 4; }
  template <int Blocks>
  __device__ __forceinline__ int first_column() const { return halves_columns<Blocks> ? half * width<Blocks> : 0; }

  /// Enqueues products of the stage with one set of rows, which are there; to be added to what is there, or not.
  template <int Blocks>
  __device__ __forceinline__ void enqueue(Sum (&to)[width<Blocks> / 2], uint32_t stage, int s, bool add) {
    const uint32_t w = shared_address(ring) + stage * size.stage_bytes, x = w + weights * tile_bytes;
    const uint64_t a = matrix(x + block_of<Blocks>(s / weights) * block_bytes, 16, 1024, Swizzle::b128);
    const uint64_t b = matrix(w + s % weights * tile_bytes + first_column<Blocks>() * line_bytes, 16, 1024, Swizzle::b128);
#pragma unroll
    for (int k = 0; k < 4; ++k) O::product(to, a + 2 * k, b + 2 * k, add || k > 0);
  }

  template <int Blocks>
  __device__ __forceinline__ void multiply(Sum (&sums)[sets<Blocks>][width<Blocks> / 2], uint32_t steps) {
    if constexpr (O::step_scales) {
      // while a warpgroup adds up, the products of the other run
      Sum products[width<Blocks> / 2];
      for (uint32_t step = 0; step < steps; ++step) {
        full[at.stage].wait(at.phase);
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s) {
          product_fence();
          enqueue<Blocks>(products, at.stage, s, false);
          product_commit();
          const float *const scale = scales + (at.stage * weights + s % weights) * size.scales + line<Blocks>(s);
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
      const auto next = [&] {
        full[at.stage].wait(at.phase);
        product_fence();
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s) enqueue<Blocks>(sums[s], at.stage, s, true);
        product_commit();
      };
      next();
      for (uint32_t step = 1; step < steps; ++step) {
        Barrier &before = empty[at.stage];
        at.advance(size.stages);
        next();
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
  /// What a thread has of sums that one block leaves to the next.
  template <int Blocks>
  __device__ __forceinline__ Four<Sum> *left(uint32_t to) const { return reinterpret_cast<Four<Sum> *>(p.left + to * sums_left) + half * 128 + thread; }
  template <int Blocks>
  __device__ __forceinline__ void leave(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2]) {
    Four<Sum> *const to = left<Blocks>(blockIdx.x + 1);
#pragma unroll
    for (int s = 0; s < sets<Blocks>; ++s)
#pragma unroll
      for (int j = 0; j < width<Blocks> / 8; ++j) to[(s * (width<Blocks> / 8) + j) * 256] = {sums[s][4 * j], sums[s][4 * j + 1], sums[s][4 * j + 2], sums[s][4 * j + 3]};
    __threadfence();
    meet(5, 256);
    if (half == 0 && thread == 0) store_release(p.ready + blockIdx.x + 1, 1);
  }
  template <int Blocks>
  __device__ __forceinline__ void fetch(Sum (&sums)[sets<Blocks>][width<Blocks> / 2]) {
    if (half == 0 && thread == 0)
      while (load_acquire(p.ready + blockIdx.x) == 0) {
      }
    meet(5, 256);
    const Four<Sum> *const from = left<Blocks>(blockIdx.x);
#pragma unroll
    for (int s = 0; s < sets<Blocks>; ++s)
#pragma unroll
      for (int j = 0; j < width<Blocks> / 8; ++j) {
        const uint4 four = __ldcg(reinterpret_cast<const uint4 *>(from + (s * (width<Blocks> / 8) + j) * 256));
        const Four<Sum> values = *reinterpret_cast<const Four<Sum> *>(&four);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[s][4 * j + i] = values[i];
      }
    if (half == 0 && thread == 0) p.ready[blockIdx.x] = 0; // as it was found
  }
  /// The row of the result that a row of an item belongs to; -1 for what is between segments.
  __device__ __forceinline__ int32_t target_of(int32_t row) const {
    if (!p.direct) return p.packed.targets[row];
    if (!p.dealt) return row;
    const int32_t segment = table.segment_of(p.groups, row), place = row - table.before[segment];
    return place < table.groups[segment].count ? table.groups[segment].base + place : -1;
  }
  /// The columns of a block: of which weight, from which on, and how many.
  struct Columns {
    int which;
    int32_t first, count;
  };
  __device__ __forceinline__ Columns columns_of(const Item &item) const {
    const int which = Finish::pairs ? 0 : p.weight_of(item.tile);
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
  /// Four neighbouring sums of a row, by each of the weights that a tile has columns of.
  struct Fours {
    Four<Sum> of[weights];
  };
  /// Them with the scales of rows and columns; `row`: of the item, `column`: of the block.
  __device__ __forceinline__ void scale(const Item &item, const Columns &columns, int32_t row, int32_t target, int32_t column, const Fours &sums, Scaled &scaled) const {
#pragma unroll
    for (int n = 0; n < weights; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value = static_cast<float>(sums.of[n][i]);
        if constexpr (O::row_scales) {
          const Weight &w = p.w[columns.which + n];
          value *= p.packed.scales[p.direct ? target : row] * w.scales[int64_t{item.matrix} * w.columns + columns.first + column + min(i, count_of(columns, column) - 1)];
        }
        if constexpr (Finish::pairs) scaled[n][i] = value;
        else scaled[i] = value;
      }
  }
  __device__ __forceinline__ void finish_four(const Item &item, const Columns &columns, int32_t line, int32_t target, const Row &row, int32_t column, const Fours &sums,
                                              const Beside &read) {
    const int count = count_of(columns, column);
    if (target < 0 || count <= 0) return;
    Scaled scaled;
    scale(item, columns, line, target, column, sums, scaled);
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
    for (int i = 0; i < 2; ++i) finish_four(item, columns, item.row + line<Blocks>(s) + 8 * i, targets[i], rows[i], column_of<Blocks>(j, i), {eight.sums[i]}, read[i]);
  }
  /// Four rows of a warp at a time, or two of two weights, go through shared memory, so that a row's columns of the block are in one warp, and so that
  /// what follows is a loop: spelled out for every sum it is far more than the instruction cache holds. Where warpgroups have half of the columns each,
  /// two warps have the rows together and take half of them. A lane looks up one of the warp's rows.
  template <int Blocks>
  __device__ __forceinline__ void store(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item) {
    constexpr bool halves = halves_columns<Blocks>;
    constexpr int staged = staged_rows / weights, parts = 8 / staged, own = halves ? staged / 2 : staged, held = 2 * row_sets<Blocks> * parts * own;
    static_assert(held <= 32);
    const Columns columns = columns_of(item);
    const int warp = thread / 32, lane = thread % 32, first_own = halves ? half * own : 0; // lanes from `held` on have no row
    Sum *const stage = reinterpret_cast<Sum *>(staging) + (halves ? warp : half * 4 + warp) * staged_rows * staged_stride;
    const auto meet_rows = [&] {
      if constexpr (halves) meet(6 + warp, 64);
      else __syncwarp();
    };
    const auto row_of_eight = [&](int eight) { return item.row + block_of<Blocks>(eight / 2) * block_rows + warp * 16 + eight % 2 * 8; };
    const int32_t looked_up = row_of_eight(lane / own / parts) + lane / own % parts * staged + first_own + lane % own;
    const int32_t target = lane < held && looked_up < item.end ? target_of(looked_up) : -1;
    const Row row = row_of(target);
    struct Ahead {
      int32_t of[own];
      Row rows[own];
      Beside read[own];
    };
    const auto look_ahead = [&](int number) {
      Ahead ahead;
#pragma unroll
      for (int e = 0; e < own; ++e) {
        ahead.of[e] = __shfl_sync(0xFFFFFFFFu, target, number * own + e);
        ahead.rows[e] = from_lane(row, number * own + e);
      }
#pragma unroll
      for (int e = 0; e < own; ++e) ahead.read[e] = beside(columns, ahead.of[e], ahead.rows[e], 4 * lane);
      return ahead;
    };
    Ahead next;
    if constexpr (!Finish::gathers) next = look_ahead(0);
#pragma unroll 1
    for (int number = 0; number < 2 * row_sets<Blocks> * parts; ++number) {
      const int eight = number / parts, part = number % parts;
      const int32_t first_row = row_of_eight(eight) + part * staged;
      if (first_row >= item.end) break; // all of the warps that meet
      if constexpr (Finish::gathers) next = look_ahead(number); // there are no registers to look ahead
      const Ahead now = next;
      const bool mine = lane / 4 / staged == part;
#pragma unroll
      for (int r = 0; r < row_sets<Blocks>; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (eight == 2 * r + i) {
#pragma unroll
            for (int n = 0; n < weights; ++n) {
              const auto &set = sums[r * weights + n];
              Sum *const to = stage + (lane / 4 % staged * weights + n) * staged_stride + first_column<Blocks>() + lane % 4 * 2;
#pragma unroll
              for (int j = 0; j < width<Blocks> / 8; ++j)
                if (mine) *reinterpret_cast<Two *>(to + 8 * j) = {set[4 * j + 2 * i], set[4 * j + 2 * i + 1]};
            }
          }
      meet_rows();
#pragma unroll
      for (int e = 0; e < own; ++e) {
        Fours fours;
#pragma unroll
        for (int n = 0; n < weights; ++n) fours.of[n] = *reinterpret_cast<const Four<Sum> *>(stage + ((first_own + e) * weights + n) * staged_stride + 4 * lane);
        if constexpr (Finish::quantises) quantise(item, columns, first_row + first_own + e, now.of[e], now.rows[e], 4 * lane, fours, now.read[e]);
        else finish_four(item, columns, first_row + first_own + e, now.of[e], now.rows[e], 4 * lane, fours, now.read[e]);
      }
      if constexpr (!Finish::gathers) next = look_ahead(number + 1); // past the last one it is not used
      meet_rows(); // before others take their place
    }
  }
  /// Four columns of a row, of which the warp has the block's.
  __device__ __forceinline__ void quantise(const Item &item, const Columns &columns, int32_t line, int32_t target, const Row &row, int32_t column, const Fours &sums,
                                           const Beside &read) {
    const int count = count_of(columns, column);
    Scaled scaled;
    scale(item, columns, line, target, column, sums, scaled);
    const Four<float> values = finish.values(row, int64_t{columns.first + column}, scaled, read, count);
    const float largest = __uint_as_float(__reduce_max_sync(0xFFFFFFFFu, largest_of(values, count)));
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
  uint8_t *const ring = shared_memory + (1024 - shared_address(shared_memory) % 1024) % 1024;

  const uint32_t part = p.parts == 1 ? 0 : block_of_cluster();
  RingSize size = RingSize::of(p.blocks, O::step_scales, weights);
  let_successor_start();
  const auto weight_of = [&](int32_t tile) { return weights > 1 ? 0 : p.weight_of(tile); };
  const auto bring_weights = [&](int32_t matrix, int32_t tile, bool alone, int32_t step, uint32_t stage) {
    full[stage].expect(weights * tile_bytes);
#pragma unroll
    for (int n = 0; n < weights; ++n) {
      const Weight &w = p.w[weight_of(tile) + n];
      tensor_copy(ring + stage * size.stage_bytes + n * tile_bytes, &w.lines, 0, ((matrix * w.tiles + tile - w.first) * p.steps + step) * tile_columns, full[stage],
                  alone ? read_once : read_again);
    }
  };
  const auto bring_rows = [&](const Box &box, int32_t step, uint32_t stage) {
    const int32_t x = p.direct ? step * line_bytes : 0, y = p.direct ? box.row : static_cast<int32_t>(step * p.packed.places) + box.row;
    tensor_copy(ring + stage * size.stage_bytes + weights * tile_bytes + box.to * line_bytes, &p.x[box.size], x, y, full[stage], read_often);
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
      empty[i].init(8);
    }
    publish_barriers();
    table.ring = size;
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool brings_weights = threadIdx.x == 0, brings_scales = O::step_scales && (warp == 1 || warp == 2), brings_rows = warp == 3;
  // Where the first item is known before anything of rows is: weights are brought before the predecessor has ended, and as many rows as there may be
  // before it is known how many there are.
  const int32_t row_tiles = p.groups * p.row_tiles, item_rows = p.blocks * block_rows, known = blockIdx.x / p.parts;
  const int32_t first = p.steps * part / p.parts, last = p.steps * (part + 1) / p.parts;
  const int32_t ahead = p.dealt ? 0 : min(last - first, static_cast<int32_t>(size.stages));
  int32_t turn = warp - 1; // of a warp that brings scales: pairs of steps of the other before its next one
  Scales<weights> own;
  const float *ws[weights];
  if (!p.dealt) {
    const int32_t tile = known / row_tiles, place = known % row_tiles, row = place / p.row_tiles * p.distance + place % p.row_tiles * item_rows;
    if (brings_weights) {
      for (int32_t i = 0; i < ahead; ++i) bring_weights(0, tile, row_tiles == 1, first + i, i);
    } else if (brings_rows && lane == 0) {
      const Box box{0, row, size_index(item_rows)};
      prefetch_map(&p.x[box.size]);
      after_predecessor();
      for (int32_t i = 0; i < ahead; ++i) {
        full[i].expect(item_rows * line_bytes);
        bring_rows(box, first + i, i);
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
  if (p.dealt) {
    if (warp == 0) deal<O, weights>(p, p.blocks, table);
    __syncthreads();
    size = table.ring;
  }

  Items items(p, table);
  float *const scales = reinterpret_cast<float *>(ring + size.stages * size.stage_bytes);
  if (threadIdx.x < 128) {
    give_registers<72>();
    Place at;
    int32_t brought = 0;
    bool loaded = !p.dealt;
    while (items.next()) {
      const Item item = items.item();
      if (brings_weights) {
        for (int32_t step = item.first; step < item.last; ++step, at.advance(size.stages), ++brought) {
          if (brought < ahead) continue;
          empty[at.stage].wait(at.phase ^ 1);
          bring_weights(item.matrix, item.tile, item.alone, step, at.stage);
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
          if (lane < boxes) bring_rows(box, step, at.stage);
        }
      } else if (brings_scales) {
        // The two take turns with pairs of steps; the loads of one are on their way while the other has its own. A phase of a barrier is known by its
        // parity alone: a warp waits for its own steps only, which nobody passes before it, and which are less than a round of the ring apart.
        scales_of(item.matrix, item.tile, ws);
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
    Multiplier<O, Finish> multiplier{p, table, finish, ring, table.ring, scales, full, empty, reinterpret_cast<float *>(ring + ring_bytes - 1024), static_cast<int>(threadIdx.x % 128), static_cast<int>(threadIdx.x / 128) - 1};
    while (items.next()) {
      const int32_t blocks = items.item().blocks;
      if (blocks == 1) multiplier.template item<1>(items, part);
      else if (most == 2 || blocks == 2) multiplier.template item<2>(items, part);
      else if constexpr (most > 2) {
        if (blocks == 3) multiplier.template item<3>(items, part);
        else multiplier.template item<4>(items, part);
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
  if (p.parts > 1) meet_cluster(); // others may still read this block's sums
}

/// How a launch is cut into blocks: 64s of rows of a tile, blocks that share k, and clusters of those; whether tiles are dealt out to them.
struct Cut {
  int32_t blocks;
  uint32_t parts, clusters;
  bool dealt;
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
/// what precedes the first; at least as long as memory brings the weights; then exchanges of sums. `length`: rows of each of `groups` segments. Tiles
/// are dealt out where there are more than blocks, and where those of segments are fewer when they are cut together.
template <class Kernel>
cudaError_t choose_cut(Kernel *kernel, const Call &c, int32_t tiles, int32_t groups, int64_t length, int32_t steps, int weights, int32_t most, uint32_t most_parts, Cut &best) {
  constexpr uint64_t step_time[most_blocks] = {330, 490, 670, 830}, before = 3000, end_time = 800, exchange = 2000, exchange_each = 700, dealing = 1000;
  constexpr uint64_t bytes_a_time = 3000;
  const uint64_t memory = uint64_t{static_cast<uint32_t>(tiles)} * weights * steps * tile_bytes / bytes_a_time;
  const uint32_t processors = c.processors;
  const auto item_time = [&](uint32_t blocks, uint32_t of_steps) { return of_steps * step_time[weights * blocks - 1] + end_time * weights * blocks; };
  uint64_t least = UINT64_MAX;
  for (uint32_t blocks = 1; blocks <= static_cast<uint32_t>(most); ++blocks)
    for (uint32_t parts = 1; parts <= most_parts && (parts == 1 || steps >= static_cast<int32_t>(4 * parts)); ++parts) {
      const uint32_t items = static_cast<uint32_t>(tiles * groups * ceil_div(length, int64_t{blocks} * block_rows));
      const Cut cut{static_cast<int32_t>(blocks), parts, items, false};
      uint32_t slots = processors;
      if (parts > 1) {
        cudaLaunchConfig_t config;
        cudaLaunchAttribute attributes[2];
        if (const cudaError_t e = configure(kernel, c, cut, config, attributes)) return e;
        int fit = 0;
        if (const cudaError_t e = cudaOccupancyMaxActiveClusters(&fit, kernel, &config)) return e;
        slots = fit;
        if (fit == 0) continue;
      } else if (items > processors) {
        continue;
      }
      const uint64_t rounds = ceil_div(items, slots), loop = before + rounds * item_time(blocks, ceil_div(static_cast<uint32_t>(steps), parts));
      const uint64_t cost = (loop > memory ? loop : memory) + (parts > 1 ? rounds * (exchange + exchange_each * (parts + blocks)) : 0);
      if (cost < least) least = cost, best = cut;
    }
  for (uint32_t blocks = 1; blocks <= static_cast<uint32_t>(most); ++blocks) {
    const uint64_t items = uint64_t{static_cast<uint32_t>(tiles)} * ceil_div(groups * (length + 7) / 8 * 8, int64_t{blocks} * block_rows), time = item_time(blocks, steps);
    const uint64_t loop = before + dealing + (items > processors ? items * time / processors : time), cost = loop > memory ? loop : memory;
    if (cost < least) least = cost, best = {most, 1, items < processors ? static_cast<uint32_t>(items) : processors, true}; // 64s as there are rows
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
  Cut cut{most_of<Finish>, 1, static_cast<uint32_t>(problem.tiles * places), true};
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
  if (cut.parts == 1 && cut.clusters > static_cast<uint32_t>(c.processors)) cut.clusters = c.processors;
  if (cut.dealt && cut.clusters > most_dealt) cut.clusters = most_dealt;
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
  problem.dealt = cut.dealt;
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
