// Which blocks of a contraction on Hopper do what: its tiles of rows and columns, cut and dealt out on the device, where it is known how many rows
// there are.
//
// Two blocks of a cluster, a couple, take tiles together: either the same rows and neighbouring blocks of columns, or the same columns and neighbouring
// tiles of rows. What both need is brought by one of them to the shared memory of both: the L2 cache brings less than products would take.
//
// Where there are fewer tiles than processors, couples of a cluster, or single blocks, share the sum over k of an item; how k is cut then depends on
// sizes and the processor, never on the number of rows there are. Where there are more, tiles are dealt out: every couple gets a share of the same
// length, which may begin and end inside of an item. Who has the first steps of an item leaves its sums, and who has the others goes on with them, so
// that each sum is added up in the order of k wherever it is cut.
#pragma once
#include "problem_hopper.cuh"

namespace s3::hopper {

/// What a couple shares of an item.
enum class Common : int32_t { nothing, rows, weights };

/// A tile of work for a block: rows of one matrix against a block of columns, or some steps of it.
struct Item {
  int32_t problem, matrix, tile, row, end; // a tile past the last one, or no rows: there is nothing but to keep in step with the other of the couple
  int32_t blocks, rows;                    // 64s of rows, and rows as they are brought: at least those from `row` to `end`
  int32_t first, last;                     // steps
  Common common;
  bool alone;           // no other item has the same weights
  bool resumes, leaves; // goes on with sums that the couple before has left; leaves them to the one after
};

/// A share of the items in order: from step `first_step` of item `first` to step `last_step` of item `last`.
struct Share {
  uint32_t first, last;
  int32_t first_step, last_step;

  __device__ __forceinline__ uint32_t count() const { return first == last ? last_step > first_step : last - first + (last_step > 0); }
};

constexpr uint32_t listed_items = 16;

/// The last of so many before which there are no more than `n`.
__device__ __forceinline__ int32_t last_until(const int32_t *before, int32_t count, int32_t n) {
  int32_t low = 0, high = count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (before[middle] <= n) low = middle;
    else high = middle;
  }
  return low;
}

/// What the threads of a block look up, for problems of so many matrices or segments.
template <int Matrices, int Many>
struct Table {
  static constexpr int many = Many;
  struct Of {
    Group groups[Matrices + 1];   // rows of each matrix, and of none, or of each segment
    int32_t before[Matrices + 1]; // items before those of each matrix, or rows before those of each segment, where segments take whole eights
    int32_t count, tiles, steps;  // matrices or segments, blocks of columns of each, and steps of an item
    bool direct, columns_first;   // as the problem has them
    int32_t rows, first_item;     // rows of segments in such eights; items before those of the problem

    /// The segment that has row `row` of those in eights.
    __device__ __forceinline__ int32_t segment_of(int32_t segments, int32_t row) const { return last_until(before, segments, row); }
  } of[Many];
  int32_t problems, steps, most; // problems, steps of the longest, 64s of rows of a tile at most
  uint32_t weights, turned;      // weights of a tile; bytes that the ring leaves for sums
  bool step_scales, dealt;
  int32_t blocks;                // 64s of rows that tiles are cut to
  Share share;
  RingSize ring;
  Item items[listed_items]; // some of the block's

  __device__ __forceinline__ const Of &at(int32_t problem) const { return of[Many == 1 ? 0 : problem]; }
  /// What is known beforehand. One thread.
  template <int Own>
  __device__ __forceinline__ void begin(const Work<Own> &work, uint32_t of_tile, uint32_t bytes_of_sums, bool scales_of_steps, const RingSize &size = {}) {
    const Problem &p = work.of[0];
    problems = Own, steps = 0, most = p.blocks, weights = of_tile, turned = bytes_of_sums, step_scales = scales_of_steps, dealt = p.dealt, ring = size;
#pragma unroll
    for (int q = 0; q < Own; ++q) {
      const Problem &own = work.of[q];
      of[q].count = own.groups, of[q].tiles = own.tiles, of[q].steps = own.steps, of[q].direct = own.direct, of[q].columns_first = own.columns_first;
      steps = max(steps, own.steps);
    }
  }
};

