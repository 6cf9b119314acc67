// Attention of one query token a row on Hopper: 64 query heads of a KV head are the 64 rows of a warpgroup product. Chunks of sequences are
// in attention_chunk.cuh, and the kernel of both in attend_hopper.cuh.
//
// A block for each processor. One warp fetches pages, 64 tokens at a time, into a ring of stages; two warpgroups take them in turn, each with
// its own running softmax, and put their sums together at the end of a unit: what this block does of one row and KV head. Where that is not
// all of the row's context, blocks leave their sums in scratch, and those that are there when the last one arrives share in adding them up;
// the last one adds those of blocks that have gone on to its own. No block depends on another one running.
//
// Which block does what follows from the positions of all rows. Equal launches give equal bits; a row's bits depend on the other rows only in
// how its context is split, and not at all where rows are about equally long and blocks take whole ones.
//
// Codes (e4m3) are multiplied as they are. Queries and weights of the softmax, which are finer, are sums of two codes. 8-bit products are
// added up in few bits by the hardware, so the low codes come first and each tile's sums of values are added in f32 by the threads.
//
// Queries may be rotated as they are loaded, and results quantised before they are written: 128 columns are in one warp then.
#pragma once
#include "attention.cuh"
#include "hopper.cuh"

namespace s3 {
namespace hopper {

// 64 x N sums of a warpgroup; a thread has rows (lane / 4) and that + 8 of its warp's 16, columns 8i + lane % 4 * 2 + (0, 1) in
// sums[4i .. 4i + 3], by row, then column.
#define S3_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define S3_D32(i) S3_D8(i), S3_D8(i + 8), S3_D8(i + 16), S3_D8(i + 24)
#define S3_D64(i) S3_D32(i), S3_D32(i + 32)
#define S3_D128(i) S3_D64(i), S3_D64(i + 64)
#define S3_N32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define S3_N64 S3_N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define S3_N128 S3_N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
/// d = a b, plus d unless `fresh`; both operands in shared memory, or a in registers. The last arguments are the numbers of what follows d.
#define S3_PRODUCT(name, shape, tail)                                                                                                               \
  __device__ __forceinline__ void name(float *d, uint64_t a, uint64_t b, bool fresh) {                                                              \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %34, 0;\nwgmma.mma_async.sync.aligned." shape " {" S3_N32 "}, %32, %33, p, 1, 1" tail "\n}"     \
                 : S3_D32(0)                                                                                                                        \
                 : "l"(a), "l"(b), "r"(static_cast<uint32_t>(fresh)));                                                                              \
  }
#define S3_PRODUCT_OF_REGISTERS(name, shape, tail, n, a0, a1, a2, a3, b0, p0)                                                                       \
  __device__ __forceinline__ void name(float *d, const uint32_t *a, uint64_t b, bool fresh) {                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %" #p0 ", 0;\nwgmma.mma_async.sync.aligned." shape " {" S3_N##n "}, {%" #a0 ",%" #a1 ",%" #a2     \
                 ",%" #a3 "}, %" #b0 ", p, 1, 1" tail "\n}"                                                                                         \
                 : S3_D##n(0)                                                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(fresh)));                                          \
  }
S3_PRODUCT(scores_bf16, "m64n64k16.f32.bf16.bf16", ", 0, 0;")
S3_PRODUCT(scores_codes, "m64n64k32.f32.e4m3.e4m3", ";")
S3_PRODUCT_OF_REGISTERS(values_bf16_64, "m64n64k16.f32.bf16.bf16", ", 1;", 32, 32, 33, 34, 35, 36, 37)
S3_PRODUCT_OF_REGISTERS(values_bf16_128, "m64n128k16.f32.bf16.bf16", ", 1;", 64, 64, 65, 66, 67, 68, 69)
S3_PRODUCT_OF_REGISTERS(values_bf16_256, "m64n256k16.f32.bf16.bf16", ", 1;", 128, 128, 129, 130, 131, 132, 133)
S3_PRODUCT_OF_REGISTERS(values_high_64, "m64n64k32.f32.e4m3.e4m3", ";", 32, 32, 33, 34, 35, 36, 37)
S3_PRODUCT_OF_REGISTERS(values_low_64, "m64n64k32.f32.e5m2.e4m3", ";", 32, 32, 33, 34, 35, 36, 37)
#undef S3_PRODUCT
#undef S3_PRODUCT_OF_REGISTERS
#undef S3_D8
#undef S3_D32
#undef S3_D64
#undef S3_D128
#undef S3_N32
#undef S3_N64
#undef S3_N128

/// A shared address that all threads of a warp have, so that the compiler knows it: matrix descriptors are made of such.
__device__ __forceinline__ uint32_t same_in_warp(uint32_t address) { return __reduce_max_sync(0xffffffffu, address); }

/// What an offset in bytes adds to a matrix descriptor.
__device__ __forceinline__ constexpr uint64_t in_matrix(int bytes) { return static_cast<uint64_t>(bytes) >> 4; }

/// Brings `bytes`, a multiple of 16, near.
__device__ __forceinline__ void prefetch(const void *from, uint32_t bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory"); }

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

// --- queries and results ------------------------------------------------------------------------------------------------------------

/// bf16 queries, as they are.
struct Queries {
  const bf16 *q;
  static constexpr bool rotated = false;
};
/// Queries that are rotated first, and rounded again: cosines in the first half of a row of the table, sines in the second.
struct RotatedQueries {
  const bf16 *q;
  const float *table;
  int positions;
  static constexpr bool rotated = true;
  template <int Dim>
  __device__ __forceinline__ const float *row(int position) const { return table + static_cast<int64_t>(max(0, min(position, positions - 1))) * Dim; }
};
/// Results in bf16.
struct Results {
  bf16 *out;
  static constexpr bool quantised = false;
};
constexpr int result_group = 128; // columns that share a scale
/// Results in bf16, quantised: codes, and a scale for each group of columns.
struct QuantisedResults {
  e4m3 *codes;
  float *scales;
  static constexpr bool quantised = true;
};

/// The scale of a group of values of which the largest magnitude has these bits.
__device__ __forceinline__ float scale_of(uint32_t magnitude) {
  const float raw = __fdiv_rn(as_float(magnitude), 448.0f);
  return raw == 0.0f ? 1.0f : raw;
}
/// The same of a group that a warp has.
__device__ __forceinline__ float scale_of_group(uint32_t magnitude) { return scale_of(__reduce_max_sync(0xffffffffu, magnitude)); }
/// The larger magnitude of two bf16, as bits of a float.
__device__ __forceinline__ uint32_t largest_of(uint32_t two) { return max(two << 16 & 0x7fffffffu, two & 0x7fff0000u); }
/// Divides by a scale: the same bits as a division, in a third of its instructions. Both sides are first multiplied by a power of two, so that
/// nothing overflows or gets lost; then a quotient by the rounded inverse needs one correction by its remainder (Markstein).
struct Divisor {
  float up, scale, inverse;
  explicit __device__ __forceinline__ Divisor(float divisor) {
    up = as_float((254u - min(as_bits(divisor) >> 23, 250u)) << 23);
    scale = __fmul_rn(divisor, up);
    inverse = __fdiv_rn(1.0f, scale);
  }
  __device__ __forceinline__ float of(float x) const {
    x = __fmul_rn(x, up);
    const float quotient = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-quotient, scale, x), inverse, quotient);
  }
};
/// Two bf16 as codes.
__device__ __forceinline__ uint16_t codes_of(uint32_t two, const Divisor &by) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(by.of(as_float(two & 0xffff0000u))), "f"(by.of(as_float(two << 16))));
  return codes;
}

