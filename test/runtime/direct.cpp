// A stand-in for an accelerator, so that the transport of queues is tested without one: the test programs on a device whose queues are threads,
// whose memory the host does not reach, and whose work is late at random.
//   STEP3_TEST_DELAY_US  the most that a queue waits before each piece of work
//   STEP3_TEST_BREAK     so many submits go well, then one fails on FFN ranks
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "step3.h"

namespace {

constexpr int exit_input = 1, exit_late = 3, exit_internal = 70;

std::uint64_t wanted(const char *name, std::uint64_t otherwise) {
  const char *text = std::getenv(name);
  return text ? static_cast<std::uint64_t>(std::atoll(text)) : otherwise;
}
std::uint8_t *at(s3_span s) { return reinterpret_cast<std::uint8_t *>(s.mem) + s.off; }
std::atomic_ref<std::uint64_t> flagAt(s3_span s) { return std::atomic_ref(*reinterpret_cast<std::uint64_t *>(at(s))); }

struct Memory {
  std::uint8_t *address = nullptr;
  std::uint64_t bytes = 0;
  int fd = -1;
};
struct Token {
  std::uint64_t magic, address, offset, bytes, all;
  std::int32_t pid, fd;
};
constexpr std::uint64_t token_magic = 0x746365726964;  // "direct"

void pause(std::uint64_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

/// Does what it is given, one piece after another. Ends when all is done.
class Queue {
 public:
  Queue(s3_dev *dev, unsigned seed) : dev(dev), random_(seed), worker_([this] { work(); }) {}
  ~Queue() {
    add({});
    worker_.join();
  }
  void add(std::function<void()> piece) {
    const std::lock_guard lock(mutex_);
    pieces_.push_back(std::move(piece));
    changed_.notify_one();
  }
  s3_dev *const dev;

 private:
  const std::uint64_t delay_ = wanted("STEP3_TEST_DELAY_US", 0);
  std::minstd_rand random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> pieces_;
  std::thread worker_;

  void work() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !pieces_.empty(); });
      const std::function<void()> piece = std::move(pieces_.front());
      pieces_.pop_front();
      lock.unlock();
      if (!piece) return;
      if (delay_ > 0) pause(random_() % (delay_ + 1));
      piece();
    }
  }
};

struct Segment {
  struct Launch {
    s3_kernel run;
    std::vector<void *> args;
    s3_launch given;
  };
  std::vector<Launch> launches;
  std::vector<s3_copy> copies;
};

struct Device {
  std::string error;
  int ordinal = 0;
  const s3_program *program = nullptr;
  bool serves = false;  // an FFN rank: it waits for what it launches upon
  std::uint64_t submits = 0;
  std::vector<Memory> memory, mapped;
  std::map<std::pair<int, int>, std::uint8_t *> known;
  std::vector<std::unique_ptr<Segment>> segments;
  std::vector<std::uint8_t> scratch = std::vector<std::uint8_t>(1 << 16);
  std::mutex mutex;
  std::condition_variable changed;
  std::uint64_t events = 0;
  std::set<std::uint64_t> pending;
  std::vector<std::chrono::steady_clock::time_point> happened;  // by event
  std::vector<std::unique_ptr<Queue>> queues;

  ~Device() {
    queues.clear();  // waits for all that they were given, as a device does
    for (const Memory &m : memory) {
      ::munmap(m.address, m.bytes);
      ::close(m.fd);
    }
    for (const Memory &m : mapped) ::munmap(m.address, m.bytes);
  }
  int refuse(int code, std::string why) {
    error = std::move(why);
    return code;
  }
  std::uint64_t record(Queue &queue) {
    std::uint64_t event = 0;
    {
      const std::lock_guard lock(mutex);
      event = ++events;
      pending.insert(event);
      happened.resize(event + 1);
    }
    queue.add([this, event] {
      const std::lock_guard lock(mutex);
      pending.erase(event);
      happened[event] = std::chrono::steady_clock::now();
      changed.notify_all();
    });
    return event;
  }
  void until(std::uint64_t event) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return !pending.contains(event); });
  }
};

Device &of(s3_dev *dev) { return *reinterpret_cast<Device *>(dev); }
Queue &of(s3_queue *queue) { return *reinterpret_cast<Queue *>(queue); }
thread_local std::string open_error;

int open(int ordinal, const char *, const char *options, s3_dev **out) {
  if (!std::strstr(options, "\"exchange\":\"device\"")) {
    open_error = "the stand-in works with --transport cuda only";
    return exit_input;
  }
  auto d = std::make_unique<Device>();
  d->ordinal = ordinal;
  d->program = s3_program_v1(nullptr);
  *out = reinterpret_cast<s3_dev *>(d.release());
  return 0;
}
void close(s3_dev *dev) { delete &of(dev); }

