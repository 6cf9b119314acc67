// Attention of one query token a row on Hopper: 64 query heads of a KV head are the 64 rows of a warpgroup product.
//
// A block for each processor. One warp fetches pages, 64 tokens at a time, into a ring of stages; two warpgroups take them in turn, each with
// its own running softmax, and put their sums together at the end of a unit: the part of one row and KV head that this block does. Where a
// unit is not all of a row's context, the blocks of the row leave their sums in scratch, and those that are still there when the last one
// arrives share in adding them up. No block ever depends on another one running.
//
// Which block does what follows from the positions of all rows, so the bits of a row's result depend on the other rows of its launch in how
// sums are split; equal launches give equal bits.
//
// Codes (e4m3) are multiplied as they are. Queries and weights of the softmax, which are finer, are sums of two codes: e4m3, then e5m2 for
// what that leaves. 8-bit products are added up in few bits by the hardware, so each tile's sum of values is added in f32 by the threads.
#pragma once
#include "attention.cuh"
#include "hopper.cuh"

#ifndef S3_MARK
#define S3_MARK(i)
#endif
namespace s3 {
namespace hopper {

// 64 x 64 of sums in a warpgroup; a thread has rows (lane / 4) and that + 8 of its warp's 16, columns 8i + lane % 4 * 2 + (0, 1) in
// sums[4i .. 4i + 3], by row, then column.
#define S3_SUMS                                                                                                                                    \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),             \
      "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),            \
      "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define S3_SUMS_TEXT                                                                                                                   \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
/// d = a b, plus d unless `fresh`; both operands in shared memory, or a in registers.
#define S3_PRODUCT(name, shape, tail)                                                                                                          \
  __device__ __forceinline__ void name(float *d, uint64_t a, uint64_t b, bool fresh) {                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %34, 0;\nwgmma.mma_async.sync.aligned." shape " " S3_SUMS_TEXT ", %32, %33, p, 1, 1" tail "\n}" \
                 : S3_SUMS                                                                                                                      \
                 : "l"(a), "l"(b), "r"(static_cast<uint32_t>(fresh)));                                                                          \
  }
#define S3_PRODUCT_OF_REGISTERS(name, shape, tail)                                                                                             \
  __device__ __forceinline__ void name(float *d, const uint32_t *a, uint64_t b, bool fresh) {                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %37, 0;\nwgmma.mma_async.sync.aligned." shape " " S3_SUMS_TEXT                              \
                 ", {%32,%33,%34,%35}, %36, p, 1, 1" tail "\n}"                                                                                \
                 : S3_SUMS                                                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(fresh)));                                      \
  }
S3_PRODUCT(scores_bf16, "m64n64k16.f32.bf16.bf16", ", 0, 0;")
S3_PRODUCT(scores_codes, "m64n64k32.f32.e4m3.e4m3", ";")
S3_PRODUCT_OF_REGISTERS(values_bf16, "m64n64k16.f32.bf16.bf16", ", 1;")
S3_PRODUCT_OF_REGISTERS(values_high, "m64n64k32.f32.e4m3.e4m3", ";")
S3_PRODUCT_OF_REGISTERS(values_low, "m64n64k32.f32.e5m2.e4m3", ";")
#undef S3_PRODUCT
#undef S3_PRODUCT_OF_REGISTERS
#undef S3_SUMS
#undef S3_SUMS_TEXT

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

/// Two numbers as codes: e4m3, and what that leaves as e4m3 or, where numbers may be a millionth of the largest, as e5m2. Magnitudes up to 448.
struct Codes {
  uint16_t high, low;
  template <bool Wide>
  static __device__ __forceinline__ Codes of(float first, float second) {
    Codes c;
    uint32_t x, of_high, rest;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(c.high) : "r"(x));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(of_high) : "h"(c.high));
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(rest) : "r"(x), "r"(of_high));
    if constexpr (Wide) asm("cvt.rn.satfinite.e5m2x2.f16x2 %0, %1;" : "=h"(c.low) : "r"(rest));
    else asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(c.low) : "r"(rest));
    return c;
  }
};

}  // namespace hopper

// --- sizes ------------------------------------------------------------------------------------------------------------------------

constexpr uint32_t most_blocks = 132;
constexpr int group_rows = 64;        // query heads that a unit does at once
constexpr int units_ahead = 4;
constexpr int least_tiles = 4;        // of a block, unless there are fewer
constexpr int slice_columns = 16;     // of a result, that a warpgroup adds up at a time

/// What one block has to do for a row: tiles first .. first + count - 1, of 64 tokens. The tiles of the row are divided among `pieces` blocks,
/// from `first_block` on, of which this is number `piece`.
struct Unit {
  int32_t row; // -1: no more
  int32_t part; // KV head and block of its query heads
  int32_t first, count, last_position;
  int32_t piece, pieces, first_block;
  int32_t ends; // it is the last one of this block
};

/// Where the next tile goes in a ring of stages.
template <int Stages>
struct RingPlace {
  uint32_t stage = 0, lap = 0, phase = 0; // phase: of the full barriers, which are those of two laps
  __device__ __forceinline__ uint32_t full() const { return lap * Stages + stage; }
  __device__ __forceinline__ void next() {
    if (++stage == Stages) stage = 0, lap ^= 1, phase ^= lap ^ 1;
  }
};