/// n / d for quotients below 2^21: from that of floats, which is one off at most.
__device__ __forceinline__ uint32_t quotient_of(uint32_t n, uint32_t d) {
  const uint32_t near = static_cast<uint32_t>(__fdividef(static_cast<float>(n), static_cast<float>(d)));
  const int32_t left = static_cast<int32_t>(n - near * d);
  return left < 0 ? near - 1 : left >= static_cast<int32_t>(d) ? near + 1 : near;
}

/// KB that shared memory gets and gives in a step: lines, then those of both operands for each product of 64 rows with 128 columns, or twice with 64.
__host__ __device__ constexpr uint32_t step_moves(uint32_t weights, uint32_t blocks) {
  return 16 * weights + 8 * blocks + weights * blocks * (blocks % 2 == 0 ? 24 : 32);
}

/// Lengths of items in units of 64 cycles, as measured on an H100 and an H200: steps, which take what shared memory needs, at 128 bytes a cycle and an eighth more,
/// or what the L2 cache needs to bring what is not shared; and what ends an item. `weights`: of a tile.
struct Lengths {
  static constexpr int32_t least_cut = 16, least_steps = 4; // steps of items that may be cut, and of their pieces
  uint32_t weights;

  __device__ __forceinline__ uint32_t step(int32_t blocks, Common common) const {
    return max((step_moves(weights, blocks) * 9 >> 6) + 1, common == Common::rows ? 8 * weights + 2 * blocks + 2 : 4 * weights + 4 * blocks + 2);
  }
  __device__ __forceinline__ uint32_t end(int32_t blocks) const { return weights == 1 ? 32 * blocks + 24 : 48 * blocks + 48; }
};

/// How rows of one matrix are cut into tiles, and what couples share of them, so that they take the least time.
struct Cuts {
  int32_t count, blocks; // tiles, and 64s of rows of each but perhaps the last
  Common common;
  int32_t row_items, columns; // items of a couple: by rows, and for each of those
  int32_t last;               // 64s of rows of the last by rows; all others have `blocks`

  __device__ __forceinline__ Cuts(const Lengths &lengths, int32_t rows, int32_t most, int32_t tiles) {
    const int32_t all = (rows + block_rows - 1) / block_rows;
    count = quotient_of(all + most - 1, most);
    blocks = count == 0 ? 0 : quotient_of(all + count - 1, count);
    const int32_t rest = all - (count - 1) * blocks, couples_of_rows = (count + 1) / 2, couples_of_tiles = (tiles + 1) / 2;
    const bool by_rows = count * couples_of_tiles * lengths.step(blocks, Common::rows) < couples_of_rows * tiles * lengths.step(blocks, Common::weights);
    common = by_rows ? Common::rows : Common::weights;
    row_items = by_rows ? count : couples_of_rows, columns = by_rows ? couples_of_tiles : tiles;
    last = by_rows || count % 2 != 0 ? rest : blocks;
  }
  __device__ __forceinline__ int32_t items() const { return row_items * columns; }
};