int alloc(s3_dev *dev, std::uint64_t bytes, std::uint64_t, std::uint32_t, s3_span *out) {
  Memory m;
  m.bytes = (bytes + 4095) / 4096 * 4096;
  m.fd = ::memfd_create("step3c-test", MFD_CLOEXEC);
  if (m.fd < 0 || ::ftruncate(m.fd, static_cast<off_t>(m.bytes)) != 0) return of(dev).refuse(exit_input, "no memory");
  void *address = ::mmap(nullptr, m.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, 0);
  if (address == MAP_FAILED) return of(dev).refuse(exit_input, "no memory");
  m.address = static_cast<std::uint8_t *>(address);
  of(dev).memory.push_back(m);
  *out = {reinterpret_cast<std::uint64_t>(address), 0, bytes};
  return 0;
}
void *host(s3_dev *, s3_span) { return nullptr; }

int queue(s3_dev *dev, s3_queue **out) {
  Device &d = of(dev);
  d.queues.push_back(std::make_unique<Queue>(dev, static_cast<unsigned>(d.ordinal * 100) + static_cast<unsigned>(d.queues.size()) + 1));
  *out = reinterpret_cast<s3_queue *>(d.queues.back().get());
  return 0;
}
int copy(s3_queue *queue, s3_span dst, s3_span src, std::uint64_t bytes) {
  of(queue).add([=] { std::memcpy(at(dst), at(src), bytes); });
  return 0;
}
int put(s3_queue *queue, s3_span dst, const void *src) {
  const auto *from = static_cast<const std::uint8_t *>(src);
  of(queue).add([dst, bytes = std::vector<std::uint8_t>(from, from + dst.bytes)] { std::memcpy(at(dst), bytes.data(), bytes.size()); });
  return 0;
}
Queue &first(s3_dev *dev) {
  if (of(dev).queues.empty()) {
    s3_queue *made = nullptr;
    queue(dev, &made);
  }
  return *of(dev).queues.front();
}
int read(s3_dev *dev, void *dst, s3_span src) {
  first(dev).add([=] { std::memcpy(dst, at(src), src.bytes); });
  of(dev).until(of(dev).record(first(dev)));
  return 0;
}
int write(s3_dev *dev, s3_span dst, const void *src) { return put(reinterpret_cast<s3_queue *>(&first(dev)), dst, src); }

int prepare(s3_dev *dev, const s3_launch *launches, std::uint32_t n, s3_segment **out) {
  auto segment = std::make_unique<Segment>();
  for (std::uint32_t i = 0; i < n; i++) {
    Segment::Launch l{of(dev).program->kernels[launches[i].kernel].run, {}, launches[i]};
    for (std::uint32_t a = 0; a < launches[i].nargs; a++) l.args.push_back(at(launches[i].args[a]));
    segment->launches.push_back(std::move(l));
  }
  of(dev).segments.push_back(std::move(segment));
  *out = reinterpret_cast<s3_segment *>(of(dev).segments.back().get());
  return 0;
}
int copies(s3_dev *dev, const s3_copy *copies, std::uint32_t n, s3_segment **out) {
  of(dev).segments.push_back(std::make_unique<Segment>(Segment{{}, {copies, copies + n}}));
  *out = reinterpret_cast<s3_segment *>(of(dev).segments.back().get());
  return 0;
}
/// 8 bytes may be a flag that another queue waits for.
void move(const s3_copy &c) {
  if (c.src.bytes != sizeof(std::uint64_t)) {
    std::memcpy(at(c.dst), at(c.src), c.src.bytes);
    return;
  }
  std::uint64_t value = 0;
  std::memcpy(&value, at(c.src), sizeof value);
  flagAt(c.dst).store(value, std::memory_order_release);
}
int submit(s3_queue *queue, s3_segment *given, s3_event *done) {
  Device &d = of(of(queue).dev);
  const auto *segment = reinterpret_cast<const Segment *>(given);
  for (const s3_copy &c : segment->copies) of(queue).add([c] { move(c); });
  if (segment->launches.empty()) return 0;
  if (d.serves && d.submits++ == wanted("STEP3_TEST_BREAK", UINT64_MAX)) return d.refuse(exit_internal, "the test breaks it");
  of(queue).add([&d, segment] {
    for (const Segment::Launch &l : segment->launches) {
      s3_call call{};
      call.args = l.args.data();
      call.heads = reinterpret_cast<const s3_head *>(at(l.given.heads));
      call.segments = l.given.segments;
      call.stride = l.given.stride;
      call.threads = 1;
      call.scratch = d.scratch.data();
      call.barrier = [](const s3_call *) {};
      if (l.given.dims.bytes > 0) {
        auto *dims = reinterpret_cast<std::int64_t *>(at(l.given.dims));
        if (l.given.rows_dim != S3_NO_SYMBOL) dims[l.given.rows_dim] = call.heads->rows;
        call.dims = dims;
      }
      l.run(&call);
    }
  });
  *done = d.record(of(queue));
  return 0;
}
int wait(s3_dev *dev, s3_event event, std::uint32_t ms) {
  Device &d = of(dev);
  std::unique_lock lock(d.mutex);
  const auto there = [&] { return !d.pending.contains(event); };
  if (ms == 0) d.changed.wait(lock, there);
  else if (!d.changed.wait_for(lock, std::chrono::milliseconds(ms), there)) return d.refuse(exit_late, "late");
  return 0;
}