template <class E, int Dim>
struct HopperShape {
  using P = Page<E, Dim>;
  static constexpr bool codes = sizeof(E) == 1;
  static constexpr int half = page_tokens * Dim * static_cast<int>(sizeof(E)); // K or V of a tile
  static constexpr int scales = codes ? 2 * page_tokens * 4 : 0;
  static constexpr int stage = 2 * half + scales;
  static constexpr int query = group_rows * Dim * 2; // bf16, or high and low codes
  static constexpr int control = 2816;
  static constexpr int fit = (227 * 1024 - control - query) / stage;
  static constexpr int stages = fit < 8 ? fit : 8;
  static constexpr uint32_t shared = query + stages * stage + control;
  static constexpr int64_t partial = static_cast<int64_t>(group_rows) * Dim * 4 + group_rows * 8; // sums of a piece, then maximum and total of its rows

  struct Control {
    // A warpgroup that is ahead may wait for a stage that still waits for the other's tile: two laps of full barriers tell them apart.
    hopper::Barrier key_full[2 * stages], value_full[2 * stages], empty[stages], unit_full[units_ahead], unit_empty[units_ahead];
    float2 state[2][group_rows]; // maximum and total of each row, by warpgroup
    float row_scale[group_rows];
    Unit units[units_ahead];
    uint32_t told[2];
  };
  static_assert(sizeof(Control) <= control);
};

// --- the warp that fetches --------------------------------------------------------------------------------------------------------

/// Rows of a launch as the fetching warp sees them.
template <int Parts>
struct Schedule {
  const s3_head *heads;
  const int32_t *position;
  uint32_t stride, rows; // rows: the most there may be

  __device__ __forceinline__ int tiles(uint32_t row) const { return is_token(heads, stride, row) ? position[row] / page_tokens + 1 : 0; }
};

__device__ __forceinline__ int64_t sum_of_warp(int64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

/// Where this block begins: a row, a part of it and a tile, and how many tiles from there on.
struct Share {
  int64_t left;       // tiles of this block
  int64_t all;        // tiles of the launch, when blocks take equal shares of all tiles in a row
  uint32_t blocks;    // that have work
  uint32_t row, part; // of the first unit
  int64_t before;     // tiles of the launch, or blocks, before the first unit
  int64_t tile;       // within it
  int piece, pieces;  // of the first unit, when each block has but one
  bool alone;         // each block has one unit at most: rows are divided evenly
};

/// Row `by` counts of each row, found by all lanes: the row and part in which number `target` falls, and what counts before it.
template <int Parts, class Count>
__device__ __forceinline__ void find(uint32_t rows, int64_t target, Count count, uint32_t &row, uint32_t &part, int64_t &before) {
  const uint32_t lane = threadIdx.x % 32, each = (rows + 31) / 32, first = lane * each, end = min(first + each, rows);
  int64_t own = 0;
#pragma unroll 4
  for (uint32_t r = first; r < end; ++r) own += count(r) * Parts;
  int64_t up_to = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, up_to, step);
    if (static_cast<int>(lane) >= step) up_to += other;
  }
  int64_t at = up_to - own;
  uint32_t r = first;
  if (at <= target && target < up_to)
    for (; target >= at + static_cast<int64_t>(count(r)) * Parts; ++r) at += static_cast<int64_t>(count(r)) * Parts;
  const uint32_t who = __ffs(__ballot_sync(0xffffffffu, at <= target && target < up_to)) - 1;
  row = __shfl_sync(0xffffffffu, r, who);
  at = __shfl_sync(0xffffffffu, at, who);
  const int64_t size = count(row);
  part = static_cast<uint32_t>((target - at) / size);
  before = at + part * size;
}

template <int Parts>
__device__ __forceinline__ Share share_of(const Schedule<Parts> &s, uint32_t block, uint32_t blocks) {
  const uint32_t lane = threadIdx.x % 32, each = (s.rows + 31) / 32, first = lane * each, end = min(first + each, s.rows);
  int64_t tiles = 0, units = 0;
#pragma unroll 4
  for (uint32_t r = first; r < end; ++r) {
    const int n = s.tiles(r);
    tiles += n * Parts;
    units += n > 0 ? Parts : 0;
  }
  tiles = sum_of_warp(tiles);
  units = sum_of_warp(units);
  Share share{};
  share.all = tiles;
  if (tiles == 0) return share;

  // few rows: as many equal pieces of each as make the blocks about equally busy
  if (units <= blocks) {
    const int64_t fair = (tiles + blocks - 1) / blocks;
    int size = static_cast<int>(fair < least_tiles ? least_tiles : fair);
    for (const int most = size + size / 8; size <= most; size += 1 + size / 64) {
      const auto pieces = [&](uint32_t r) { return (s.tiles(r) + size - 1) / size; };
      int64_t all = 0;
      for (uint32_t r = first; r < end; ++r) all += pieces(r) * Parts;
      all = sum_of_warp(all);
      if (all > blocks) continue;
      share.alone = true;
      if (block >= all) return share;
      find<Parts>(s.rows, block, pieces, share.row, share.part, share.before);
      const int n = s.tiles(share.row);
      share.pieces = (n + size - 1) / size;
      share.piece = static_cast<int>(block - share.before);
      share.tile = static_cast<int64_t>(share.piece) * n / share.pieces;
      share.left = static_cast<int64_t>(share.piece + 1) * n / share.pieces - share.tile;
      return share;
    }
  }
  const int64_t wanted = (tiles + least_tiles - 1) / least_tiles;
  share.blocks = static_cast<uint32_t>(wanted < blocks ? wanted : blocks);
  if (block >= share.blocks) return share;
  const int64_t start = tiles * block / share.blocks;
  share.left = tiles * (block + 1) / share.blocks - start;
  find<Parts>(s.rows, start, [&](uint32_t r) { return s.tiles(r); }, share.row, share.part, share.before);
  share.tile = start - share.before;
  return share;
}

