// Contractions by the matrix units that all processors from Ampere on have: products of a warp over weights packed as layout.ts packs them.
//
// A block takes tiles of 128 columns of the result by up to 128 rows, one after the other. Its threads bring lines of 128 bytes of both through a
// ring in shared memory by asynchronous copies, running ahead into the next tile; eight warps multiply, of many rows 64 by 32 of a tile each, of
// few all rows by 16. Where there are fewer tiles than processors, blocks share the sum over k, and the last one to arrive adds up what they left
// in scratch, in the order of k; how k is cut depends on sizes and the processor, never on the number of rows there are. There are no units for
// e4m3: codes become f16 on the way to registers. Rows are taken where they lie; those of experts are first gathered (pack_rows.cuh).
#pragma once
#include "matrix_units.cuh"
#include "pack_rows.cuh"

namespace s3::ampere {

/// Types of operands: `products` products for 32 bytes of a line of columns, of which `columns` makes the operand of number n.
struct Bf16 {
  using Sum = float;
  static constexpr int values = 64, products = 1, warps = 4, most_rows = 128; // of a block, of a tile
  static constexpr bool step_scales = false, row_scales = false; // scales of each line, or of whole rows and columns
  static __device__ __forceinline__ void columns(const uint32_t *raw, int, uint32_t (&b)[2]) { b[0] = raw[0], b[1] = raw[1]; }
  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { warp::multiply<false>(d, a, b[0], b[1]); }
};
struct Int8 {
  using Sum = int32_t;
  static constexpr int values = 128, products = 1, warps = 4, most_rows = 128;
  static constexpr bool step_scales = false, row_scales = true;
  static __device__ __forceinline__ void columns(const uint32_t *raw, int, uint32_t (&b)[2]) { b[0] = raw[0], b[1] = raw[1]; }
  static __device__ __forceinline__ void product(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
/// As f16, and only 1 / 256 of each code, which shifts bits. Of 16 codes of a line, a product has those of even number first.
struct E4m3 {
  using Sum = float;
  static constexpr int values = 128, products = 2, warps = 8, most_rows = 64; // more rows need too many registers
  static constexpr bool step_scales = true, row_scales = false;
  static constexpr float unit = 65536.0f; // of products
  static __device__ __forceinline__ uint32_t even(uint32_t codes) { return (codes << 8 & 0x80008000u) | (codes << 7 & 0x3f803f80u); }
  static __device__ __forceinline__ uint32_t odd(uint32_t codes) { return (codes & 0x80008000u) | (codes >> 1 & 0x3f803f80u); }
  static __device__ __forceinline__ void columns(const uint32_t *raw, int n, uint32_t (&b)[2]) { b[0] = even(raw[n]), b[1] = odd(raw[n]); }
  static __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { warp::multiply<true>(d, a, b[0], b[1]); }
};

constexpr int line_bytes = 128, tile_columns = 128, tile_bytes = tile_columns * line_bytes;
constexpr int most_stages = 6;
constexpr uint32_t most_sharing = 264;           // blocks that leave sums in scratch: linear.ts has room for 64 KiB of each
constexpr int row_group = 16;                    // tiles of rows that meet all columns before others do
template <class O, int Most>
constexpr int widened_bytes = O::products == 2 ? Most * 2 * line_bytes : 0; // rows of a line as f16
template <class O, int Most>
constexpr int stage_bytes = tile_bytes + Most * line_bytes + (O::step_scales ? 4 * Most + 16 : 0); // scales of rows, and that of the columns

struct Problem {
  const uint8_t *w;
  const uint8_t *x; // rows as they are, or null: rows are what was packed
  const s3_head *heads; // of each segment of them
  int32_t heads_rows, distance;
  int64_t row_bytes;
  const float *xs, *ws;
  Packed packed;
  int32_t columns, tiles, steps; // columns of the result, blocks of 128 of them, lines along k
  int32_t groups;                // of rows: by matrix, or by segment
  uint32_t parts, stages;        // blocks that share k
  bool zeros;                    // rows that meet no matrix get results of zeros
  uint8_t *partials;
  uint32_t *counters;
};

/// A tile of work: rows of one matrix against a block of columns, and the part of k.
struct Item {
  int32_t matrix, tile, row, end; // rows `row` to `end`
  uint32_t number, part;          // number: of all tiles
};

/// Items of a block in order: groups of rows, some tiles of these, blocks of columns, tiles of rows, parts of k.
template <int Most>
class Items {
  const Group *groups;
  int32_t count, tiles, group = 0;
  bool direct;
  uint32_t parts, index, before = 0;

 public:
  __device__ Items(const Problem &p, const Group *in) : groups(in), count(p.groups), tiles(p.tiles), direct(p.x != nullptr), parts(p.parts), index(blockIdx.x) {}
  __device__ bool next(Item &item) {
    for (; group < count; ++group) {
      const Group g = groups[group];
      const int32_t row_tiles = (g.count + Most - 1) / Most;
      const uint32_t items = static_cast<uint32_t>(row_tiles * tiles) * parts;
      if (index < before + items) {
        const int32_t number = static_cast<int32_t>((index - before) / parts), together = number / (row_group * tiles), local = number - together * row_group * tiles;
        const int32_t in_group = min(row_group, row_tiles - together * row_group);
        const int32_t each = ((g.count + row_tiles - 1) / row_tiles + 15) / 16 * 16, first = (together * row_group + local % in_group) * each;
        item = {direct ? 0 : group, local / in_group, g.base + first, g.base + min(first + each, g.count), index / parts, (index - before) % parts};
        index += gridDim.x;
        return true;
      }
      before += items;
    }
    return false;
  }
};

/// Copies `Bytes` (4 or 16), or zeros when `there` is false.
template <int Bytes>
__device__ __forceinline__ void copy_or_zero(uint32_t to, const void *from, bool there) {
  if constexpr (Bytes == 16) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

/// What brings lines: runs ahead of what multiplies them. A thread brings the same piece of every so many rows.
template <class O, int Most>
struct Fetcher {
  const Problem &p;
  Items<Most> items;
  uint32_t ring, stage = 0;
  Item item{};
  uint32_t left = 0; // lines
  const uint8_t *w = nullptr, *x = nullptr;
  const float *ws = nullptr, *xs = nullptr;
  int64_t bytes = 0; // of the row from here on

  /// Brings the next line of both operands, if there is one, to the next stage.
  __device__ __forceinline__ void next() {
    constexpr int threads = 32 * O::warps, in_step = threads / 8;
    const int thread = static_cast<int>(threadIdx.x), row = thread / 8, piece = thread % 8;
    const bool direct = p.x != nullptr;
    if (left == 0) {
      if (!items.next(item)) return warp::commit();
      const uint32_t step = p.steps * item.part / p.parts;
      left = p.steps * (item.part + 1) / p.parts - step;
      const int64_t tile = int64_t{item.matrix} * p.tiles + item.tile;
      w = p.w + (tile * p.steps + step) * tile_bytes + thread * 16;
      bytes = direct ? p.row_bytes - int64_t{step} * line_bytes - piece * 16 : INT64_MAX;
      x = direct ? p.x + (item.row + row) * p.row_bytes + int64_t{step} * line_bytes + piece * 16 : p.packed.lines + (step * p.packed.places + item.row) * line_bytes + thread * 16;
      if constexpr (O::step_scales) {
        ws = p.ws + tile * p.steps + step;
        xs = direct ? p.xs + int64_t{item.row + thread} * p.steps + step : p.packed.scales + step * p.packed.places + item.row + thread;
      }
    }
    const uint32_t to = ring + stage * stage_bytes<O, Most>;
    const int count = item.end - item.row;
#pragma unroll
    for (int i = 0; i < tile_bytes / 16 / threads; ++i) copy_or_zero<16>(to + (i * threads + thread) * 16, w + i * threads * 16, true);
    const int64_t next_rows = direct ? in_step * p.row_bytes : in_step * line_bytes;
    const uint32_t place = to + tile_bytes + row * line_bytes + (direct ? piece ^ (row & 7) : piece) * 16;
#pragma unroll
    for (int i = 0; i < Most / in_step; ++i) {
      const int first = i * in_step; // past the rows, to a multiple of this, there are zeros
      if (first >= count) break;
      const bool there = first + row < count && bytes > 0;
      copy_or_zero<16>(place + first * line_bytes, there ? x + i * next_rows : p.w, there);
    }
    if constexpr (O::step_scales) {
      const uint32_t scales = to + tile_bytes + Most * line_bytes;
      if (thread < Most) copy_or_zero<4>(scales + thread * 4, thread < count ? xs : p.ws, thread < count);
      else if (thread == Most) copy_or_zero<4>(scales + 4 * Most, ws, true);
      xs += direct ? 1 : p.packed.places;
      ++ws;
    }
    warp::commit();
    w += tile_bytes;
    x += direct ? line_bytes : p.packed.places * line_bytes;
    bytes -= direct ? line_bytes : 0;
    --left;
    if (++stage == p.stages) stage = 0;
  }
};

/// What multiplies. Of a pair of 16-row blocks and 16-column blocks, a thread has rows lane / 4 and that + 8, and columns 4 (lane % 4) .. + 3.
template <class O, int Most, class Finish>
struct Multiplier {
  using Sum = typename O::Sum;
  const Problem &p;
  const Finish &finish;
  Fetcher<O, Most> &fetcher;
  uint8_t *memory;
  uint32_t ring, &told;
  uint32_t stage = 0;

  template <int Rows>
  __device__ __forceinline__ void item(const Item &item) {
    constexpr int across = Rows >= 64 ? 2 : 1, row_blocks = Rows / 16 / across, column_blocks = 8 * across / O::warps; // warps along the rows, and 16s of each
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int first_row = warp % across * (16 * row_blocks), first_column = warp / across * (16 * column_blocks);
    Sum sums[row_blocks][column_blocks][2][4]; // of eight columns each: rows lane / 4 and that + 8, two columns each
#pragma unroll
    for (int i = 0; i < row_blocks * column_blocks * 8; ++i) (&sums[0][0][0][0])[i] = 0;

    // the columns of an eight are chosen so that a thread gets four neighbours of both, and no two lie in the same banks
    const int half = lane / 16, quarter = lane % 8 / 2, column = 4 * quarter + 2 * (half ^ quarter / 2) + lane % 2;
    constexpr int row_bytes = O::products * line_bytes, widths = 4 * O::products; // of rows as they are multiplied
    const uint32_t a_place = (first_row + lane % 16) * row_bytes + ((lane / 16 ^ lane % 8) << 4);
    const uint32_t b_place = (first_column + column) * line_bytes + ((lane / 8 % 2 ^ column % 8) << 4);
    const uint32_t steps = p.steps * (item.part + 1) / p.parts - p.steps * item.part / p.parts;
    for (uint32_t step = 0; step < steps; ++step) {
      wait_for_line();
      __syncthreads(); // the line is there, and the stage of the line before is read
      if constexpr (O::products == 2) widen_rows<Rows>();
      fetcher.next();
      if constexpr (O::products == 2) __syncthreads();
      const uint32_t lines = ring + stage * stage_bytes<O, Most>, rows = O::products == 2 ? ring + p.stages * stage_bytes<O, Most> : lines + tile_bytes;
      Sum products[O::step_scales ? row_blocks : 1][O::step_scales ? column_blocks : 1][2][4] = {};
      uint32_t a[2][row_blocks][4], b[2][column_blocks][4]; // of this product and the next
      const auto load_rows = [&](int k) {
#pragma unroll
        for (int i = 0; i < row_blocks; ++i) load(a[k % 2][i], rows + (a_place ^ k << 5) + i * 16 * row_bytes);
      };
      const auto load_columns = [&](int k) {
#pragma unroll
        for (int j = 0; j < column_blocks; ++j) load(b[k % 2][j], lines + (b_place ^ k << 5) + j * 16 * line_bytes);
      };
      load_columns(0);
      load_rows(0);
#pragma unroll
      for (int k = 0; k < widths; ++k) {
        if (k + 1 < widths) load_rows(k + 1);
        if (k + 1 < widths && (k + 1) % O::products == 0) load_columns((k + 1) / O::products);
#pragma unroll
        for (int j = 0; j < column_blocks; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t columns[2];
            O::columns(b[k / O::products % 2][j] + 2 * e, k % O::products, columns);
#pragma unroll
            for (int i = 0; i < row_blocks; ++i) {
              if constexpr (O::step_scales) O::product(products[i][j][e], a[k % 2][i], columns);
              else O::product(sums[i][j][e], a[k % 2][i], columns);
            }
          }
      }
      if constexpr (O::step_scales) {
        const float *const scales = reinterpret_cast<const float *>(memory + stage * stage_bytes<O, Most> + tile_bytes + Most * line_bytes);
        const float of_columns = scales[Most] * O::unit;
#pragma unroll
        for (int i = 0; i < row_blocks; ++i) {
          const float first = scales[first_row + 16 * i + lane / 4] * of_columns, second = scales[first_row + 16 * i + lane / 4 + 8] * of_columns;
#pragma unroll
          for (int j = 0; j < column_blocks; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
              for (int n = 0; n < 4; ++n) sums[i][j][e][n] = fmaf(products[i][j][e][n], n < 2 ? first : second, sums[i][j][e][n]);
        }
      }
      if (++stage == p.stages) stage = 0;
    }

    Four<Sum> fours[row_blocks][column_blocks][2]; // four neighbouring columns of a row
    const bool second_first = lane % 4 / 2 != 0;
#pragma unroll
    for (int i = 0; i < row_blocks; ++i)
#pragma unroll
      for (int j = 0; j < column_blocks; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const Sum x = sums[i][j][0][2 * r + n], y = sums[i][j][1][2 * r + n];
            fours[i][j][r][n] = second_first ? y : x;
            fours[i][j][r][2 + n] = second_first ? x : y;
          }
    if (p.parts > 1 && !add_parts<row_blocks * column_blocks * 2>(item, &fours[0][0][0])) return;
#pragma unroll
    for (int i = 0; i < row_blocks; ++i)
#pragma unroll
      for (int j = 0; j < column_blocks; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          finish_four(item, item.row + first_row + 16 * i + 8 * r + lane / 4, item.tile * tile_columns + first_column + 16 * j + lane % 4 * 4, fours[i][j][r]);
  }

 private:
  static __device__ __forceinline__ void load(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
  }
  /// Codes of the rows of a line become f16, two pieces of each.
  template <int Rows>
  __device__ __forceinline__ void widen_rows() {
    const uint8_t *const from = memory + stage * stage_bytes<O, Most> + tile_bytes;
    uint8_t *const to = memory + p.stages * stage_bytes<O, Most>;
#pragma unroll
    for (int i = threadIdx.x; i < Rows * 8; i += 32 * O::warps) {
      const int row = i / 8, piece = i % 8 ^ (row & 7);
      const uint4 x = *reinterpret_cast<const uint4 *>(from + i * 16);
      *reinterpret_cast<uint4 *>(to + row * 2 * line_bytes + ((2 * piece) ^ (row & 7)) * 16) = uint4{O::even(x.x), O::even(x.y), O::even(x.z), O::even(x.w)};
      *reinterpret_cast<uint4 *>(to + row * 2 * line_bytes + ((2 * piece + 1) ^ (row & 7)) * 16) = uint4{O::odd(x.x), O::odd(x.y), O::odd(x.z), O::odd(x.w)};
    }
  }
  /// All but the lines that were brought last may be on their way.
  __device__ __forceinline__ void wait_for_line() {
    if (p.stages >= 6) warp::wait<4>();
    else if (p.stages == 5) warp::wait<3>();
    else if (p.stages == 4) warp::wait<2>();
    else if (p.stages == 3) warp::wait<1>();
    else warp::wait<0>();
  }
  /// Leaves sums for the others that share this tile; whether this block is the last of them, which has the sums of all then.
  template <int Fours>
  __device__ __forceinline__ bool add_parts(const Item &item, Four<Sum> *fours) {
    using Stored = std::conditional_t<std::is_same_v<Sum, float>, float4, int4>;
    const auto slot = [&](uint32_t part) { return reinterpret_cast<Stored *>(p.partials + (int64_t{item.number} * p.parts + part) * (Most * tile_columns * 4)) + threadIdx.x; };
    Stored *const own = slot(item.part);
    constexpr int threads = 32 * O::warps;
#pragma unroll
    for (int i = 0; i < Fours; ++i) __stcg(own + i * threads, Stored{fours[i][0], fours[i][1], fours[i][2], fours[i][3]});
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      told = atomicAdd(p.counters + item.number, 1u) == p.parts - 1;
      if (told) p.counters[item.number] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!told) return false;
#pragma unroll
    for (int i = 0; i < Fours; ++i) fours[i] = Four<Sum>{};
    constexpr uint32_t at_once = Fours < 16 ? 16 / Fours : 1; // parts whose loads are on their way together; the last is repeated, and not added
    for (uint32_t part = 0; part < p.parts; part += at_once) {
      Stored x[at_once][Fours];
#pragma unroll
      for (uint32_t n = 0; n < at_once; ++n)
#pragma unroll
        for (int i = 0; i < Fours; ++i) x[n][i] = __ldcg(slot(min(part + n, p.parts - 1)) + i * threads);
#pragma unroll
      for (uint32_t n = 0; n < at_once; ++n) {
        if (part + n >= p.parts) break;
#pragma unroll
        for (int i = 0; i < Fours; ++i) fours[i][0] += x[n][i].x, fours[i][1] += x[n][i].y, fours[i][2] += x[n][i].z, fours[i][3] += x[n][i].w;
      }
    }
    return true;
  }
  /// Sums of four neighbouring columns of a row become results.
  __device__ __forceinline__ void finish_four(const Item &item, int32_t row, int32_t column, const Four<Sum> &sums) {
    if (row >= item.end || column >= p.columns) return;
    const int count = min(4, p.columns - column);
    const typename Finish::Row target = finish.row_of(0, p.x != nullptr ? row : p.packed.targets[row]);
    const typename Finish::Beside beside = finish.beside(0, target, int64_t{column}, count);
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scaled[i] = static_cast<float>(sums[i]);
      if constexpr (O::row_scales) scaled[i] *= (p.x != nullptr ? p.xs : p.packed.scales)[row] * p.ws[int64_t{item.matrix} * p.columns + column + min(i, count - 1)];
    }
    finish(0, target, int64_t{column}, scaled, beside, count);
  }
};

template <class O, int Most, class Finish>
__global__ void __launch_bounds__(32 * O::warps, 2) contract_kernel(const __grid_constant__ Problem p, const __grid_constant__ Finish finish) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ Group groups[most_matrices + 1];
  __shared__ uint32_t told;
  let_successor_start();
  after_predecessor();
  if (p.x != nullptr)
    for (int i = threadIdx.x; i < p.groups; i += blockDim.x)
      groups[i] = {i * p.distance, p.heads == nullptr ? p.heads_rows : static_cast<int32_t>(p.heads[i].rows) * p.heads_rows};
  else
    for (int i = threadIdx.x; i <= p.groups; i += blockDim.x) groups[i] = p.packed.groups[i];
  __syncthreads();

  const Items<Most> items(p, groups);
  Fetcher<O, Most> fetcher{p, items, warp::address(memory)};
  for (uint32_t i = 1; i < p.stages; ++i) fetcher.next();
  Multiplier<O, Most, Finish> multiplier{p, finish, fetcher, memory, warp::address(memory), told};
  Items<Most> own = items;
  for (Item item; own.next(item);) {
    const int32_t rows = item.end - item.row;
    if (rows <= 16) multiplier.template item<16>(item);
    else if (rows <= 32) multiplier.template item<32>(item);
    else if (Most == 64 || rows <= 64) multiplier.template item<64>(item);
    else if constexpr (Most == 128) multiplier.template item<128>(item);
  }
  const Group none = p.zeros ? groups[p.groups] : Group{0, 0};
  const uint32_t fours = ceil_div(p.columns, 4);
  const float zeros[4] = {};
  for (int32_t row = blockIdx.x; row < none.count; row += gridDim.x)
    for (uint32_t four = threadIdx.x; four < fours; four += blockDim.x) {
      const typename Finish::Row target = finish.row_of(0, p.packed.targets[none.base + row]);
      const int64_t column = 4 * four;
      const int count = min(4, p.columns - static_cast<int32_t>(column));
      finish(0, target, column, zeros, finish.beside(0, target, column, count), count);
    }
}

/// y = x w^T for packed weights. `Most`: 64, or 128, rows of a tile. `window`: rows that the scratch has room for; more are done one window after
/// the other. What blocks that share k leave for each other is the first in scratch.
template <class O, int MostWanted, class Finish>
cudaError_t contract(const Call &c, const Contraction &d, const Rows &rows, const Choice &choice, int64_t window, const void *x, const float *xs, const uint8_t *w, const float *ws, const Finish &finish) {
  static_assert(!Finish::quantises);
  constexpr int Most = MostWanted < O::most_rows ? MostWanted : O::most_rows, stage = stage_bytes<O, Most>;
  const auto kernel = contract_kernel<O, Most, Finish>;
  const int64_t row_bytes = d.inner * (128 / O::values), steps = ceil_div(row_bytes, int64_t{line_bytes});
  const int64_t scales = O::step_scales ? steps : O::row_scales ? 1 : 0;
  const bool direct = choice.ids == nullptr && row_bytes % 16 == 0; // pieces of rows are where copies can take them
  if (direct && rows.segments > most_matrices) return cudaErrorInvalidValue;
  const int64_t partials = choice.ids == nullptr ? int64_t{most_sharing} * 128 * tile_columns * 4 : 0;
  const Packed packed(c.scratch + partials, window, choice.experts, steps, scales);
  if (direct) window = rows.capacity();
  const int64_t places = rows.capacity() < window ? rows.capacity() : window; // of a launch
  int device = 0, of_block = 0, of_processor = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) return e;
  constexpr int other = (5 << 10) + widened_bytes<O, Most>; // groups, and what the system keeps
  const auto fit = [&](int shared) { return static_cast<uint32_t>(min((shared - other) / stage, most_stages)); };
  const uint32_t processors = c.processors < int{most_sharing} ? c.processors : most_sharing;

  Problem p{};
  p.w = w;
  p.x = direct ? static_cast<const uint8_t *>(x) : nullptr;
  p.heads = rows.per_token ? rows.heads : nullptr;
  p.heads_rows = static_cast<int32_t>(rows.count);
  p.distance = static_cast<int32_t>(rows.distance());
  p.row_bytes = row_bytes;
  p.xs = xs;
  p.ws = ws;
  p.packed = packed;
  p.columns = static_cast<int32_t>(d.columns);
  p.tiles = static_cast<int32_t>(ceil_div(d.columns, int64_t{tile_columns}));
  p.steps = static_cast<int32_t>(steps);
  p.groups = direct ? static_cast<int32_t>(rows.segments) : choice.experts;
  p.zeros = choice.zeros;
  p.partials = c.scratch;
  p.counters = c.counters;
  const uint32_t items = static_cast<uint32_t>(p.tiles * (direct ? rows.segments * ceil_div(rows.distance(), int64_t{Most}) : ceil_div(places, int64_t{Most})));
  p.parts = 1;
  if (choice.ids == nullptr && items < processors) {
    // more parts are shorter, but there are more to add up: more than one of a processor pay where they are long, or wait for much else than memory
    constexpr uint32_t least_steps = 4, least_steps_of_two = O::products == 2 ? least_steps : 32;
    uint32_t best = UINT32_MAX;
    for (uint32_t parts = 1; parts <= 16; ++parts) {
      const uint32_t all = items * parts, least = all <= processors ? least_steps : least_steps_of_two;
      if (parts > 1 && (steps < least * parts || all > 2 * processors || all > most_sharing)) break;
      const uint32_t cost = ceil_div(static_cast<uint32_t>(steps), parts) + (parts > 1 ? 2 + parts : 0);
      if (cost < best) best = cost, p.parts = parts;
    }
  }
  // two blocks of a processor hide what each waits for; where there is less to do, one has more on its way
  uint32_t blocks = choice.ids == nullptr ? items * p.parts : UINT32_MAX;
  p.stages = fit(of_processor / 2);
  if (blocks <= processors || p.stages < 3) p.stages = fit(of_block), blocks = blocks < static_cast<uint32_t>(c.processors) ? blocks : c.processors;
  else blocks = blocks < 2u * c.processors ? blocks : 2u * c.processors;
  for (int64_t first = 0; first < rows.capacity(); first += window) {
    if (!direct)
      if (const cudaError_t e = pack_rows(c, {static_cast<const uint8_t *>(x), xs, row_bytes, scales, first, window}, rows, choice, packed)) return e;
    if (const cudaError_t e = launch(kernel, dim3(blocks), dim3(32 * O::warps), p.stages * stage + widened_bytes<O, Most>, c, p, finish)) return e;
  }
  return cudaSuccess;
}

}  // namespace s3::ampere