/// Fills in the table of a block to which tiles are dealt, from what is known beforehand and its groups. All lanes of a warp.
template <class Table>
__device__ __forceinline__ void deal(Table &table) {
  const Lengths lengths{table.weights};
  const int32_t lane = threadIdx.x % 32, most = table.most, steps = table.steps, many = table.problems;
  int32_t rows_of[Table::many], matrices = 0, until[Table::many]; // matrices of problems up to each
#pragma unroll
  for (int q = 0; q < Table::many; ++q) {
    if (q >= many) break;
    typename Table::Of &of = table.of[q];
    int32_t rows = 0;
    if (of.direct)
      for (int32_t first = 0; first < of.count; first += 32) {
        const int32_t segment = first + lane, own = segment < of.count ? (of.groups[segment].count + 7) / 8 * 8 : 0;
        const int32_t sum = rows + sum_to_lane(own);
        if (segment < of.count) of.before[segment] = sum - own;
        rows = __shfl_sync(0xFFFFFFFFu, sum, 31);
      }
    rows_of[q] = rows;
    until[q] = matrices += of.direct ? 1 : of.count;
  }
  struct Matrix {
    int32_t problem, number, rows, tiles, steps;
  };
  const auto matrix_of = [&](int32_t index) {
    Matrix m{0, index, 0, 0, 0};
#pragma unroll
    for (int q = 0; q + 1 < Table::many; ++q)
      if (q + 1 < many && index >= until[q]) m.problem = q + 1, m.number = index - until[q];
    int32_t rows = rows_of[0];
#pragma unroll
    for (int q = 1; q < Table::many; ++q)
      if (m.problem == q) rows = rows_of[q];
    const typename Table::Of &of = table.at(m.problem);
    m.rows = of.direct ? rows : of.groups[m.number].count, m.tiles = of.tiles, m.steps = of.steps;
    return m;
  };
  const auto length_of = [&](const Matrix &m, const Cuts &cuts, int32_t blocks) { return m.steps * lengths.step(blocks, cuts.common) + lengths.end(blocks); };
  const auto row_items_length = [&](const Matrix &m, const Cuts &cuts) { return cuts.count == 0 ? 0 : (cuts.row_items - 1) * length_of(m, cuts, cuts.blocks) + length_of(m, cuts, cuts.last); };
  const auto cuts_of = [&](const Matrix &m, int32_t cut) { return Cuts(lengths, m.rows, cut, m.tiles); };
  // the cut that is done first
  const uint32_t couples = clusters(), couple = cluster_of_block();
  struct Sums {
    uint32_t items, length, largest, time; // `largest`: 64s of rows
  } best{0, 0, 1, UINT32_MAX};
  int32_t best_cut = 1;
  const auto add = [&](Sums &to, const Matrix &m, int32_t cut) {
    const Cuts cuts = cuts_of(m, cut);
    to = {to.items + cuts.items(), to.length + cuts.columns * row_items_length(m, cuts), max(to.largest, cuts.blocks), 0};
  };
  const auto time_of = [&](const Sums &sums) {
    if (sums.items > couples && steps >= Lengths::least_cut) return quotient_of(sums.length, couples) + 1;
    return quotient_of(sums.items + couples - 1, couples) * (steps * lengths.step(sums.largest, Common::weights) + lengths.end(sums.largest));
  };
  if (matrices <= 8) { // cuts side by side
    static_assert(most_blocks == 4);
    Sums sums{0, 0, 1, 0};
    if (lane % 8 < matrices) add(sums, matrix_of(lane % 8), max(most - lane / 8, 1));
    for (int by = 1; by < 8; by *= 2)
      sums = {sums.items + __shfl_xor_sync(0xFFFFFFFFu, sums.items, by), sums.length + __shfl_xor_sync(0xFFFFFFFFu, sums.length, by),
              max(sums.largest, __shfl_xor_sync(0xFFFFFFFFu, sums.largest, by)), 0};
    sums.time = time_of(sums);
    const uint32_t least = __reduce_min_sync(0xFFFFFFFFu, sums.time), at = __ffs(__ballot_sync(0xFFFFFFFFu, sums.time == least)) - 1;
    best = from_lane(sums, at), best_cut = max(most - static_cast<int32_t>(at) / 8, 1);
  } else {
    for (int32_t cut = most; cut > 0; --cut) {
      Sums sums{0, 0, 1, 0};
      for (int32_t index = lane; index < matrices; index += 32) add(sums, matrix_of(index), cut);
      sums = {__reduce_add_sync(0xFFFFFFFFu, sums.items), __reduce_add_sync(0xFFFFFFFFu, sums.length), __reduce_max_sync(0xFFFFFFFFu, sums.largest), 0};
      sums.time = time_of(sums);
      if (sums.time < best.time) best = sums, best_cut = cut;
    }
  }
  // the share of this couple
  const uint32_t items = best.items, each = quotient_of(best.length, couples), over = best.length - each * couples;
  uint32_t item_before = 0, length_before = 0;
  const uint32_t start = each * couple + quotient_of(over * couple, couples), stop = each * (couple + 1) + quotient_of(over * (couple + 1), couples);
  Share share{min(couple, items), min(couple + 1, items), 0, 0};
  if (items > couples) share = {items, items, 0, 0};
  for (int32_t first = 0; first < matrices; first += 32) {
    const int32_t index = first + lane;
    const Matrix matrix = index < matrices ? matrix_of(index) : Matrix{0, 0, 0, 1, 1};
    const bool columns_first = table.at(matrix.problem).columns_first;
    const Cuts cuts = cuts_of(matrix, best_cut);
    const uint32_t own_items = cuts.items(), own_length = cuts.columns * row_items_length(matrix, cuts);
    const uint32_t item_sum = item_before + sum_to_lane(own_items), length_sum = length_before + sum_to_lane(own_length);
    if (index < matrices) {
      if (matrix.number == 0) table.of[matrix.problem].first_item = item_sum - own_items;
      if (!table.at(matrix.problem).direct) table.of[matrix.problem].before[matrix.number] = item_sum - own_items;
    }
    if (items > couples)
#pragma unroll 1
      for (int end = 0; end < 2; ++end) {
        const uint32_t at = end == 0 ? start : stop;
        const bool here = at >= length_sum - own_length && at < length_sum;
        uint32_t item = 0;
        int32_t step = 0;
        if (here) {
          uint32_t left = at - (length_sum - own_length);
          const uint32_t whole = length_of(matrix, cuts, cuts.blocks), last = length_of(matrix, cuts, cuts.last);
          uint32_t column, row_item;
          if (columns_first) {
            row_item = min(quotient_of(left, cuts.columns * whole), static_cast<uint32_t>(cuts.row_items - 1)), left -= row_item * cuts.columns * whole;
            column = quotient_of(left, row_item + 1 == cuts.row_items ? last : whole);
          } else {
            column = quotient_of(left, row_items_length(matrix, cuts)), left -= column * row_items_length(matrix, cuts);
            row_item = min(quotient_of(left, whole), static_cast<uint32_t>(cuts.row_items - 1));
          }
          const bool is_last = row_item + 1 == cuts.row_items;
          const uint32_t item_length = is_last ? last : whole;
          left -= columns_first ? column * item_length : row_item * whole;
          item = item_sum - own_items + (columns_first ? row_item * cuts.columns + column : column * cuts.row_items + row_item);
          step = static_cast<int32_t>(quotient_of(left, lengths.step(is_last ? cuts.last : cuts.blocks, cuts.common))) / 2 * 2;
          const bool whole_items = matrix.steps < Lengths::least_cut, most = whole_items ? 2 * left >= item_length : step > matrix.steps - Lengths::least_steps;
          if (most) ++item;
          if (most || whole_items || step < Lengths::least_steps) step = 0;
        }
        const uint32_t holders = __ballot_sync(0xFFFFFFFFu, here);
        if (holders == 0) continue;
        item = __shfl_sync(0xFFFFFFFFu, item, __ffs(holders) - 1), step = __shfl_sync(0xFFFFFFFFu, step, __ffs(holders) - 1);
        if (end == 0) share.first = item, share.first_step = step;
        else share.last = item, share.last_step = step;
      }
    item_before = __shfl_sync(0xFFFFFFFFu, item_sum, 31), length_before = __shfl_sync(0xFFFFFFFFu, length_sum, 31);
  }
  if (lane == 0) {
#pragma unroll
    for (int q = 0; q < Table::many; ++q)
      if (q < many) table.of[q].rows = rows_of[q];
    table.blocks = best_cut, table.share = share, table.ring = RingSize::of(best.largest, table.step_scales, table.weights, table.turned);
  }
  __syncwarp();
}

