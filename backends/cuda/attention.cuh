// Attention over a paged cache for any processor and any shape, and the kernel that writes the cache.
//
// A page holds 64 tokens of one layer. For each KV head it holds K, then V, then for codes one scale a token for K and for V. Where heads are
// of 64, 128 or 256 elements of at most 2 bytes, K and V lie as the shared memory of matrix units wants them, so that a kernel fetches them
// by plain copies of consecutive bytes; else they lie token by token.
#pragma once
#include <type_traits>

#include "matrix_units.cuh"

namespace s3 {

constexpr int page_tokens = 64;

/// Bytes within the part of a page that belongs to one KV head, for elements of type E; attention.ts has the same sizes.
///
/// Packed, 2 bytes: rows of 64 elements, 128 bytes, of one token each; all tokens of the first 64 elements, then of the next. The eight
/// 16-byte pieces of a row are exchanged by the token's number (the 128-byte swizzle). V is the same.
///
/// Packed, 1 byte: K as rows of at most 128 elements of a token, pieces exchanged likewise. V is transposed, since 8-bit matrix units take
/// only operands whose rows are what is summed over: a row of 64 tokens for each element of the head, with the 64-byte swizzle. Within 32
/// tokens the order is that in which a thread of a matrix unit holds scores: place p has token 16(p/16) + 8(p%4/2) + 2(p%16/4) + p%2.
template <class E, int Dim>
struct Page {
  static constexpr bool packed = sizeof(E) <= 2 && (Dim == 64 || Dim == 128 || Dim == 256);
  static constexpr bool scaled = sizeof(E) == 1;
  static constexpr int values = page_tokens * Dim * static_cast<int>(sizeof(E));
  static constexpr int scales = 2 * values; // of K, then of V
  static constexpr int head = (scales + (scaled ? 2 * page_tokens * 4 : 0) + 127) / 128 * 128;