// --- sizes ------------------------------------------------------------------------------------------------------------------------

constexpr int units_ahead = 4;
constexpr uint32_t least_tiles = 4;        // of a block, unless there are fewer
constexpr uint32_t most_pairs = 2048;      // of rows that are attended together; later rows are on their own

/// What one block has to do for a row: tiles first .. first + count - 1, of 64 tokens. The tiles of the row are divided among `pieces` blocks,
/// from `first_block` on, of which this is number `piece`.
struct Unit {
  int32_t row; // -1: no more
  int32_t part; // KV head and block of its query heads
  int32_t first, count, last_position;
  int32_t rows; // 2: the next row too, which is one position further
  int32_t piece, pieces, first_block;
  int32_t helpers; // the pieces before this number are the last work of their blocks, which add up the row
};

/// Where a tile is in a ring of stages. There are full barriers for two laps, whose phase this is.
template <int Stages>
struct RingPlace {
  uint32_t full, phase;
  explicit __device__ __forceinline__ RingPlace(uint32_t tile) : full(tile % (2 * Stages)), phase(tile / (2 * Stages) % 2) {}
  __device__ __forceinline__ uint32_t stage() const { return full < Stages ? full : full - Stages; }
  __device__ __forceinline__ uint32_t lap() const { return full < Stages ? 0 : 1; }
  __device__ __forceinline__ void advance(uint32_t tiles) {
    full += tiles;
    if (full >= 2 * Stages) full -= 2 * Stages, phase ^= 1;
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
  static constexpr uint32_t row_tiles = codes ? 4 : 2; // how many tiles would take the time between the last tile of a row and the first of the next
  static constexpr int fit = (227 * 1024 - control - query) / stage;
  static constexpr int stages = fit < 8 ? fit : 8;
  static constexpr int chunk_stages = stages - 1; // the last one's place has the queries of a second row
  static constexpr uint32_t shared = query + stages * stage + control;

  struct Control {
    // A warpgroup that is ahead may wait for a stage that still waits for the other's tile: two laps of full barriers tell them apart.
    hopper::Barrier key_full[2 * stages], value_full[2 * stages], empty[stages], value_empty[stages], unit_full[units_ahead], unit_empty[units_ahead];
    float2 state[2][group_rows]; // maximum and total of each row, by warpgroup
    float row_scale[group_rows];
    Unit units[units_ahead];
    uint32_t told;
    uint32_t pairs[most_pairs / 32];
  };
  static_assert(sizeof(Control) <= control);
};

// --- the warp that fetches --------------------------------------------------------------------------------------------------------

/// Tiles of the rows of a launch. Counts of the first rows wait in shared memory until the first unit is published.
struct Rows {
  const s3_head *heads;
  const int32_t *position;
  uint32_t stride, count, noted;
  const uint32_t *notes;

  __device__ __forceinline__ uint32_t tiles_alone(uint32_t row) const {
    const uint32_t n = static_cast<uint32_t>(position[row]) / page_tokens + 1; // both loads at once: what lies past the rows is not used
    return is_token(heads, stride, row) ? n : 0;
  }
  __device__ __forceinline__ uint32_t together(uint32_t) const { return 1; }
  __device__ __forceinline__ uint32_t tiles(uint32_t row) const { return tiles_alone(row); }
  __device__ __forceinline__ uint32_t noted_tiles(uint32_t row) const { return row < noted ? notes[row] : tiles(row); }
};
/// The same where rows 2p and 2p + 1 may be a pair, of which the first has the tiles of both and the second none.
struct PairedRows : Rows {
  const uint32_t *pairs; // a bit for each

  __device__ __forceinline__ uint32_t together(uint32_t row) const { return row / 2 < most_pairs && (pairs[row / 64] >> row / 2 % 32 & 1) != 0 ? 2 : 1; }
  __device__ __forceinline__ uint32_t tiles(uint32_t row) const { return together(row) == 1 ? tiles_alone(row) : row % 2 == 0 ? tiles_alone(row + 1) : 0; }
  __device__ __forceinline__ uint32_t noted_tiles(uint32_t row) const {
    if (row >= noted - 1) return tiles(row);
    return together(row) == 1 ? notes[row] : row % 2 == 0 ? notes[row + 1] : 0;
  }
};

/// What one block does: `left` tiles from a tile of a part of a row on. Where tiles of all rows are divided, `ahead` idle ones count before the
/// first of each part, for the time that another row takes to begin and end.
struct Share {
  uint32_t left;
  uint32_t row, part, tile;
  uint32_t ahead;
  uint32_t before;        // tiles of the launch, or blocks, before that part
  uint32_t piece, pieces; // of its only unit, when rows are divided evenly; else 0
  uint32_t all, blocks;   // tiles of the launch and blocks with work, when all tiles in a row are
};

__device__ __forceinline__ uint32_t sum_of_warp(uint32_t x) { return __reduce_add_sync(0xffffffffu, x); }

/// The row and part in which number `target` falls when each part of a row has `count(row)`, and what the parts before have; by a warp.
template <int Parts, class Count>
__device__ __forceinline__ void find(uint32_t rows, uint32_t target, Count count, Share &share) {
  const uint32_t lane = threadIdx.x % 32, each = (rows + 31) / 32, first = min(lane * each, rows), end = min(first + each, rows);
  uint32_t own = 0;
  for (uint32_t r = first; r < end; ++r) own += count(r) * Parts;
  uint32_t at = own;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, at, step);
    if (lane >= step) at += other;
  }
  at -= own;
  const bool here = target - at < own;
  uint32_t r = first, n = 0;
  if (here)
    for (; target - at >= (n = count(r) * Parts); ++r) at += n;
  const int who = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, here))) - 1;
  share.row = __shfl_sync(0xffffffffu, r, who);
  at = __shfl_sync(0xffffffffu, at, who);
  const uint32_t size = __shfl_sync(0xffffffffu, n, who) / Parts;
  share.part = Parts == 1 ? 0 : (target - at) / size;
  share.before = at + share.part * size;
}

/// What there is to do for `blocks` blocks, as a warp adds it up.
struct Load {
  uint32_t tiles, units, longest;
  uint32_t fair, each; // tiles and units of a block

  template <int Parts, class Rows>
  static __device__ __forceinline__ Load of(const Rows &rows, uint32_t blocks) {
    const uint32_t lane = threadIdx.x % 32, part = (rows.count + 31) / 32, first = min(lane * part, rows.count), end = min(first + part, rows.count);
    Load all{};
    for (uint32_t r = first; r < end; ++r) {
      const uint32_t n = rows.noted_tiles(r);
      all.tiles += n * Parts;
      all.units += n > 0 ? Parts : 0;
      all.longest = max(all.longest, n);
    }
    all.tiles = sum_of_warp(all.tiles);
    all.units = sum_of_warp(all.units);
    all.longest = __reduce_max_sync(0xffffffffu, all.longest);
    all.fair = max((all.tiles + blocks - 1) / blocks, least_tiles);
    all.each = (all.units + blocks - 1) / blocks;
    return all;
  }
  /// Rows are about equally long, and as many as keep the blocks busy: each block has whole ones. `slack`: what part more than others it may have.
  __device__ __forceinline__ bool whole(uint32_t slack) const { return each * longest <= fair + fair / slack; }
};
constexpr uint32_t row_slack = 16, pair_slack = 8;