template <class E, int Heads, int Parts, int Dim>
__device__ __forceinline__ void fetch(typename HopperShape<E, Dim>::Control &control, uint8_t *ring, const s3_head *heads, uint32_t segments, uint32_t stride,
                                      const uint8_t *pool, const int32_t *pages, const int32_t *position, int pages_of_row) {
  using S = HopperShape<E, Dim>;
  const Schedule<Parts> schedule{heads, position, stride, segments * stride};
  const Share share = share_of<Parts>(schedule, blockIdx.x, gridDim.x);
  S3_MARK(1)
  const uint32_t lane = threadIdx.x % 32;
  int newest = 0; // rows of the launch, less one: no page that ends before `newest` positions ahead of a row's own is written by it
  for (uint32_t i = 0; i < segments; ++i) newest += static_cast<int>(heads[i].rows);

  bool waited = false;
  RingPlace<S::stages> place;
  int unit = 0;
  uint32_t unit_phase = 0;
  int64_t left = share.left, before = share.before;
  int tile = static_cast<int>(share.tile);
  uint32_t row = share.row, part = share.part;
  while (left > 0) {
    const int last = position[row], tiles = last / page_tokens + 1;
    const int count = static_cast<int>(min(static_cast<int64_t>(tiles - tile), left));
    left -= count;
    control.unit_empty[unit].wait(unit_phase ^ 1);
    if (lane == 0) {
      Unit &u = control.units[unit];
      u.row = static_cast<int32_t>(row);
      u.part = static_cast<int32_t>(part);
      u.first = tile;
      u.count = count;
      u.last_position = last;
      u.ends = left == 0;
      if (share.alone) {
        u.piece = share.piece;
        u.pieces = share.pieces;
      } else {
        const int64_t from = ((before + 1) * share.blocks - 1) / share.all, to = ((before + tiles) * share.blocks - 1) / share.all;
        u.piece = static_cast<int32_t>(blockIdx.x - from);
        u.pieces = static_cast<int32_t>(to - from + 1);
      }
      u.first_block = static_cast<int32_t>(blockIdx.x) - u.piece;
      control.unit_full[unit].arrive();
    }
    if (++unit == units_ahead) unit = 0, unit_phase ^= 1;

    const int32_t *const ids = pages + static_cast<int64_t>(row) * pages_of_row;
    int32_t some = 0;
    for (int i = 0; i < count; ++i) {
      if (i % 32 == 0) some = i + static_cast<int>(lane) < count ? ids[tile + i + lane] : 0;
      const int32_t id = __shfl_sync(0xffffffffu, some, i % 32);
      if (!waited && (tile + i + 1) * page_tokens + newest > last + 1) {
        after_predecessor();
        waited = true;
      }
      control.empty[place.stage].wait(place.lap ^ 1);
      if (lane == 0) {
        hopper::Barrier &key_full = control.key_full[place.full()], &value_full = control.value_full[place.full()];
        const uint8_t *const from = pool + (static_cast<int64_t>(id) * Heads + part / (Parts / Heads)) * S::P::head;
        uint8_t *const to = ring + place.stage * (2 * S::half), *const scales = ring + S::stages * (2 * S::half) + place.stage * S::scales;
        key_full.expect(S::half + S::scales);
        hopper::bulk_copy(to, from, S::half, key_full, hopper::read_once);
        if constexpr (S::codes) hopper::bulk_copy(scales, from + S::P::scales, S::scales, key_full, hopper::read_once);
        value_full.expect(S::half);
        hopper::bulk_copy(to + S::half, from + S::half, S::half, value_full, hopper::read_once);
      }
      S3_MARK(2)
      __syncwarp();
      place.next();
    }
    before += tiles;
    tile = 0;
    if (++part == Parts) {
      part = 0;
      if (left > 0)
        while (schedule.tiles(++row) == 0) {}
    }
  }
  control.unit_empty[unit].wait(unit_phase ^ 1);
  if (lane == 0) {
    control.units[unit].row = -1;
    control.unit_full[unit].arrive();
  }
  after_predecessor();
}

// --- the warpgroups that compute ----------------------------------------------------------------------------------------------------

/// The running softmax of 64 queries, in a warpgroup; a thread has the rows and columns of a product's sums. Maxima count powers of two.
template <int Dim>
struct Running {
  float sums[Dim / 2]; // in units of `unit`
  float maximum[2], total[2]; // total: of this thread's columns
  float unit;
};

