// Choosing among the columns of a row: the k largest, and a token drawn from logits. Order is descending; equal values (the zeros too) by the
// lower index; NaN last.
#pragma once
#include "rows.cuh"

namespace s3 {

constexpr int choosing_threads = 1024;

/// Values in the order in which they are chosen, as integers: the larger first, then the lower index. 0 is below all.
__device__ __forceinline__ uint64_t choice_of(float x, int64_t index) {
  return static_cast<uint64_t>(rank_of(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
__device__ __forceinline__ int64_t index_of(uint64_t choice) { return 0xffffffffu - static_cast<uint32_t>(choice); }

struct First {
  template <class F> static __device__ __forceinline__ F both(F x, F y) { return x > y ? x : y; }
};

/// The k largest of n, largest first, by one warp.
__device__ __forceinline__ void top_k(const float *x, int64_t n, int k, float *values, int32_t *ids) {
  uint64_t last = ~0ull;
  for (int chosen = 0; chosen < k; ++chosen) {
    uint64_t best = 0;
    for (int64_t i = threadIdx.x; i < n; i += 32) {
      const uint64_t choice = choice_of(x[i], i);
      if (choice < last && choice > best) best = choice;
    }
    last = reduce_lanes<First>(best, 32);
    if (threadIdx.x != 0) continue;
    ids[chosen] = static_cast<int32_t>(index_of(last));
    values[chosen] = x[index_of(last)];
  }
}

/// The same of a row that one warp holds.
template <int Columns>
__device__ __forceinline__ void top_k(const Held<float, Columns, 32, 1> &x, int k, float *values, int32_t *ids) {
  using H = Held<float, Columns, 32, 1>;
  uint64_t last = ~0ull;
  for (int chosen = 0; chosen < k; ++chosen) {
    uint64_t best = 0;
    float own = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < H::chunks; ++chunk) {
      const int64_t i = H::first(chunk);
      const uint64_t choice = i < Columns ? choice_of(x.values[chunk][0], i) : 0;
      if (choice >= last || choice <= best) continue;
      best = choice;
      own = x.values[chunk][0];
    }
    last = reduce_lanes<First>(best, 32);
    if (best != last) continue;
    ids[chosen] = static_cast<int32_t>(index_of(last));
    values[chosen] = own;
  }
}

/// Softmax of a row that one warp holds, every step rounded to f32 as the op's expansion is.
template <int Columns>
__device__ __forceinline__ void softmax(Held<float, Columns, 32, 1> &x) {
  using H = Held<float, Columns, 32, 1>;
  const float largest = reduce_row<Max>(x, Columns);
#pragma unroll
  for (int chunk = 0; chunk < H::chunks; ++chunk) x.values[chunk][0] = exponential_of(__fsub_rn(x.values[chunk][0], largest));
  const float total = reduce_row<Sum>(x, Columns);
#pragma unroll
  for (int chunk = 0; chunk < H::chunks; ++chunk) x.values[chunk][0] = __fdiv_rn(x.values[chunk][0], total);
}

/// Masses e^((x - largest) / temperature) of a row's logits, as multiples of 2^-40: whole numbers, whose sums do not depend on their order.
struct Masses {
  const float *x;
  int64_t n;
  double largest, temperature;

  __device__ __forceinline__ uint64_t of(float logit) const {
    return static_cast<uint64_t>(llrint(exponential_of((static_cast<double>(logit) - largest) / temperature) * 0x1p40));
  }

  /// Sums by 8 bits of the rank, of the logits whose higher bits are `prefix`. By all threads of the block.
  __device__ void count(uint32_t prefix, int shift, unsigned long long *sums) const {
    __syncthreads();
    for (int d = threadIdx.x; d < 256; d += blockDim.x) sums[d] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t rank = rank_of(x[i]);
      if (shift == 24 || rank >> (shift + 8) == prefix) atomicAdd(sums + (rank >> shift & 255), of(x[i]));
    }
    __syncthreads();
  }

  /// The first token, in descending order, with which the sum of masses is at least `target`, and that sum.
  __device__ int64_t reach(uint64_t target, uint64_t &sum) const {
    __shared__ unsigned long long sums[256];
    __shared__ unsigned long long place[2];
    uint32_t prefix = 0;
    sum = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      count(prefix, shift, sums);
      if (threadIdx.x == 0) {
        int digit = -1;
        uint64_t before = 0;
        for (int d = 255; d >= 0; --d) {
          if (sums[d] == 0) continue;
          if (digit >= 0) before += sums[digit];
          digit = d;
          if (sum + before + sums[d] >= target) break;
        }
        place[0] = static_cast<unsigned long long>(digit < 0 ? 0 : digit);
        place[1] = before;
      }
      __syncthreads();
      prefix = prefix << 8 | static_cast<uint32_t>(place[0]);
      sum += place[1];
    }
    // all logits of this rank are equal: how many of them are needed, and which is the last of those
    int64_t any = n;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
      if (rank_of(x[i]) == prefix) {
        any = i;
        break;
      }
    const int64_t first = index_of(reduce_block<First>(any < n ? choice_of(0.0f, any) : uint64_t{0}));
    const uint64_t each = of(x[first]);
    const uint64_t needed = each == 0 || sum + each >= target ? 1 : (target - sum + each - 1) / each;
    int64_t token = first;
    uint64_t found = 0;
    for (int64_t from = 0; from < n && found < needed; from += blockDim.x) {
      const int64_t i = from + threadIdx.x;
      const bool equal = i < n && rank_of(x[i]) == prefix;
      const int here = __syncthreads_count(equal);
      if (here == 0) continue;
      if (found + here >= needed) {
        // the (needed - found)-th of this stretch, or the last one when rounding asks for more
        if (threadIdx.x == 0) {
          uint64_t left = needed - found;
          for (int64_t j = from; j < n && j < from + blockDim.x; ++j)
            if (rank_of(x[j]) == prefix && --left == 0) {
              place[0] = static_cast<unsigned long long>(j);
              break;
            }
        }
        __syncthreads();
        token = static_cast<int64_t>(place[0]);
        sum += needed * each;
        return token;
      }
      found += here;
    }
    sum += found * each;
    return token;
  }
};

/// Temperature 0: the largest. Else a draw from softmax(logits / temperature) restricted to the shortest prefix of the descending order that
/// reaches `top_p`. By all threads of the block.
__device__ __forceinline__ int32_t sample_token(const float *logits, int64_t n, float temperature, float top_p, uint32_t seed, int32_t position) {
  uint64_t own = 0;
  bool broken = false; // a NaN, or an infinity
  constexpr int together = 8; // loads on their way at a time
  for (int64_t from = threadIdx.x; from < n; from += together * choosing_threads) {
    float x[together];
#pragma unroll
    for (int j = 0; j < together; ++j) x[j] = from + j * choosing_threads < n ? logits[from + j * choosing_threads] : -infinity;
#pragma unroll
    for (int j = 0; j < together; ++j) {
      if (from + j * choosing_threads < n) own = First::both(own, choice_of(x[j], from + j * choosing_threads));
      broken |= !(x[j] < infinity);
    }
  }
  const int64_t best = index_of(reduce_block<First>(own));
  broken = __syncthreads_or(broken);
  if (!(temperature > 0) || !(top_p > 0) || broken) return static_cast<int32_t>(best);
  const Masses masses{logits, n, logits[best], temperature};
  unsigned long long mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) mine += masses.of(logits[i]);
  const uint64_t total = reduce_block<Sum>(mine);
  uint64_t kept = 0, sum = 0;
  const double bound = top_p < 1 ? ceil(static_cast<double>(top_p) * static_cast<double>(total)) : static_cast<double>(total);
  masses.reach(static_cast<uint64_t>(bound), kept);
  // strictly above the drawn point: the least whole number that is
  const double point = uniform(seed, static_cast<uint32_t>(position)) * static_cast<double>(kept);
  return static_cast<int32_t>(masses.reach(static_cast<uint64_t>(floor(point)) + 1, sum));
}

}  // namespace s3