  /// where element d of the K of a token is
  static __device__ __forceinline__ int key(int token, int d) {
    if constexpr (!packed) return (token * Dim + d) * static_cast<int>(sizeof(E));
    constexpr int row = Dim * static_cast<int>(sizeof(E)) < 128 ? 64 : 128, elements = row / static_cast<int>(sizeof(E)), in_piece = 16 / static_cast<int>(sizeof(E));
    const int exchange = row == 128 ? token & 7 : token >> 1 & 3;
    return d / elements * (page_tokens * row) + token * row + ((d % elements / in_piece) ^ exchange) * 16 + d % in_piece * static_cast<int>(sizeof(E));
  }
  static __device__ __forceinline__ int value(int token, int d) {
    if constexpr (!packed || sizeof(E) != 1) return values + key(token, d);
    const int place = token & 48 | (token & 6) << 1 | (token & 8) >> 2 | token & 1;
    return values + d * page_tokens + ((place / 16) ^ (d >> 1 & 3)) * 16 + place % 16;
  }
};

/// Whether this row of a launch is one of its tokens.
__device__ __forceinline__ bool is_token(const s3_head *heads, uint32_t stride, uint32_t row) {
  if (row < stride) return row < heads[0].rows;
  return row % stride < heads[row / stride].rows;
}

// --- writing ----------------------------------------------------------------------------------------------------------------------

constexpr int append_warps = 4;

/// A warp for each row and KV head. Scales are null when the cache has none.
template <class E, int Heads, int Dim>
__global__ void __launch_bounds__(append_warps * 32) append_kernel(const s3_head *heads, uint32_t stride, uint32_t pairs, const E *k, const float *k_scales,
                                                                   const E *v, const float *v_scales, const int32_t *pages, const int32_t *position,
                                                                   int pages_of_row, uint8_t *pool) {
  using P = Page<E, Dim>;
  let_successor_start();
  const uint32_t pair = blockIdx.x * append_warps + threadIdx.x / 32, row = pair / Heads, lane = threadIdx.x % 32;
  if (pair >= pairs || !is_token(heads, stride, row)) return;
  const int at = position[row], token = at % page_tokens;
  uint8_t *const to = pool + (static_cast<int64_t>(pages[static_cast<int64_t>(row) * pages_of_row + at / page_tokens]) * Heads + pair % Heads) * P::head;
  after_predecessor();
  const int64_t from = static_cast<int64_t>(pair) * Dim;
#pragma unroll 8
  for (int d = static_cast<int>(lane); d < Dim; d += 32) {
    *reinterpret_cast<E *>(to + P::key(token, d)) = k[from + d];
    *reinterpret_cast<E *>(to + P::value(token, d)) = v[from + d];
  }
  if (P::scaled && lane == 0) {
    float *const scales = reinterpret_cast<float *>(to + P::scales);
    scales[token] = k_scales[pair];
    scales[page_tokens + token] = v_scales[pair];
  }
}

template <class E, int Heads, int Dim>
cudaError_t append(const Call &c, const E *k, const float *k_scales, const E *v, const float *v_scales, const int32_t *pages, const int32_t *position,
                   int pages_of_row, uint8_t *pool) {
  const uint32_t pairs = c.segments * c.stride * Heads;
  return launch(append_kernel<E, Heads, Dim>, dim3((pairs + append_warps - 1) / append_warps), dim3(append_warps * 32), 0, c, c.heads, c.stride, pairs, k,
                k_scales, v, v_scales, pages, position, pages_of_row, pool);
}

// --- reading, for every shape -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void put(float *to, float x) { *to = x; }
__device__ __forceinline__ void put(bf16 *to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void put(f16 *to, float x) { *to = to_f16(x); }
__device__ __forceinline__ void put(e4m3 *to, float x) { *to = to_e4m3(x); }
__device__ __forceinline__ void put(e5m2 *to, float x) { *to = to_e5m2(x); }

constexpr int plain_warps = 4;

/// A block for each row and query head. Its warps take tokens in turn, their lanes the elements of the head.
template <class Q, class E, int Heads, int Group, int Dim>
__global__ void __launch_bounds__(plain_warps * 32) attend_plain_kernel(const s3_head *heads, uint32_t stride, const Q *q, const uint8_t *pool,
                                                                        const int32_t *pages, const int32_t *position, int pages_of_row, float scale, Q *out) {
  using P = Page<E, Dim>;
  constexpr int own = (Dim + 31) / 32; // elements of a lane
  __shared__ float maxima[plain_warps], totals[plain_warps], sums[plain_warps][Dim];
  const uint32_t row = blockIdx.x / (Heads * Group), head = blockIdx.x % (Heads * Group);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (!is_token(heads, stride, row)) return;
  after_predecessor();
  const int64_t at = (static_cast<int64_t>(row) * Heads * Group + head) * Dim;
  float x[own], sum[own] = {};
#pragma unroll
  for (int i = 0; i < own; ++i) x[i] = lane + i * 32 < Dim ? scale * value(q[at + lane + i * 32]) : 0.0f;

  float maximum = -infinity, total = 0.0f;
  const int last = position[row];
  for (int t = warp; t <= last; t += plain_warps) {
    const uint8_t *const page = pool + (static_cast<int64_t>(pages[static_cast<int64_t>(row) * pages_of_row + t / page_tokens]) * Heads + head / Group) * P::head;
    const float *const scales = reinterpret_cast<const float *>(page + P::scales);
    const int token = t % page_tokens;
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < own; ++i)
      if (lane + i * 32 < Dim) score = fmaf(x[i], value(*reinterpret_cast<const E *>(page + P::key(token, lane + i * 32))), score);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
    if (P::scaled) score *= scales[token];
    const float now = fmaxf(maximum, score), kept = expf(maximum - now), power = expf(score - now);
    const float weight = P::scaled ? power * scales[page_tokens + token] : power;
    total = fmaf(total, kept, power);
    maximum = now;
#pragma unroll
    for (int i = 0; i < own; ++i)
      if (lane + i * 32 < Dim) sum[i] = fmaf(weight, value(*reinterpret_cast<const E *>(page + P::value(token, lane + i * 32))), sum[i] * kept);
  }
#pragma unroll
  for (int i = 0; i < own; ++i)
    if (lane + i * 32 < Dim) sums[warp][lane + i * 32] = sum[i];
  if (lane == 0) maxima[warp] = maximum, totals[warp] = total;
  __syncthreads();

  float most = maxima[0], whole = 0.0f;
  for (int w = 1; w < plain_warps; ++w) most = fmaxf(most, maxima[w]);
  for (int w = 0; w < plain_warps; ++w) whole = fmaf(totals[w], expf(maxima[w] - most), whole);
  for (int d = static_cast<int>(threadIdx.x); d < Dim; d += plain_warps * 32) {
    float y = 0.0f;
    for (int w = 0; w < plain_warps; ++w) y = fmaf(sums[w][d], expf(maxima[w] - most), y);
    put(out + at + d, y / whole);
  }
}

/// Attention of every row of a launch over cache positions 0 .. position[row]; `Group` query heads share a KV head.
template <class Q, class E, int Heads, int Group, int Dim>
cudaError_t attend_plain(const Call &c, const Q *q, const uint8_t *pool, const int32_t *pages, const int32_t *position, int pages_of_row, float scale, Q *out) {
  return launch(attend_plain_kernel<Q, E, Heads, Group, Dim>, dim3(c.segments * c.stride * Heads * Group), dim3(plain_warps * 32), 0, c, c.heads, c.stride, q, pool,
                pages, position, pages_of_row, scale, out);
}

// --- what kernels with matrix units share -------------------------------------------------------------------------------------------

constexpr int group_rows = 64; // query heads of a unit
constexpr uint32_t most_blocks = 132;

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

/// The running softmax of 64 queries, in four warps of 16 each. A thread has rows lane / 4 and that + 8 of its warp's, columns
/// 8i + lane % 4 * 2 + (0, 1) in sums[4i .. 4i + 3], by row, then column, as matrix products give them; scores of 64 tokens likewise. Maxima count powers of two.
template <int Dim>
struct Running {
  float sums[Dim / 2];
  float maximum[2], total[2]; // total: of this thread's columns
};

/// A whole number not below log2 of the largest scale of the first `count` tokens; by a warp.
__device__ __forceinline__ float exponent_of_largest(const float *scales, int count) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t first = lane < count ? as_bits(scales[lane]) : 0, second = lane + 32 < count ? as_bits(scales[lane + 32]) : 0;
  const uint32_t most = __reduce_max_sync(0xffffffffu, max(first & 0x7fffffffu, second & 0x7fffffffu));
  return static_cast<float>(max(static_cast<int>((most + 0x7fffffu) >> 23) - 127, -60)); // scales may all be 0
}