/// Whole: rows are not divided among blocks, whatever they are. `ahead`: how many tiles another row costs.
template <int Parts, bool Whole, class Rows>
__device__ __forceinline__ Share share_of(const Rows &rows, uint32_t block, uint32_t blocks, uint32_t ahead) {
  const Load load = Load::of<Parts>(rows, blocks);
  const auto [tiles, units, longest, fair, each_block] = load;
  Share share{};
  if (tiles == 0) return share;

  if (Whole || load.whole(row_slack)) {
    if (block * each_block >= units) return share;
    find<Parts>(rows.count, block * each_block, [&](uint32_t r) { return rows.noted_tiles(r) > 0 ? 1u : 0u; }, share);
    share.pieces = 1;
    uint32_t r = share.row, part = share.part;
    for (uint32_t i = 0; i < each_block && r < rows.count; ++i) {
      share.left += rows.noted_tiles(r);
      if (++part < Parts) continue;
      part = 0;
      do ++r;
      while (r < rows.count && rows.noted_tiles(r) == 0);
    }
    return share;
  }
  // few rows: as many equal pieces of each as make the blocks about equally busy
  if (units <= blocks) {
    const uint32_t lane = threadIdx.x % 32, each = (rows.count + 31) / 32, first = min(lane * each, rows.count), end = min(first + each, rows.count);
    uint32_t size = fair;
    for (const uint32_t most = size + size / 8; size <= most; size += 1 + size / 64) {
      const auto pieces = [&](uint32_t r) { return (rows.noted_tiles(r) + size - 1) / size; };
      uint32_t all = 0;
      for (uint32_t r = first; r < end; ++r) all += pieces(r) * Parts;
      all = sum_of_warp(all);
      if (all > blocks) continue;
      if (block >= all) return share;
      find<Parts>(rows.count, block, pieces, share);
      const uint32_t n = rows.noted_tiles(share.row);
      share.pieces = (n + size - 1) / size;
      share.piece = block - share.before;
      share.tile = part_of(n, share.piece, share.pieces);
      share.left = part_of(n, share.piece + 1, share.pieces) - share.tile;
      return share;
    }
  }
  share.ahead = ahead;
  share.all = tiles + units * ahead;
  share.blocks = min((tiles + least_tiles - 1) / least_tiles, blocks);
  if (block >= share.blocks) return share;
  const uint32_t start = part_of(share.all, block, share.blocks);
  share.left = part_of(share.all, block + 1, share.blocks) - start;
  find<Parts>(rows.count, start, [&](uint32_t r) { return rows.noted_tiles(r) > 0 ? rows.noted_tiles(r) + ahead : 0; }, share);
  share.tile = start - share.before;
  return share;
}

/// The first query head of a part of a row.
template <int Group>
__device__ __forceinline__ int head_of(uint32_t part) {
  constexpr uint32_t blocks = (Group + group_rows - 1) / group_rows;
  return static_cast<int>(part / blocks * Group + part % blocks * group_rows);
}

/// Chunk: keys and values are given back separately, and other blocks read them too.
template <class E, int Heads, int Group, int Dim, bool Chunk, class Rows, class From>
__device__ __forceinline__ void fetch(typename HopperShape<E, Dim>::Control &control, uint8_t *ring, const Rows &rows, uint32_t segments, const From &from_queries,
                                      const uint8_t *pool, const int32_t *pages, int pages_of_row) {
  using S = HopperShape<E, Dim>;
  constexpr int Parts = Heads * ((Group + group_rows - 1) / group_rows);
  constexpr uint64_t hint = Chunk ? hopper::read_again : hopper::read_once;
  const Share share = share_of<Parts, Chunk>(rows, blockIdx.x, gridDim.x, S::row_tiles);
  __syncwarp();
  const uint32_t lane = threadIdx.x % 32;
  int newest = 0; // rows of the launch: no page that ends as many positions ahead of a row's own is written by it
  for (uint32_t i = 0; i < segments; ++i) newest += static_cast<int>(rows.heads[i].rows);

  bool waited = false;
  RingPlace<Chunk ? S::chunk_stages : S::stages> place(0);
  uint32_t unit = 0, unit_phase = 0, left = share.left, before = share.before, row = share.row, part = share.part;
  uint32_t begin = share.tile;
  while (left > 0) {
    const uint32_t together = rows.together(row);
    const int last = rows.position[row] + static_cast<int>(together) - 1, tiles = last / page_tokens + 1;
    const uint32_t all = static_cast<uint32_t>(tiles) + share.ahead, end = min(begin + left, all);
    const int tile = static_cast<int>(max(begin, share.ahead) - share.ahead), count = static_cast<int>(max(end, share.ahead) - share.ahead) - tile;
    const uint32_t first = before + share.ahead;
    left -= end - begin;
    before += all;
    begin = 0;
    const uint32_t own_row = row, own_part = part;
    if (++part == Parts) {
      part = 0;
      if (left > 0)
        while (rows.tiles(++row) == 0) {}
    }
    if (count == 0) continue;
    control.unit_empty[unit].wait(unit_phase ^ 1);
    if (lane == 0) {
      Unit &u = control.units[unit];
      u.row = static_cast<int32_t>(own_row);
      u.part = static_cast<int32_t>(own_part);
      u.first = tile;
      u.count = count;
      u.last_position = last + 1 - static_cast<int>(together);
      u.rows = static_cast<int32_t>(together);
      u.piece = static_cast<int32_t>(share.piece);
      u.pieces = u.helpers = static_cast<int32_t>(share.pieces);
      if (share.pieces == 0) { // the blocks of the unit's first and last tile
        const auto block_of = [&](uint32_t t) { return static_cast<uint32_t>((static_cast<uint64_t>(t + 1) * share.blocks - 1) / share.all); };
        const uint32_t end = first + static_cast<uint32_t>(tiles), from = block_of(first), to = block_of(end - 1);
        u.piece = static_cast<int32_t>(blockIdx.x - from);
        u.pieces = static_cast<int32_t>(to - from + 1);
        u.helpers = u.pieces - (part_of(share.all, to + 1, share.blocks) > end);
      }
      u.first_block = static_cast<int32_t>(blockIdx.x) - u.piece;
      control.unit_full[unit].arrive();
      if constexpr (From::rotated) hopper::prefetch(from_queries.template row<Dim>(last), Dim * 4);
    }
    if (waited && lane < together) {
      const int first_head = head_of<Group>(own_part), queries = min(group_rows, Group - first_head % Group);
      hopper::prefetch(from_queries.q + (static_cast<int64_t>(own_row + lane) * Heads * Group + first_head) * Dim, queries * Dim * 2);
    }
    if (++unit == units_ahead) unit = 0, unit_phase ^= 1;

    const int32_t *const ids = pages + static_cast<int64_t>(own_row) * pages_of_row;
    int32_t some = 0;
    for (int i = 0; i < count; ++i) {
      if (i % 32 == 0) some = i + static_cast<int>(lane) < count ? ids[tile + i + lane] : 0;
      const int32_t id = __shfl_sync(0xffffffffu, some, i % 32);
      if (!waited && (tile + i + 1) * page_tokens + newest > last + 1) {
        after_predecessor();
        waited = true;
      }
      control.empty[place.stage()].wait(place.lap() ^ 1);
      if (lane == 0) {
        hopper::Barrier &key_full = control.key_full[place.full], &value_full = control.value_full[place.full];
        const uint8_t *const from = pool + (static_cast<int64_t>(id) * Heads + own_part / (Parts / Heads)) * S::P::head;
        uint8_t *const to = ring + place.stage() * (2 * S::half), *const scales = ring + S::stages * (2 * S::half) + place.stage() * S::scales;
        key_full.expect(S::half + S::scales);
        hopper::bulk_copy(to, from, S::half, key_full, hint);
        if constexpr (S::codes) hopper::bulk_copy(scales, from + S::P::scales, S::scales, key_full, hint);
        if constexpr (Chunk) control.value_empty[place.stage()].wait(place.lap() ^ 1);
        value_full.expect(S::half);
        hopper::bulk_copy(to + S::half, from + S::half, S::half, value_full, hint);
      }
      __syncwarp();
      place.advance(1);
    }
  }
  control.unit_empty[unit].wait(unit_phase ^ 1);
  if (lane == 0) {
    control.units[unit].row = -1;
    control.units[unit].part = control.units[unit].last_position = 0;
    control.unit_full[unit].arrive();
  }
  after_predecessor();
}