/// Rows of the queries of a unit in shared memory, as keys lie in a page; codes with the scale of each row.
template <class E, int Dim>
__device__ __forceinline__ void load_queries(const bf16 *q, int count, uint8_t *to, float *row_scale, float scale) {
  constexpr int in_row = Dim / 8, each = group_rows * in_row / 256; // 16-byte pieces
  const int thread = static_cast<int>(threadIdx.x);
  uint4 x[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int piece = thread + i * 256;
    x[i] = piece / in_row < count ? *reinterpret_cast<const uint4 *>(q + piece * 8) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int piece = thread + i * 256, row = piece / in_row, d = piece % in_row * 8;
    if constexpr (sizeof(E) == 2) {
      *reinterpret_cast<uint4 *>(to + Page<bf16, Dim>::key(row, d)) = x[i];
    } else {
      const uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
      float y[8], most = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        y[j] = as_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
        most = fmaxf(most, fabsf(y[j]));
      }
#pragma unroll
      for (int step = in_row / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
      // the power of two that brings the largest to 128 .. 256
      const uint32_t exponent = max(as_bits(most) >> 23, 16u);
      const float up = as_float((261u - exponent) << 23);
      uint32_t high[2] = {}, low[2] = {};
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const hopper::Codes c = hopper::Codes::of<false>(y[j] * up, y[j + 1] * up);
        high[j / 4] |= static_cast<uint32_t>(c.high) << j % 4 * 8;
        low[j / 4] |= static_cast<uint32_t>(c.low) << j % 4 * 8;
      }
      uint8_t *const at = to + Page<E, Dim>::key(row, d);
      *reinterpret_cast<uint2 *>(at) = uint2{high[0], high[1]};
      *reinterpret_cast<uint2 *>(at + group_rows * Dim) = uint2{low[0], low[1]};
      if (d == 0) row_scale[row] = as_float((exponent - 7u) << 23) * scale;
    }
  }
}

/// Zeros V of tokens from `count` on, which may hold anything; by one warpgroup.
template <class E, int Dim>
__device__ __forceinline__ void clear_values(uint8_t *values, int count, int thread) {
  if constexpr (sizeof(E) == 2) {
    for (int piece = count * 8 + thread; piece < page_tokens * 8; piece += 128)
#pragma unroll
      for (int block = 0; block < Dim / 64; ++block) *reinterpret_cast<uint4 *>(values + block * 8192 + piece * 16) = uint4{};
  } else {
    using P = Page<E, Dim>;
    for (int d = thread; d < Dim; d += 128)
      for (int token = count; token < page_tokens; ++token) values[P::value(token, d) - P::values] = 0;
  }
}

/// Scores of a tile against all queries, issued; Q and K as in a page.
template <class E, int Dim>
__device__ __forceinline__ void multiply_keys(float *s, uint32_t q, uint32_t k) {
  using namespace hopper;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int i = 0; i < Dim / 16; ++i) {
      const uint32_t at = i / 4 * 8192 + i % 4 * 32;
      scores_bf16(s, matrix(q + at, 16, 1024, Swizzle::b128), matrix(k + at, 16, 1024, Swizzle::b128), i == 0);
    }
  } else {
    constexpr Swizzle swizzle = Dim == 64 ? Swizzle::b64 : Swizzle::b128;
    constexpr uint32_t eight_rows = Dim == 64 ? 512 : 1024;
#pragma unroll
    for (int i = 0; i < Dim / 32; ++i) {
      const uint32_t at = i / 4 * 8192 + i % 4 * 32;
      const uint64_t b = matrix(k + at, 16, eight_rows, swizzle);
      scores_codes(s, matrix(q + at, 16, eight_rows, swizzle), b, i == 0);
      scores_codes(s, matrix(q + group_rows * Dim + at, 16, eight_rows, swizzle), b, false);
    }
  }
}

/// One tile of which `count` tokens take part: waits for it, and leaves it to its caller to give the stage back.
template <class E, int Dim>
__device__ __forceinline__ void attend_tile(Running<Dim> &r, typename HopperShape<E, Dim>::Control &control, uint8_t *stage_data, const float *scales, uint32_t full,
                                            uint32_t phase, uint32_t q, int count, const float *factor, int thread) {
  using namespace hopper;
  using S = HopperShape<E, Dim>;
  const int column = thread % 4 * 2; // the first of this thread's in each 8
  const uint32_t k = shared_address(stage_data), v = k + S::half;
  float s[32];
  control.key_full[full].wait(phase);
  S3_MARK(4)
  product_fence();
  multiply_keys<E, Dim>(s, q, k);
  product_commit();

  float value_scale[16];
  float kept_by_unit = 1.0f;
  if constexpr (S::codes) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 two = *reinterpret_cast<const float2 *>(scales + page_tokens + i * 8 + column);
      value_scale[2 * i] = i * 8 + column < count ? two.x : 0.0f;
      value_scale[2 * i + 1] = i * 8 + column + 1 < count ? two.y : 0.0f;
      most = fmaxf(most, fmaxf(value_scale[2 * i], value_scale[2 * i + 1]));
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    // weights are at most 256 units
    const float needed = as_float((as_bits(most) + 0x7fffffu) & 0x7f800000u) * 0x1p-8f;
    if (needed > r.unit) {
      kept_by_unit = r.unit / needed;
      r.unit = needed;
    }
    const float per_unit = as_float(0x7f000000u - as_bits(r.unit));
#pragma unroll
    for (int i = 0; i < 16; ++i) value_scale[i] *= per_unit;
  }
  product_wait<0>();