/// Scores times the scales of K of their tokens, or weights times those of V.
__device__ __forceinline__ void scale_scores(float (&s)[32], const float *scales, int thread) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 two = *reinterpret_cast<const float2 *>(scales + i * 8 + thread % 4 * 2);
    s[4 * i] *= two.x, s[4 * i + 1] *= two.y, s[4 * i + 2] *= two.x, s[4 * i + 3] *= two.y;
  }
}
__device__ __forceinline__ void leave_out(float (&s)[32], int count, int thread) {
#pragma unroll
  for (int i = 0; i < 32; ++i)
    if (i / 4 * 8 + thread % 4 * 2 + i % 2 >= count) s[i] = -infinity;
}

/// Scores become powers relative to a row's maximum so far, which is raised by `above`; `kept` brings earlier sums to it. Whether these change.
template <int Dim>
__device__ __forceinline__ bool soften(Running<Dim> &r, float (&s)[32], const float (&factor)[2], float above, float (&kept)[2]) {
  bool moved = false;
  float most[2][2], total[2][2] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    float &m = most[i / 2 % 2][i / 16];
    m = i % 16 / 2 == i / 2 % 2 && i % 2 == 0 ? s[i] : fmaxf(m, s[i]);
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float m = fmaxf(most[row][0], most[row][1]);
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
    const float now = fmaxf(r.maximum[row], fmaf(m, factor[row], above));
    moved |= now != r.maximum[row];
    kept[row] = power_of_two(r.maximum[row] - now);
    r.maximum[row] = now;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = i / 2 % 2;
    s[i] = power_of_two(fmaf(s[i], factor[row], -r.maximum[row]));
    total[row][i / 16] += s[i];
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) r.total[row] = fmaf(r.total[row], kept[row], total[row][0] + total[row][1]);
  return moved;
}

