// The host's processor as a device: kernels of a shared library, run by a team of threads. Launches run where submit() is called, so every
// event has already happened when it is given.
#include <cerrno>
#include <cstring>
#include <memory>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../error.h"
#include "../json.h"
#include "../library.h"
#include "device.h"
#include "futex.h"
#include "host_memory.h"

namespace s3 {

thread_local const char *volatile running_kernel = nullptr;

namespace {

thread_local std::string open_error;

struct Launch {
  s3_kernel run = nullptr;
  const char *name = nullptr;
  std::vector<void *> args;
  const s3_head *heads = nullptr;
  std::uint32_t segments = 1, stride = 1;
  std::int64_t *dims = nullptr;
  std::int64_t *rows = nullptr;  // T among the dims
};

struct Segment {
  std::vector<Launch> launches;
};

/// Threads that run each launch together. The caller of run() is thread 0.
class Team {
 public:
  Team(std::uint32_t threads, std::uint32_t spin, void *scratch) : threads_(threads), spin_(spin), scratch_(scratch) {
    for (std::uint32_t t = 1; t < threads; t++) workers_.emplace_back([this, t] { work(t); });
  }
  ~Team() {
    segment_ = nullptr;
    start_.ring();
    for (auto &w : workers_) w.join();
  }
  void run(const Segment &segment) {
    // headers are there by now: those that peers send came with the last exchange
    for (const Launch &l : segment.launches)
      if (l.rows) *l.rows = l.heads->rows;
    if (threads_ > 1) {
      segment_ = &segment;
      start_.ring();
    }
    launches(segment, 0);
  }

 private:
  struct Call : s3_call {
    Team *team;
  };

  const std::uint32_t threads_, spin_;
  void *const scratch_;
  std::vector<std::thread> workers_;
  const Segment *segment_ = nullptr;
  Bell start_;
  alignas(64) std::atomic<std::uint32_t> arrived_{0};
  Bell passed_;

  void barrier() {
    const std::uint32_t now = passed_.word.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      passed_.ring();
      return;
    }
    passed_.wait(spin_, 0, [&] { return passed_.word.load(std::memory_order_acquire) != now; }, [] { return false; });
  }
  static void together(const s3_call *call) { static_cast<const Call *>(call)->team->barrier(); }
  static void alone(const s3_call *) {}

  void launches(const Segment &segment, std::uint32_t thread) {
    Call call{};
    call.team = this;
    call.thread = thread;
    call.threads = threads_;
    call.scratch = scratch_;
    call.barrier = threads_ > 1 ? together : alone;
    for (const Launch &l : segment.launches) {
      call.args = l.args.data();
      call.heads = l.heads;
      call.segments = l.segments;
      call.stride = l.stride;
      call.dims = l.dims;
      running_kernel = l.name;
      l.run(&call);
      running_kernel = nullptr;
      if (threads_ > 1) barrier();
    }
  }

  void work(std::uint32_t thread) {
    std::uint32_t seen = 0;
    for (;;) {
      start_.wait(spin_, 0, [&] { return start_.word.load(std::memory_order_acquire) != seen; }, [] { return false; });
      seen++;
      const Segment *segment = segment_;
      if (!segment) return;
      launches(*segment, thread);
    }
  }
};

struct Device {
  std::string error;
  const s3_program *program = nullptr;
  std::unordered_map<std::string, std::uint32_t> kernels;
  std::vector<HostMemory> memory;
  std::vector<std::unique_ptr<Segment>> segments;
  std::unique_ptr<Team> team;

