// The contract between the CUDA driver of the runtime, the table of a program and its kernels.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "step3.h"

namespace s3 {

/// Bytes that start at zero and that every kernel leaves at zero: tickets and arrival counters of its blocks.
constexpr uint32_t counter_bytes = 64 << 10;

/// What a kernel's launcher gets on the host. All addresses are of the device.
struct Call {
  void *const *args;        // in, inout, out: the order of the schedule's step
  const s3_head *heads;     // one a segment; rows of segment i are i*stride .. i*stride + heads[i].rows - 1
  uint32_t segments, stride;
  uint8_t *scratch;         // of the plan's size, holding anything; another kernel's once this one has ended
  uint32_t *counters;       // counter_bytes
  cudaStream_t stream;
  int processors;           // streaming multiprocessors of the device
  const int64_t *dims;      // of the device: values of the graph's symbols, in their order, which change between launches of what was captured
};

/// Enqueues one kernel. Called once, while the segment is captured: sizes that vary are read from the headers on the device.
using Launcher = cudaError_t (*)(const Call &);

/// What a kernel on the device knows of its launch.
struct Launched {
  const s3_head *heads;
  uint32_t segments, stride;
  const int64_t *dims;
};
inline Launched launched(const Call &c) { return {c.heads, c.segments, c.stride, c.dims}; }

struct Entry {
  const char *name;
  uint64_t scratch;
  Launcher launch;
};

/// An argument of the schedule as the pointer that a kernel wants of it; anything else as it is.
template <typename Parameter, typename Argument>
Parameter parameter(const Argument &argument) {
  if constexpr (std::is_pointer_v<Parameter> && std::is_same_v<Argument, void *>) return static_cast<Parameter>(argument);
  else return argument;
}

/// Enqueues `kernel` so that it may start while its predecessor drains. It must call after_predecessor() before it reads what a predecessor
/// wrote, or writes anything; weights, constants and KV pages of earlier rounds may be read before.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, uint32_t shared_bytes, const Call &call, const Arguments &...arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return cudaSuccess;
  if (shared_bytes > 48 << 10) {
    const cudaError_t raised = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (raised != cudaSuccess) return raised;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = call.stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, parameter<Parameters>(arguments)...);
}

#ifdef __CUDACC__
/// Waits until the grids before this one have ended and their writes are seen. Nothing on processors without such launches.
__device__ __forceinline__ void after_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Rows of all segments together, and what the graph's symbol of that number is.
__device__ __forceinline__ int64_t all_tokens(const Launched &c) {
  int64_t tokens = 0;
  for (uint32_t i = 0; i < c.segments; ++i) tokens += c.heads[i].rows;
  return tokens;
}
__device__ __forceinline__ int64_t size_of(const Launched &c, uint32_t symbol) { return c.dims[symbol]; }

/// Lets the next grid be scheduled onto processors that this one leaves; what it reads of us waits for our end all the same.
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
#endif

}  // namespace s3
