// Writing the cache straight from keys and values: rotation, quantisation and the store into the page in one kernel.
#pragma once
#include "attention.cuh"
#include "rows.cuh"

namespace s3 {

/// Elements of one token and KV head in a warp: lane + 32 i is element i of a lane.
template <int Dim>
constexpr int lane_elements = (Dim + 31) / 32;

/// Codes and their scales, as the cache holds them.
template <class E>
struct Stored {
  const E *codes;
  const float *scales;
};
/// Values that the cache holds rounded, or as codes.
template <class X>
struct Plain {
  const X *x;
  template <int Dim>
  __device__ __forceinline__ void load(int64_t pair, int64_t, int lane, float (&own)[lane_elements<Dim>]) const {
#pragma unroll
    for (int i = 0; i < lane_elements<Dim>; ++i) own[i] = lane + 32 * i < Dim ? value(x[pair * Dim + lane + 32 * i]) : 0.0f;
  }
};
/// Values that are rotated first: cosines in the first half of a row of the table, sines in the second; rounded to X as the rotation is.
template <class X>
struct Rotated {
  const X *x;
  const float *table;
  int positions;
  template <int Dim>
  __device__ __forceinline__ void load(int64_t pair, int64_t position, int lane, float (&own)[lane_elements<Dim>]) const {
    static_assert(Dim % 64 == 0, "the other half of a lane's element is the lane's too");
    constexpr int half = lane_elements<Dim> / 2;
    const float *const row = table + (position < 0 ? 0 : position < positions ? position : positions - 1) * Dim;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const int d = lane + 32 * i;
      const float a = value(x[pair * Dim + d]), b = value(x[pair * Dim + Dim / 2 + d]), cosine = row[d], sine = row[Dim / 2 + d];
      X low, high;
      put(&low, __fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine)));
      put(&high, __fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine)));
      own[i] = value(low);
      own[half + i] = value(high);
    }
  }
};

template <class E> struct CodeRange;
template <> struct CodeRange<e4m3> { static constexpr float largest = 448.0f; };
template <> struct CodeRange<int8_t> { static constexpr float largest = 127.0f; };

__device__ __forceinline__ void put(int8_t *to, float x) { *to = to_i8(x); }

/// The codes or values of a token and head as the cache has them, and their scale.
template <class E, int Dim, class Source>
__device__ __forceinline__ float encode(const Source &source, int64_t pair, int64_t position, int lane, E (&codes)[lane_elements<Dim>]) {
  float own[lane_elements<Dim>];
  source.template load<Dim>(pair, position, lane, own);
  float scale = 1.0f;
  if constexpr (sizeof(E) == 1) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < lane_elements<Dim>; ++i) largest = larger_of(largest, magnitude(own[i]));
    const float raw = __fdiv_rn(reduce_lanes<Amax>(largest, 32), CodeRange<E>::largest);
    scale = raw == 0.0f ? 1.0f : raw;
#pragma unroll
    for (int i = 0; i < lane_elements<Dim>; ++i) own[i] = __fdiv_rn(own[i], scale);
  }
#pragma unroll
  for (int i = 0; i < lane_elements<Dim>; ++i) put(&codes[i], own[i]);
  return scale;
}
template <class E, int Dim>
__device__ __forceinline__ float encode(const Stored<E> &source, int64_t pair, int64_t, int lane, E (&codes)[lane_elements<Dim>]) {
#pragma unroll
  for (int i = 0; i < lane_elements<Dim>; ++i)
    if (lane + 32 * i < Dim) codes[i] = source.codes[pair * Dim + lane + 32 * i];
  return source.scales == nullptr ? 1.0f : source.scales[pair];
}

/// A warp for each row and KV head.
template <class E, int Heads, int Dim, class Keys, class Values>
__global__ void __launch_bounds__(append_warps * 32) append_fresh_kernel(const s3_head *heads, uint32_t stride, uint32_t pairs, Keys keys, Values values,
                                                                         const int32_t *pages, const int32_t *position, int pages_of_row, uint8_t *pool) {
  using P = Page<E, Dim>;
  let_successor_start();
  const uint32_t pair = blockIdx.x * append_warps + threadIdx.x / 32, row = pair / Heads;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (pair >= pairs || !is_token(heads, stride, row)) return;
  const int at = position[row], token = at % page_tokens;
  uint8_t *const to = pool + (static_cast<int64_t>(pages[static_cast<int64_t>(row) * pages_of_row + at / page_tokens]) * Heads + pair % Heads) * P::head;
  after_predecessor();
  E k[lane_elements<Dim>], v[lane_elements<Dim>];
  const float k_scale = encode<E, Dim>(keys, pair, at, lane, k), v_scale = encode<E, Dim>(values, pair, at, lane, v);
#pragma unroll
  for (int i = 0; i < lane_elements<Dim>; ++i) {
    const int d = lane + 32 * i;
    if (d >= Dim) break;
    *reinterpret_cast<E *>(to + P::key(token, d)) = k[i];
    *reinterpret_cast<E *>(to + P::value(token, d)) = v[i];
  }
  if (P::scaled && lane == 0) {
    float *const scales = reinterpret_cast<float *>(to + P::scales);
    scales[token] = k_scale;
    scales[page_tokens + token] = v_scale;
  }
}

template <class E, int Heads, int Dim, class Keys, class Values>
cudaError_t append_fresh(const Call &c, const Keys &keys, const Values &values, const int32_t *pages, const int32_t *position, int pages_of_row, uint8_t *pool) {
  const uint32_t pairs = c.segments * c.stride * Heads;
  return launch(append_fresh_kernel<E, Heads, Dim, Keys, Values>, dim3((pairs + append_warps - 1) / append_warps), dim3(append_warps * 32), 0, c, c.heads,
                c.stride, pairs, keys, values, pages, position, pages_of_row, pool);
}

}  // namespace s3
