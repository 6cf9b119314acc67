// What the warpgroups that multiply do in a contraction on Hopper: sums of an item's products in registers, and results made of them.
//
// Two warpgroups have half of the rows each, or half of the columns where the 64s of rows are an odd number. Results are made where the sums are, in
// registers: the four lanes that have a row exchange what they have, so that each has four neighbouring columns.
#pragma once
#include <type_traits>

#include "deal_hopper.cuh"
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
/// What values of a group are divided by, from its largest magnitude: as ir/ops/quantise.ts.
struct Divisor {
  float scale;                      // the divisor
  float power, divided, reciprocal; // values and it are first multiplied by a power of two, where it is very small or large

  __device__ __forceinline__ explicit Divisor(float largest) {
    const float raw = largest / 448.0f;
    scale = raw == 0 ? 1.0f : raw;
    power = largest < 0x1p-80f ? 0x1p100f : largest > 0x1p120f ? 0x1p-100f : 1.0f;
    divided = scale * power, reciprocal = 1.0f / divided;
    if (reciprocal == 0) divided = 0; // all but what is infinite becomes zero
  }
  /// x / scale, rounded as a division is where it is not too small for a code
  __device__ __forceinline__ float quotient(float x) const {
    x *= power;
    const float near = x * reciprocal;
    return __fmaf_rn(__fmaf_rn(-near, divided, x), reciprocal, near);
  }
};
/// Codes of four columns of a group, and with its first ones the scale.
template <bool Whole>
__device__ __forceinline__ void quantise_four(const Four<float> &values, const Divisor &by, int count, bool first, e4m3 *codes, float *scale) {
  Four<e4m3> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = to_e4m3(by.quotient(values[i]));
  write_four<Whole>(codes, count, four);
  if (first) *scale = by.scale;
}

constexpr uint32_t nowhere = UINT32_MAX;

/// 64s of rows of a tile: sums by two weights leave registers for half as many.
template <class Finish>
constexpr int32_t most_of = Finish::pairs ? most_blocks / 2 : most_blocks;

/// Sums are turned in shared memory, so that a warp has whole lines of a row, where nothing is read beside them, which would have to wait for each turn,
/// and no weight's sums meet another's. Else the lanes that have a row exchange what they have.
template <class Finish>
constexpr uint32_t turned_of = Finish::turned ? turned_bytes : 0;

/// What a thread of the multiplying warpgroups knows.
template <class O, class Finish, int Many, class Table>
struct Multiplier {
  static constexpr int weights = Finish::pairs ? 2 : 1; // of which a tile has columns
  const Work<Many> &work;
  const Table &table;
  const Finish &finish;
  uint8_t *ring;
  RingSize size;
  const float *scales; // [stage][weight][row]
  Barrier *full, *empty;
  uint32_t *maxima; // of rows of both halves of a block of columns: [warp][half][row of the warp's sixteen]
  int thread, half; // thread of the warpgroup, and which of two it is
  uint32_t frees;   // the block in which this lane says that a stage is free, or nowhere
  Place at{};

  __device__ __forceinline__ Multiplier(const Work<Many> &work_, const Table &table_, const Finish &finish_, uint8_t *ring_, const RingSize &of, Barrier *full_, Barrier *empty_, uint32_t *maxima_)
      : work(work_), table(table_), finish(finish_), ring(ring_), size{uniform(of.stages), uniform(of.stage_bytes), uniform(of.scales)},
        scales(reinterpret_cast<const float *>(ring_ + of.stages * of.stage_bytes)), full(full_), empty(empty_), maxima(maxima_) {
    uint32_t own = threadIdx.x;
    pin(own); // what follows from it is not kept in registers from one stage of a launch to the next
    thread = own % 128, half = static_cast<int>(of_warp(own / 128)) - 1;
    const uint32_t rank = block_of_cluster(), together = work.of[0].together, lane = own % 32;
    frees = lane < together ? rank - rank % together + lane : nowhere;
  }

  using Sum = typename O::Sum;
  using Scaled = std::conditional_t<Finish::pairs, float[2][4], float[4]>; // what Finish gets of four columns
  using Row = typename Finish::Row;
  using Beside = typename Finish::Beside;

