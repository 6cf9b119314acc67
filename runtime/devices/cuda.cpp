// An NVIDIA GPU as a device. Part of each program for it, and found there by the runtime: the runtime itself needs no CUDA.
//
// One stream does everything in order. The launches between two communication steps are one CUDA graph, captured once. Memory that other ranks
// write lies in the host's memory, mapped into the GPU's addresses, so that ranks on other devices reach it through any transport; or, when
// all ranks are on GPUs, in the GPU's own. Then each further queue is a stream for the messages to one peer: its copy engine moves them, and no
// multiprocessor is taken from the kernels.
#include <cuda.h>
#include <cuda_runtime.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <thread>
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

struct Device;
struct Queue {
  Device *device;
  cudaStream_t stream;
};

/// What share() writes. A handle is of a whole allocation, for another process; its address is for this one.
struct Shared {
  char magic[8];
  cudaIpcMemHandle_t handle;
  std::uint64_t address, offset, bytes;
};
using WaitValue = decltype(&cuStreamWaitValue64);  // found at run time: only the runtime library is linked
constexpr char magic[8] = {'s', '3', 'c', 'u', 'd', 'a', '0', '1'};
static_assert(sizeof(Shared) <= S3_TOKEN);

struct Device {
  std::string error;
  int ordinal = 0, processors = 0;
  std::uint64_t scratch_bytes = 0;
  bool direct = false;                 // shared memory is the GPU's
  WaitValue waitFor = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<std::unique_ptr<Queue>> queues;  // the first is `stream`
  void *scratch = nullptr, *counters = nullptr;
  std::vector<void *> memory;          // of the GPU
  std::vector<HostMemory> reachable;   // of the host, mapped
  std::vector<s3_span> shared;         // of the GPU, whole allocations
  std::map<std::string, void *> mapped;  // of GPUs of other processes, by handle
  std::vector<std::unique_ptr<Segment>> segments;
  std::unordered_map<std::string, std::uint32_t> kernels;
  // events are handed out in turn; one that was handed out again had happened long ago, since a round has fewer steps than there are events
  std::vector<cudaEvent_t> events;
  std::uint64_t recorded = 0;

  ~Device() {
    if (stream) cudaStreamSynchronize(stream);
    for (const auto &q : queues) cudaStreamSynchronize(q->stream);
    segments.clear();
    for (const cudaEvent_t e : events) cudaEventDestroy(e);
    // a peer may still have our shared memory open: that goes with the process
    for (const auto &[handle, m] : mapped) cudaIpcCloseMemHandle(m);
    for (void *m : memory) cudaFree(m);
    for (const HostMemory &m : reachable) {
      cudaHostUnregister(m.address);
      m.unmap();
    }
    for (std::size_t i = 1; i < queues.size(); i++) cudaStreamDestroy(queues[i]->stream);
    if (stream) cudaStreamDestroy(stream);
  }
  void *alloc(std::uint64_t bytes, const char *what) {
    void *m = nullptr;
    check(cudaMalloc(&m, std::max<std::uint64_t>(bytes, 1)), what);
    memory.push_back(m);
    clear(m, bytes, what);
    return m;
  }
  /// Memory of the GPU that others write.
  void *share(std::uint64_t bytes) {
    constexpr std::uint64_t piece = 2 << 20;  // what another process maps, so that nothing else of ours is in it
    bytes = (std::max<std::uint64_t>(bytes, 1) + piece - 1) / piece * piece;
    void *m = nullptr;
    check(cudaMalloc(&m, bytes), "memory of the GPU for exchanges");
    shared.push_back({reinterpret_cast<std::uint64_t>(m), 0, bytes});
    clear(m, bytes, "memory of the GPU for exchanges");
    return m;
  }
  /// At once: other streams, and peers, do not wait for this one.
  void clear(void *m, std::uint64_t bytes, const char *what) const {
    check(cudaMemsetAsync(m, 0, bytes, stream), what);
    check(cudaStreamSynchronize(stream), what);
  }
  bool isHost(s3_span s) const {
    for (const HostMemory &m : reachable)
      if (m.holds(s.mem + s.off, s.bytes)) return true;
    return false;
  }
};

Device &of(s3_dev *dev) { return *reinterpret_cast<Device *>(dev); }
Queue &of(s3_queue *queue) { return *reinterpret_cast<Queue *>(queue); }
void *at(s3_span s) { return reinterpret_cast<std::uint8_t *>(s.mem) + s.off; }