int share(s3_dev *dev, s3_span span, void *token, std::uint32_t *bytes) {
  for (const Memory &m : of(dev).memory) {
    if (at(span) < m.address || at(span) + span.bytes > m.address + m.bytes) continue;
    const Token t{token_magic, reinterpret_cast<std::uint64_t>(m.address), static_cast<std::uint64_t>(at(span) - m.address), span.bytes, m.bytes, ::getpid(), m.fd};
    std::memcpy(token, &t, sizeof t);
    *bytes = sizeof t;
    return 0;
  }
  return of(dev).refuse(exit_internal, "not memory of this device");
}
int map(s3_dev *dev, const void *token, std::uint32_t bytes, std::uint32_t here, s3_span *out) {
  Device &d = of(dev);
  Token t{};
  if (bytes != sizeof t) return d.refuse(exit_input, "no token of the stand-in");
  std::memcpy(&t, token, sizeof t);
  if (t.magic != token_magic) return d.refuse(exit_input, "no token of the stand-in");
  if (!here) {
    std::uint8_t *&address = d.known[{t.pid, t.fd}];
    if (!address) {
      const int fd = ::open(("/proc/" + std::to_string(t.pid) + "/fd/" + std::to_string(t.fd)).c_str(), O_RDWR | O_CLOEXEC);
      void *mapped = fd < 0 ? MAP_FAILED : ::mmap(nullptr, t.all, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      if (fd >= 0) ::close(fd);
      if (mapped == MAP_FAILED) return d.refuse(exit_late, "memory of a peer that is gone");
      address = static_cast<std::uint8_t *>(mapped);
      d.mapped.push_back({address, t.all, -1});
    }
    t.address = reinterpret_cast<std::uint64_t>(address);
  }
  *out = {t.address, t.offset, t.bytes};
  return 0;
}

int kernel(s3_dev *dev, const char *name, std::uint32_t *index) {
  Device &d = of(dev);
  if (std::strcmp(name, "experts") == 0) d.serves = true;
  for (*index = 0; *index < d.program->count; ++*index)
    if (std::strcmp(d.program->kernels[*index].name, name) == 0) return 0;
  return d.refuse(exit_input, "no such kernel");
}

int mark(s3_queue *queue, s3_event *done) {
  *done = of(of(queue).dev).record(of(queue));
  return 0;
}
int after(s3_queue *queue, s3_event event) {
  of(queue).add([&d = of(of(queue).dev), event] { d.until(event); });
  return 0;
}
int await(s3_queue *queue, s3_span flag, std::uint64_t sequence) {
  of(queue).add([=] {
    while (static_cast<std::int64_t>(flagAt(flag).load(std::memory_order_acquire) - sequence) < 0) pause(20);
  });
  return 0;
}
int elapsed(s3_dev *dev, s3_event from, s3_event to, std::int64_t *ns) {
  Device &d = of(dev);
  const std::lock_guard lock(d.mutex);
  if (d.pending.contains(from) || d.pending.contains(to)) return d.refuse(exit_internal, "asked of an event before it has happened");
  *ns = std::chrono::duration_cast<std::chrono::nanoseconds>(d.happened[to] - d.happened[from]).count();
  return 0;
}
const char *error(s3_dev *dev) { return dev ? of(dev).error.c_str() : open_error.c_str(); }

}  // namespace

extern "C" const s3_device *s3_device_v1(void) {
  static const s3_device table = {S3_ABI, S3_DEVICE_DIRECT, open,  close, alloc,  host,  queue, copy, read,  write, prepare,
                                  submit, wait,             share, kernel, error, map,   mark,  after, put,  copies, await, elapsed};
  return &table;
}