  /// All of an item. `part`: which of those that share k.
  __device__ __forceinline__ void item(const Item &item, uint32_t part) {
    if (item.blocks == 1) this->template item<1>(item, part);
    else if (most_of<Finish> == 2 || item.blocks == 2) this->template item<2>(item, part);
    else if constexpr (most_of<Finish> > 2) {
      if (item.blocks == 3) this->template item<3>(item, part);
      else this->template item<4>(item, part);
    }
  }
  /// Results of rows that meet no matrix, a share of each block, where they are wanted.
  __device__ __forceinline__ void zeros(const Problem &p) const {
    if constexpr (!Finish::quantises) {
      const Group none = p.zeros ? table.of[0].groups[p.groups] : Group{0, 0};
      const Scaled zeros{};
      for (int32_t place = blockIdx.x; place < none.count; place += gridDim.x) {
        const auto row = finish.row_of(0, p.packed.targets[none.base + place]);
        for (int which = 0; which < p.weights; which += weights)
          for (int32_t column = 4 * (threadIdx.x - 128); column < p.w[which].columns; column += 4 * 256) {
            const int count = min(4, p.w[which].columns - column);
            finish(which, row, int64_t{column}, zeros, finish.beside(which, row, int64_t{column}, count), count);
          }
      }
    }
  }

 private:
  template <int Blocks>
  __device__ __forceinline__ void item(const Item &item, uint32_t part) {
    const uint32_t parts = work.of[0].parts;
    Sum sums[sets<Blocks>][width<Blocks> / 2];
    Targets<Blocks> targets{};
    if (parts == 1) {
      look_up<Blocks>(item, targets);
      if constexpr (Finish::prefetches) {
        const Columns columns = columns_of(item);
        for (const int32_t target : targets)
          if (target >= 0 && !item.leaves) finish.prefetch(columns.which, target, columns.first);
      }
    }
    if (item.resumes) {
      fetch<Blocks>(sums);
    } else {
#pragma unroll
      for (auto &set : sums)
#pragma unroll
        for (Sum &sum : set) sum = 0;
    }
    multiply<Blocks>(sums, item.last - item.first);
    if constexpr (!Finish::quantises && !Finish::pairs)
      if (parts > 1) return share<Blocks>(sums, item, part);
    if (item.leaves) leave<Blocks>(sums);
    else store<Blocks>(sums, item, targets);
  }

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

  /// Enqueues products of the stage whose memory starts at `word` (sixteens of bytes, in a descriptor) with one set of rows, which are there; to be added
  /// to what is there, or not.
  template <int Blocks>
  __device__ __forceinline__ void enqueue(Sum (&to)[width<Blocks> / 2], uint32_t word, int s, bool add) const {
    const uint32_t a = word + (weights * tile_bytes + block_of<Blocks>(s / weights) * block_bytes) / 16, b = word + (s % weights * tile_bytes + first_column<Blocks>() * line_bytes) / 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) O::product(to, of_lines(a + 2 * k), of_lines(b + 2 * k), add || k > 0);
  }

  template <int Blocks>
  __device__ __forceinline__ void multiply(Sum (&sums)[sets<Blocks>][width<Blocks> / 2], uint32_t steps) {
    // What is the same in all lanes stays out of registers.
    const uint32_t first = uniform(shared_address(ring) / 16 | lines_word), stage_words = size.stage_bytes / 16;
    uint32_t stage = uniform(at.stage), phase = uniform(at.phase), word = first + stage * stage_words;
    steps = uniform(steps);
    const auto advance = [&] {
      ++stage, word += stage_words;
      if (stage == size.stages) stage = 0, phase ^= 1, word = first;
    };
    if constexpr (O::step_scales) {
      // While a warpgroup adds up, the products of the other run: there must be little between its last sum and its next product.
      const float *const own = scales + line<Blocks>(0);
      Sum products[width<Blocks> / 2];
      full[stage].wait(phase);
      for (uint32_t step = 1; step <= steps; ++step) {
        const float *const scale = own + stage * weights * size.scales;
        const uint32_t before = stage, start = of_warp(word);
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s) {
          product_fence();
          enqueue<Blocks>(products, start, s, false);
          product_commit();
          const float *const of_set = scale + s % weights * size.scales + s / weights * block_rows;
          const float upper = of_set[0], lower = of_set[8];
          if (s + 1 == sets<Blocks>) {
            advance();
            if (step < steps) full[stage].wait(phase);
          }
          product_wait<0>();
#pragma unroll
          for (Sum &product : products) pin(product);
#pragma unroll
          for (int j = 0; j < width<Blocks> / 2; ++j) sums[s][j] += products[j] * (j % 4 < 2 ? upper : lower);
        }
        __syncwarp(); // every lane has read its scales
        release(before);
      }
    } else {
      const auto next = [&] {
        full[stage].wait(phase);
        product_fence();
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s) enqueue<Blocks>(sums[s], word, s, true);
        product_commit();
      };
      next();
      for (uint32_t step = 1; step < steps; ++step) {
        const uint32_t before = stage;
        advance();
        next();
        product_wait<1>();
        release(before);
      }
      product_wait<0>();