/// What every function of the table does around its work: the device is this thread's, and failures become codes.
template <class Work>
int guarded(Device &d, const Work &work) {
  return caught(d.error, [&] {
    check(cudaSetDevice(d.ordinal), "GPU");
    work(d);
  });
}

template <class Work>
int guarded(s3_dev *dev, const Work &work) {
  return guarded(of(dev), work);
}

/// The driver's function by which a stream waits for a word of memory. It is tried once: not every system has it.
WaitValue findWait(cudaStream_t stream, void *zero, int ordinal) {
  void *found = nullptr;
  cudaDriverEntryPointQueryResult how = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t code = cudaGetDriverEntryPointByVersion("cuStreamWaitValue64", &found, 12000, cudaEnableDefault, &how);
#else
  const cudaError_t code = cudaGetDriverEntryPoint("cuStreamWaitValue64", &found, cudaEnableDefault, &how);
#endif
  const auto wait = reinterpret_cast<WaitValue>(found);
  if (code != cudaSuccess || how != cudaDriverEntryPointSuccess ||
      wait(stream, reinterpret_cast<CUdeviceptr>(zero), 0, CU_STREAM_WAIT_VALUE_GEQ) != CUDA_SUCCESS)
    fail(exit_input, "GPU ", ordinal, " cannot wait for its memory to change; use --transport shm");
  return wait;
}

void open(int ordinal, const char *options, s3_dev **out) {
  auto d = std::make_unique<Device>();
  // a stream that waits for a peer must not hold up another because the two share a channel to the GPU
  ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
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
  if (const Json *v = json.root().find("exchange")) d->direct = v->text() == "device";
  const Json *timing = json.root().find("timing");
  check(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "stream");
  d->scratch = d->alloc(d->scratch_bytes, "scratch memory");
  d->counters = d->alloc(counter_bytes, "counters");
  d->events.resize(4096);
  for (cudaEvent_t &e : d->events) check(cudaEventCreateWithFlags(&e, timing && timing->flag() ? cudaEventDefault : cudaEventDisableTiming), "event");
  if (d->direct) d->waitFor = findWait(d->stream, d->counters, d->ordinal);
  check(cudaStreamSynchronize(d->stream), "GPU");
  *out = reinterpret_cast<s3_dev *>(d.release());
}

