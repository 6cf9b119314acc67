// Contractions y[r, n] = sum over k of x[r, k] w[n, k] for any processor, shape and type, and what all kernels of the linear family share.
#pragma once
#include "launch.h"
#include "scalar.h"

namespace s3 {

/// Sizes of one contraction.
struct Contraction {
  int64_t columns; // N, of the result
  int64_t inner;   // K, summed over
  int64_t group;   // values of k that share a scale; K when there are no scales
  int64_t block;   // columns that share a scale
};

/// Where rows of a result lie: `count` of them for each token of each segment, or `count` altogether.
struct Rows {
  const s3_head *heads;
  uint32_t segments, stride;
  bool per_token;
  uint32_t count;

  Rows(const Call &c, bool of_tokens, uint32_t of_each) : heads(c.heads), segments(of_tokens ? c.segments : 1), stride(c.stride), per_token(of_tokens), count(of_each) {}
  /// places for rows, whether there are that many or not
  __host__ __device__ int64_t capacity() const { return per_token ? int64_t{segments} * stride * count : count; }
  /// rows from the start of one segment to that of the next
  __host__ __device__ int64_t distance() const { return per_token ? int64_t{stride} * count : count; }
  __device__ int64_t size(uint32_t segment) const { return per_token ? int64_t{heads[segment].rows} * count : count; }
  __device__ bool has(int64_t row) const {
    if (segments == 1) return row < size(0);
    const uint32_t r = static_cast<uint32_t>(row), n = static_cast<uint32_t>(distance());
    return r % n < size(r / n);
  }
};

/// Which of several matrices each row meets. Rows are pairs of a token and one of its `choices` experts; pair p reads row p of x, or row
/// p / choices when x has one for each token. Experts outside first .. first + experts - 1 are somebody else's: their pairs give zeros, or
/// nothing when nobody reads them.
struct Choice {
  const int32_t *ids; // null: there is one matrix, of all rows
  int32_t choices, experts, first;
  bool row_per_token, zeros;

  __device__ int64_t source(int64_t row) const { return row_per_token ? row / choices : row; }
  /// the matrix, or -1
  __device__ int32_t matrix(int64_t row) const {
    if (ids == nullptr) return 0;
    const int64_t expert = int64_t{ids[row]} - first;
    return expert >= 0 && expert < experts ? static_cast<int32_t>(expert) : -1;
  }
};
constexpr Choice no_choice{nullptr, 1, 1, 0, false, false};

template <class T>
T *argument(const Call &c, int index) {
  return static_cast<T *>(c.args[index]);
}
template <class A, class B>
__host__ __device__ constexpr A ceil_div(A a, B b) {
  return (a + static_cast<A>(b) - 1) / static_cast<A>(b);
}

/// x / y, of floats within 2 ulp and at the same pace whatever they are.
template <class A, class B>
__device__ __forceinline__ auto divided(A x, B y) {
  if constexpr (std::is_same_v<A, float> && std::is_same_v<B, float>) {
    float quotient;
    asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
    return quotient;
  } else {
    return x / y;
  }
}

/// e^x, of floats within 2^-17 of it.
template <class A>
__device__ __forceinline__ auto exponential_near(A x) {
  if constexpr (std::is_same_v<A, float>) {
    float power;
    asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
    return power;
  } else {
    return exponential_of(x);
  }
}

/// Four neighbouring elements, moved as one where they lie at a multiple of four.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
  __device__ __forceinline__ T &operator[](int i) { return at[i]; }
  __device__ __forceinline__ const T &operator[](int i) const { return at[i]; }
};
/// `count` elements from p on; Whole: there are always four, and p is a multiple of four elements from where an array starts.
template <bool Whole, class T>
__device__ __forceinline__ Four<T> read_four(const T *p, int count) {
  if constexpr (Whole) {
    return *reinterpret_cast<const Four<T> *>(p);
  } else {
    Four<T> v{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) v[i] = p[i];
    return v;
  }
}
template <bool Whole, class T>
__device__ __forceinline__ void write_four(T *p, int count, const Four<T> &v) {
  if constexpr (Whole) {
    *reinterpret_cast<Four<T> *>(p) = v;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) p[i] = v[i];
  }
}