#pragma unroll
      for (auto &set : sums)
#pragma unroll
        for (Sum &sum : set) pin(sum);
      release(stage);
      advance();
    }
    at.stage = stage, at.phase = phase;
  }
  /// The warp is done with what a stage has, for both blocks of a couple, which bring some of it.
  __device__ __forceinline__ void release(uint32_t stage) const {
    if (frees != nowhere) empty[stage].arrive_at(frees);
  }
  /// What a thread has of sums that a block leaves to that of the next couple.
  template <int Blocks>
  __device__ __forceinline__ Four<Sum> *left(uint32_t to) const { return reinterpret_cast<Four<Sum> *>(work.of[0].left + to * sums_left) + half * 128 + thread; }
  template <int Blocks>
  __device__ __forceinline__ void leave(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2]) {
    const Problem &p = work.of[0];
    Four<Sum> *const to = left<Blocks>(blockIdx.x + p.together);
#pragma unroll
    for (int s = 0; s < sets<Blocks>; ++s)
#pragma unroll
      for (int j = 0; j < width<Blocks> / 8; ++j) to[(s * (width<Blocks> / 8) + j) * 256] = {sums[s][4 * j], sums[s][4 * j + 1], sums[s][4 * j + 2], sums[s][4 * j + 3]};
    __threadfence();
    meet(5, 256);
    if (half == 0 && thread == 0) store_release(p.ready + blockIdx.x + p.together, 1);
  }
  template <int Blocks>
  __device__ __forceinline__ void fetch(Sum (&sums)[sets<Blocks>][width<Blocks> / 2]) {
    const Problem &p = work.of[0];
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
  __device__ __forceinline__ int32_t target_of(const Item &item, int32_t row) const {
    const Problem &p = work.at(item.problem);
    if (!p.direct) return p.keeps ? row : p.packed.targets[row];
    if (!p.dealt) return row;
    const typename Table::Of &of = table.at(item.problem);
    const int32_t segment = of.segment_of(p.groups, row), place = row - of.before[segment];
    return place < of.groups[segment].count ? of.groups[segment].base + place : -1;
  }
  /// The columns of a block: of which weight of the problem and of the launch, from which on, and how many.
  struct Columns {
    int weight, which;
    int32_t first, count;
  };
  __device__ __forceinline__ Columns columns_of(const Item &item) const {
    const Problem &p = work.at(item.problem);
    const int weight = Finish::pairs ? 0 : p.weight_of(item.tile);
    const int32_t first = (item.tile - p.w[weight].first) * tile_columns;
    return {weight, (Many == 1 ? 0 : p.first) + weight, first, p.w[weight].columns - first};
  }
  /// How many of the four columns from `column` of the block on there are; none when it is not positive. Full: the block has all of its columns.
  template <bool Full>
  static __device__ __forceinline__ int count_of(const Columns &columns, int32_t column) { return Full ? 4 : min(4, columns.count - column); }
  /// What is read beside fours of columns of a thread's two rows, from those of sums 4j on; nothing of rows and columns that are not there.
  template <int Blocks, bool Full, int Eights>
  __device__ __forceinline__ void beside(const Columns &columns, const int32_t (&targets)[2], const Row (&rows)[2], int j, Beside (&read)[Eights][2]) const {
    static_assert(apart_of_fours == 16);
    int64_t from[2];
    int count[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t column = column_of<Blocks>(j, i);
      from[i] = columns.first + column, count[i] = targets[i] < 0 ? 0 : Full ? tile_columns : columns.count - column;
    }
    finish.beside(columns.which, rows, from, count, read);
  }
  __device__ __forceinline__ Row row_of(const Columns &columns, int32_t target) const { return finish.row_of(columns.which, max(target, 0)); }
  /// Rows of the result that a warp's rows belong to: lane l has rows l % 16 of its sets 2n + l / 16.
  template <int Blocks>
  using Targets = int32_t[(row_sets<Blocks> + 1) / 2];
  template <int Blocks>
  __device__ __forceinline__ void look_up(const Item &item, Targets<Blocks> &targets) const {
#pragma unroll
    for (int n = 0; n < (row_sets<Blocks> + 1) / 2; ++n) {
      const int set = 2 * n + thread % 32 / 16;
      const int32_t row = item.row + block_of<Blocks>(set) * block_rows + thread / 32 * 16 + thread % 16;
      targets[n] = set < row_sets<Blocks> && row < item.end ? target_of(item, row) : -1;
    }
  }

  /// Four neighbouring sums of a row, by each of the weights that a tile has columns of.
  struct Fours {
    Four<Sum> of[weights];
  };
  /// Them with the scales of rows and columns; `row`: of the item, `column`: of the block, which has `count` of them.
  __device__ __forceinline__ void scale(const Item &item, const Columns &columns, int32_t row, int32_t target, int32_t column, int count, const Fours &sums, Scaled &scaled) const {
#pragma unroll
    for (int n = 0; n < weights; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float value = static_cast<float>(sums.of[n][i]);
        if constexpr (O::row_scales) {
          const Problem &p = work.at(item.problem);
          const Weight &w = p.w[columns.weight + n];
          value *= p.packed.scales[p.direct ? target : row] * w.scales[int64_t{item.matrix} * w.columns + columns.first + column + min(i, count - 1)];
        }
        if constexpr (Finish::pairs) scaled[n][i] = value;
        else scaled[i] = value;
      }
  }
  /// Results of so many eights of two rows. `line`: the upper row of the item, `j`: of the first eight's sums.
  template <int Blocks, bool Full, int Eights>
  __device__ __forceinline__ void finish_eights(const Item &item, const Columns &columns, int32_t line, const int32_t (&targets)[2], const Row (&rows)[2], int j, const Fours (&fours)[Eights][2]) const {
    Beside read[Eights][2];
    beside<Blocks, Full>(columns, targets, rows, j, read);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (targets[i] < 0) continue;
#pragma unroll
      for (int u = 0; u < Eights; ++u) {
        const int32_t column = column_of<Blocks>(j + 2 * u, i);
        const int count = count_of<Full>(columns, column);
        if (count <= 0) continue;
        Scaled scaled;
        scale(item, columns, line + 8 * i, targets[i], column, count, fours[u][i], scaled);
        finish(columns.which, rows[i], int64_t{columns.first + column}, scaled, read[u][i], count);
      }
    }
  }

  /// Lanes of a pair exchange halves of eight sums of each weight, 4j .. 4j + 7 of a set, so that each has four neighbouring columns of both of its rows,
  /// and the four lanes of a row have sixteen. `apart`: from the sums of one weight to those of the next.
  __device__ __forceinline__ void exchange(const Sum *own, int apart, Fours (&fours)[2]) const {
    const bool second = thread % 2 != 0;
    const auto other = [&](Sum of_first, Sum of_second) { return __shfl_xor_sync(0xFFFFFFFFu, second ? of_second : of_first, 1); };
#pragma unroll
    for (int n = 0; n < weights; ++n, own += apart) {
      const Sum a = other(own[2], own[0]), b = other(own[3], own[1]), c = other(own[4], own[6]), d = other(own[5], own[7]);
      fours[0].of[n] = second ? Four<Sum>{c, d, own[4], own[5]} : Four<Sum>{own[0], own[1], a, b};
      fours[1].of[n] = second ? Four<Sum>{a, b, own[2], own[3]} : Four<Sum>{own[6], own[7], c, d};
    }
  }
  /// The first of those columns, of either row.
  template <int Blocks>
  __device__ __forceinline__ int column_of(int j, int i) const {
    return first_column<Blocks>() + 8 * j + thread % 4 / 2 * 4 + (thread % 2 != i ? 8 : 0);
  }
  /// The first so many of a thread's sums by each weight.
  template <int Blocks, int Count>
  static __device__ __forceinline__ void take_first(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], Sum (&first)[weights][Count]) {
#pragma unroll
    for (int n = 0; n < weights; ++n)
#pragma unroll
      for (int i = 0; i < Count; ++i) first[n][i] = sums[n][i];
  }
  /// Moves what comes after them up to their place, from set to set.
  template <int Blocks, int Count>
  static __device__ __forceinline__ void move_up(Sum (&sums)[sets<Blocks>][width<Blocks> / 2]) {
    constexpr int of_set = width<Blocks> / 2;
#pragma unroll
    for (int n = 0; n < weights; ++n)
#pragma unroll
      for (int i = 0; i + Count < row_sets<Blocks> * of_set; ++i)
        sums[i / of_set * weights + n][i % of_set] = sums[(i + Count) / of_set * weights + n][(i + Count) % of_set];
  }
  /// Two rows of a set that a thread has: the upper one's line, the rows of the result, and what is read once for each.
  struct Pair {
    int32_t line, targets[2];
    Row rows[2];
  };
  template <int Blocks>
  __device__ __forceinline__ Pair pair_of(const Item &item, const Targets<Blocks> &own, const Row (&own_rows)[(row_sets<Blocks> + 1) / 2], int r) const {
    Pair pair;
    pair.line = item.row + block_of<Blocks>(r) * block_rows + thread / 32 * 16 + thread % 32 / 4;
    constexpr bool several = row_sets<Blocks> > 2;
    const int32_t target = several && r >= 2 ? own[several] : own[0];
    const Row &row = several && r >= 2 ? own_rows[several] : own_rows[0];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int lane = r % 2 * 16 + 8 * i + thread % 32 / 4;
      pair.targets[i] = __shfl_sync(0xFFFFFFFFu, target, lane), pair.rows[i] = from_lane(row, lane);
    }
    return pair;
  }
  /// Whether the warp has rows of set r.
  template <int Blocks>
  __device__ __forceinline__ bool has_rows(const Item &item, int r) const { return item.row + block_of<Blocks>(r) * block_rows + thread / 32 * 16 < item.end; }

  /// Results of an item. Where there is more to do than to write sums, in loops that move them through the same registers: instructions for each of
  /// them would not fit into the caches of a processor (32 KB), and come through the same memory as the weights.
  template <int Blocks>
  __device__ __forceinline__ void store(Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, const Targets<Blocks> &own) const {
    const Columns columns = columns_of(item);
    if (columns.count >= tile_columns) store<Blocks, true>(sums, item, columns, own);
    else store<Blocks, false>(sums, item, columns, own);
  }
  template <int Blocks, bool Full>
  __device__ __forceinline__ void store(Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, const Columns &columns, const Targets<Blocks> &own) const {
    Row own_rows[(row_sets<Blocks> + 1) / 2];
#pragma unroll
    for (int n = 0; n < (row_sets<Blocks> + 1) / 2; ++n) own_rows[n] = row_of(columns, own[n]);
    if constexpr (Finish::turned) {
      turn<Blocks, Full>(sums, item, columns, own, own_rows);
    } else if constexpr (Finish::quantises) {
#pragma unroll 1
      for (int r = 0; r < row_sets<Blocks>; ++r) {
        if (!has_rows<Blocks>(item, r)) break;
        quantise<Blocks, Full>(sums, item, columns, pair_of<Blocks>(item, own, own_rows, r));
      }
    } else {
      constexpr int eights = width<Blocks> / 16, together = sizeof(Beside) > 32 ? 2 : 4, of_set = eights / together; // whose reads wait for each other's
      const auto finish_first = [&](const Sum *own, int apart, const Pair &pair, int first) {
        Fours fours[together][2];
#pragma unroll
        for (int u = 0; u < together; ++u) exchange(own + 8 * u, apart, fours[u]);
        finish_eights<Blocks, Full>(item, columns, pair.line, pair.targets, pair.rows, 2 * first, fours);
      };
      if constexpr (Finish::pairs) {
#pragma unroll 1
        for (int chunk = 0; chunk < row_sets<Blocks> * of_set; ++chunk) {
          if (!has_rows<Blocks>(item, chunk / of_set)) break;
          Sum first[weights][8 * together];
          take_first<Blocks>(sums, first);
          finish_first(first[0], 8 * together, pair_of<Blocks>(item, own, own_rows, chunk / of_set), together * (chunk % of_set));
          move_up<Blocks, 8 * together>(sums);
        }
      } else {
#pragma unroll
        for (int r = 0; r < row_sets<Blocks>; ++r) {
          if (!has_rows<Blocks>(item, r)) break;
          const Pair pair = pair_of<Blocks>(item, own, own_rows, r);
#pragma unroll
          for (int first = 0; first < eights; first += together) finish_first(sums[r] + 8 * first, 0, pair, first);
        }
      }
    }
  }
  /// Eight rows and 64 columns of a warp at a time: put down in shared memory as lanes have them, and taken up as lines.
  template <int Blocks, bool Full>
  __device__ __forceinline__ void turn(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, const Columns &columns, const Targets<Blocks> &own, const Row (&own_rows)[(row_sets<Blocks> + 1) / 2]) const {
    constexpr int together = turned_rows / 2; // rows that a lane has a four of
    const int lane = thread % 32, warp = thread / 32;
    Sum *const turned = reinterpret_cast<Sum *>(ring + ring_bytes - 1024 - turned_bytes) + (half * 4 + warp) * turned_rows * turned_pitch;
    Sum *const put = turned + lane / 4 * turned_pitch + lane % 4 * 2;
    const Sum *const taken = turned + lane / 16 * turned_pitch + lane % 16 * 4;
#pragma unroll 1
    for (int n = 0; n < 2 * row_sets<Blocks>; ++n) {
      const int r = n / 2, upper = n % 2;
      const int32_t line = item.row + block_of<Blocks>(r) * block_rows + warp * 16 + 8 * upper + lane / 16;
      if (line - lane / 16 >= item.end) break;
      constexpr bool several = row_sets<Blocks> > 2;
      const int32_t own_target = several && r >= 2 ? own[several] : own[0];
      const Row &own_row = several && r >= 2 ? own_rows[several] : own_rows[0];
      int32_t targets[together];
      Row rows[together];
#pragma unroll
      for (int k = 0; k < together; ++k) {
        const int from = r % 2 * 16 + 8 * upper + 2 * k + lane / 16;
        targets[k] = __shfl_sync(0xFFFFFFFFu, own_target, from), rows[k] = from_lane(own_row, from);
      }
#pragma unroll
      for (int first = 0; first < width<Blocks>; first += turned_columns) {
        struct alignas(8) Two { Sum at[2]; };
#pragma unroll
        for (int m = 0; m < 2 * row_sets<Blocks>; ++m) { // sums are in registers, which are known when this is compiled
          if (m != n) continue;
#pragma unroll
          for (int j = 0; j < turned_columns / 8; ++j) {
            const Sum *const two = sums[m / 2] + (first + 8 * j) / 2 + 2 * (m % 2);
            *reinterpret_cast<Two *>(put + 8 * j) = {two[0], two[1]};
          }
        }
        __syncwarp();
        Fours fours[together];
#pragma unroll
        for (int k = 0; k < together; ++k) fours[k].of[0] = *reinterpret_cast<const Four<Sum> *>(taken + 2 * k * turned_pitch);
        __syncwarp(); // before others take their place
        const int32_t column = first_column<Blocks>() + first + lane % 16 * 4;
        const int count = count_of<Full>(columns, column);
        Scaled scaled[together];
#pragma unroll
        for (int k = 0; k < together; ++k)
          if (!O::row_scales || (targets[k] >= 0 && count > 0)) scale(item, columns, line + 2 * k, targets[k], column, count, fours[k], scaled[k]);
        finish.write(columns.which, rows, targets, int64_t{columns.first + column}, scaled, count);
      }
    }
  }
  /// The first set of rows, of which a warp, or two where warpgroups have half of the columns each, has all columns of the block; the next one comes
  /// to its place.
  template <int Blocks, bool Full>
  __device__ __forceinline__ void quantise(Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, const Columns &columns, const Pair &pair) const {
    static_assert(std::is_same_v<Sum, float>);
    constexpr int of_set = width<Blocks> / 2, all = row_sets<Blocks> * of_set, together = 2, many = 8 * together, chunks = of_set / many;
    uint32_t largest[2] = {};
    // values take the places of sums behind all others
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float first[weights][many], made[many];
      take_first<Blocks>(sums, first);
      Beside read[together][2];
      beside<Blocks, Full>(columns, pair.targets, pair.rows, 2 * together * chunk, read);
#pragma unroll
      for (int u = 0; u < together; ++u) {
        Fours fours[2];
        exchange(first[0] + 8 * u, many, fours);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t column = column_of<Blocks>(2 * (together * chunk + u), i);
          const int count = count_of<Full>(columns, column);
          Scaled scaled;
          scale(item, columns, pair.line + 8 * i, pair.targets[i], column, count, fours[i], scaled);
          const Four<float> values = finish.values(columns.which, pair.rows[i], int64_t{columns.first + column}, scaled, read[u][i], count);
          largest[i] = max(largest[i], largest_of(values, count));
#pragma unroll
          for (int n = 0; n < 4; ++n) made[8 * u + 4 * i + n] = values[n];
        }
      }
      move_up<Blocks, many>(sums);