/// Zeros V, and its scales, of tokens from `count` on, which may hold anything; by 128 threads.
template <class E, int Dim>
__device__ __forceinline__ void clear_values(uint8_t *values, float *scales, int count, int thread) {
  if constexpr (sizeof(E) == 2) {
    for (int piece = count * 8 + thread; piece < page_tokens * 8; piece += 128)
#pragma unroll
      for (int block = 0; block < Dim / 64; ++block) *reinterpret_cast<uint4 *>(values + block * 8192 + piece * 16) = uint4{};
  } else {
    using P = Page<E, Dim>;
    for (int d = thread; d < Dim; d += 128)
      for (int token = count; token < page_tokens; ++token) values[P::value(token, d) - P::values] = 0;
    if (count <= thread && thread < page_tokens) scales[thread] = 0.0f;
  }
}

/// Writes 8 columns of two rows, of which each thread of four has a part; rows past the group's are not there.
__device__ __forceinline__ void write_result(bf16 *out, int dim, int row, int column, int rows, float4 x, float by_first, float by_second) {
  if (row < rows) *reinterpret_cast<uint32_t *>(out + row * dim + column) = pack_bf16(x.x * by_first, x.y * by_first);
  if (row + 8 < rows) *reinterpret_cast<uint32_t *>(out + (row + 8) * dim + column) = pack_bf16(x.z * by_second, x.w * by_second);
}

/// What a piece of a unit leaves for the others in scratch: its sums, by four, thread and columns, then maximum and total of its rows.
template <int Dim>
constexpr int64_t partial_bytes = static_cast<int64_t>(group_rows) * Dim * 4 + group_rows * 8;

/// floor(all * a / b)
__device__ __forceinline__ uint32_t part_of(uint32_t all, uint32_t a, uint32_t b) { return all / b * a + all % b * a / b; }

/// Sums of all pieces of a unit, of two rows eight apart, and what makes results of them.
template <int Fours>
struct Added {
  float4 sum[Fours];
  float norm[2];
};

/// Adds up some fours of sums, of the same rows, of all `count` pieces of a unit. Fours count the 128 threads of a warpgroup first, then 8 columns.
template <int Dim, int Fours, class Slot>
__device__ __forceinline__ Added<Fours> add_pieces(Slot slot_of, int count, const uint8_t *scratch, int row, const int (&four)[Fours]) {
  Added<Fours> added{};
  float4(&sum)[Fours] = added.sum;
  float most[2] = {-infinity, -infinity}, total[2] = {};
  const int pieces = (count + 3) / 4 * 4; // four are on their way together; the last is repeated with no weight
#pragma unroll 4
  for (int p = 0; p < pieces; ++p) {
    const uint8_t *const piece = scratch + static_cast<int64_t>(slot_of(min(p, count - 1))) * partial_bytes<Dim>;
    const float2 *const state = reinterpret_cast<const float2 *>(piece + group_rows * Dim * 4);
    float2 first = __ldcg(state + row), second = __ldcg(state + row + 8);
    float4 x[Fours];
#pragma unroll
    for (int i = 0; i < Fours; ++i) x[i] = __ldcg(reinterpret_cast<const float4 *>(piece) + four[i]);
    if (p >= count) first.x = second.x = -infinity;
    const float now[2] = {fmaxf(most[0], first.x), fmaxf(most[1], second.x)};
    const float kept[2] = {power_of_two(most[0] - now[0]), power_of_two(most[1] - now[1])};
    const float taken[2] = {power_of_two(first.x - now[0]), power_of_two(second.x - now[1])};
    most[0] = now[0], most[1] = now[1];
    total[0] = fmaf(total[0], kept[0], first.y * taken[0]);
    total[1] = fmaf(total[1], kept[1], second.y * taken[1]);
#pragma unroll
    for (int i = 0; i < Fours; ++i) {
      sum[i].x = fmaf(sum[i].x, kept[0], x[i].x * taken[0]), sum[i].y = fmaf(sum[i].y, kept[0], x[i].y * taken[0]);
      sum[i].z = fmaf(sum[i].z, kept[1], x[i].z * taken[1]), sum[i].w = fmaf(sum[i].w, kept[1], x[i].w * taken[1]);
    }
  }
  added.norm[0] = 1.0f / total[0], added.norm[1] = 1.0f / total[1];
  return added;
}