#pragma unroll
  for (int i = 0; i < 32; ++i) pin(s[i]);

  if constexpr (S::codes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 two = *reinterpret_cast<const float2 *>(scales + i * 8 + column);
      s[4 * i] *= two.x, s[4 * i + 1] *= two.y, s[4 * i + 2] *= two.x, s[4 * i + 3] *= two.y;
    }
  }
  if (count < page_tokens) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (i / 4 * 8 + column + i % 2 >= count) s[i] = -infinity;
  }
  float kept[2];
  bool moved = kept_by_unit != 1.0f;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float most = s[2 * row];
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (i / 2 % 2 == row) most = fmaxf(most, s[i]);
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float now = fmaxf(r.maximum[row], most * factor[row]);
    moved |= now != r.maximum[row];
    const float by_maximum = power_of_two(r.maximum[row] - now);
    r.maximum[row] = now;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (i / 2 % 2 == row) {
        s[i] = power_of_two(fmaf(s[i], factor[row], -now));
        total += s[i];
      }
    r.total[row] = fmaf(r.total[row], by_maximum, total);
    kept[row] = by_maximum * kept_by_unit;
  }

  if constexpr (!S::codes) {
    uint32_t p[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int i = 0; i < Dim / 2; ++i) r.sums[i] *= kept[i / 2 % 2];
    }
    control.value_full[full].wait(phase);
    if (count < page_tokens) {
      clear_values<E, Dim>(stage_data + S::half, count, thread);
      fence_async();
      meet(2 + threadIdx.x / 128, 128);
    }
    product_fence();
#pragma unroll
    for (int block = 0; block < Dim / 64; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) values_bf16(r.sums + 32 * block, p + 4 * i, matrix(v + block * 8192 + i * 2048, 8192, 1024, Swizzle::b128), false);
    product_commit();
    product_wait<0>();
#pragma unroll
    for (int i = 0; i < Dim / 2; ++i) pin(r.sums[i]);
  } else {
    uint32_t high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // operand i % 4 of tokens 32 (i / 4) on: row i % 2, tokens 16 (i / 2 % 2) + 8 (0, 1) + column + (0, 1)
      const int from = i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2, token = i / 4 * 8 + i / 2 % 2 * 4;
      const Codes a = Codes::of<true>(s[from] * value_scale[token], s[from + 1] * value_scale[token + 1]);
      const Codes b = Codes::of<true>(s[from + 4] * value_scale[token + 2], s[from + 5] * value_scale[token + 3]);
      high[i] = a.high | static_cast<uint32_t>(b.high) << 16;
      low[i] = a.low | static_cast<uint32_t>(b.low) << 16;
    }
    control.value_full[full].wait(phase);
    if (count < page_tokens) {
      clear_values<E, Dim>(stage_data + S::half, count, thread);
      fence_async();
      meet(2 + threadIdx.x / 128, 128);
    }
    const auto issue = [&](float *t, int block) {
      product_fence();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint64_t b = matrix(v + block * 4096 + i * 32, 16, 512, Swizzle::b64);
        values_high(t, high + 4 * i, b, i == 0);
        values_low(t, low + 4 * i, b, false);
      }
      product_commit();
    };
    const auto add = [&](float *t, int block) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        pin(t[i]);
        r.sums[32 * block + i] = fmaf(r.sums[32 * block + i], kept[i / 2 % 2], t[i]);
      }
    };
    float even[32], odd[32];
    issue(even, 0);
#pragma unroll
    for (int block = 0; block < Dim / 64; ++block) {
      if (block + 1 < Dim / 64) {
        issue(block % 2 ? even : odd, block + 1);
        product_wait<1>();
      } else {
        product_wait<0>();
      }
      add(block % 2 ? odd : even, block);
    }
  }
}

/// Writes 8 columns of two rows, of which each thread of four has a part; rows past the group's are not there.
__device__ __forceinline__ void write_result(bf16 *out, int dim, int row, int column, int rows, float4 x, float by_first, float by_second) {
  if (row < rows) *reinterpret_cast<uint32_t *>(out + row * dim + column) = hopper::pack_bf16(x.x * by_first, x.y * by_first);
  if (row + 8 < rows) *reinterpret_cast<uint32_t *>(out + (row + 8) * dim + column) = hopper::pack_bf16(x.z * by_second, x.w * by_second);
}

/// How far the pieces of a unit are, in one word that begins and ends as 0.
namespace progress {
constexpr uint32_t arrived = 1, gone = 1 << 10, claimed = 1 << 20;
__device__ __forceinline__ uint32_t arrivals(uint32_t word) { return word % gone; }
__device__ __forceinline__ uint32_t departures(uint32_t word) { return word / gone % gone; }
__device__ __forceinline__ uint32_t claims(uint32_t word) { return word / claimed; }
__device__ __forceinline__ uint32_t read(const uint32_t *word) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(word) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t add(uint32_t *word, uint32_t x) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(x) : "memory");
  return before;
}
__device__ __forceinline__ void depart(uint32_t *word, uint32_t pieces) {
  if (departures(add(word, gone)) == pieces - 1) *word = 0;
}
}  // namespace progress