__device__ __forceinline__ Item item_of(int32_t problem, int32_t matrix, int32_t tile, const Group &g, int32_t from, int32_t most, int32_t steps) {
  const int32_t rows = max(min(most, g.count - from), 0);
  return {problem, matrix, tile, g.base + from, g.base + from + rows, max((rows + block_rows - 1) / block_rows, 1), row_size(size_index(rows)), 0, steps};
}
/// The item that a cluster is there for.
template <class Table>
__device__ __forceinline__ Item known_item(const Problem &p, const Table &table) {
  const int32_t index = cluster_of_block(), rank = block_of_cluster(), part = rank / p.together, row_tiles = p.groups * p.row_tiles;
  const int32_t tile = index / row_tiles * p.together + rank % p.together, r = index % row_tiles;
  Item own = item_of(0, 0, tile, table.of[0].groups[r / p.row_tiles], r % p.row_tiles * p.blocks * block_rows, p.blocks * block_rows, p.steps);
  own.first = p.steps * part / p.parts, own.last = p.steps * (part + 1) / p.parts;
  own.common = p.together > 1 ? Common::rows : Common::nothing, own.alone = row_tiles == 1;
  return own;
}
/// Item n of a couple's share.
template <class Table>
__device__ __forceinline__ Item dealt_item(const Table &table, uint32_t n) {
  const Share share = table.share;
  const bool begins = share.first_step > 0, ends = share.last_step > 0;
  uint32_t index = share.first + n + begins - ends;
  int32_t from = 0, to = INT32_MAX;
  // the first steps of the last one come first, since the next couple needs them at its end
  if (share.first == share.last) index = share.first, from = share.first_step, to = share.last_step;
  else if (ends && n == 0) index = share.last, to = share.last_step;
  else if (index == share.last) index = share.first, from = share.first_step;
  int32_t problem = 0;
#pragma unroll
  for (int q = 1; q < Table::many; ++q)
    if (q < table.problems && static_cast<int32_t>(index) >= table.of[q].first_item) problem = q;
  const typename Table::Of &of = table.at(problem);
  const int32_t matrix = of.direct ? 0 : last_until(of.before, of.count, index);
  const Group g = of.direct ? Group{0, of.rows} : of.groups[matrix];
  const Cuts cuts(Lengths{table.weights}, g.count, table.blocks, of.tiles);
  const int32_t local = static_cast<int32_t>(index) - (of.direct ? of.first_item : of.before[matrix]), most = cuts.blocks * block_rows;
  const int32_t inner = of.columns_first ? cuts.columns : cuts.row_items, outer = quotient_of(local, inner);
  const int32_t column = of.columns_first ? local - outer * inner : outer, row_item = of.columns_first ? outer : local - outer * inner;
  const int32_t other_rows = cuts.common == Common::weights ? 2 : 1, other_tiles = 3 - other_rows, number = block_of_cluster();
  Item own = item_of(problem, matrix, column * other_tiles + (other_tiles - 1) * number, g, (row_item * other_rows + (other_rows - 1) * number) * most, most, of.steps);
  own.first = from, own.last = min(to, of.steps), own.resumes = from > 0, own.leaves = to < of.steps;
  own.common = cuts.common, own.alone = cuts.row_items == 1;
  return own;
}
template <class Table>
__device__ __forceinline__ uint32_t item_count(const Table &table) { return table.dealt ? table.share.count() : 1; }
/// Puts items of the block from number `from` on into the table. `p`: the only problem, where tiles are not dealt. All lanes of a warp.
template <class Table>
__device__ __forceinline__ void list_items(const Problem *p, Table &table, uint32_t from) {
  const uint32_t own = threadIdx.x % 32;
  if (own < listed_items && from + own < item_count(table)) table.items[own] = table.dealt ? dealt_item(table, from + own) : known_item(*p, table);
}

/// Items of a block, which all of its threads go through together. Those of its couple's share, where tiles are dealt: in order of problems, matrices,
/// and tiles of rows or blocks of columns. Else the one that its cluster is there for, in order of blocks of columns and tiles of rows, which in
/// segments are cut whether there are rows or not; every block of a cluster takes the same rows.
/// `Lists`: whether the threads are those that put items into the table.
template <bool Lists, class Table>
class Items {
  const Problem *const p;
  Table &table;
  const uint32_t count;
  uint32_t number = UINT32_MAX;

 public:
  __device__ __forceinline__ Items(const Problem *first, Table &in) : p(first), table(in), count(item_count(in)) {}
  /// Goes on to the next one, or says that there is none.
  __device__ __forceinline__ bool next() {
    __syncwarp();
    if (++number >= count) return false;
    if (number > 0 && number % listed_items == 0) {
      __syncthreads();
      if (Lists && threadIdx.x < 32) list_items(p, table, number);
      __syncthreads();
    }
    return true;
  }
  __device__ __forceinline__ const Item &item() const { return table.items[number % listed_items]; }
};

}  // namespace s3::hopper