/// Adds up fours of sums [from, to) of all `count` pieces of a unit.
template <int Dim, int Threads, class Slot>
__device__ __forceinline__ void add_up(Slot slot_of, int count, const uint8_t *scratch, bf16 *out, int rows, int from, int to) {
  const int in_group = (from + static_cast<int>(threadIdx.x)) % 128, row = in_group / 32 * 16 + in_group % 32 / 4;
  for (int first = from + static_cast<int>(threadIdx.x); first < to; first += 2 * Threads) {
    const int four[2] = {first, min(first + Threads, to - 1)};
    const Added<2> x = add_pieces<Dim>(slot_of, count, scratch, row, four);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (first + i * Threads < to) write_result(out, Dim, row, four[i] / 128 * 8 + in_group % 4 * 2, rows, x.sum[i], x.norm[0], x.norm[1]);
  }
}

// --- matrix units of every processor ----------------------------------------------------------------------------------------------

template <class E, int Dim>
struct WarpShape {
  static constexpr bool codes = sizeof(E) == 1;
  static constexpr int half = page_tokens * Dim * static_cast<int>(sizeof(E));
  static constexpr int stage = 2 * half + (codes ? 2 * page_tokens * 4 : 0);
  static constexpr int query = group_rows * Dim * 2;
  static constexpr uint32_t shared = query + 2 * stage + group_rows * 4 + 16;
  static constexpr float code_unit = std::is_same_v<E, e4m3> ? 256.0f : 1.0f; // of what widen gives
};

/// This warp's 16 queries in shared memory, as keys of bf16 lie in a page. For codes as f16, the largest of a row 128 to 256; then in each 16
/// elements the order is that of codes in a product: of four neighbours, two are 8 apart from the other two.
template <class E, int Dim>
__device__ __forceinline__ void load_warp_queries(const bf16 *q, int count, uint8_t *to, float *row_scale, float scale, int warp, int lane) {
  using P = Page<bf16, Dim>;
  if constexpr (sizeof(E) == 2) {
#pragma unroll 4
    for (int i = lane; i < 16 * Dim / 8; i += 32) {
      const int row = warp * 16 + i / (Dim / 8), d = i % (Dim / 8) * 8;
      *reinterpret_cast<uint4 *>(to + P::key(row, d)) = *reinterpret_cast<const uint4 *>(q + min(row, count - 1) * Dim + d);
    }
  } else {
#pragma unroll 2
    for (int row = warp * 16; row < warp * 16 + 16; ++row) {
      float x[Dim / 32], most = 0.0f;
#pragma unroll
      for (int i = 0; i < Dim / 32; ++i) most = fmaxf(most, fabsf(x[i] = value(q[min(row, count - 1) * Dim + lane + 32 * i])));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
      const uint32_t exponent = max(as_bits(most) >> 23, 16u);
      const float up = as_float((261u - exponent) << 23);
#pragma unroll
      for (int i = 0; i < Dim / 32; ++i) {
        const int d = lane + 32 * i, place = d & ~15 | (d & 2) << 2 | (d & 12) >> 1 | d & 1;
        *reinterpret_cast<f16 *>(to + P::key(row, place)) = to_f16(x[i] * up);
      }
      if (lane == 0) row_scale[row] = as_float((exponent - 7u) << 23) * scale * WarpShape<E, Dim>::code_unit;
    }
  }
  __syncwarp();
}