/// Scratch of piece `piece` of a unit that begins in block `first_block`: a block leaves at most two, the end of one unit and the begin of another.
template <class S>
__device__ __forceinline__ uint8_t *partial_of(uint8_t *scratch, int first_block, int piece) {
  return scratch + (static_cast<int64_t>(first_block + piece) * 2 + (piece == 0)) * S::partial;
}

/// Adds up slice after slice of a unit's pieces until none is left; by each warpgroup of each block that is still there.
template <class S, int Dim>
__device__ __forceinline__ void combine(const Unit &u, uint8_t *scratch, uint32_t *word, uint32_t &told, bf16 *out, int rows) {
  constexpr int each = slice_columns / 8;
  const int thread = static_cast<int>(threadIdx.x % 128), row = thread / 32 * 16 + thread % 32 / 4, group = static_cast<int>(threadIdx.x / 128);
  for (;;) {
    if (thread == 0) told = progress::claims(progress::add(word, progress::claimed));
    hopper::meet(2 + group, 128);
    const int slice = static_cast<int>(told);
    hopper::meet(2 + group, 128);
    if (slice >= Dim / slice_columns) return;
    float most[2] = {-infinity, -infinity};
#pragma unroll 8
    for (int p = 0; p < u.pieces; ++p) {
      const float2 *const state = reinterpret_cast<const float2 *>(partial_of<S>(scratch, u.first_block, p) + group_rows * Dim * 4);
      most[0] = fmaxf(most[0], __ldcg(state + row).x);
      most[1] = fmaxf(most[1], __ldcg(state + row + 8).x);
    }
    float total[2] = {};
    float4 sum[each] = {};
#pragma unroll 8
    for (int p = 0; p < u.pieces; ++p) {
      const uint8_t *const from = partial_of<S>(scratch, u.first_block, p);
      const float2 *const state = reinterpret_cast<const float2 *>(from + group_rows * Dim * 4);
      const float2 first = __ldcg(state + row), second = __ldcg(state + row + 8);
      const float by_first = hopper::power_of_two(first.x - most[0]), by_second = hopper::power_of_two(second.x - most[1]);
      total[0] = fmaf(first.y, by_first, total[0]);
      total[1] = fmaf(second.y, by_second, total[1]);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        const float4 x = __ldcg(reinterpret_cast<const float4 *>(from) + (slice * each + i) * 128 + thread);
        sum[i].x = fmaf(x.x, by_first, sum[i].x), sum[i].y = fmaf(x.y, by_first, sum[i].y);
        sum[i].z = fmaf(x.z, by_second, sum[i].z), sum[i].w = fmaf(x.w, by_second, sum[i].w);
      }
    }
#pragma unroll
    for (int i = 0; i < each; ++i)
      write_result(out, Dim, row, (slice * each + i) * 8 + thread % 4 * 2, rows, sum[i], 1.0f / total[0], 1.0f / total[1]);
  }
}

/// Sums [From, To) of a running softmax, in fours: the end of a unit for the warpgroup, or both, that hold all of it.
/// `threads`: 128 when this warpgroup has done the unit alone.
template <class S, int From, int To, int Dim>
__device__ __forceinline__ void finish(const Running<Dim> &r, const Unit &u, typename S::Control &control, uint8_t *scratch, uint32_t *counters, bf16 *out, int rows,
                                       uint32_t threads) {
  const int thread = static_cast<int>(threadIdx.x % 128), row = thread / 32 * 16 + thread % 32 / 4, group = static_cast<int>(threadIdx.x / 128);
  S3_MARK(6)
  if (u.pieces == 1) {
    const float by_first = 1.0f / r.total[0], by_second = 1.0f / r.total[1];
#pragma unroll
    for (int i = From / 4; i < To / 4; ++i)
      write_result(out, Dim, row, i * 8 + thread % 4 * 2, rows, float4{r.sums[4 * i], r.sums[4 * i + 1], r.sums[4 * i + 2], r.sums[4 * i + 3]}, by_first, by_second);
    return;
  }
  const bool speaks = thread == 0 && (threads == 128 || group == 0);
  const uint32_t barrier = threads == 128 ? 2 + group : 1;
  uint32_t *const word = counters + u.first_block;
  uint32_t &told = control.told[threads == 128 ? group : 0];

  uint8_t *const to = partial_of<S>(scratch, u.first_block, u.piece);
#pragma unroll
  for (int i = From / 4; i < To / 4; ++i)
    __stcg(reinterpret_cast<float4 *>(to) + i * 128 + thread, float4{r.sums[4 * i], r.sums[4 * i + 1], r.sums[4 * i + 2], r.sums[4 * i + 3]});
  if (From == 0 && thread % 4 == 0) {
    float2 *const state = reinterpret_cast<float2 *>(to + group_rows * Dim * 4);
    __stcg(state + row, float2{r.maximum[0], r.total[0]});
    __stcg(state + row + 8, float2{r.maximum[1], r.total[1]});
  }
  __threadfence();
  hopper::meet(barrier, threads);
  if (speaks) {
    const uint32_t pieces = static_cast<uint32_t>(u.pieces);
    bool all = progress::arrivals(progress::add(word, progress::arrived)) == pieces - 1;
    S3_MARK(7)
    if (!all && u.ends) {
      // others are about to end as well: stay a while (some 30 us) to help
      const int64_t start = clock64();
      do all = progress::arrivals(progress::read(word)) == pieces;
      while (!all && clock64() - start < 50000);
    }
    if (!all) progress::depart(word, pieces);
    told = all;
  }
  hopper::meet(barrier, threads);
  const bool all = told != 0;
  hopper::meet(barrier, threads);
  S3_MARK(8)
  if (!all) return;
  combine<S, Dim>(u, scratch, word, control.told[group], out, rows);
  S3_MARK(9)
  hopper::meet(barrier, threads);
  if (speaks) progress::depart(word, static_cast<uint32_t>(u.pieces));
}