/// Which of a token's pairs have experts first .. end - 1, and their weights; 0 for others.
template <int Choices>
struct ChosenPairs {
  static_assert(Choices <= 32);
  int32_t row;
  uint32_t owned; // a bit for each
  float weights[Choices];

  __device__ __forceinline__ ChosenPairs() {}
  __device__ __forceinline__ ChosenPairs(const int32_t *ids, const float *of, int32_t first, int32_t end, int32_t token) : row(token), owned(0) {
#pragma unroll
    for (int j = 0; j < Choices; ++j) {
      const int64_t pair = int64_t{row} * Choices + j;
      const int32_t expert = ids[pair];
      const float weight = of[pair]; // of all, so that it need not wait for ids
      const bool own = expert >= first && expert < end;
      if (own) owned |= 1u << j;
      weights[j] = own ? weight : 0;
    }
  }
  __device__ __forceinline__ float weight(int pair) const {
    float found = 0;
#pragma unroll
    for (int j = 0; j < Choices; ++j)
      if (j == pair) found = weights[j];
    return found;
  }
};
/// Whether a token has pairs with experts first .. end - 1.
template <int Choices>
__device__ __forceinline__ bool has_pairs(const int32_t *ids, int32_t first, int32_t end, int32_t token) {
  bool some = false;
#pragma unroll
  for (int j = 0; j < Choices; ++j) {
    const int32_t expert = ids[int64_t{token} * Choices + j];
    some |= expert >= first && expert < end;
  }
  return some;
}
/// Brings what that reads into the cache of the processor.
template <int Choices>
__device__ __forceinline__ void prefetch_ids(const int32_t *ids, int32_t token) {
  const int32_t *const own = ids + int64_t{token} * Choices;
  asm volatile("prefetch.global.L1 [%0];\nprefetch.global.L1 [%1];" ::"l"(own), "l"(own + Choices - 1));
}
/// Brings what `add_pairs` will read of a token's pairs into the cache of the processor: columns `column` .. column + 127 of those that there are.
template <int Choices>
__device__ __forceinline__ void prefetch_pairs(const float *y, int64_t columns, const int32_t *ids, int32_t first, int32_t end, int32_t token, int64_t column) {
  constexpr int in_line = 32;
#pragma unroll
  for (int j = 0; j < Choices; ++j) {
    const int64_t pair = int64_t{token} * Choices + j;
    const int32_t expert = ids[pair];
    if (expert < first || expert >= end) continue;
#pragma unroll
    for (int line = 0; line < 4; ++line)
      if (column + in_line * line < columns) asm volatile("prefetch.global.L1 [%0];" ::"l"(y + pair * columns + column + in_line * line));
  }
}
/// Fours of columns that are dealt with together are so many columns from each other. `count`: columns that are left from the first one on.
constexpr int apart_of_fours = 16;
__device__ __forceinline__ int count_of_four(int count, int four) { return count - apart_of_fours * four; }

/// Adds up what the pairs of rows have in y, of row i in fours of columns from from[i] on, where there are count[i]. `chosen(i)` are its pairs,
/// `sum(u, i)` is the sum of four u, in the order of pairs. Most rows have few or none.
template <bool Whole, int Fours, int Choices, int Rows, class Chosen, class Sum>
__device__ __forceinline__ void add_pairs(const float *y, int64_t columns, const int64_t (&from)[Rows], const int (&count)[Rows], const Chosen &chosen, const Sum &sum) {
#pragma unroll
  for (int u = 0; u < Fours; ++u)
#pragma unroll
    for (int i = 0; i < Rows; ++i) sum(u, i) = {};
  uint32_t left[Rows];
#pragma unroll
  for (int i = 0; i < Rows; ++i) left[i] = count[i] > 0 ? chosen(i).owned : 0;
#pragma unroll 1
  for (;;) {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < Rows; ++i) any |= left[i];
    if (any == 0) break;
    Four<float> got[Fours][Rows];
    float weight[Rows];
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      const int j = __ffs(left[i]) - 1; // the next one; -1 of none
      const float *const pair = y + (int64_t{chosen(i).row} * Choices + j) * columns + from[i];
      weight[i] = chosen(i).weight(j);
#pragma unroll
      for (int u = 0; u < Fours; ++u) {
        got[u][i] = {};
        if (j >= 0 && count_of_four(count[i], u) > 0) got[u][i] = read_four<Whole>(pair + apart_of_fours * u, count_of_four(count[i], u));
      }
      left[i] &= left[i] - 1;
    }
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int u = 0; u < Fours; ++u)
#pragma unroll
        for (int n = 0; n < 4; ++n) sum(u, i)[n] += weight[i] * got[u][i][n];
  }
}

