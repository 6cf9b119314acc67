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

/// What a thread of the multiplying warpgroups knows.
template <class O, class Finish>
struct Multiplier {
  static constexpr int weights = Finish::pairs ? 2 : 1; // of which a tile has columns
  const Problem &p;
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

  using Sum = typename O::Sum;
  using Scaled = std::conditional_t<Finish::pairs, float[2][4], float[4]>; // what Finish gets of four columns
  using Row = typename Finish::Row;
  using Beside = typename Finish::Beside;

  template <int Blocks>
  __device__ __forceinline__ void item(const Item &item, uint32_t part) {
    Sum sums[sets<Blocks>][width<Blocks> / 2];
    Targets<Blocks> targets{};
    if (p.parts == 1) look_up<Blocks>(item, targets);
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
      if (p.parts > 1) return share<Blocks>(sums, item, part);
    if (item.leaves) leave<Blocks>(sums);
    else store<Blocks>(sums, item, targets);
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
        const uint32_t before = stage;
#pragma unroll
        for (int s = 0; s < sets<Blocks>; ++s) {
          product_fence();
          enqueue<Blocks>(products, word, s, false);
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
  __device__ __forceinline__ Four<Sum> *left(uint32_t to) const { return reinterpret_cast<Four<Sum> *>(p.left + to * sums_left) + half * 128 + thread; }
  template <int Blocks>
  __device__ __forceinline__ void leave(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2]) {
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
  /// How many of the four columns from `column` of the block on there are; none when it is not positive. Full: the block has all of its columns.
  template <bool Full>
  static __device__ __forceinline__ int count_of(const Columns &columns, int32_t column) { return Full ? 4 : min(4, columns.count - column); }
  /// What is read beside fours of columns of a thread's two rows, from those of sums 4j on; nothing of rows and columns that are not there.
  template <int Blocks, bool Full, int Many>
  __device__ __forceinline__ void beside(const Columns &columns, const int32_t (&targets)[2], const Row (&rows)[2], int j, Beside (&read)[Many][2]) const {
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
  __device__ __forceinline__ Row row_of(int32_t target) const { return finish.row_of(max(target, 0)); }
  /// Rows of the result that a warp's rows belong to: lane l has rows l % 16 of its sets 2n + l / 16.
  template <int Blocks>
  using Targets = int32_t[(row_sets<Blocks> + 1) / 2];
  template <int Blocks>
  __device__ __forceinline__ void look_up(const Item &item, Targets<Blocks> &targets) const {
#pragma unroll
    for (int n = 0; n < (row_sets<Blocks> + 1) / 2; ++n) {
      const int set = 2 * n + thread % 32 / 16;
      const int32_t row = item.row + block_of<Blocks>(set) * block_rows + thread / 32 * 16 + thread % 16;
      targets[n] = set < row_sets<Blocks> && row < item.end ? target_of(row) : -1;
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
          const Weight &w = p.w[columns.which + n];
          value *= p.packed.scales[p.direct ? target : row] * w.scales[int64_t{item.matrix} * w.columns + columns.first + column + min(i, count - 1)];
        }
        if constexpr (Finish::pairs) scaled[n][i] = value;
        else scaled[i] = value;
      }
  }
  /// Results of so many eights of two rows. `line`: the upper row of the item, `j`: of the first eight's sums.
  template <int Blocks, bool Full, int Many>
  __device__ __forceinline__ void finish_eights(const Item &item, const Columns &columns, int32_t line, const int32_t (&targets)[2], const Row (&rows)[2], int j, const Fours (&fours)[Many][2]) const {
    Beside read[Many][2];
    beside<Blocks, Full>(columns, targets, rows, j, read);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (targets[i] < 0) continue;
#pragma unroll
      for (int u = 0; u < Many; ++u) {
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
  template <int Blocks>
  __device__ __forceinline__ void store(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, const Targets<Blocks> &own) const {
    const Columns columns = columns_of(item);
    if (columns.count >= tile_columns) store<Blocks, true>(sums, item, columns, own);
    else store<Blocks, false>(sums, item, columns, own);
  }
  template <int Blocks, bool Full>
  __device__ __forceinline__ void store(const Sum (&sums)[sets<Blocks>][width<Blocks> / 2], const Item &item, const Columns &columns, const Targets<Blocks> &own) const {
    constexpr int apart = width<Blocks> / 2, eights = width<Blocks> / 16, together = sizeof(Beside) > 32 ? 2 : 4; // whose reads wait for each other's
    Row own_rows[(row_sets<Blocks> + 1) / 2];
#pragma unroll
    for (int n = 0; n < (row_sets<Blocks> + 1) / 2; ++n) own_rows[n] = row_of(own[n]);
#pragma unroll
    for (int r = 0; r < row_sets<Blocks>; ++r) {
      const int32_t line = item.row + block_of<Blocks>(r) * block_rows + thread / 32 * 16; // the warp's first
      if (line >= item.end) break;
      int32_t targets[2];
      Row rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int lane = r % 2 * 16 + 8 * i + thread % 32 / 4;
        targets[i] = __shfl_sync(0xFFFFFFFFu, own[r / 2], lane), rows[i] = from_lane(own_rows[r / 2], lane);
      }
      const int32_t own_line = line + thread % 32 / 4;
      if constexpr (Finish::quantises) {
        quantise<Blocks, Full>(sums[r * weights], item, columns, own_line, targets, rows);
      } else {
#pragma unroll
        for (int first = 0; first < eights; first += together) {
          Fours fours[together][2];
#pragma unroll
          for (int u = 0; u < together; ++u) exchange(sums[r * weights] + 8 * (first + u), apart, fours[u]);
          finish_eights<Blocks, Full>(item, columns, own_line, targets, rows, 2 * first, fours);
        }
      }
    }
  }
  /// A set of rows, of which a warp, or two where warpgroups have half of the columns each, has all columns of the block.
  template <int Blocks, bool Full>
  __device__ __forceinline__ void quantise(const Sum *sums, const Item &item, const Columns &columns, int32_t line, const int32_t (&targets)[2], const Row (&rows)[2]) const {
    constexpr int apart = width<Blocks> / 2, eights = width<Blocks> / 16;
    Four<float> values[eights][2];
    uint32_t largest[2] = {};
#pragma unroll
    for (int u = 0; u < eights; ++u) {
      Fours fours[2];
      exchange(sums + 8 * u, apart, fours);
      Beside read[1][2];
      beside<Blocks, Full>(columns, targets, rows, 2 * u, read);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t column = column_of<Blocks>(2 * u, i);
        const int count = count_of<Full>(columns, column);
        Scaled scaled;
        scale(item, columns, line + 8 * i, targets[i], column, count, fours[i], scaled);
        values[u][i] = finish.values(rows[i], int64_t{columns.first + column}, scaled, read[0][i], count);
        largest[i] = max(largest[i], largest_of(values[u][i], count));
      }
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
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Divisor by(__uint_as_float(largest[i]));
      if (targets[i] < 0) continue;
#pragma unroll
      for (int u = 0; u < eights; ++u) {
        const int32_t column = column_of<Blocks>(2 * u, i);
        const int count = count_of<Full>(columns, column);
        if (count > 0) finish.quantised(rows[i], int64_t{columns.first + column}, values[u][i], by, count);
      }
    }
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
        const Row rows[2] = {row_of(targets[0]), row_of(targets[1])};
        Fours fours[1][2];
        exchange(eight[u], 8, fours[0]);
        finish_eights<Blocks, false>(item, columns, row, targets, rows, 2 * static_cast<int>((unit + u * p.parts) % eights), fours);
      }
    }
  }
};

}  // namespace s3::hopper
