// Instructions of Hopper that CUDA C++ has no words for: barriers in shared memory, bulk copies, and what warpgroup products need.
// PTX ISA 9.0; compiled for sm_90a only.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace s3::hopper {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- barriers: phases flip when `arrivals` have arrived and all announced bytes have landed --------------------------------------

struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(uint32_t arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory"); }
  __device__ __forceinline__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory"); }
  /// arrives, and announces bytes that copies will bring
  __device__ __forceinline__ void expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes) : "memory");
  }
  /// announces bytes without arriving
  __device__ __forceinline__ void announce(uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(bytes) : "memory");
  }
  /// arrives at the barrier in the same place of another block of the cluster
  __device__ __forceinline__ void arrive_at(uint32_t block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
            shared_address(this)),
        "r"(block)
        : "memory");
  }
  __device__ __forceinline__ bool passed(uint32_t phase) const {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(phase)
        : "memory");
    return done != 0;
  }
  /// waits for the end of the phase of this parity
  __device__ __forceinline__ void wait(uint32_t phase) const {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(shared_address(this)), "r"(phase)
        : "memory");
  }
};
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
/// The arrival of this thread once its cp.async copies so far have landed; not counted beforehand.
__device__ __forceinline__ void arrive_after_copies(Barrier &b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&b)) : "memory");
}

// --- copies ---------------------------------------------------------------------------------------------------------------------

/// Cache hints for copies: of what is read once, of what is read again soon, and of what many blocks read.
constexpr uint64_t read_once = 0x12F0000000000000, read_again = 0x1000000000000000, read_often = 0x14F0000000000000;

/// `bytes` (a multiple of 16, both addresses too) from global to shared memory, counted by the barrier.
__device__ __forceinline__ void bulk_copy(void *to, const void *from, uint32_t bytes, Barrier &b, uint64_t hint) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&b)), "l"(hint)
               : "memory");
}
/// The same to the same place of every block of the cluster in `blocks`, a bit for each; each one's own barrier counts what it gets.
__device__ __forceinline__ void bulk_copy_to(uint16_t blocks, void *to, const void *from, uint32_t bytes, Barrier &b, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&b)), "h"(blocks), "l"(hint)
      : "memory");
}
/// The box of a tensor map at (x, y): x counts elements of the inner axis.
__device__ __forceinline__ void tensor_copy(void *to, const CUtensorMap *map, int32_t x, int32_t y, Barrier &b, uint64_t hint) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(x), "r"(y), "r"(shared_address(&b)), "l"(hint)
               : "memory");
}
/// The same to the same place of every block of the cluster in `blocks`.
__device__ __forceinline__ void tensor_copy_to(uint16_t blocks, void *to, const CUtensorMap *map, int32_t x, int32_t y, Barrier &b, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::
          "r"(shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(&b)), "h"(blocks), "l"(hint)
      : "memory");
}
/// Fetches a map that copies will soon use.
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
/// Brings the line at an address into the L2 cache.
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory"); }
/// 16 bytes by this thread; zeros when `there` is false.
__device__ __forceinline__ void copy_16(void *to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
/// Makes what this thread wrote to shared memory by ordinary stores visible to copies and warpgroup products.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// Orders ordinary accesses of this thread to memory of the device and copies.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- memory of the device that blocks share ---------------------------------------------------------------------------------------

/// Who loads `value` by load_acquire sees what this thread, and those that it has met, wrote before.
__device__ __forceinline__ void store_release(uint32_t *to, uint32_t value) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory"); }
__device__ __forceinline__ uint32_t load_acquire(const uint32_t *from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

/// The value before the addition; release and acquire.
__device__ __forceinline__ uint32_t add_at(uint32_t *to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

// --- clusters -------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t block_of_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// The number of this block's cluster, and how many there are.
__device__ __forceinline__ uint32_t cluster_of_block() {
  uint32_t number;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
  return number;
}
__device__ __forceinline__ uint32_t clusters() {
  uint32_t count;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return count;
}
/// All threads of all blocks of the cluster meet; what they wrote to each other's shared memory before is seen after.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/// The same in two halves, of which the first tells nothing of what was written but barriers that were published.
__device__ __forceinline__ void arrive_with_barriers() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
/// The address in a block of the cluster of what this block has at `address`.
__device__ __forceinline__ uint32_t address_in(uint32_t block, uint32_t address) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
/// 16 bytes of another block's shared memory.
__device__ __forceinline__ uint4 load_in_cluster(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// --- warpgroup products -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
/// Keeps the compiler from moving uses of an accumulator across a wait.
__device__ __forceinline__ void pin(float &x) { asm volatile("" : "+f"(x)::"memory"); }

/// A value that all lanes of the warp have, which the compiler then knows.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }
/// The same, in a register of the warp, of which descriptors are made: the instruction gives it there.
__device__ __forceinline__ uint32_t of_warp(uint32_t value) { return __reduce_or_sync(0xFFFFFFFFu, value); }

/// A value of another lane.
template <class T>
__device__ __forceinline__ T from_lane(const T &own, int lane) {
  static_assert(sizeof(T) % 4 == 0);
  struct Words { uint32_t at[sizeof(T) / 4]; } words = reinterpret_cast<const Words &>(own);
#pragma unroll
  for (uint32_t &word : words.at) word = __shfl_sync(0xFFFFFFFFu, word, lane);
  return reinterpret_cast<const T &>(words);
}

enum class Swizzle : uint32_t { none = 0, b128 = 1, b64 = 2, b32 = 3 };
/// Matrix descriptor of shared memory at an address; offsets in bytes (leading: between columns of core matrices, stride: between groups of 8 rows).
__device__ __forceinline__ uint64_t matrix(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>((leading & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3FFFF) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

/// That of lines of 128 bytes, with pieces exchanged, in two words: the lower one counts sixteens of bytes from lines_word on, which is address 0.
constexpr uint32_t lines_word = 1 << 16;
__device__ __forceinline__ uint64_t of_lines(uint32_t lower) { return uint64_t{1024 >> 4 | static_cast<uint32_t>(Swizzle::b128) << 30} << 32 | lower; }

template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
__device__ __forceinline__ void pin(int32_t &x) { asm volatile("" : "+r"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t &x) { asm volatile("" : "+r"(x)); }
/// Barrier `id` (1 to 15) of some of the block's warps.
__device__ __forceinline__ void meet(uint32_t id, uint32_t threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace s3::hopper