/// A block for each part of a row, 64 query heads of one KV head, and piece of its context; `splits` pieces at most. Each of its four warps has 16
/// of the heads. The last piece of a row to arrive adds all of them up.
template <class E, int Heads, int Group, int Dim>
__global__ void __launch_bounds__(128, 1) attend_warps_kernel(const s3_head *heads, uint32_t stride, uint32_t splits, const bf16 *q, const uint8_t *pool,
                                                              const int32_t *pages, const int32_t *position, int pages_of_row, float scale, bf16 *out,
                                                              uint8_t *scratch, uint32_t *counters) {
  using S = WarpShape<E, Dim>;
  using P = Page<E, Dim>;
  constexpr uint32_t blocks = (Group + group_rows - 1) / group_rows, parts = Heads * blocks;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t *const ring = shared + S::query;
  float *const row_scale = reinterpret_cast<float *>(ring + 2 * S::stage);
  uint32_t &told = *reinterpret_cast<uint32_t *>(row_scale + group_rows);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const uint32_t unit = blockIdx.x / splits, row = unit / parts, part = unit % parts;
  let_successor_start();
  after_predecessor();
  if (!is_token(heads, stride, row)) return;
  const uint32_t last = static_cast<uint32_t>(position[row]), tiles = last / page_tokens + 1, piece = blockIdx.x % splits, pieces = min(splits, (tiles + 3) / 4);
  if (piece >= pieces) return;
  const uint32_t first = part_of(tiles, piece, pieces), end = part_of(tiles, piece + 1, pieces);
  const int first_head = static_cast<int>(part / blocks * Group + part % blocks * group_rows), rows = min(group_rows, Group - first_head % Group);
  const int64_t at = (static_cast<int64_t>(row) * Heads * Group + first_head) * Dim;

  const auto fetch = [&](uint32_t tile) {
    const uint8_t *const from = pool + (static_cast<int64_t>(pages[static_cast<int64_t>(row) * pages_of_row + tile]) * Heads + part / blocks) * P::head;
    uint8_t *const to = ring + (tile - first) % 2 * S::stage;
#pragma unroll 8
    for (int i = thread; i < S::stage / 16; i += 128) warp::copy_16(to + i * 16, from + i * 16);
    warp::commit();
  };
  fetch(first);
  const float to_powers = scale * 1.44269504f;
  load_warp_queries<E, Dim>(q + at, rows, shared, row_scale, to_powers, warp, lane);
  const int own_row = warp * 16 + lane / 4;
  float factor[2] = {to_powers, to_powers};
  if constexpr (S::codes) factor[0] = row_scale[own_row], factor[1] = row_scale[own_row + 8];
  Running<Dim> r;
#pragma unroll
  for (int i = 0; i < Dim / 2; ++i) r.sums[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) r.maximum[i] = -infinity, r.total[i] = 0.0f;

  for (uint32_t tile = first; tile < end; ++tile) {
    if (tile + 1 < end) {
      fetch(tile + 1);
      warp::wait<1>();
    } else {
      warp::wait<0>();
    }
    __syncthreads();
    uint8_t *const k = ring + (tile - first) % 2 * S::stage, *const v = k + S::half;
    float *const scales = reinterpret_cast<float *>(k + 2 * S::half);
    const int count = min(page_tokens, static_cast<int>(last + 1 - tile * page_tokens));
    if (count < page_tokens) {
      clear_values<E, Dim>(v, scales + page_tokens, count, thread);
      __syncthreads();
    }
    float s[32] = {};
#pragma unroll 2
    for (int d = 0; d < Dim; d += S::codes ? 32 : 16) {
      uint32_t a[2][4];
      warp::load_matrices(a[0], shared + Page<bf16, Dim>::key(warp * 16 + lane % 16, d + lane / 16 * 8));
      if constexpr (S::codes) warp::load_matrices(a[1], shared + Page<bf16, Dim>::key(warp * 16 + lane % 16, d + 16 + lane / 16 * 8));
#pragma unroll
      for (int token = 0; token < page_tokens; token += 16) {
        uint32_t b[4];
        warp::load_matrices(b, k + P::key(token + lane / 16 * 8 + lane % 8, d + lane / 8 % 2 * (S::codes ? 16 : 8)));
        if constexpr (S::codes) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t low, high;
            warp::widen<E>(b[i], low, high);
            warp::multiply<true>(s + token / 2 + i / 2 * 4, a[i % 2], low, high);
          }
        } else {
          warp::multiply<false>(s + token / 2, a[0], b[0], b[1]);
          warp::multiply<false>(s + token / 2 + 4, a[0], b[2], b[3]);
        }
      }
    }
    float above = 0.0f, kept[2];
    if constexpr (S::codes) {
      above = exponent_of_largest(scales + page_tokens, count); // so that weights times scales are at most 1
      scale_scores(s, scales, thread);
    }
    if (count < page_tokens) leave_out(s, count, thread);
    if (__any_sync(0xffffffffu, soften(r, s, factor, above, kept))) {
#pragma unroll
      for (int i = 0; i < Dim / 2; ++i) r.sums[i] *= kept[i / 2 % 2];
    }
    uint32_t p[16];
    if constexpr (S::codes) scale_scores(s, scales + page_tokens, thread);
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = S::codes ? warp::pack_f16(s[2 * i], s[2 * i + 1]) : pack_bf16(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int d = 0; d < Dim; d += 16) {
      if constexpr (S::codes) {
#pragma unroll
        for (int token = 0; token < page_tokens; token += 32) {
          uint32_t b[4];
          warp::load_matrices(b, k + P::value(token + lane / 8 % 2 * 16, d + lane / 16 * 8 + lane % 8));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t low, high;
            warp::widen<E>(b[i], low, high);
            warp::multiply<true>(r.sums + d / 2 + i / 2 * 4, p + token / 4 + i % 2 * 4, low, high);
          }
        }
      } else {
#pragma unroll
        for (int token = 0; token < page_tokens; token += 16) {
          uint32_t b[4];
          warp::load_transposed(b, k + P::value(token + lane % 16, d + lane / 16 * 8));
          warp::multiply<false>(r.sums + d / 2, p + token / 4, b[0], b[1]);
          warp::multiply<false>(r.sums + d / 2 + 4, p + token / 4, b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    r.total[i] += __shfl_xor_sync(0xffffffffu, r.total[i], 1);
    r.total[i] += __shfl_xor_sync(0xffffffffu, r.total[i], 2);
  }
  constexpr float one = S::codes ? S::code_unit : 1.0f;
  float4 *const partial = reinterpret_cast<float4 *>(scratch + static_cast<int64_t>(blockIdx.x) * partial_bytes<Dim>);
#pragma unroll
  for (int i = 0; i < Dim / 8; ++i) {
    const float4 sum{r.sums[4 * i] * one, r.sums[4 * i + 1] * one, r.sums[4 * i + 2] * one, r.sums[4 * i + 3] * one};
    if (pieces == 1) write_result(out + at, Dim, own_row, i * 8 + lane % 4 * 2, rows, sum, 1.0f / r.total[0], 1.0f / r.total[1]);
    else __stcg(partial + i * 128 + thread, sum);
  }
  if (pieces == 1) return;
  if (lane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) __stcg(reinterpret_cast<float2 *>(partial + Dim / 8 * 128) + own_row + 8 * i, float2{r.maximum[i], r.total[i]});
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    told = atomicAdd(counters + unit, 1u) == pieces - 1;
    if (told) counters[unit] = 0;
    __threadfence();
  }
  __syncthreads();
  if (told) add_up<Dim, 128>([&](int i) { return static_cast<int>(unit * splits) + i; }, static_cast<int>(pieces), scratch, out + at, rows, 0, Dim / 8 * 128);
}