// --- any processor, any shape -----------------------------------------------------------------------------------------------------------

/// Sums of products of codes are exact.
template <class W>
struct SumOf { using type = float; };
template <>
struct SumOf<int8_t> { using type = int32_t; };

constexpr int plain_warps = 8, plain_columns = 4 * plain_warps;

/// A warp for four columns of a row: its lanes take every 32nd k, and add up what they have in a fixed order. Finish has
/// `row_of(which, row)` and `beside(which, of_row, column, count)`, which read what else there is, and `(which, of_row, column, sums[4], beside, count)`, which
/// turns sums into results; `which` of several weights: here there is one.
template <bool Scaled, class X, class W, class Finish>
__global__ void __launch_bounds__(32 * plain_warps) plain_kernel(Contraction d, Rows rows, Choice choice, const X *x, const float *xs, const W *w, const float *ws, Finish finish) {
  using Sum = typename SumOf<W>::type;
  after_predecessor();
  let_successor_start();
  const int lane = threadIdx.x % 32;
  const int64_t column = int64_t{blockIdx.x} * plain_columns + threadIdx.x / 32 * 4;
  if (column >= d.columns) return;
  const int count = static_cast<int>(d.columns - column < 4 ? d.columns - column : 4);
  const int64_t groups = ceil_div(d.inner, d.group);
  for (int64_t row = blockIdx.y; row < rows.capacity(); row += gridDim.y) {
    if (!rows.has(row)) continue;
    const int32_t matrix = choice.matrix(row);
    float sums[4] = {};
    if (matrix >= 0) {
      const int64_t source = choice.source(row);
      const X *const from = x + source * d.inner;
      const W *line[4];
      const float *scale[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t n = column + (i < count ? i : 0);
        line[i] = w + (matrix * d.columns + n) * d.inner;
        scale[i] = Scaled ? ws + (matrix * ceil_div(d.columns, d.block) + n / d.block) * groups : nullptr;
      }
      for (int64_t g = 0; g < groups; ++g) {
        Sum part[4] = {};
        const int64_t end = (g + 1) * d.group < d.inner ? (g + 1) * d.group : d.inner;
        for (int64_t k = g * d.group + lane; k < end; k += 32) {
          const Sum a = static_cast<Sum>(value(from[k]));
          for (int i = 0; i < 4; ++i) part[i] += a * static_cast<Sum>(value(line[i][k]));
        }
        for (int i = 0; i < 4; ++i) sums[i] += Scaled ? static_cast<float>(part[i]) * (xs[source * groups + g] * scale[i][g]) : static_cast<float>(part[i]);
      }
      for (int i = 0; i < 4; ++i)
        for (int other = 16; other > 0; other /= 2) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], other);
    }
    if (lane == 0 && (matrix >= 0 || choice.zeros)) {
      const auto of_row = finish.row_of(0, static_cast<int32_t>(row));
      finish(0, of_row, column, sums, finish.beside(0, of_row, column, count), count);
    }
  }
}

template <bool Scaled, class X, class W, class Finish>
cudaError_t contract_plain(const Call &c, const Contraction &d, const Rows &rows, const Choice &choice, const X *x, const float *xs, const W *w, const float *ws, const Finish &finish) {
  const int64_t places = rows.capacity();
  const dim3 blocks(static_cast<uint32_t>(ceil_div(d.columns, plain_columns)), static_cast<uint32_t>(places < 4096 ? places : 4096));
  return launch(plain_kernel<Scaled, X, W, Finish>, blocks, dim3(32 * plain_warps), 0, c, d, rows, choice, x, xs, w, ws, finish);
}

}  // namespace s3
