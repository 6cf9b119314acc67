/*
 * Times kernels of a program library for bench/cpu.ts. Commands on standard input, one a line; one line of answer each:
 *   kernel NAME ROWS ARGS (KIND BYTES)...   makes arguments (f: f32, b: bf16, e: e4m3, i: i8, o: output); answers the number of the case
 *   time CASE THREADS REPEATS               nanoseconds of each repeat
 *   read MEGABYTES THREADS REPEATS          nanoseconds of reading so much memory, the best of two ways of reading
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "step3.h"

namespace {

struct memory {
  uint8_t *data;
  uint64_t bytes;
  explicit memory(uint64_t size) : data(static_cast<uint8_t *>(aligned_alloc(4096, (size + 4095) / 4096 * 4096 + 4096))), bytes(size) {
    if (data == nullptr) abort();
    memset(data, 0, size);
  }
};

struct job {
  const s3_kernel_entry *kernel;
  s3_head head;
  std::vector<void *> args;
  uint8_t *scratch;
};

uint32_t random_state = 1;
uint32_t random_bits() { return random_state = random_state * 1664525u + 1013904223u; }

void fill(memory &m, char kind) {
  for (uint64_t i = 0; i < m.bytes; ++i) {
    const uint32_t r = random_bits() >> 8;
    if (kind == 'f' && i % 4 == 0 && i + 4 <= m.bytes) {
      const float x = (float)(int32_t)(r & 0xffff) / 32768 - 1;
      memcpy(m.data + i, &x, 4);
    } else if (kind == 'b' && i % 2 == 0 && i + 2 <= m.bytes) {
      const uint16_t x = (uint16_t)(0x3c00u + (r & 0x81ffu)); /* magnitudes from 2^-7 to 2^-3, both signs */
      memcpy(m.data + i, &x, 2);
    } else if (kind == 'e') {
      m.data[i] = (uint8_t)(r & 0xbfu);
    } else if (kind == 'i') {
      m.data[i] = (uint8_t)r;
    }
  }
}