// --- the warpgroups that compute ----------------------------------------------------------------------------------------------------

/// What turns eight elements of a head: with those of the other half of the head, which another thread of the warp has.
template <int Dim>
struct Rotation {
  float cosine[8], sine[8];
  __device__ __forceinline__ Rotation() {}
  __device__ __forceinline__ Rotation(const float *row, int piece) {
    const float4 *const from = reinterpret_cast<const float4 *>(row + piece % (Dim / 16) * 8);
    const float sign = piece < Dim / 16 ? -1.0f : 1.0f;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 c = from[j], s = from[Dim / 8 + j];
      cosine[4 * j] = c.x, cosine[4 * j + 1] = c.y, cosine[4 * j + 2] = c.z, cosine[4 * j + 3] = c.w;
      sine[4 * j] = sign * s.x, sine[4 * j + 1] = sign * s.y, sine[4 * j + 2] = sign * s.z, sine[4 * j + 3] = sign * s.w;
    }
  }
  __device__ __forceinline__ uint4 of(uint4 x) const {
    const uint32_t own[4] = {x.x, x.y, x.z, x.w};
    uint32_t y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, own[j], Dim / 16);
      const float low = __fadd_rn(__fmul_rn(as_float(own[j] << 16), cosine[2 * j]), __fmul_rn(as_float(other << 16), sine[2 * j]));
      const float high =
          __fadd_rn(__fmul_rn(as_float(own[j] & 0xffff0000u), cosine[2 * j + 1]), __fmul_rn(as_float(other & 0xffff0000u), sine[2 * j + 1]));
      y[j] = pack_bf16(low, high);
    }
    return uint4{y[0], y[1], y[2], y[3]};
  }
};
/// Nothing to turn.
struct NoRotation {
  __device__ __forceinline__ NoRotation() {}
  __device__ __forceinline__ NoRotation(const float *, int) {}
  __device__ __forceinline__ uint4 of(uint4 x) const { return x; }
};

/// The queries of a unit on their way: each thread of 256 has 16-byte pieces of some rows. Rows past `count` repeat the last.
/// `turn`: the row of the table that rotates them.
template <int Dim, class Turn>
struct QueryRows {
  static constexpr int in_row = Dim / 8, at_once = 256 / in_row, times = group_rows / at_once; // pieces of a row, rows
  uint4 x[times];
  Turn rotation;

  __device__ __forceinline__ QueryRows() {}
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / in_row; }
  static __device__ __forceinline__ int piece() { return static_cast<int>(threadIdx.x) % in_row; }

  __device__ __forceinline__ void load(const bf16 *q, int count, const float *turn) {
    rotation = Turn(turn, piece());
#pragma unroll
    for (int i = 0; i < times; ++i) x[i] = *reinterpret_cast<const uint4 *>(q + min(row() + i * at_once, count - 1) * Dim + piece() * 8);
  }
  /// Puts them into shared memory as keys lie in a page; as high and low codes with the scale of each row, times `scale`, for a cache of codes.
  template <class E>
  __device__ __forceinline__ void store(uint8_t *to, float *row_scale, float scale) const {
    constexpr int step = at_once * (sizeof(E) == 2 || Dim >= 128 ? 128 : 64); // what is exchanged within rows does not change from step to step
    uint8_t *const at = to + Page<E, Dim>::key(row(), piece() * 8);
    if constexpr (sizeof(E) == 2) {
#pragma unroll
      for (int i = 0; i < times; ++i) *reinterpret_cast<uint4 *>(at + i * step) = rotation.of(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < times; ++i) {
        const uint4 own = rotation.of(x[i]);
        const uint32_t words[4] = {own.x, own.y, own.z, own.w};
        uint32_t magnitude = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) magnitude = __vmaxu2(magnitude, words[j] & 0x7fff7fffu);
        magnitude = max(magnitude & 0xffffu, magnitude >> 16);
        if constexpr (in_row == 32) {
          magnitude = __reduce_max_sync(0xffffffffu, magnitude);
        } else {
#pragma unroll
          for (int lanes = in_row / 2; lanes > 0; lanes /= 2) magnitude = max(magnitude, __shfl_xor_sync(0xffffffffu, magnitude, lanes));
        }
        // the power of two that brings the largest to 128 .. 256
        const uint32_t exponent = max(magnitude >> 7, 16u);
        const float up = as_float((261u - exponent) << 23);
        uint32_t codes[2] = {}, rest[2] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const hopper::Codes c = hopper::Codes::of<false>(as_float(words[j] << 16) * up, as_float(words[j] & 0xffff0000u) * up);
          codes[j / 2] |= static_cast<uint32_t>(c.high) << j % 2 * 16;
          rest[j / 2] |= static_cast<uint32_t>(c.low) << j % 2 * 16;
        }
        *reinterpret_cast<uint2 *>(at + i * step) = uint2{codes[0], codes[1]};
        *reinterpret_cast<uint2 *>(at + i * step + group_rows * Dim) = uint2{rest[0], rest[1]};
        if (piece() == 0) row_scale[row() + i * at_once] = as_float((exponent - 7u) << 23) * scale;
      }
    }
  }
};
template <class From, int Dim>
using QueryRowsOf = QueryRows<Dim, std::conditional_t<From::rotated, Rotation<Dim>, NoRotation>>;

/// Starts to load the queries of a row's head and those after it.
template <class Rows, class From>
__device__ __forceinline__ void load_queries(Rows &rows, const From &from, int64_t at, int count, int position) {
  if constexpr (From::rotated) rows.load(from.q + at, count, from.template row<Rows::in_row * 8>(position));
  else rows.load(from.q + at, count, nullptr);
}

