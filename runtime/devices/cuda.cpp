// An NVIDIA GPU as a device. Part of each program for it, and found there by the runtime: the runtime itself needs no CUDA.
//
// One stream does everything in order. The launches between two communication steps are one CUDA graph, captured once. Memory that other ranks
// write lies in the host's memory, mapped into the GPU's addresses, so that ranks on other devices reach it through any transport.
#include <cuda_runtime.h>

#include <chrono>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "error.h"
#include "host_memory.h"
#include "json.h"
#include "launch.h"

namespace s3 {

extern const Entry entries[];
extern const std::uint32_t entry_count;
/// lowest compute capability of the kernels, and whether only that major version runs them
extern const int program_major;
extern const bool program_exact;

namespace {

thread_local std::string open_error;

/// Throws a Failure with what CUDA says.
void check(cudaError_t code, const char *doing) {
  if (code == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  const bool memory = code == cudaErrorMemoryAllocation;
  fail(memory ? exit_input : exit_internal, doing, ": ", cudaGetErrorString(code), memory ? "; use more ranks or a smaller batch or context" : "");
}

struct Segment {
  cudaGraphExec_t graph = nullptr;
  ~Segment() {
    if (graph) cudaGraphExecDestroy(graph);
  }
};

struct Device {
  std::string error;
  int ordinal = 0, processors = 0;
  std::uint64_t scratch_bytes = 0;
  cudaStream_t stream = nullptr;
  void *scratch = nullptr, *counters = nullptr;
  std::vector<void *> memory;          // of the GPU
  std::vector<HostMemory> reachable;   // of the host, mapped
  std::vector<std::unique_ptr<Segment>> segments;
  std::unordered_map<std::string, std::uint32_t> kernels;
  // events are handed out in turn; one that was handed out again had happened long ago, since a round has fewer steps than there are events
  std::vector<cudaEvent_t> events;
  std::uint64_t recorded = 0;

  ~Device() {
    if (stream) cudaStreamSynchronize(stream);
    segments.clear();
    for (const cudaEvent_t e : events) cudaEventDestroy(e);
    for (void *m : memory) cudaFree(m);
    for (const HostMemory &m : reachable) {
      cudaHostUnregister(m.address);
      m.unmap();
    }
    if (stream) cudaStreamDestroy(stream);
  }
  void *alloc(std::uint64_t bytes, const char *what) {
    void *m = nullptr;
    check(cudaMalloc(&m, std::max<std::uint64_t>(bytes, 1)), what);
    memory.push_back(m);
    check(cudaMemsetAsync(m, 0, bytes, stream), what);
    return m;
  }
  bool isHost(s3_span s) const {
    for (const HostMemory &m : reachable)
      if (m.holds(s.mem + s.off, s.bytes)) return true;
    return false;
  }
};

Device &of(s3_dev *dev) { return *reinterpret_cast<Device *>(dev); }
void *at(s3_span s) { return reinterpret_cast<std::uint8_t *>(s.mem) + s.off; }

/// What every function of the table does around its work: the device is this thread's, and failures become codes.
template <class Work>
int guarded(s3_dev *dev, const Work &work) {
  Device &d = of(dev);
  try {
    check(cudaSetDevice(d.ordinal), "GPU");
    work(d);
    return 0;
  } catch (const Failure &e) {
    d.error = e.what();
    return e.code;
  } catch (const std::exception &e) {
    d.error = e.what();
    return exit_internal;
  }
}

void open(int ordinal, const char *options, s3_dev **out) {
  auto d = std::make_unique<Device>();
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
    fail(exit_input, "no NVIDIA GPU (", cudaGetErrorString(cudaGetLastError()), "); run on a machine with one, or compile for another target");
  d->ordinal = ordinal % count;
  check(cudaSetDevice(d->ordinal), "GPU");
  cudaDeviceProp card{};
  check(cudaGetDeviceProperties(&card, d->ordinal), "GPU");
  if (program_exact ? card.major != program_major : card.major < program_major)
    fail(exit_input, "the program is for compute capability ", program_major, program_exact ? ".0" : ".0 or newer", "; GPU ", d->ordinal, " (", card.name, ") has ",
         card.major, ".", card.minor, "; compile for cuda:", card.major == 9 ? "sm_90a" : "sm_80");
  d->processors = card.multiProcessorCount;
  for (std::uint32_t i = 0; i < entry_count; i++) {
    d->scratch_bytes = std::max(d->scratch_bytes, entries[i].scratch);
    d->kernels.emplace(entries[i].name, i);
  }
  const JsonFile json = JsonFile::parse(options && *options ? options : "{}", "device options");
  if (const Json *kernels = json.root().find("kernels"))
    for (const auto &[name, facts] : kernels->members()) {
      const auto found = d->kernels.find(name);
      if (found == d->kernels.end() || entries[found->second].scratch != static_cast<std::uint64_t>(facts.whole()))
        fail(exit_input, "kernel '", name, "' is missing or not the one of manifest.json; the program was built from another bundle, build it again");
    }
  check(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "stream");
  d->scratch = d->alloc(d->scratch_bytes, "scratch memory");
  d->counters = d->alloc(counter_bytes, "counters");
  d->events.resize(4096);
  for (cudaEvent_t &e : d->events) check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "event");
  check(cudaStreamSynchronize(d->stream), "GPU");
  *out = reinterpret_cast<s3_dev *>(d.release());
}

int cudaDevOpen(int ordinal, const char *, const char *options, s3_dev **out) {
  try {
    open(ordinal, options, out);
    return 0;
  } catch (const Failure &e) {
    open_error = e.what();
    return e.code;
  } catch (const std::exception &e) {
    open_error = e.what();
    return exit_internal;
  }
}

void cudaDevClose(s3_dev *dev) {
  cudaSetDevice(of(dev).ordinal);
  delete &of(dev);
}

int cudaDevAlloc(s3_dev *dev, std::uint64_t bytes, std::uint64_t, std::uint32_t shared, s3_span *out) {
  return guarded(dev, [&](Device &d) {
    if (!shared) {
      *out = {reinterpret_cast<std::uint64_t>(d.alloc(bytes, "memory of the GPU")), 0, bytes};
      return;
    }
    HostMemory m = HostMemory::map(bytes, true);
    if (const cudaError_t code = cudaHostRegister(m.address, m.bytes, cudaHostRegisterMapped | cudaHostRegisterPortable); code != cudaSuccess) {
      m.unmap();
      check(code, "mapping memory of the host");
    }
    d.reachable.push_back(m);
    void *seen = nullptr;
    check(cudaHostGetDevicePointer(&seen, m.address, 0), "mapping memory of the host");
    if (seen != m.address) fail(exit_input, "GPU ", d.ordinal, " does not see the host's memory at the host's addresses; choose another transport");
    *out = {reinterpret_cast<std::uint64_t>(m.address), 0, bytes};
  });
}

void *cudaDevHost(s3_dev *dev, s3_span span) { return of(dev).isHost(span) ? at(span) : nullptr; }

// the one queue of this device is its stream
int cudaDevQueue(s3_dev *dev, s3_queue **out) {
  *out = reinterpret_cast<s3_queue *>(dev);
  return 0;
}
int cudaDevCopy(s3_queue *queue, s3_span dst, s3_span src, std::uint64_t bytes) {
  return guarded(reinterpret_cast<s3_dev *>(queue), [&](Device &d) { check(cudaMemcpyAsync(at(dst), at(src), bytes, cudaMemcpyDefault, d.stream), "copying"); });
}
int cudaDevRead(s3_dev *dev, void *dst, s3_span src) {
  return guarded(dev, [&](Device &d) {
    if (d.isHost(src)) {
      std::memcpy(dst, at(src), src.bytes);
      return;
    }
    check(cudaMemcpyAsync(dst, at(src), src.bytes, cudaMemcpyDeviceToHost, d.stream), "reading");
    check(cudaStreamSynchronize(d.stream), "reading");
  });
}
int cudaDevWrite(s3_dev *dev, s3_span dst, const void *src) {
  return guarded(dev, [&](Device &d) {
    if (d.isHost(dst)) std::memcpy(at(dst), src, dst.bytes);
    // the bytes are taken before the call ends, and arrive in the stream's order
    else check(cudaMemcpyAsync(at(dst), src, dst.bytes, cudaMemcpyHostToDevice, d.stream), "writing");
  });
}

int cudaDevPrepare(s3_dev *dev, const s3_launch *launches, std::uint32_t n, s3_segment **out) {
  return guarded(dev, [&](Device &d) {
    auto segment = std::make_unique<Segment>();
    std::vector<void *> args;
    check(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeThreadLocal), "capturing launches");
    std::string failed;
    cudaError_t why = cudaSuccess;
    for (std::uint32_t i = 0; i < n && failed.empty(); i++) {
      const s3_launch &from = launches[i];
      args.clear();
      for (std::uint32_t a = 0; a < from.nargs; a++) args.push_back(at(from.args[a]));
      const Call call = {args.data(),     static_cast<const s3_head *>(at(from.heads)),  from.segments,
                         from.stride,     static_cast<std::uint8_t *>(d.scratch),        static_cast<std::uint32_t *>(d.counters),
                         d.stream,        d.processors};
      why = from.kernel < entry_count ? entries[from.kernel].launch(call) : cudaErrorInvalidValue;
      if (why != cudaSuccess) failed = from.kernel < entry_count ? entries[from.kernel].name : "an unknown kernel";
    }
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(d.stream, &graph);
    const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, decltype(&cudaGraphDestroy)> owned(graph, &cudaGraphDestroy);
    if (!failed.empty()) fail(exit_internal, "kernel ", failed, " cannot be launched: ", cudaGetErrorString(why));
    check(ended, "capturing launches");
    check(cudaGraphInstantiate(&segment->graph, graph, 0), "preparing launches");
    d.segments.push_back(std::move(segment));
    *out = reinterpret_cast<s3_segment *>(d.segments.back().get());
  });
}

int cudaDevSubmit(s3_queue *queue, s3_segment *segment, s3_event *done) {
  return guarded(reinterpret_cast<s3_dev *>(queue), [&](Device &d) {
    check(cudaGraphLaunch(reinterpret_cast<Segment *>(segment)->graph, d.stream), "launching");
    check(cudaEventRecord(d.events[d.recorded % d.events.size()], d.stream), "launching");
    *done = ++d.recorded;
  });
}

int cudaDevWait(s3_dev *dev, s3_event event, std::uint32_t ms) {
  return guarded(dev, [&](Device &d) {
    if (event == 0 || event + d.events.size() <= d.recorded) return;
    const cudaEvent_t e = d.events[(event - 1) % d.events.size()];
    if (ms == 0) return check(cudaEventSynchronize(e), "running kernels");
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
    for (;;) {
      const cudaError_t state = cudaEventQuery(e);
      if (state != cudaErrorNotReady) return check(state, "running kernels");
      if (std::chrono::steady_clock::now() > end) fail(exit_peer, "kernels were not done after ", ms, " ms");
    }
  });
}

int cudaDevShare(s3_dev *dev, s3_span span, void *token, std::uint32_t *bytes) {
  return describeShared(of(dev).reachable, span, token, bytes, of(dev).error);
}

int cudaDevKernel(s3_dev *dev, const char *name, std::uint32_t *index) {
  return guarded(dev, [&](Device &d) {
    const auto found = d.kernels.find(name);
    if (found == d.kernels.end()) fail(exit_input, "the program has no kernel '", name, "'; it was built from another bundle, build it again");
    *index = found->second;
  });
}

const char *cudaDevError(s3_dev *dev) { return dev ? of(dev).error.c_str() : open_error.c_str(); }

}  // namespace
}  // namespace s3

extern "C" __attribute__((visibility("default"))) const s3_device *s3_device_v1(void) {
  using namespace s3;
  static const s3_device table = {S3_ABI,       0,              cudaDevOpen,   cudaDevClose, cudaDevAlloc, cudaDevHost,   cudaDevQueue, cudaDevCopy,
                                  cudaDevRead,  cudaDevWrite,   cudaDevPrepare, cudaDevSubmit, cudaDevWait, cudaDevShare, cudaDevKernel, cudaDevError};
  return &table;
}
