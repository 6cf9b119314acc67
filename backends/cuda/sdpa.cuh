// Attention of heads that lie in memory as tensors. A block of four warps has 16 queries that share a head of k and v; each warp has four of
// them, its lanes being keys for the scores and columns for the values, with a running maximum and sum: no matrix of scores in memory.
#pragma once
#include "tensors.cuh"

namespace s3 {

struct SdpaSizes {
  int64_t batches, kv_heads, group /* heads of q for one of k */, queries, keys;
};

enum class Causal { none, first, last };

/// What scores are added to or hidden by, and its elements from one index to the next of each axis of the scores.
template <class B>
struct SdpaBias {
  const B *at;
  int64_t batch, head, query, key;
};

__device__ __forceinline__ void put_result(float *to, float x) { *to = x; }
__device__ __forceinline__ void put_result(bf16 *to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void put_result(f16 *to, float x) { *to = to_f16(x); }

__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <int Dim, int Out, class X, class Y, class B>
__device__ void sdpa(const Launched &c, const SdpaSizes &n, Causal causal, const X *q, const X *k, const X *v, const SdpaBias<B> &bias, float scale,
                     float softcap, Y *out) {
  constexpr int tile = 16, of_warp = 4, own = (Out + 31) / 32;
  __shared__ float queries[tile][Dim];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t of_head = n.group * n.queries; // queries that share a head of k, one after another in memory
  const int64_t tiles = (of_head + tile - 1) / tile;
  for (Units r = Units::fixed(c, n.batches * n.kv_heads, tiles); r.next();) {
    const int64_t first = r.tile * tile, row = r.row * of_head + first;
    const int count = static_cast<int>(least(of_head - first, tile));
    __syncthreads();
    for (int i = threadIdx.x; i < count * Dim; i += 128) queries[i / Dim][i % Dim] = value(q[row * Dim + i]);
    __syncthreads();
    float maximum[of_warp], total[of_warp], sums[of_warp][own];
    int64_t seen[of_warp], most = 0;
    const B *added[of_warp];
#pragma unroll
    for (int m = 0; m < of_warp; ++m) {
      const int64_t at = first + warp + 4 * m, head = r.row % n.kv_heads * n.group + at / n.queries, query = at % n.queries;
      const int64_t reach = query + 1 + (causal == Causal::last ? n.keys - n.queries : 0);
      seen[m] = warp + 4 * m >= count ? 0 : causal == Causal::none ? n.keys : reach < 0 ? 0 : least(reach, n.keys);
      most = seen[m] > most ? seen[m] : most;
      added[m] = bias.at == nullptr ? nullptr : bias.at + r.row / n.kv_heads * bias.batch + head * bias.head + query * bias.query;
      maximum[m] = -infinity;
      total[m] = 0;
#pragma unroll
      for (int i = 0; i < own; ++i) sums[m][i] = 0;
    }
    for (int64_t key = 0; key < most; key += 32) {
      const int64_t j = key + lane;
      float scores[of_warp] = {};
      if (j < most) {
        const X *const from = k + (r.row * n.keys + j) * Dim;
#pragma unroll 8
        for (int d = 0; d < Dim; ++d) {
          const float x = value(from[d]);
#pragma unroll
          for (int m = 0; m < of_warp; ++m) scores[m] = fmaf(queries[warp + 4 * m][d], x, scores[m]); // rows past `count` count for nothing
        }
      }
      float weights[of_warp];
#pragma unroll
      for (int m = 0; m < of_warp; ++m) {
        float score = scale * scores[m];
        if (softcap != 0) score = softcap * hyperbolic_tangent(score / softcap);
        if (j >= seen[m])
          score = -infinity;
        else if (added[m] != nullptr) {
          if constexpr (sizeof(B) == sizeof(float))
            score += added[m][j * bias.key];
          else if (added[m][j * bias.key] == 0)
            score = -infinity;
        }
        const float now = fmaxf(maximum[m], warp_max(score)), base = now == -infinity ? 0.0f : now; // nothing seen yet
        const float kept = maximum[m] == -infinity ? 0.0f : exponential_of(maximum[m] - base);
        weights[m] = score == -infinity ? 0.0f : exponential_of(score - base);
        maximum[m] = now;
        total[m] = total[m] * kept + warp_sum(weights[m]);
#pragma unroll
        for (int i = 0; i < own; ++i) sums[m][i] *= kept;
      }
      const int keys = static_cast<int>(least(most - key, 32));
      for (int t = 0; t < keys; ++t) {
        const X *const from = v + (r.row * n.keys + key + t) * Out;
        float weight[of_warp];
#pragma unroll
        for (int m = 0; m < of_warp; ++m) weight[m] = __shfl_sync(0xffffffffu, weights[m], t);
#pragma unroll
        for (int i = 0; i < own; ++i) {
          if (lane + 32 * i >= Out) break;
          const float x = value(from[lane + 32 * i]);
#pragma unroll
          for (int m = 0; m < of_warp; ++m) sums[m][i] = fmaf(weight[m], x, sums[m][i]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < of_warp; ++m) {
      if (warp + 4 * m >= count) break;
      const float all = total[m] == 0 ? 1.0f : total[m];
#pragma unroll
      for (int i = 0; i < own; ++i)
        if (lane + 32 * i < Out) put_result(out + (row + warp + 4 * m) * Out + lane + 32 * i, sums[m][i] / all);
    }
  }
}

}  // namespace s3