/// Scores of a tile against all queries, issued; Q and K as in a page. Low codes come first: sums are cut off after few bits.
template <class E, int Dim>
__device__ __forceinline__ void multiply_keys(float *s, uint32_t q, uint32_t k) {
  using namespace hopper;
  constexpr bool narrow = Dim * sizeof(E) == 64;
  const uint64_t a = matrix(same_in_warp(q), 16, narrow ? 512 : 1024, narrow ? Swizzle::b64 : Swizzle::b128);
  const uint64_t b = matrix(k, 16, narrow ? 512 : 1024, narrow ? Swizzle::b64 : Swizzle::b128);
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int i = 0; i < Dim / 16; ++i) scores_bf16(s, a + in_matrix(i / 4 * 8192 + i % 4 * 32), b + in_matrix(i / 4 * 8192 + i % 4 * 32), i == 0);
  } else {
#pragma unroll
    for (int part = 1; part >= 0; --part)
#pragma unroll
      for (int i = 0; i < Dim / 32; ++i)
        scores_codes(s, a + in_matrix(part * (group_rows * Dim) + i / 4 * 8192 + i % 4 * 32), b + in_matrix(i / 4 * 8192 + i % 4 * 32), part == 1 && i == 0);
  }
}

/// V of a tile as a matrix, of a stage whose shared address is `at`.
template <class E, int Dim>
__device__ __forceinline__ uint64_t values_at(uint32_t at) {
  using S = HopperShape<E, Dim>;
  return S::codes ? hopper::matrix(at + S::half, 16, 512, hopper::Swizzle::b64) : hopper::matrix(at + S::half, 8192, 1024, hopper::Swizzle::b128);
}
/// Weights of the softmax times V, issued: added to the sums.
template <int Dim>
__device__ __forceinline__ void multiply_values(float *sums, const uint32_t (&p)[16], uint64_t v) {
  using namespace hopper;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (Dim == 256) values_bf16_256(sums, p + 4 * i, v + in_matrix(i * 2048), false);
    else if constexpr (Dim == 128) values_bf16_128(sums, p + 4 * i, v + in_matrix(i * 2048), false);
    else values_bf16_64(sums, p + 4 * i, v + in_matrix(i * 2048), false);
  }
}
/// Weights as codes, as operands of products with 64 columns of V.
struct WeightCodes {
  uint32_t high[8], low[8];
  __device__ __forceinline__ void take(const float (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // operand i % 4 of tokens 32 (i / 4) on: row i % 2, tokens 16 (i / 2 % 2) + 8 (0, 1) + this thread's two
      const int from = i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
      const hopper::Codes a = hopper::Codes::of<true>(s[from], s[from + 1]), b = hopper::Codes::of<true>(s[from + 4], s[from + 5]);
      high[i] = a.high | static_cast<uint32_t>(b.high) << 16;
      low[i] = a.low | static_cast<uint32_t>(b.low) << 16;
    }
  }
  /// Sums of 64 columns, issued.
  __device__ __forceinline__ void multiply(float *t, uint64_t v, int block) const {
    using namespace hopper;
    product_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) values_low_64(t, low + 4 * i, v + in_matrix(block * 4096 + i * 32), i == 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) values_high_64(t, high + 4 * i, v + in_matrix(block * 4096 + i * 32), false);
    product_commit();
  }
};
/// Adds what came of 64 columns of a tile.
template <int Dim>
__device__ __forceinline__ void add_columns(Running<Dim> &r, float *t, int block, const float (&kept)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    hopper::pin(t[i]);
    r.sums[32 * block + i] = fmaf(r.sums[32 * block + i], kept[i / 2 % 2], t[i]);
  }
}
/// What the maximum of a row is raised by, so that weights times the scales of `count` tokens' V are at most 256.
__device__ __forceinline__ float above_maximum(const float *value_scales, int count) { return exponent_of_largest(value_scales, count) - 8.0f; }

/// This warp has no more use for a stage.
__device__ __forceinline__ void give_back(hopper::Barrier &empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) empty.arrive();
}

/// This warpgroup's tiles of a unit, of which the first is the unit's number `own`; `tile` counts the tiles before the unit. The stages of the
/// unit's last two tiles are left to its end.
template <class E, int Dim>
__device__ __forceinline__ void attend_plain_tiles(Running<Dim> &r, typename HopperShape<E, Dim>::Control &control, uint8_t *ring, const Unit &u, uint32_t tile,
                                             uint32_t own, uint32_t q, const float (&factor)[2], int thread) {
  using namespace hopper;
  using S = HopperShape<E, Dim>;
  RingPlace<S::stages> place(tile + own);
  for (int i = static_cast<int>(own); i < u.count; i += 2) {
    const uint32_t stage = place.stage(), k = same_in_warp(shared_address(ring + stage * (2 * S::half)));
    const int count = min(page_tokens, u.last_position + 1 - (u.first + i) * page_tokens);
    float s[32], kept[2];
    control.key_full[place.full].wait(place.phase);
    product_fence();
    multiply_keys<E, Dim>(s, q, k);
    product_commit();
    product_wait<0>();
#pragma unroll
    for (int j = 0; j < 32; ++j) pin(s[j]);
    if (count < page_tokens) leave_out(s, count, thread);
    const bool moved = soften(r, s, factor, 0.0f, kept);
    if (count < page_tokens) {
      control.value_full[place.full].wait(place.phase);
      clear_values<E, Dim>(ring + stage * (2 * S::half) + S::half, nullptr, count, thread);
      fence_async();
      meet(2 + threadIdx.x / 128, 128);
    }
    uint32_t p[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) p[j] = pack_bf16(s[2 * j], s[2 * j + 1]);
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int j = 0; j < Dim / 2; ++j) r.sums[j] *= kept[j / 2 % 2];
    }
    control.value_full[place.full].wait(place.phase);
    product_fence();
    multiply_values<Dim>(r.sums, p, values_at<E, Dim>(k));
    product_commit();
    product_wait<0>();
#pragma unroll
    for (int j = 0; j < Dim / 2; ++j) pin(r.sums[j]);
    if (i < u.count - 2) give_back(control.empty[stage]);
    place.advance(2);
  }
}

/// The turns in which the two warpgroups keep the matrix units busy, one while the other one's threads compute: they go by the number of the tile.
struct Turns {
  static constexpr uint32_t first = 4; // number of the barrier of the first warpgroup
  static __device__ __forceinline__ void give() { asm volatile("bar.arrive %0, 256;" ::"r"(first + 1 - threadIdx.x / 128) : "memory"); }
  static __device__ __forceinline__ void take() { hopper::meet(first + threadIdx.x / 128, 256); }
};