/// Attention of every row of a launch over cache positions 0 .. position[row]; `Group` query heads share a KV head. `scale` is above 0.
template <class Q, class E, int Heads, int Group, int Dim>
cudaError_t attend_warps(const Call &c, const Q *q, const uint8_t *pool, const int32_t *pages, const int32_t *position, int pages_of_row, float scale, Q *out) {
  const uint32_t units = c.segments * c.stride * Heads * ((Group + group_rows - 1) / group_rows);
  if (units == 0) return cudaSuccess;
  int device = 0, shared = 0;
  cudaError_t failed = cudaGetDevice(&device);
  if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (failed != cudaSuccess) return failed;
  if (static_cast<uint32_t>(shared) < WarpShape<E, Dim>::shared) // small processors, for heads of 256
    return attend_plain<Q, E, Heads, Group, Dim>(c, q, pool, pages, position, pages_of_row, scale, out);
  const uint32_t processors = static_cast<uint32_t>(c.processors) < most_blocks ? static_cast<uint32_t>(c.processors) : most_blocks;
  const uint32_t splits = units < 2 * processors ? 2 * processors / units : 1;
  return launch(attend_warps_kernel<E, Heads, Group, Dim>, dim3(units * splits), dim3(128), WarpShape<E, Dim>::shared, c, c.heads, c.stride, splits, q, pool, pages,
                position, pages_of_row, scale, out, c.scratch, c.counters);
}

}  // namespace s3