/// Takes in what the other warpgroup has of this one's half of the columns, which lies in a stage, and gives the stage back.
template <int From, int To, int Dim>
__device__ __forceinline__ void merge(Running<Dim> &r, const float4 *theirs, const float2 *state, hopper::Barrier &empty) {
  const int thread = static_cast<int>(threadIdx.x % 128), row = thread / 32 * 16 + thread % 32 / 4;
  float own[2], other[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 s = state[row + 8 * i];
    const float now = fmaxf(r.maximum[i], s.x);
    own[i] = hopper::power_of_two(r.maximum[i] - now);
    other[i] = hopper::power_of_two(s.x - now);
    r.maximum[i] = now;
    // in the order of the warpgroups, so that both get the same bits
    r.total[i] = threadIdx.x < 128 ? fmaf(r.total[i], own[i], s.y * other[i]) : fmaf(s.y, other[i], r.total[i] * own[i]);
  }
#pragma unroll
  for (int i = From / 4; i < To / 4; ++i) {
    const float4 x = theirs[(i - From / 4) * 128 + thread];
    r.sums[4 * i] = fmaf(x.x, other[0], r.sums[4 * i] * own[0]), r.sums[4 * i + 1] = fmaf(x.y, other[0], r.sums[4 * i + 1] * own[0]);
    r.sums[4 * i + 2] = fmaf(x.z, other[1], r.sums[4 * i + 2] * own[1]), r.sums[4 * i + 3] = fmaf(x.w, other[1], r.sums[4 * i + 3] * own[1]);
  }
  hopper::fence_async();
  __syncwarp();
  if (thread % 32 == 0) empty.arrive();
}