int cudaDevOpen(int ordinal, const char *, const char *options, s3_dev **out) {
  return caught(open_error, [&] {
    open(ordinal, options, out);
  });
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
    if (d.direct) {
      *out = {reinterpret_cast<std::uint64_t>(d.share(bytes)), 0, bytes};
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

int cudaDevQueue(s3_dev *dev, s3_queue **out) {
  return guarded(dev, [&](Device &d) {
    cudaStream_t stream = d.stream;
    if (!d.queues.empty()) check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    d.queues.push_back(std::make_unique<Queue>(Queue{&d, stream}));
    *out = reinterpret_cast<s3_queue *>(d.queues.back().get());
  });
}
int cudaDevCopy(s3_queue *queue, s3_span dst, s3_span src, std::uint64_t bytes) {
  const Queue &q = of(queue);
  return guarded(*q.device, [&](Device &) { check(cudaMemcpyAsync(at(dst), at(src), bytes, cudaMemcpyDefault, q.stream), "copying"); });
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

/// What `work` enqueues on the stream, as a graph.
template <class Work>
s3_segment *capture(Device &d, const char *what, const Work &work) {
  auto segment = std::make_unique<Segment>();
  check(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeThreadLocal), what);
  std::string failed;
  try {
    work();
  } catch (const Failure &e) {
    failed = e.what();
  }
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(d.stream, &graph);
  const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, decltype(&cudaGraphDestroy)> owned(graph, &cudaGraphDestroy);
  if (!failed.empty()) fail(exit_internal, failed);
  check(ended, what);
  check(cudaGraphInstantiate(&segment->graph, graph, 0), what);
  // or its first launch would allocate, while others wait for what comes after it
  check(cudaGraphUpload(segment->graph, d.stream), what);
  d.segments.push_back(std::move(segment));
  return reinterpret_cast<s3_segment *>(d.segments.back().get());
}

int cudaDevPrepare(s3_dev *dev, const s3_launch *launches, std::uint32_t n, s3_segment **out) {
  return guarded(dev, [&](Device &d) {
    std::vector<void *> args;
    *out = capture(d, "preparing launches", [&] {
      for (std::uint32_t i = 0; i < n; i++) {
        const s3_launch &from = launches[i];
        if (from.kernel >= entry_count) fail(exit_internal, "kernel ", from.kernel, " of ", entry_count);
        args.clear();
        for (std::uint32_t a = 0; a < from.nargs; a++) args.push_back(at(from.args[a]));
        const Call call = {args.data(),     static_cast<const s3_head *>(at(from.heads)),  from.segments,
                           from.stride,     static_cast<std::uint8_t *>(d.scratch),        static_cast<std::uint32_t *>(d.counters),
                           d.stream,        d.processors,
                           from.dims.bytes > 0 ? static_cast<const std::int64_t *>(at(from.dims)) : nullptr};
        if (const cudaError_t why = entries[from.kernel].launch(call); why != cudaSuccess)
          fail(exit_internal, "kernel ", entries[from.kernel].name, " cannot be launched: ", cudaGetErrorString(why));
      }
    });
  });
}

int cudaDevCopies(s3_dev *dev, const s3_copy *copies, std::uint32_t n, s3_segment **out) {
  return guarded(dev, [&](Device &d) {
    *out = capture(d, "preparing copies", [&] {
      for (std::uint32_t i = 0; i < n; i++)
        check(cudaMemcpyAsync(at(copies[i].dst), at(copies[i].src), copies[i].src.bytes, cudaMemcpyDefault, d.stream), "preparing copies");
    });
  });
}

int cudaDevMark(s3_queue *queue, s3_event *done) {
  const Queue &q = of(queue);
  return guarded(*q.device, [&](Device &d) {
    check(cudaEventRecord(d.events[d.recorded % d.events.size()], q.stream), "launching");
    *done = ++d.recorded;
  });
}
int cudaDevSubmit(s3_queue *queue, s3_segment *segment, s3_event *done) {
  const Queue &q = of(queue);
  const int code = guarded(*q.device, [&](Device &) { check(cudaGraphLaunch(reinterpret_cast<Segment *>(segment)->graph, q.stream), "launching"); });
  return code != 0 || !done ? code : cudaDevMark(queue, done);
}

/// The event that stands for one that was handed out, or null when that happened long ago.
cudaEvent_t eventOf(const Device &d, s3_event event) {
  return event == 0 || event + d.events.size() <= d.recorded ? nullptr : d.events[(event - 1) % d.events.size()];
}

int cudaDevWait(s3_dev *dev, s3_event event, std::uint32_t ms) {
  return guarded(dev, [&](Device &d) {
    const cudaEvent_t e = eventOf(d, event);
    if (!e) return;
    if (ms == 0) return check(cudaEventSynchronize(e), "running kernels");
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      const cudaError_t state = cudaEventQuery(e);
      if (state != cudaErrorNotReady) return check(state, "running kernels");
      const auto waited = std::chrono::steady_clock::now() - start;
      if (waited > std::chrono::milliseconds(ms)) fail(exit_peer, "kernels were not done after ", ms, " ms");
      // a core that asks all the time is quickest; after a while it has other things to do
      if (waited > std::chrono::milliseconds(2)) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  });
}

int cudaDevShare(s3_dev *dev, s3_span span, void *token, std::uint32_t *bytes) {
  if (!of(dev).direct) return describeShared(of(dev).reachable, span, token, bytes, of(dev).error);
  return guarded(dev, [&](Device &d) {
    const std::uint64_t from = span.mem + span.off;
    for (const s3_span &s : d.shared) {
      if (from < s.mem || from - s.mem > s.bytes || span.bytes > s.bytes - (from - s.mem)) continue;
      Shared token_of{{}, {}, s.mem, from - s.mem, span.bytes};
      std::memcpy(token_of.magic, magic, sizeof magic);
      check(cudaIpcGetMemHandle(&token_of.handle, reinterpret_cast<void *>(s.mem)), "sharing memory of the GPU");
      if (*bytes < sizeof token_of) fail(exit_internal, "share: the token is too small");
      std::memcpy(token, &token_of, sizeof token_of);
      *bytes = sizeof token_of;
      return;
    }
    fail(exit_internal, "share: not shared memory of this device");
  });
}

int cudaDevMap(s3_dev *dev, const void *token, std::uint32_t bytes, std::uint32_t here, s3_span *out) {
  return guarded(dev, [&](Device &d) {
    Shared shared{};
    if (bytes == sizeof shared) std::memcpy(&shared, token, sizeof shared);
    if (std::memcmp(shared.magic, magic, sizeof magic) != 0) fail(exit_input, "its memory is not of an NVIDIA GPU; use --transport shm");
    *out = {shared.address, shared.offset, shared.bytes};
    if (here) {
      cudaPointerAttributes facts{};
      check(cudaPointerGetAttributes(&facts, reinterpret_cast<void *>(shared.address)), "memory of another GPU");
      if (facts.device == d.ordinal) return;
      int able = 0;
      check(cudaDeviceCanAccessPeer(&able, d.ordinal, facts.device), "memory of another GPU");
      if (!able) fail(exit_input, "GPU ", d.ordinal, " does not reach the memory of GPU ", facts.device, "; use --transport shm");
      const cudaError_t code = cudaDeviceEnablePeerAccess(facts.device, 0);
      if (code == cudaErrorPeerAccessAlreadyEnabled) static_cast<void>(cudaGetLastError());
      else check(code, "memory of another GPU");
      return;
    }
    void *&base = d.mapped[{reinterpret_cast<const char *>(&shared.handle), sizeof shared.handle}];
    if (!base) {
      const cudaError_t code = cudaIpcOpenMemHandle(&base, shared.handle, cudaIpcMemLazyEnablePeerAccess);
      if (code != cudaSuccess) {
        d.mapped.erase({reinterpret_cast<const char *>(&shared.handle), sizeof shared.handle});
        static_cast<void>(cudaGetLastError());
        fail(exit_input, "the memory of its GPU cannot be reached from GPU ", d.ordinal, " (", cudaGetErrorString(code),
             "); let every rank see all GPUs (CUDA_VISIBLE_DEVICES), or use --transport shm");
      }
    }
    out->mem = reinterpret_cast<std::uint64_t>(base);
  });
}

int cudaDevAfter(s3_queue *queue, s3_event event) {
  const Queue &q = of(queue);
  return guarded(*q.device, [&](Device &d) {
    if (const cudaEvent_t e = eventOf(d, event)) check(cudaStreamWaitEvent(q.stream, e, 0), "waiting for kernels");
  });
}
int cudaDevPut(s3_queue *queue, s3_span dst, const void *src) {
  const Queue &q = of(queue);
  // so few bytes are part of the command itself
  return guarded(*q.device, [&](Device &) { check(cudaMemcpyAsync(at(dst), src, dst.bytes, cudaMemcpyHostToDevice, q.stream), "writing"); });
}
int cudaDevAwait(s3_queue *queue, s3_span flag, std::uint64_t sequence) {
  const Queue &q = of(queue);
  return guarded(*q.device, [&](Device &d) {
    if (d.waitFor(q.stream, flag.mem + flag.off, sequence, CU_STREAM_WAIT_VALUE_GEQ) != CUDA_SUCCESS) fail(exit_internal, "waiting for a message");
  });
}

int cudaDevElapsed(s3_dev *dev, s3_event from, s3_event to, std::int64_t *ns) {
  return guarded(dev, [&](Device &d) {
    const cudaEvent_t first = eventOf(d, from), last = eventOf(d, to);
    if (!first || !last) fail(exit_internal, "a round with more than ", d.events.size(), " events cannot be timed");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, first, last), "timing");
    *ns = static_cast<std::int64_t>(static_cast<double>(ms) * 1e6);
  });
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
  static const s3_device table = {S3_ABI,         S3_DEVICE_DIRECT, cudaDevOpen,  cudaDevClose, cudaDevAlloc, cudaDevHost,   cudaDevQueue, cudaDevCopy,
                                  cudaDevRead,    cudaDevWrite,     cudaDevPrepare, cudaDevSubmit, cudaDevWait, cudaDevShare, cudaDevKernel, cudaDevError,
                                  cudaDevMap,     cudaDevMark,      cudaDevAfter, cudaDevPut,   cudaDevCopies, cudaDevAwait,  cudaDevElapsed};
  return &table;
}
