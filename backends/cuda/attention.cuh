// Attention over a paged cache for any processor and any shape, and the kernel that writes the cache.
//
// A page holds 64 tokens of one layer. For each KV head it holds K, then V, then for codes one scale a token for K and for V. Where heads are
// of 64, 128 or 256 elements of at most 2 bytes, K and V lie as the shared memory of matrix units wants them, so that a kernel fetches them
// by plain copies of consecutive bytes; else they lie token by token.
#pragma once
#include "launch.h"
#include "scalar.h"

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
__device__ __forceinline__ bool is_token(const s3_head *heads, uint32_t stride, uint32_t row) { return row % stride < heads[row / stride].rows; }

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

}  // namespace s3