  ~Device() {
    team.reset();
    for (const HostMemory &m : memory) m.unmap();
  }
  int refuse(int code, std::string why) {
    error = std::move(why);
    return code;
  }
};

Device &of(s3_dev *dev) { return *reinterpret_cast<Device *>(dev); }

int cppOpen(int, const char *program, const char *options, s3_dev **out) {
  return caught(open_error, [&] {
    auto d = std::make_unique<Device>();
    std::uint32_t threads = 1, spin = 2000;
    std::string isa;
    const JsonFile json = JsonFile::parse(options && *options ? options : "{}", "device options");
    if (const Json *v = json.root().find("threads")) threads = static_cast<std::uint32_t>(v->whole(1, 1024));
    if (const Json *v = json.root().find("spin")) spin = static_cast<std::uint32_t>(v->whole(0, 1 << 30));
    if (const Json *v = json.root().find("isa")) isa = v->text();
    const auto entry = symbol<const s3_program *(*)(const char *)>(program ? program : "", "s3_program_v1");
    if (!entry) fail(exit_input, program, ": has no s3_program_v1; is it a program of a bundle?");
    d->program = entry(isa.empty() ? nullptr : isa.c_str());
    if (!d->program)
      fail(exit_input, program, ": has no kernels for ", isa.empty() ? "this processor" : "--isa " + isa, ", or this processor cannot run them");
    if (d->program->abi != S3_ABI) fail(exit_input, program, ": built for abi ", d->program->abi, ", this runtime speaks ", S3_ABI, "; build it again");
    std::uint64_t scratch = 0;
    for (std::uint32_t i = 0; i < d->program->count; i++) {
      scratch = std::max(scratch, d->program->kernels[i].scratch);
      d->kernels.emplace(d->program->kernels[i].name, i);
    }
    if (const Json *kernels = json.root().find("kernels"))
      for (const auto &[name, facts] : kernels->members()) {
        const auto found = d->kernels.find(name);
        if (found == d->kernels.end() || d->program->kernels[found->second].scratch != static_cast<std::uint64_t>(facts.whole()))
          fail(exit_input, program, ": kernel '", name, "' is missing or not the one of manifest.json; it was built from another bundle, build it again");
      }
    d->memory.push_back(HostMemory::map(scratch, false));
    d->team = std::make_unique<Team>(threads, threads > 1 ? spin : 0, d->memory.back().address);
    *out = reinterpret_cast<s3_dev *>(d.release());
  });
}

void cppClose(s3_dev *dev) { delete &of(dev); }

int cppAlloc(s3_dev *dev, std::uint64_t bytes, std::uint64_t align, std::uint32_t shared, s3_span *out) {
  Device &d = of(dev);
  if (align > HostMemory::page) return d.refuse(exit_internal, say("memory aligned to ", align, " bytes"));
  try {
    d.memory.push_back(HostMemory::map(bytes, shared != 0));
  } catch (const Failure &e) {
    return d.refuse(e.code, e.what());
  }
  *out = {reinterpret_cast<std::uint64_t>(d.memory.back().address), 0, bytes};
  return 0;
}

std::uint8_t *at(s3_span s) { return reinterpret_cast<std::uint8_t *>(s.mem) + s.off; }

void *cppHost(s3_dev *, s3_span span) { return at(span); }
// the one queue of this device is the thread that calls
int cppQueue(s3_dev *dev, s3_queue **out) {
  *out = reinterpret_cast<s3_queue *>(dev);
  return 0;
}
int cppCopy(s3_queue *, s3_span dst, s3_span src, std::uint64_t bytes) {
  std::memmove(at(dst), at(src), bytes);
  return 0;
}
int cppRead(s3_dev *, void *dst, s3_span src) {
  std::memcpy(dst, at(src), src.bytes);
  return 0;
}
int cppWrite(s3_dev *, s3_span dst, const void *src) {
  std::memcpy(at(dst), src, dst.bytes);
  return 0;
}

int cppPrepare(s3_dev *dev, const s3_launch *launches, std::uint32_t n, s3_segment **out) {
  Device &d = of(dev);
  auto segment = std::make_unique<Segment>();
  for (std::uint32_t i = 0; i < n; i++) {
    const s3_launch &from = launches[i];
    if (from.kernel >= d.program->count) return d.refuse(exit_internal, say("kernel ", from.kernel, " of ", d.program->count));
    Launch l;
    l.run = d.program->kernels[from.kernel].run;
    l.name = d.program->kernels[from.kernel].name;
    for (std::uint32_t a = 0; a < from.nargs; a++) l.args.push_back(at(from.args[a]));
    l.heads = reinterpret_cast<const s3_head *>(at(from.heads));
    l.segments = from.segments;
    l.stride = from.stride;
    if (from.dims.bytes > 0) l.dims = reinterpret_cast<std::int64_t *>(at(from.dims));
    if (l.dims && from.rows_dim != S3_NO_SYMBOL) l.rows = l.dims + from.rows_dim;
    segment->launches.push_back(std::move(l));
  }
  d.segments.push_back(std::move(segment));
  *out = reinterpret_cast<s3_segment *>(d.segments.back().get());
  return 0;
}

int cppSubmit(s3_queue *queue, s3_segment *segment, s3_event *done) {
  of(reinterpret_cast<s3_dev *>(queue)).team->run(*reinterpret_cast<const Segment *>(segment));
  if (done) *done = 0;
  return 0;
}
int cppWait(s3_dev *, s3_event, std::uint32_t) { return 0; }

int cppShare(s3_dev *dev, s3_span span, void *token, std::uint32_t *bytes) {
  return describeShared(of(dev).memory, span, token, bytes, of(dev).error);
}

int cppKernel(s3_dev *dev, const char *name, std::uint32_t *index) {
  Device &d = of(dev);
  const auto found = d.kernels.find(name);
  if (found == d.kernels.end()) return d.refuse(exit_input, say("the program has no kernel '", name, "'; it was built from another bundle, build it again"));
  *index = found->second;
  return 0;
}

const char *cppError(s3_dev *dev) { return dev ? of(dev).error.c_str() : open_error.c_str(); }

}  // namespace

const s3_device *cppDevice() {
  static const s3_device table = {S3_ABI,     S3_DEVICE_SHARES_SPANS, cppOpen,   cppClose, cppAlloc, cppHost,  cppQueue, cppCopy, cppRead,
                                  cppWrite,   cppPrepare,             cppSubmit, cppWait,  cppShare, cppKernel, cppError, nullptr, nullptr,
                                  nullptr,    nullptr,                nullptr,   nullptr,  nullptr};
  return &table;
}

}  // namespace s3