template <class E, int Heads, int Group, int Dim>
__device__ __forceinline__ void compute(typename HopperShape<E, Dim>::Control &control, uint8_t *queries, uint8_t *ring, const bf16 *q, float scale, bf16 *out,
                                        uint8_t *scratch, uint32_t *counters) {
  using S = HopperShape<E, Dim>;
  constexpr int blocks = (Group + group_rows - 1) / group_rows;
  const int thread = static_cast<int>(threadIdx.x % 128), group = static_cast<int>(threadIdx.x / 128), row = thread / 32 * 16 + thread % 32 / 4;
  const float to_powers = scale * 1.44269504f; // e^x = 2^(x log2 e)
  Running<Dim> r;
  RingPlace<S::stages> place;
  uint32_t tile = 0, unit = 0, unit_phase = 0;
  after_predecessor();
  for (;;) {
    control.unit_full[unit].wait(unit_phase);
    const Unit &u = control.units[unit];
    if (u.row < 0) return;
    hopper::meet(1, 256); // nobody reads the unit before and its queries any more
    if (thread == 0 && tile > 0) control.unit_empty[(unit + units_ahead - 1) % units_ahead].arrive();
    if (++unit == units_ahead) unit = 0, unit_phase ^= 1;

    const int first_head = u.part / blocks * Group + u.part % blocks * group_rows, heads = min(group_rows, Group - u.part % blocks * group_rows);
    const int64_t at = (static_cast<int64_t>(u.row) * Heads * Group + first_head) * Dim;
    load_queries<E, Dim>(q + at, heads, queries, control.row_scale, to_powers);
    hopper::fence_async();
    hopper::meet(1, 256);
    S3_MARK(3)
    float factor[2] = {to_powers, to_powers};
    if constexpr (S::codes) factor[0] = control.row_scale[row], factor[1] = control.row_scale[row + 8];

#pragma unroll
    for (int i = 0; i < Dim / 2; ++i) r.sums[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) r.maximum[i] = -infinity, r.total[i] = 0.0f;
    r.unit = S::codes ? 0x1p-100f : 1.0f;

    uint32_t own_stage = 0, other_stage = 0; // of the last tile of each warpgroup
    for (int i = 0; i < u.count; ++i, ++tile) {
      if (tile % 2 == static_cast<uint32_t>(group)) {
        const int first_token = (u.first + i) * page_tokens;
        attend_tile<E, Dim>(r, control, ring + place.stage * (2 * S::half),
                            reinterpret_cast<const float *>(ring + S::stages * (2 * S::half) + place.stage * S::scales), place.full(), place.phase, hopper::shared_address(queries), min(page_tokens, u.last_position + 1 - first_token), factor, thread);
        own_stage = place.stage;
        // the last tile's stage takes the sums for the other warpgroup
        if (i < u.count - 2 || u.count == 1) {
          __syncwarp();
          if (thread % 32 == 0) control.empty[place.stage].arrive();
        }
      } else {
        other_stage = place.stage;
      }
      place.next();
    }
    S3_MARK(5)
    if (u.count == 1 && (tile - 1) % 2 != static_cast<uint32_t>(group)) continue;

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      r.total[i] += __shfl_xor_sync(0xffffffffu, r.total[i], 1);
      r.total[i] += __shfl_xor_sync(0xffffffffu, r.total[i], 2);
    }
    if constexpr (S::codes) {
#pragma unroll
      for (int i = 0; i < Dim / 2; ++i) r.sums[i] *= r.unit;
    }
    constexpr int middle = Dim / 4;
    if (u.count == 1) {
      finish<S, 0, Dim / 2, Dim>(r, u, control, scratch, counters, out + at, heads, 128);
      continue;
    }
    hopper::meet(2 + group, 128); // the other warps have multiplied that stage too
    float4 *const mine = reinterpret_cast<float4 *>(ring + own_stage * (2 * S::half));
    const float4 *const theirs = reinterpret_cast<const float4 *>(ring + other_stage * (2 * S::half));
#pragma unroll
    for (int i = 0; i < middle / 4; ++i) {
      if (group == 0) mine[i * 128 + thread] = float4{r.sums[middle + 4 * i], r.sums[middle + 4 * i + 1], r.sums[middle + 4 * i + 2], r.sums[middle + 4 * i + 3]};
      else mine[i * 128 + thread] = float4{r.sums[4 * i], r.sums[4 * i + 1], r.sums[4 * i + 2], r.sums[4 * i + 3]};
    }
    if (thread % 4 == 0) {
      control.state[group][row] = float2{r.maximum[0], r.total[0]};
      control.state[group][row + 8] = float2{r.maximum[1], r.total[1]};
    }
    hopper::fence_async();
    hopper::meet(1, 256);
    if (group == 0) {
      merge<0, middle, Dim>(r, theirs, control.state[1], control.empty[other_stage]);
      finish<S, 0, middle, Dim>(r, u, control, scratch, counters, out + at, heads, 256);
    } else {
      merge<middle, Dim / 2, Dim>(r, theirs, control.state[0], control.empty[other_stage]);
      finish<S, middle, Dim / 2, Dim>(r, u, control, scratch, counters, out + at, heads, 256);
    }
  }
}

template <class E, int Heads, int Group, int Dim>
__global__ void __launch_bounds__(384, 1) attend_hopper_kernel(const s3_head *heads, uint32_t segments, uint32_t stride, const bf16 *q, const uint8_t *pool,
                                                               const int32_t *pages, const int32_t *position, int pages_of_row, float scale, bf16 *out,
                                                               uint8_t *scratch, uint32_t *counters) {
  using S = HopperShape<E, Dim>;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto &control = *reinterpret_cast<typename S::Control *>(shared + S::query + S::stages * S::stage);
  S3_MARK(0)
  let_successor_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * S::stages; ++i) control.key_full[i].init(1), control.value_full[i].init(1);
    for (int i = 0; i < S::stages; ++i) control.empty[i].init(4);
    for (int i = 0; i < units_ahead; ++i) control.unit_full[i].init(1), control.unit_empty[i].init(2);
    hopper::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    hopper::give_registers<40>();
    if (threadIdx.x < 288)
      fetch<E, Heads, Heads *((Group + group_rows - 1) / group_rows), Dim>(control, shared + S::query, heads, segments, stride, pool, pages, position, pages_of_row);
  } else {
    hopper::take_registers<232>();
    compute<E, Heads, Group, Dim>(control, shared, shared + S::query, q, scale, out, scratch, counters);
  }
}

/// Bytes of scratch of the largest launch; attention.ts has the same.
template <class E, int Dim>
constexpr int64_t attend_hopper_scratch = 2 * most_blocks * HopperShape<E, Dim>::partial;

/// Attention of every row of a launch over cache positions 0 .. position[row]; `Group` query heads share a KV head. `scale` is above 0.
template <class Q, class E, int Heads, int Group, int Dim>
cudaError_t attend_hopper(const Call &c, const Q *q, const uint8_t *pool, const int32_t *pages, const int32_t *position, int pages_of_row, float scale, Q *out) {
  using S = HopperShape<E, Dim>;
  const uint32_t blocks = static_cast<uint32_t>(c.processors) < most_blocks ? static_cast<uint32_t>(c.processors) : most_blocks;
  return launch(attend_hopper_kernel<E, Heads, Group, Dim>, dim3(c.stride == 0 ? 0 : blocks), dim3(384), S::shared, c, c.heads, c.segments, c.stride, q, pool, pages,
                position, pages_of_row, scale, out, c.scratch, c.counters);
}

}  // namespace s3