/// The same for codes. A turn is the products of a tile's values and of the keys of the next one; the keys of the last tile are multiplied once
/// more, because the compiler would wait for products on their way around a branch.
template <class E, int Dim>
__device__ __forceinline__ void attend_coded_tiles(Running<Dim> &r, typename HopperShape<E, Dim>::Control &control, uint8_t *ring, const Unit &u, uint32_t tile,
                                                   uint32_t own, uint32_t q, const float (&factor)[2], int thread) {
  using namespace hopper;
  using S = HopperShape<E, Dim>;
  constexpr int blocks = Dim / 64; // of 64 columns
  RingPlace<S::stages> place(tile + own);
  const auto stage_at = [&] { return same_in_warp(shared_address(ring + place.stage() * (2 * S::half))); };
  float s[32], other[32];
  const auto begin_scores = [&] {
    control.key_full[place.full].wait(place.phase);
    product_fence();
    multiply_keys<E, Dim>(s, q, stage_at());
    product_commit();
  };
  const int tiles = static_cast<int>(same_in_warp((static_cast<uint32_t>(u.count) + 1 - own) / 2));
  if (tiles > 0) begin_scores();
  for (int left = tiles, i = static_cast<int>(own); left > 0; --left, i += 2) {
    const uint32_t stage = place.stage();
    const uint64_t v = values_at<E, Dim>(stage_at());
    float *const scales = reinterpret_cast<float *>(ring + S::stages * (2 * S::half) + stage * S::scales);
    const int count = min(page_tokens, u.last_position + 1 - (u.first + i) * page_tokens);
    float kept[2];
    const float above = above_maximum(scales + page_tokens, count);
    product_wait<0>();
#pragma unroll
    for (int j = 0; j < 32; ++j) pin(s[j]);
    scale_scores(s, scales, thread);
    if (count < page_tokens) leave_out(s, count, thread);
    soften(r, s, factor, above, kept);
    if (count < page_tokens) {
      control.value_full[place.full].wait(place.phase);
      clear_values<E, Dim>(ring + stage * (2 * S::half) + S::half, scales + page_tokens, count, thread);
      fence_async();
      meet(2 + threadIdx.x / 128, 128);
    }
    WeightCodes weights;
    scale_scores(s, scales + page_tokens, thread);
    weights.take(s);
    control.value_full[place.full].wait(place.phase);
    Turns::take();
    // sums of 64 columns at a time, of which the threads add one lot while the next is multiplied; the last is not where the scores will be
    weights.multiply(blocks % 2 ? other : s, v, 0);
#pragma unroll
    for (int block = 0; block < blocks - 1; ++block) {
      weights.multiply((blocks - block) % 2 ? s : other, v, block + 1);
      product_wait<1>();
      add_columns(r, (blocks - block) % 2 ? other : s, block, kept);
    }
    if (left > 1) place.advance(2);
    begin_scores();
    Turns::give();
    product_wait<1>();
    if (i < u.count - 2) give_back(control.empty[stage]);
    add_columns(r, other, blocks - 1, kept);
  }
  product_wait<0>();
}

/// How far the pieces of a unit are, in one word that begins and ends as 0.
namespace progress {
constexpr uint32_t arrived = 1, gone = 1 << 10, given_up = 1 << 20;
__device__ __forceinline__ uint32_t arrivals(uint32_t word) { return word % gone; }
__device__ __forceinline__ uint32_t departures(uint32_t word) { return word / gone % gone; }
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
}  // namespace progress

/// Number of a piece in scratch: a block leaves at most two, the end of one unit and the begin of another.
__device__ __forceinline__ int slot_of(const Unit &u, int piece) { return (u.first_block + piece) * 2 + (piece == 0); }

/// Which fours of sums a block adds up: none, its own share, or all.
constexpr uint32_t adds_none = 0, adds_share = 1, adds_all = 2;

/// Whether all other pieces have arrived and none of their blocks waits.
__device__ __forceinline__ bool is_last(const Unit &u, uint32_t word) {
  const uint32_t others = static_cast<uint32_t>(u.pieces) - 1;
  return progress::arrivals(word) == others && progress::departures(word) == others;
}

/// Announces a piece whose sums are in scratch. The last blocks of a row to arrive are about to end: they wait a while for all others.
/// One that has waited in vain leaves, and the last one to arrive then adds up everything.
__device__ __forceinline__ uint32_t arrive(const Unit &u, uint32_t *word) {
  using namespace progress;
  const uint32_t pieces = static_cast<uint32_t>(u.pieces);
  const bool helps = u.piece < u.helpers;
  uint32_t before = add(word, helps ? arrived : arrived + gone), adds = adds_none;
  if (arrivals(before) == pieces - 1) {
    adds = before >= given_up ? adds_all : helps ? adds_share : adds_none;
    if (helps) before = add(word, gone);
  } else if (helps) {
    const int64_t start = clock64();
    bool all;
    do all = arrivals(read(word)) == pieces;
    while (!all && clock64() - start < 50000); // some 30 us
    before = add(word, all ? gone : gone + given_up);
    adds = arrivals(before) == pieces ? adds_share : adds_none;
  }
  if (departures(before) == pieces - 1) *word = 0;
  return adds;
}

/// What a thread has of a unit that both warpgroups have put together: the half of the columns that is its warpgroup's, of the same rows.
template <int Dim>
struct Merged {
  static constexpr int fours = Dim / 16;
  float4 sums[fours];
  float maximum[2], total[2]; // of a row

  /// Adds the warpgroups' sums: each puts what is the other's half into the stage of its last tile.
  __device__ __forceinline__ Merged(const Running<Dim> &r, float2 (&state)[2][group_rows], bool has_part, uint8_t *own_stage, const uint8_t *other_stage) {
    const int thread = static_cast<int>(threadIdx.x % 128), group = static_cast<int>(threadIdx.x / 128), row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] = r.total[i] + __shfl_xor_sync(0xffffffffu, r.total[i], 1);
      total[i] += __shfl_xor_sync(0xffffffffu, total[i], 2);
      if (thread % 4 == 0) state[group][row + 8 * i] = float2{r.maximum[i], total[i]};
    }
    hopper::meet(2 + group, 128); // no warp multiplies the stage any more, or reads what lay there
    if (has_part) {
#pragma unroll
      for (int i = 0; i < fours; ++i)
        reinterpret_cast<float4 *>(own_stage)[i * 128 + thread] = group == 0 ? four(r, fours + i) : four(r, i);
    }
    hopper::meet(1, 256);
    float own[2], others[2]; // what the sums are multiplied by
#pragma unroll
    for (int i = 0; i < 2; ++i) { // the same bits whichever of the two this is
      const float2 other = state[1 - group][row + 8 * i];
      maximum[i] = fmaxf(r.maximum[i], other.x);
      own[i] = power_of_two(r.maximum[i] - maximum[i]);
      others[i] = power_of_two(other.x - maximum[i]);
      total[i] = __fadd_rn(__fmul_rn(total[i], own[i]), __fmul_rn(other.y, others[i]));
    }
