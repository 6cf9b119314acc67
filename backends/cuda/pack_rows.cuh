// Rows of activations as contract_hopper.cuh and contract_ampere.cuh want them: gathered by the matrix that they meet, in lines of 128 bytes.
//
// Rows of one matrix follow each other from a multiple of 8 on. Line (b, r) holds bytes 128b .. 128b + 127 of row r, zeros past its end, with its
// eight pieces of 16 bytes exchanged by r % 8 (the 128-byte swizzle); lines of a block b are consecutive. Scales lie likewise: [b][r].
#pragma once
#include "contract.cuh"

namespace s3 {

/// Rows that meet one matrix: where they start among the packed ones, and how many they are.
struct Group {
  int32_t base, count;
};
constexpr int most_matrices = 384;

/// Packed rows, in the scratch of a launch that does at most `window` rows at a time.
struct Packed {
  uint8_t *lines;   // [blocks][places] lines
  float *scales;    // [scale blocks][places]
  int32_t *targets; // for each packed row, and then for rows that meet no matrix, the row of the result
  Group *groups;    // for each matrix, and then of rows that meet none
  int64_t places, blocks, scale_blocks;

  Packed() = default;
  /// linear.ts has the same sizes
  static int64_t places_for(int64_t window, int64_t matrices) { return (window + 8 * matrices + 256 + 31) / 32 * 32; }
  Packed(uint8_t *scratch, int64_t window, int64_t matrices, int64_t line_blocks, int64_t scale_blocks_)
      : places(places_for(window, matrices)), blocks(line_blocks), scale_blocks(scale_blocks_) {
    lines = scratch;
    scales = reinterpret_cast<float *>(lines + 128 * places * blocks);
    targets = reinterpret_cast<int32_t *>(scales + places * scale_blocks);
    groups = reinterpret_cast<Group *>(targets + places + (window + 31) / 32 * 32);
  }
  /// Other values of the same rows.
  Packed beside(uint8_t *at, int64_t line_blocks, int64_t scale_blocks_) const {
    Packed other = *this;
    other.lines = at, other.blocks = line_blocks, other.scale_blocks = scale_blocks_;
    other.scales = reinterpret_cast<float *>(at + 128 * places * line_blocks);
    return other;
  }
};
/// Where byte `byte` of packed row `row` lies.
__device__ __forceinline__ int64_t packed_at(int64_t places, int64_t row, int64_t byte) { return ((byte >> 7) * places + row) * 128 + (((byte >> 4) ^ row) & 7) * 16 + (byte & 15); }

/// What is packed: rows `first` .. of at most `window`.
struct Packing {
  const uint8_t *x;
  const float *xs;
  int64_t row_bytes, scales; // of a row of x
  int64_t first, window;
};

/// Pieces that a thread has in flight.
constexpr int pieces_at_once = 4;

/// Piece i of a row of `size` bytes. Aligned: rows start at multiples of 16 bytes.
template <bool Aligned>
__device__ __forceinline__ uint4 piece_of(const uint8_t *row, int64_t size, int64_t i) {
  if constexpr (Aligned) return 16 * i < size ? *reinterpret_cast<const uint4 *>(row + 16 * i) : make_uint4(0, 0, 0, 0);
  uint32_t words[4] = {};
  for (int b = 0; b < 16; ++b)
    if (16 * i + b < size) words[b / 4] |= uint32_t{row[16 * i + b]} << (b % 4 * 8);
  return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void put_piece(const Packed &to, int64_t row, int64_t i, const uint4 &piece) {
  *reinterpret_cast<uint4 *>(to.lines + packed_at(to.places, row, 16 * i)) = piece;
}

/// The sum over the lanes up to this one's.
__device__ __forceinline__ int32_t sum_to_lane(int32_t own) {
  const uint32_t lane = threadIdx.x % 32;
  for (int by = 1; by < 32; by *= 2) {
    const int32_t before = __shfl_up_sync(0xFFFFFFFFu, own, by);
    if (lane >= by) own += before;
  }
  return own;
}

/// The place of the l-th row that is there, or -1; `seen` becomes the number of rows there when there are no more than l. All lanes of a warp.
__device__ __forceinline__ int64_t place_of(const Rows &rows, int64_t l, int64_t &seen) {
  const uint32_t lane = threadIdx.x % 32;
  seen = 0;
  for (uint32_t segment = 0; segment < rows.segments; segment += 32) {
    const int32_t own = segment + lane < rows.segments ? static_cast<int32_t>(rows.size(segment + lane)) : 0;
    const int32_t sum = sum_to_lane(own);
    const uint32_t holders = __ballot_sync(0xFFFFFFFFu, seen + sum > l);
    if (holders != 0) {
      const int at = __ffs(holders) - 1;
      return (segment + at) * rows.distance() + l - seen - __shfl_sync(0xFFFFFFFFu, sum - own, at);
    }
    seen += __shfl_sync(0xFFFFFFFFu, sum, 31);
  }
  return -1;
}

/// Rows that all meet one matrix, in order. Blocks (x, y): rows x, x + gridDim.x ..., and a share of their pieces.
template <bool Aligned>
__global__ void __launch_bounds__(256) pack_all(Packing from, Rows rows, Packed to) {
  let_successor_start();
  after_predecessor();
  const bool simple = rows.segments == 1; // then places are known before it is known which of them have rows
  const int64_t end = from.first + from.window < rows.capacity() ? from.window : rows.capacity() - from.first;
  const int64_t thread = blockIdx.y * 256 + threadIdx.x, threads = gridDim.y * 256;
  int64_t seen;
  for (int64_t row = blockIdx.x; row < end; row += gridDim.x) {
    const int64_t place = simple ? from.first + row : place_of(rows, from.first + row, seen);
    if (place < 0) break;
    const float scale = thread < from.scales ? from.xs[place * from.scales + thread] : 0;
    for (int64_t i = thread; i < 8 * to.blocks; i += pieces_at_once * threads) {
      uint4 pieces[pieces_at_once];
#pragma unroll
      for (int n = 0; n < pieces_at_once; ++n) pieces[n] = piece_of<Aligned>(from.x + place * from.row_bytes, from.row_bytes, i + n * threads);
      if (simple && place >= rows.size(0)) break;
#pragma unroll
      for (int n = 0; n < pieces_at_once; ++n)
        if (i + n * threads < 8 * to.blocks) put_piece(to, row, i + n * threads, pieces[n]);
    }
    if (simple && place >= rows.size(0)) break;
    if (thread < from.scales) to.scales[thread * to.places + row] = scale;
    for (int64_t i = thread + threads; i < from.scales; i += threads) to.scales[i * to.places + row] = from.xs[place * from.scales + i];
    if (thread == 0) to.targets[row] = static_cast<int32_t>(place);
  }
  if (blockIdx.x == gridDim.x - 1 && blockIdx.y == 0 && threadIdx.x < 32) {
    if (simple)
      seen = rows.size(0);
    else if (place_of(rows, from.first + from.window, seen) >= 0)
      seen = from.first + from.window;
    const int64_t count = seen - from.first < from.window ? seen - from.first : from.window;
    if (threadIdx.x == 0) {
      to.groups[0] = {0, static_cast<int32_t>(count < 0 ? 0 : count)};
      to.groups[1] = {0, 0};
    }
  }
}

constexpr int pack_threads = 1024, pack_listed = 256, ids_at_once = 10, ids_of_all = ids_at_once * pack_threads;

/// Rows that each meet the matrix of their expert, or none. Every block counts all rows of the window, so that it knows where those of its share
/// go: in ascending order within each matrix. Rows that meet none are counted where they get zeros.
template <bool Aligned>
__global__ void __launch_bounds__(pack_threads) pack_chosen(Packing from, Rows rows, Choice choice, Packed to) {
  __shared__ int32_t total[most_matrices + 1], next[most_matrices + 1], sizes[most_matrices]; // of matrices, and of segments
  __shared__ int32_t packed[pack_listed], source[pack_listed];
  __shared__ uint32_t listed;
  __shared__ uint16_t counted[ids_of_all]; // ids that count, of those that are looked at
  let_successor_start();
  after_predecessor();
  const int32_t none = choice.experts;
  const uint32_t lane = threadIdx.x % 32;
  const int64_t end = from.first + from.window < rows.capacity() ? from.first + from.window : rows.capacity();
  const int64_t share = ceil_div(end - from.first, static_cast<int64_t>(gridDim.x)), begin = from.first + blockIdx.x * share;
  const int64_t share_end = begin + share < end ? begin + share : end;
  const uint32_t distance = static_cast<uint32_t>(rows.distance());
  for (int i = threadIdx.x; i <= none; i += pack_threads) total[i] = next[i] = 0;
  for (uint32_t i = threadIdx.x; i < rows.segments; i += pack_threads) sizes[i] = static_cast<int32_t>(rows.size(i));
  /// of a row that has this id, if it is there
  const auto matrix_of = [&](bool there, int32_t id) {
    const int64_t expert = int64_t{id} - choice.first;
    const bool owned = expert >= 0 && expert < choice.experts;
    if (!there || !(owned || choice.zeros)) return -1;
    return owned ? static_cast<int32_t>(expert) : none;
  };
  // Most ids are somebody else's: those that count are listed first, so that whole warps have something to count.
  for (int64_t base = from.first; base < end; base += ids_of_all) {
    if (threadIdx.x == 0) listed = 0;
    int32_t ids[ids_at_once];
#pragma unroll
    for (int n = 0; n < ids_at_once; ++n) {
      const int64_t at = base + n * pack_threads + threadIdx.x;
      ids[n] = at < end ? choice.ids[at] : 0;
    }
    uint32_t some = 0;
#pragma unroll
    for (int n = 0; n < ids_at_once; ++n)
      if (matrix_of(base + n * pack_threads + threadIdx.x < end, ids[n]) >= 0) some |= 1u << n;
    __syncthreads();
    int32_t place = sum_to_lane(__popc(some));
    int32_t first = 0;
    if (lane == 31) first = atomicAdd(&listed, place);
    place += __shfl_sync(0xFFFFFFFFu, first, 31) - __popc(some);
    for (; some != 0; some &= some - 1) counted[place++] = static_cast<uint16_t>((__ffs(some) - 1) * pack_threads + threadIdx.x);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i - lane < listed; i += pack_threads) {
      const bool mine = i < listed;
      const uint32_t at = static_cast<uint32_t>(base) + (mine ? counted[i] : 0);
      const int32_t matrix = matrix_of(mine && at % distance < sizes[at / distance], choice.ids[at]), before = at < begin ? 1 : 0;
      const uint32_t alike = __match_any_sync(0xFFFFFFFFu, matrix * 2 + before);
      if (matrix >= 0 && __ffs(alike) - 1 == lane) {
        atomicAdd(&total[matrix], __popc(alike));
        if (before != 0) atomicAdd(&next[matrix], __popc(alike));
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < 32) {
    int32_t base = 0;
    for (int32_t first = 0; first <= none; first += 32) {
      const int32_t matrix = first + static_cast<int32_t>(lane), count = matrix <= none ? total[matrix] : 0, room = (count + 7) / 8 * 8;
      const int32_t sum = sum_to_lane(room);
      const int32_t start = base + sum - room;
      if (matrix <= none) {
        next[matrix] += start;
        if (blockIdx.x == 0) to.groups[matrix] = {start, count};
      }
      base += __shfl_sync(0xFFFFFFFFu, sum, 31);
    }
  }
  for (int64_t list = begin; list < share_end; list += pack_listed) {
    __syncthreads();
    if (threadIdx.x < 32) {
      int owned = 0;
      for (int first = 0; first < pack_listed && list + first < share_end; first += 32) {
        const uint32_t at = static_cast<uint32_t>(list + first) + lane;
        const int32_t matrix = at < share_end ? matrix_of(at % distance < sizes[at / distance], choice.ids[at]) : -1;
        const uint32_t alike = __match_any_sync(0xFFFFFFFFu, matrix), below = (1u << lane) - 1;
        const int32_t row = matrix < 0 ? 0 : next[matrix] + __popc(alike & below);
        __syncwarp();
        if (matrix >= 0) {
          if (__ffs(alike) - 1 == lane) next[matrix] = row + __popc(alike);
          to.targets[row] = static_cast<int32_t>(at);
        }
        const bool own = matrix >= 0 && matrix != none;
        const uint32_t owners = __ballot_sync(0xFFFFFFFFu, own);
        if (own) {
          packed[owned + __popc(owners & below)] = row;
          source[owned + __popc(owners & below)] = static_cast<int32_t>(choice.source(at));
        }
        owned += __popc(owners);
        __syncwarp();
      }
      if (lane == 0) listed = owned;
    }
    __syncthreads();
    const uint32_t of_row = static_cast<uint32_t>(8 * to.blocks), pieces = listed * of_row, scales = static_cast<uint32_t>(from.scales);
    for (uint32_t first = threadIdx.x; first < pieces; first += pieces_at_once * pack_threads) {
      uint4 got[pieces_at_once];
#pragma unroll
      for (int n = 0; n < pieces_at_once; ++n) {
        const uint32_t i = first + n * pack_threads, row = i / of_row;
        if (i < pieces) got[n] = piece_of<Aligned>(from.x + source[row] * from.row_bytes, from.row_bytes, i - row * of_row);
      }
#pragma unroll
      for (int n = 0; n < pieces_at_once; ++n) {
        const uint32_t i = first + n * pack_threads, row = i / of_row;
        if (i < pieces) put_piece(to, packed[row], i - row * of_row, got[n]);
      }
    }
    for (uint32_t first = threadIdx.x; first < listed * scales; first += pieces_at_once * pack_threads) {
      float got[pieces_at_once];
#pragma unroll
      for (int n = 0; n < pieces_at_once; ++n) {
        const uint32_t i = first + n * pack_threads, row = i / scales;
        if (i < listed * scales) got[n] = from.xs[source[row] * from.scales + i - row * scales];
      }
#pragma unroll
      for (int n = 0; n < pieces_at_once; ++n) {
        const uint32_t i = first + n * pack_threads, row = i / scales;
        if (i < listed * scales) to.scales[(i - row * scales) * to.places + packed[row]] = got[n];
      }
    }
  }
}

/// With as much shared memory as the kernels that follow: a processor that had to be divided anew would have to be empty first.
template <class Kernel>
cudaError_t prefer_shared(Kernel *kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

/// `choice` of all rows: no_choice.
inline cudaError_t pack_rows(const Call &c, const Packing &from, const Rows &rows, const Choice &choice, const Packed &to) {
  const bool aligned = from.row_bytes % 16 == 0;
  const int64_t window = from.window < rows.capacity() ? from.window : rows.capacity();
  if (choice.ids != nullptr && rows.segments > most_matrices) return cudaErrorInvalidValue;
  if (choice.ids == nullptr) {
    const uint32_t across = static_cast<uint32_t>(window < 512 ? window : 512);
    const int64_t pieces = ceil_div(8 * to.blocks, int64_t{256}), wanted = ceil_div(int64_t{2 * c.processors}, int64_t{across});
    const dim3 blocks(across, static_cast<uint32_t>(pieces < wanted ? pieces : wanted));
    const auto kernel = aligned ? pack_all<true> : pack_all<false>;
    if (const cudaError_t e = prefer_shared(kernel)) return e;
    return launch(kernel, blocks, dim3(256), 0, c, from, rows, to);
  }
  const dim3 blocks(static_cast<uint32_t>(window < c.processors ? window : c.processors));
  const auto kernel = aligned ? pack_chosen<true> : pack_chosen<false>;
  if (const cudaError_t e = prefer_shared(kernel)) return e;
  return launch(kernel, blocks, dim3(pack_threads), 0, c, from, rows, choice, to);
}

}  // namespace s3
