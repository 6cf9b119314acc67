// Rows of a launch, a block for each row or tile of one, and reductions of a row by its block.
//
// A reduction adds what each thread holds in ascending columns, then the threads of a warp in a tree, then the warps in order: the same bits
// whatever the other rows are.
#pragma once
#include <type_traits>

#include "launch.h"
#include "scalar.h"

namespace s3 {

/// All (row, tile) pairs that a launch may have, a block for each. A tile is a part of the columns. Rows count over all segments: segment i
/// starts at row i * stride * per_token.
struct RowGrid {
  const s3_head *heads;
  uint32_t segments, distance, per_token, tiles;

  /// `per_token` rows for each token of each segment
  static RowGrid of_tokens(const Call &c, uint32_t per_token, uint32_t tiles) { return {c.heads, c.segments, c.stride * per_token, per_token, tiles}; }
  /// a number of rows that has nothing to do with tokens
  static RowGrid fixed(const Call &, uint32_t count, uint32_t tiles) { return {nullptr, 1, count, 0, tiles}; }

  uint32_t blocks() const { return segments * distance * tiles; }
  /// the row and tile of this block; false when there is no such row
  __device__ __forceinline__ bool locate(int64_t &row, int64_t &tile) const {
    const uint32_t unit = blockIdx.x / tiles;
    row = unit;
    tile = blockIdx.x % tiles;
    return heads == nullptr || unit % distance < heads[unit / distance].rows * per_token;
  }
};

/// A column of the chunk that a thread works on: `at` in the row, `lane` in the chunk, which is the thread's `chunk`-th.
struct Column {
  int64_t at;
  int chunk, lane;
  __device__ __forceinline__ operator int64_t() const { return at; }
};

/// Values of the columns that a thread works on, in registers: chunks of `Width` neighbours, the threads' chunks side by side.
template <class T, int Columns, int Threads, int Width>
struct Held {
  static constexpr int chunks = (Columns + Threads * Width - 1) / (Threads * Width);
  T values[chunks][Width];
  __device__ __forceinline__ T &operator[](Column i) { return values[i.chunk][i.lane]; }
  __device__ __forceinline__ const T &operator[](Column i) const { return values[i.chunk][i.lane]; }
  static __device__ __forceinline__ int64_t first(int chunk) { return (static_cast<int64_t>(chunk) * Threads + threadIdx.x) * Width; }
};

/// One chunk of a row in memory. Whole chunks move in pieces of up to 16 bytes: rows start at a multiple of the chunk.
template <class T, int Width>
struct Piece {
  static constexpr int bytes = sizeof(T) * Width;
  using Word = std::conditional_t<bytes % 16 == 0, uint4, std::conditional_t<bytes % 8 == 0, uint2, std::conditional_t<bytes % 4 == 0, uint32_t, T>>>;
  static constexpr int words = bytes / sizeof(Word);
  union {
    T values[Width];
    Word word[words];
  };
  __device__ __forceinline__ Piece() {}
  __device__ __forceinline__ explicit Piece(const T *from) {
#pragma unroll
    for (int i = 0; i < words; ++i) word[i] = reinterpret_cast<const Word *>(from)[i];
  }
  __device__ __forceinline__ void store(T *to) const {
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<Word *>(to)[i] = word[i];
  }
  __device__ __forceinline__ T &operator[](Column i) { return values[i.lane]; }
  __device__ __forceinline__ const T &operator[](Column i) const { return values[i.lane]; }
};

/// This thread's columns of a row in memory.
template <class T, int Columns, int Threads, int Width>
__device__ __forceinline__ void load(Held<T, Columns, Threads, Width> &to, const T *row) {
  using H = Held<T, Columns, Threads, Width>;
#pragma unroll
  for (int chunk = 0; chunk < H::chunks; ++chunk) {
    const int64_t first = H::first(chunk);
    if (Columns % (Threads * Width) != 0 && first >= Columns) break;
    const Piece<T, Width> piece(row + first);
#pragma unroll
    for (int lane = 0; lane < Width; ++lane) to.values[chunk][lane] = piece.values[lane];
  }
}

/// Copies a row by all threads of a block; zeros when there is no source.
template <class T, int64_t Columns>
__device__ __forceinline__ void copy_row(T *to, const T *from) {
  constexpr int width = Columns % 8 == 0 ? 8 : 1;
  for (int64_t i = threadIdx.x * width; i < Columns; i += blockDim.x * width) {
    Piece<T, width> piece;
    if (from != nullptr) piece = Piece<T, width>(from + i);
    else
      for (int lane = 0; lane < width; ++lane) piece.values[lane] = T{};
    piece.store(to + i);
  }
}

// --- reductions by all threads of a block -----------------------------------------------------------------------------------------

struct Sum {
  template <class F> static __device__ __forceinline__ F none() { return 0; }
  template <class F> static __device__ __forceinline__ F of(F x) { return x; }
  template <class F> static __device__ __forceinline__ F both(F x, F y) { return x + y; }
  template <class F> static __device__ __forceinline__ F end(F x, int64_t) { return x; }
};
struct Mean : Sum {
  template <class F> static __device__ __forceinline__ F end(F x, int64_t n) { return x / static_cast<F>(n); }
};
struct Prod {
  template <class F> static __device__ __forceinline__ F none() { return 1; }
  template <class F> static __device__ __forceinline__ F of(F x) { return x; }
  template <class F> static __device__ __forceinline__ F both(F x, F y) { return x * y; }
  template <class F> static __device__ __forceinline__ F end(F x, int64_t) { return x; }
};
struct Max {
  template <class F> static __device__ __forceinline__ F none() { return -infinity; }
  template <class F> static __device__ __forceinline__ F of(F x) { return x; }
  template <class F> static __device__ __forceinline__ F both(F x, F y) { return larger_of(x, y); }
  template <class F> static __device__ __forceinline__ F end(F x, int64_t) { return x; }
};
struct Min {
  template <class F> static __device__ __forceinline__ F none() { return infinity; }
  template <class F> static __device__ __forceinline__ F of(F x) { return x; }
  template <class F> static __device__ __forceinline__ F both(F x, F y) { return smaller_of(x, y); }
  template <class F> static __device__ __forceinline__ F end(F x, int64_t) { return x; }
};
struct Amax : Max {
  template <class F> static __device__ __forceinline__ F none() { return 0; }
  template <class F> static __device__ __forceinline__ F of(F x) { return magnitude(x); }
  /// magnitudes of floats are in the order of their bits, NaN above all
  template <class F> static __device__ __forceinline__ F both(F x, F y) {
    if constexpr (std::is_same_v<F, float>) return as_float(::max(as_bits(x), as_bits(y)));
    else return Max::both<F>(x, y);
  }
};

template <class R, class F>
__device__ __forceinline__ F reduce_lanes(F x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x = R::template both<F>(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

/// of one value a thread; all threads get the result
template <class R, class F>
__device__ __forceinline__ F reduce_block(F x) {
  __shared__ F of_warps[32];
  x = reduce_lanes<R, F>(x, 32);
  const int warps = (blockDim.x + 31) / 32, lane = threadIdx.x % 32;
  if (warps == 1) return x;
  __syncthreads();
  if (lane == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  F all = of_warps[0];
  for (int w = 1; w < warps; ++w) all = R::template both<F>(all, of_warps[w]);
  return all;
}

template <class R, class F>
__device__ __forceinline__ F reduce_row(const F *x, int64_t n) {
  __syncthreads();
  F own = R::template none<F>();
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) own = R::template both<F>(own, R::template of<F>(x[i]));
  return R::template end<F>(reduce_block<R, F>(own), n);
}
template <class R, class F, int Columns, int Threads, int Width>
__device__ __forceinline__ F reduce_row(const Held<F, Columns, Threads, Width> &x, int64_t n) {
  using H = Held<F, Columns, Threads, Width>;
  F own = R::template none<F>();
#pragma unroll
  for (int chunk = 0; chunk < H::chunks; ++chunk)
#pragma unroll
    for (int lane = 0; lane < Width; ++lane)
      if (Columns % (Threads * Width) == 0 || H::first(chunk) + lane < Columns) own = R::template both<F>(own, R::template of<F>(x.values[chunk][lane]));
  return R::template end<F>(reduce_block<R, F>(own), n);
}

/// out[g], in shared memory, of the g-th group of `group` elements; the last may be short. A warp a group.
template <class R, class F>
__device__ __forceinline__ void reduce_groups(const F *x, int64_t n, int64_t group, F *out) {
  __syncthreads();
  const int64_t groups = (n + group - 1) / group;
  for (int64_t g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
    const int64_t size = n - g * group < group ? n - g * group : group;
    F own = R::template none<F>();
    for (int64_t i = threadIdx.x % 32; i < size; i += 32) own = R::template both<F>(own, R::template of<F>(x[g * group + i]));
    own = R::template end<F>(reduce_lanes<R, F>(own, 32), size);
    if (threadIdx.x % 32 == 0) out[g] = own;
  }
  __syncthreads();
}
/// The same of what threads hold: a group is a power of two of chunks, at most a warp's.
template <class R, class F, int Columns, int Threads, int Width>
__device__ __forceinline__ void reduce_groups(const Held<F, Columns, Threads, Width> &x, int64_t n, int64_t group, F *out) {
  using H = Held<F, Columns, Threads, Width>;
  const int lanes = static_cast<int>(group) / Width;
#pragma unroll
  for (int chunk = 0; chunk < H::chunks; ++chunk) {
    F own = R::template none<F>();
    const int64_t first = H::first(chunk);
#pragma unroll
    for (int lane = 0; lane < Width; ++lane)
      if (Columns % (Threads * Width) == 0 || first + lane < Columns) own = R::template both<F>(own, R::template of<F>(x.values[chunk][lane]));
    own = reduce_lanes<R, F>(own, lanes);
    if (threadIdx.x % lanes == 0 && first < Columns) out[first / group] = R::template end<F>(own, n - first < group ? n - first : group);
  }
  __syncthreads();
}

#define S3_REDUCTION(name, R)                                                                                             \
  template <class X> __device__ __forceinline__ auto name(const X &x, int64_t n) { return reduce_row<R>(x, n); }          \
  template <class X, class F>                                                                                             \
  __device__ __forceinline__ void name##_of_groups(const X &x, int64_t n, int64_t group, F *out) { reduce_groups<R>(x, n, group, out); }
S3_REDUCTION(sum, Sum)
S3_REDUCTION(mean, Mean)
S3_REDUCTION(prod, Prod)
S3_REDUCTION(max, Max)
S3_REDUCTION(min, Min)
S3_REDUCTION(amax, Amax)
#undef S3_REDUCTION

/// The value of every group, in shared memory, becomes f of it.
template <class X, class F>
__device__ __forceinline__ void each_of_groups(X *x, int64_t groups, F f) {
  for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) x[g] = f(x[g]);
  __syncthreads();
}

}  // namespace s3