#pragma unroll
    for (int i = 0; i < fours; ++i) {
      const float4 a = group == 0 ? four(r, i) : four(r, fours + i), b = reinterpret_cast<const float4 *>(other_stage)[i * 128 + thread];
      sums[i].x = __fadd_rn(__fmul_rn(a.x, own[0]), __fmul_rn(b.x, others[0])), sums[i].y = __fadd_rn(__fmul_rn(a.y, own[0]), __fmul_rn(b.y, others[0]));
      sums[i].z = __fadd_rn(__fmul_rn(a.z, own[1]), __fmul_rn(b.z, others[1])), sums[i].w = __fadd_rn(__fmul_rn(a.w, own[1]), __fmul_rn(b.w, others[1]));
    }
  }
  static __device__ __forceinline__ float4 four(const Running<Dim> &r, int i) { return float4{r.sums[4 * i], r.sums[4 * i + 1], r.sums[4 * i + 2], r.sums[4 * i + 3]}; }

  /// Number of a four in a piece, without the thread's.
  static __device__ __forceinline__ int at(int i) { return (static_cast<int>(threadIdx.x / 128) * fours + i) * 128; }

  /// Leaves this piece in scratch.
  __device__ __forceinline__ void leave(uint8_t *piece) const {
    const int thread = static_cast<int>(threadIdx.x % 128), row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < fours; ++i) __stcg(reinterpret_cast<float4 *>(piece) + at(i) + thread, sums[i]);
    if (threadIdx.x / 128 == 0 && thread % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) __stcg(reinterpret_cast<float2 *>(piece + group_rows * Dim * 4) + row + 8 * i, float2{maximum[i], total[i]});
    }
  }

  /// Adds up all `count` pieces of a unit, of which this is number `own` and the others are in scratch: the same bits as add_pieces.
  template <class Slot>
  __device__ __forceinline__ void add(Slot slot_of, int own, int count, const uint8_t *scratch) {
    const int thread = static_cast<int>(threadIdx.x % 128), row = thread / 32 * 16 + thread % 32 / 4;
    float4 sum[fours] = {};
    float most[2] = {-infinity, -infinity}, all[2] = {};
#pragma unroll 1
    for (int p = 0; p < count; ++p) {
      const uint8_t *const piece = scratch + static_cast<int64_t>(slot_of(p)) * partial_bytes<Dim>;
      const float2 *const state = reinterpret_cast<const float2 *>(piece + group_rows * Dim * 4);
      float2 of[2] = {{maximum[0], total[0]}, {maximum[1], total[1]}};
      float4 x[fours];
      if (p != own) {
        of[0] = __ldcg(state + row), of[1] = __ldcg(state + row + 8);
#pragma unroll
        for (int i = 0; i < fours; ++i) x[i] = __ldcg(reinterpret_cast<const float4 *>(piece) + at(i) + thread);
      } else {
#pragma unroll
        for (int i = 0; i < fours; ++i) x[i] = sums[i];
      }
      float kept[2], taken[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float now = fmaxf(most[i], of[i].x);
        kept[i] = power_of_two(most[i] - now), taken[i] = power_of_two(of[i].x - now);
        most[i] = now;
        all[i] = fmaf(all[i], kept[i], of[i].y * taken[i]);
      }
#pragma unroll
      for (int i = 0; i < fours; ++i) {
        sum[i].x = fmaf(sum[i].x, kept[0], x[i].x * taken[0]), sum[i].y = fmaf(sum[i].y, kept[0], x[i].y * taken[0]);
        sum[i].z = fmaf(sum[i].z, kept[1], x[i].z * taken[1]), sum[i].w = fmaf(sum[i].w, kept[1], x[i].w * taken[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < fours; ++i) sums[i] = sum[i];
    total[0] = all[0], total[1] = all[1];
  }

  /// Results in bf16: of four `i`, columns 2 (0, 1) of the first row in the first word, of the second in the second.
  __device__ __forceinline__ uint2 result(int i, const float (&norm)[2]) const {
    return uint2{pack_bf16(sums[i].x * norm[0], sums[i].y * norm[0]), pack_bf16(sums[i].z * norm[1], sums[i].w * norm[1])};
  }
};

/// Four words of two columns each, of four threads that have columns side by side and of four blocks of 8 columns, so that each thread has one
/// block; all of 16 bits.
__device__ __forceinline__ uint2 gather_block(uint32_t first_two, uint32_t second_two) {
  const bool odd = threadIdx.x % 2, upper = threadIdx.x % 4 / 2;
  // with the neighbour: blocks 0 and 2, or 1 and 3
  const uint32_t given = __shfl_xor_sync(0xffffffffu, __byte_perm(first_two, second_two, odd ? 0x5410 : 0x7632), 1);
  const uint32_t kept = __byte_perm(first_two, second_two, odd ? 0x7632 : 0x5410);
  const uint32_t low = odd ? __byte_perm(given, kept, 0x5410) : __byte_perm(kept, given, 0x5410), high = odd ? __byte_perm(given, kept, 0x7632) : __byte_perm(kept, given, 0x7632);
  const uint32_t others = __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
  return upper ? uint2{others, high} : uint2{low, others};
}

/// Quantises the results of a row of a unit, which lie in shared memory as keys in a page: a warp of some for each group of columns.
template <int Dim, int Warps>
__device__ __forceinline__ void quantise_row(const uint8_t *results, int rows, const QuantisedResults &to, int64_t at) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 2
  for (int group = static_cast<int>(threadIdx.x / 32 % Warps); group < rows * Dim / result_group; group += Warps) {
    const int first = group * result_group + lane * 4;
    const uint2 x = *reinterpret_cast<const uint2 *>(results + Page<bf16, Dim>::key(first / Dim, first % Dim));
    const float scale = scale_of_group(max(largest_of(x.x), largest_of(x.y)));
    const Divisor by(scale);
    *reinterpret_cast<uint32_t *>(to.codes + at + first) = codes_of(x.x, by) | static_cast<uint32_t>(codes_of(x.y, by)) << 16;
    if (lane == 0) to.scales[at / result_group + group] = scale;
  }
}

/// Writes the results of a unit of `rows` heads. Where a warpgroup has not the whole of a group of columns, they go where the queries were first.
template <int Dim, class To>
__device__ __forceinline__ void write(const Merged<Dim> &merged, uint8_t *queries, const To &to, int64_t at, int rows) {
  const int thread = static_cast<int>(threadIdx.x % 128), row = thread / 32 * 16 + thread % 32 / 4, first = static_cast<int>(threadIdx.x / 128) * (Dim / 2);
  const float norm[2] = {1.0f / merged.total[0], 1.0f / merged.total[1]};
  constexpr int fours = Merged<Dim>::fours;
  if constexpr (!To::quantised) {
#pragma unroll
    for (int i = 0; i < fours; ++i) write_result(to.out + at, Dim, row, first + i * 8 + thread % 4 * 2, rows, merged.sums[i], norm[0], norm[1]);
  } else if constexpr (Dim / 2 != result_group) {
#pragma unroll
    for (int i = 0; i < fours; ++i) {
      const uint2 x = merged.result(i, norm);
      *reinterpret_cast<uint32_t *>(queries + Page<bf16, Dim>::key(row, first + i * 8 + thread % 4 * 2)) = x.x;
      *reinterpret_cast<uint32_t *>(queries + Page<bf16, Dim>::key(row + 8, first + i * 8 + thread % 4 * 2)) = x.y;
    }
    hopper::meet(1, 256);
    quantise_row<Dim, 8>(queries, rows, to, at);
  } else {
    uint32_t magnitude[2] = {};
    uint2 x[fours];
#pragma unroll
    for (int i = 0; i < fours; ++i) {
      x[i] = merged.result(i, norm);
      magnitude[0] = max(magnitude[0], largest_of(x[i].x)), magnitude[1] = max(magnitude[1], largest_of(x[i].y));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      magnitude[j] = max(magnitude[j], __shfl_xor_sync(0xffffffffu, magnitude[j], 1));
      magnitude[j] = max(magnitude[j], __shfl_xor_sync(0xffffffffu, magnitude[j], 2));
      const float scale = scale_of(magnitude[j]);
      const Divisor by(scale);
      const bool there = row + 8 * j < rows;
      const int64_t from = at + (row + 8 * j) * Dim + first;
      if (there && thread % 4 == 0) to.scales[from / result_group] = scale;
#pragma unroll
      for (int i = 0; i < fours; i += 4) {
        const auto codes = [&](int k) { return static_cast<uint32_t>(codes_of(j == 0 ? x[i + k].x : x[i + k].y, by)); };
        const uint2 block = gather_block(codes(0) | codes(1) << 16, codes(2) | codes(3) << 16);
        if (there) *reinterpret_cast<uint2 *>(to.codes + from + (i + thread % 4) * 8) = block;
      }
    }
  }
}

/// Two groups of columns of a unit are 64 fours, of rows eight apart: of one head, or of two neighbours where heads are narrow.
template <int Dim>
constexpr int group_pairs = group_rows * Dim / result_group / 2;

/// Adds up and quantises pairs of groups [from, to) of all `count` pieces of a unit: a warp for each.
template <int Dim, class Slot>
__device__ __forceinline__ void add_up_quantised(Slot slot_of, int count, const uint8_t *scratch, const QuantisedResults &results, int64_t at, int rows, int from, int to) {
  constexpr int threads = Dim < result_group ? 4 * result_group / Dim : 4, blocks = 64 / threads; // of a warpgroup, and of 8 columns, in a pair
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int pair = from + static_cast<int>(threadIdx.x / 32); pair < to; pair += 8) {
    const int thread = pair % (128 / threads) * threads + lane % threads, block = pair / (128 / threads) * blocks + lane / threads;
    const int row = thread / 32 * 16 + thread % 32 / 4;
    const int four[2] = {block * 128 + thread, (block + blocks / 2) * 128 + thread};
    const Added<2> x = add_pieces<Dim>(slot_of, count, scratch, row, four);
    uint32_t two[2][2]; // by row
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      two[0][i] = pack_bf16(x.sum[i].x * x.norm[0], x.sum[i].y * x.norm[0]);
      two[1][i] = pack_bf16(x.sum[i].z * x.norm[1], x.sum[i].w * x.norm[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = scale_of_group(max(largest_of(two[i][0]), largest_of(two[i][1])));
      const Divisor by(scale);
      if (row + 8 * i < rows) {
        const int64_t first = at + (row + 8 * i) * Dim + block * 8 + thread % 4 * 2;
#pragma unroll
        for (int j = 0; j < 2; ++j) *reinterpret_cast<uint16_t *>(results.codes + first + j * (blocks / 2) * 8) = codes_of(two[i][j], by);
        if (lane == 0) results.scales[first / result_group] = scale;
      }
    }
  }
}

template <class E, int Heads, int Group, int Dim, class From, class To>
__device__ __forceinline__ void compute(typename HopperShape<E, Dim>::Control &control, uint8_t *queries, uint8_t *ring, const From &from_queries, float scale,
                                        const To &to_results, uint8_t *scratch, uint32_t *counters) {
  using S = HopperShape<E, Dim>;
  const int thread = static_cast<int>(threadIdx.x % 128), group = static_cast<int>(threadIdx.x / 128), row = thread / 32 * 16 + thread % 32 / 4;
  const float to_powers = scale * 1.44269504f; // e^x = 2^(x log2 e)
  Running<Dim> r;
  uint32_t tile = 0, unit = 0, unit_phase = 0;
  QueryRowsOf<From, Dim> rows;
  const auto first_head = [&](const Unit &u) { return head_of<Group>(u.part); };
  const auto heads_of = [&](const Unit &u) { return min(group_rows, Group - first_head(u) % Group); };
  const auto place_of = [&](const Unit &u) { return (static_cast<int64_t>(u.row) * Heads * Group + first_head(u)) * Dim; };
  const auto begin_unit = [&] {
    control.unit_full[unit].wait(unit_phase);
    Unit u = control.units[unit];
    u.row = max(u.row, 0); // the last one's are not used, but else the values before would be kept for it
    load_queries(rows, from_queries, place_of(u), heads_of(u), u.last_position);
  };
  if (S::codes && group == 1) Turns::give();
  after_predecessor();
  begin_unit();
  for (;;) {
    const Unit &u = control.units[unit];
    if (u.row < 0) return;
    hopper::meet(1, 256); // nobody reads the unit before and its queries any more
    if (thread == 0 && tile > 0) control.unit_empty[(unit + units_ahead - 1) % units_ahead].arrive();
    if (++unit == units_ahead) unit = 0, unit_phase ^= 1;

    const int heads = heads_of(u);
    const int64_t at = place_of(u);
    rows.template store<E>(queries, control.row_scale, to_powers);
    hopper::fence_async();
    hopper::meet(1, 256);
    float factor[2] = {to_powers, to_powers};
    if constexpr (S::codes) factor[0] = control.row_scale[row], factor[1] = control.row_scale[row + 8];

#pragma unroll
    for (int i = 0; i < Dim / 2; ++i) r.sums[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) r.maximum[i] = -infinity, r.total[i] = 0.0f;

    const uint32_t own = (tile ^ static_cast<uint32_t>(group)) % 2; // the first tile of this warpgroup
    if constexpr (S::codes) attend_coded_tiles<E, Dim>(r, control, ring, u, tile, own, hopper::shared_address(queries), factor, thread);
    else attend_plain_tiles<E, Dim>(r, control, ring, u, tile, own, hopper::shared_address(queries), factor, thread);
    tile += static_cast<uint32_t>(u.count);
    const uint32_t last_stage = RingPlace<S::stages>(tile - 1).stage(), stage_before = u.count == 1 ? last_stage : RingPlace<S::stages>(tile - 2).stage();
    const uint32_t even_stage = tile % 2 == 1 ? last_stage : stage_before, odd_stage = tile % 2 == 1 ? stage_before : last_stage;
    const bool has_part = u.count > 1 || (tile - 1) % 2 == static_cast<uint32_t>(group);
    // the last piece to arrive adds up all of them when nobody waits
    uint32_t *const word = counters + u.first_block;
    const bool whole = u.pieces == 1;
    if (threadIdx.x == 0) control.told = !whole && is_last(u, progress::read(word));
    uint8_t *const own_stage = ring + (group == 0 ? even_stage : odd_stage) * (2 * S::half), *const other_stage = ring + (group == 0 ? odd_stage : even_stage) * (2 * S::half);
    Merged<Dim> merged(r, control.state, has_part, own_stage, other_stage);
    const bool last = control.told;
    const auto slot = [&](int p) { return slot_of(u, p); };
    if (!whole && !last) {
      merged.leave(scratch + static_cast<int64_t>(slot(u.piece)) * partial_bytes<Dim>);
      __threadfence();
    }
    hopper::fence_async();
    hopper::meet(1, 256);
    if (has_part && thread % 32 == 0) control.empty[group == 0 ? even_stage : odd_stage].arrive();
    if (last) {
      if (threadIdx.x == 0) *word = 0;
      merged.add(slot, u.piece, u.pieces, scratch);
    }
    begin_unit(); // queries of the next one come while results of this one are written
    if (whole || last) {
      write(merged, queries, to_results, at, heads);
      continue;
    }
    if (threadIdx.x == 0) control.told = arrive(u, word);
    hopper::meet(1, 256);
    const uint32_t adds = control.told;
    if (adds == adds_none) continue;
    constexpr int all = To::quantised ? group_pairs<Dim> : Dim / 8 * 128;
    const int from = adds == adds_all ? 0 : static_cast<int>(part_of(all, u.piece, u.helpers)), to = adds == adds_all ? all : static_cast<int>(part_of(all, u.piece + 1, u.helpers));
    if constexpr (To::quantised) add_up_quantised<Dim>(slot, u.pieces, scratch, to_results, at, heads, from, to);
    else add_up<Dim, 256>(slot, u.pieces, scratch, to_results.out + at, heads, from, to);
  }
}

}  // namespace s3