/* Waits actively, as a runtime does between kernels, but not for long when somebody else has the processor. */
template <class F> void wait_until(const F &ready) {
  for (uint32_t spins = 0; !ready(); ++spins) {
    if (spins < 20000) {
      __builtin_ia32_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

class team {
 public:
  explicit team(uint32_t size) : size_(size) {
    for (uint32_t t = 1; t < size; ++t)
      threads_.emplace_back([this, t] {
        for (uint64_t seen = 0;;) {
          wait_until([&] { return round_.load(std::memory_order_acquire) != seen; });
          ++seen;
          if (!work_) return;
          work_(t);
          done_.fetch_add(1, std::memory_order_release);
        }
      });
  }
  ~team() {
    run(nullptr);
    for (std::thread &t : threads_) t.join();
  }
  void run(std::function<void(uint32_t)> work) {
    work_ = std::move(work);
    done_.store(0);
    round_.fetch_add(1, std::memory_order_release);
    if (!work_) return;
    work_(0);
    wait_until([&] { return done_.load(std::memory_order_acquire) + 1 >= size_; });
  }

 private:
  uint32_t size_;
  std::vector<std::thread> threads_;
  std::function<void(uint32_t)> work_;
  std::atomic<uint64_t> round_{0};
  std::atomic<uint32_t> done_{0};
};

std::atomic<uint32_t> arrived{0}, phase{0};
void meet(const s3_call *c) {
  if (c->threads == 1) return;
  const uint32_t now = phase.load(std::memory_order_acquire);
  if (arrived.fetch_add(1) + 1 == c->threads) {
    arrived.store(0);
    phase.fetch_add(1, std::memory_order_release);
  } else {
    wait_until([&] { return phase.load(std::memory_order_acquire) != now; });
  }
}

typedef float wide __attribute__((vector_size(64)));

/* Reads as one stream, or as eight with prefetches; gives something that depends on every byte. */
float read_part(const uint8_t *from, uint64_t bytes, bool streams) {
  wide a = {}, b = {}, c = {}, d = {};
  const uint64_t lines = bytes / 64;
  const wide *const p = reinterpret_cast<const wide *>(from);
  if (streams) {
    const uint64_t part = lines / 8;
    for (uint64_t i = 0; i < part; ++i)
      for (int s = 0; s < 8; s += 4) {
        a += p[i + (s + 0) * part], b += p[i + (s + 1) * part], c += p[i + (s + 2) * part], d += p[i + (s + 3) * part];
        for (int j = 0; j < 4; ++j) __builtin_prefetch(&p[i + (s + j) * part + 16]);
      }
  } else {
    for (uint64_t i = 0; i + 4 <= lines; i += 4) {
      a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
      __builtin_prefetch(&p[i + 32]), __builtin_prefetch(&p[i + 34]);
    }
  }
  const wide sum = a + b + c + d;
  return sum[0] + sum[7];
}

template <class F> uint64_t nanoseconds(const F &f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return (uint64_t)std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2) return fprintf(stderr, "usage: cpu_kernels LIBRARY\n"), 2;
  void *const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return fprintf(stderr, "%s\n", dlerror()), 2;
  const s3_program *const program = reinterpret_cast<decltype(&s3_program_v1)>(dlsym(library, "s3_program_v1"))(getenv("S3_ISA"));
  if (program == nullptr) return fprintf(stderr, "this machine cannot run the instruction set in S3_ISA\n"), 2;
  printf("%s\n", program->isa);
  fflush(stdout);
  std::vector<job> jobs;
  memory *read_memory = nullptr;
  char word[64], name[256];
  while (scanf("%63s", word) == 1) {
    if (strcmp(word, "kernel") == 0) {
      job j = {};
      uint32_t args = 0;
      if (scanf("%255s %u %u", name, &j.head.rows, &args) != 3) return 2;
      for (uint32_t i = 0; i < program->count; ++i)
        if (strcmp(program->kernels[i].name, name) == 0) j.kernel = &program->kernels[i];
      if (j.kernel == nullptr) return fprintf(stderr, "no kernel %s\n", name), 2;
      for (; args > 0; --args) {
        char kind = 0;
        unsigned long long bytes = 0;
        if (scanf(" %c %llu", &kind, &bytes) != 2) return 2;
        memory m(bytes);
        fill(m, kind);
        j.args.push_back(m.data);
      }
      j.scratch = memory(j.kernel->scratch).data;
      jobs.push_back(j);
      printf("%zu\n", jobs.size() - 1);
    } else if (strcmp(word, "time") == 0) {
      unsigned index = 0, threads = 0, repeats = 0;
      if (scanf("%u %u %u", &index, &threads, &repeats) != 3) return 2;
      const job &j = jobs.at(index);
      team workers(threads);
      for (unsigned r = 0; r <= repeats; ++r) {
        const uint64_t took = nanoseconds([&] {
          workers.run([&](uint32_t t) {
            const s3_call call = {j.args.data(), &j.head, 1, j.head.rows, t, threads, j.scratch, meet};
            j.kernel->run(&call);
          });
        });
        if (r > 0) printf("%llu ", (unsigned long long)took); /* the first wakes the team */
      }
      printf("\n");
    } else if (strcmp(word, "read") == 0) {
      unsigned megabytes = 0, threads = 0, repeats = 0;
      if (scanf("%u %u %u", &megabytes, &threads, &repeats) != 3) return 2;
      if (read_memory == nullptr) {
        read_memory = new memory((uint64_t)megabytes << 20);
        fill(*read_memory, 'f');
      }
      team workers(threads);
      volatile float keep = 0;
      for (unsigned r = 0; r <= repeats; ++r) {
        uint64_t best = UINT64_MAX;
        for (const bool streams : {false, true}) {
          const uint64_t took = nanoseconds([&] {
            workers.run([&](uint32_t t) {
              const uint64_t part = read_memory->bytes / threads;
              keep = keep + read_part(read_memory->data + t * part, part, streams);
            });
          });
          best = took < best ? took : best;
        }
        if (r > 0) printf("%llu ", (unsigned long long)best);
      }
      printf("\n");
    } else {
      return fprintf(stderr, "what is %s?\n", word), 2;
    }
    fflush(stdout);
  }
  return 0;
}