#pragma unroll
      for (int i = 0; i < many; ++i) sums[(all - many + i) / of_set * weights][(all - many + i) % of_set] = made[i];
    }
#pragma unroll
    for (uint32_t &of_row : largest)
      for (int by = 1; by < 4; by *= 2) of_row = max(of_row, __shfl_xor_sync(0xFFFFFFFFu, of_row, by));
    if constexpr (halves_columns<Blocks>) {
      uint32_t *const of_warp = maxima + thread / 32 * 32, place = thread % 32 / 4;
      if (thread % 4 < 2) of_warp[half * 16 + 8 * (thread % 2) + place] = thread % 2 != 0 ? largest[1] : largest[0];
      meet(6 + thread / 32, 64);
#pragma unroll
      for (int i = 0; i < 2; ++i) largest[i] = max(largest[i], of_warp[(1 - half) * 16 + 8 * i + place]);
      meet(6 + thread / 32, 64); // before others take their place
    }
    const Divisor by[2] = {Divisor(__uint_as_float(largest[0])), Divisor(__uint_as_float(largest[1]))};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
      for (int u = 0; u < together; ++u)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t column = column_of<Blocks>(2 * (together * chunk + u), i);
          const int count = count_of<Full>(columns, column), at = all - of_set + 8 * u + 4 * i;
          Four<float> values;
#pragma unroll
          for (int n = 0; n < 4; ++n) values[n] = sums[(at + n) / of_set * weights][(at + n) % of_set];
          if (pair.targets[i] >= 0 && count > 0) finish.quantised(columns.which, pair.rows[i], int64_t{columns.first + column}, values, by[i], count);
        }
#pragma unroll
      for (int i = 0; i + many < of_set; ++i) sums[(all - of_set) / of_set * weights][i] = sums[(all - of_set) / of_set * weights][i + many];
    }
  }

  /// Eights of sums of a thread are dealt out to the blocks that share k; each adds up those of all in the order of k.
  template <int Blocks>
  __device__ __forceinline__ void share(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, uint32_t part) {
    const Problem &p = work.of[0];
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
        const uint32_t there = address_in(from * p.together + block_of_cluster() % p.together, shared_address(ring) + place);
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
        const Row rows[2] = {row_of(columns, targets[0]), row_of(columns, targets[1])};
        Fours fours[1][2];
        exchange(eight[u], 8, fours[0]);
        finish_eights<Blocks, false>(item, columns, row, targets, rows, 2 * static_cast<int>((unit + u * p.parts) % eights), fours);
      }
    }
  }
};

}  // namespace s3::hopper
