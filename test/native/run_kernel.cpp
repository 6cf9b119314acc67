/*
 * Runs kernels of a program library for tests. Reads requests from standard input and writes answers to standard output, both in the
 * machine's byte order:
 *   u32 runs, then for each run:
 *     string kernel, string isa (u32 length, bytes; an empty isa is the best of this machine)
 *     u32 threads, u32 repeats, u32 segments, u32 stride, u32 rows[segments]
 *     u32 dims, i64 values[dims] of the graph's symbols
 *     u32 args, then for each: u32 kind (0 read, 1 written, 2 both), u64 bytes, the bytes unless it is only written
 *   answer for each run: string error (empty when all went well), string isa, u64 nanoseconds of the fastest repeat, then the bytes of
 *   each written argument.
 * Every argument and the scratch end at guard bytes that must survive; what is only written starts as 0xA5. Arguments that are only read
 * must not change. Repeats start again from the given bytes.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "step3.h"

namespace {

constexpr size_t guard = 256;
constexpr uint8_t guard_byte = 0x5C, unwritten_byte = 0xA5;

void read_all(void *to, size_t bytes) {
  if (bytes != 0 && fread(to, 1, bytes, stdin) != bytes) {
    fprintf(stderr, "run_kernel: the request ends early\n");
    exit(2);
  }
}
template <class T> T read_value() {
  T x;
  read_all(&x, sizeof x);
  return x;
}
std::string read_string() {
  std::string s(read_value<uint32_t>(), '\0');
  read_all(s.data(), s.size());
  return s;
}
template <class T> void write_value(T x) { fwrite(&x, sizeof x, 1, stdout); }
void write_string(const std::string &s) {
  write_value((uint32_t)s.size());
  fwrite(s.data(), 1, s.size(), stdout);
}

/* memory at a multiple of 64 bytes, guarded behind its last byte and before its first */
struct block {
  std::vector<uint8_t> storage;
  uint8_t *data;
  size_t bytes;
  explicit block(size_t size, uint8_t fill) : storage(size + 2 * guard + 64, guard_byte), bytes(size) {
    const uintptr_t start = (uintptr_t)storage.data() + guard;
    data = (uint8_t *)((start + 63) / 64 * 64);
    memset(data, fill, size);
  }
  bool intact() const {
    for (size_t i = 1; i <= guard; ++i)
      if (data[-(ptrdiff_t)i] != guard_byte || data[bytes + i - 1] != guard_byte) return false;
    return true;
  }
};

struct argument {
  uint32_t kind;
  std::vector<uint8_t> given;
  std::unique_ptr<block> memory;
};

struct team {
  s3_call call; /* first: a kernel's barrier gets this thread's call */
  std::barrier<> *together;
};
void meet(const s3_call *c) { reinterpret_cast<const team *>(c)->together->arrive_and_wait(); }

std::string run(const s3_program *program, const std::string &kernel, uint32_t threads, uint32_t repeats, uint32_t stride,
                const std::vector<uint32_t> &rows, const std::vector<int64_t> &dims, std::vector<argument> &arguments, uint64_t &fastest) {
  const s3_kernel_entry *entry = nullptr;
  for (uint32_t i = 0; i < program->count; ++i)
    if (kernel == program->kernels[i].name) entry = &program->kernels[i];
  if (entry == nullptr) return "no kernel " + kernel;
  std::vector<s3_head> heads(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) heads[i] = s3_head{}, heads[i].rows = rows[i];
  fastest = UINT64_MAX;
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    block scratch(entry->scratch, unwritten_byte);
    std::vector<void *> addresses;
    for (argument &a : arguments) {
      if (repeat == 0 || a.kind != 0) a.memory = std::make_unique<block>(a.memory ? a.memory->bytes : a.given.size(), unwritten_byte);
      if (a.kind != 1) memcpy(a.memory->data, a.given.data(), a.given.size());
      addresses.push_back(a.memory->data);
    }
    typedef std::chrono::steady_clock clock;
    std::barrier<> together((ptrdiff_t)threads), started((ptrdiff_t)threads);
    std::vector<clock::time_point> starts(threads), ends(threads);
    std::vector<std::thread> others;
    for (uint32_t t = 0; t < threads; ++t)
      others.emplace_back([&, t] {
        const team mine = {{addresses.data(), heads.data(), (uint32_t)rows.size(), stride, t, threads, scratch.data, meet, dims.data()},
                           &together};
        started.arrive_and_wait();
        starts[t] = clock::now();
        entry->run(&mine.call);
        ends[t] = clock::now();
      });
    for (std::thread &o : others) o.join();
    const auto span = *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
    const uint64_t took = (uint64_t)std::chrono::duration_cast<std::chrono::nanoseconds>(span).count();
    if (took < fastest) fastest = took;
    if (!scratch.intact()) return "it wrote outside its scratch";
    for (size_t i = 0; i < arguments.size(); ++i) {
      const argument &a = arguments[i];
      if (!a.memory->intact()) return "it wrote outside argument " + std::to_string(i);
      if (a.kind == 0 && memcmp(a.memory->data, a.given.data(), a.given.size()) != 0) return "it changed argument " + std::to_string(i);
    }
  }
  return "";
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2) return fprintf(stderr, "usage: run_kernel LIBRARY < requests > answers\n"), 2;
  void *const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return fprintf(stderr, "run_kernel: %s\n", dlerror()), 2;
  const auto find = reinterpret_cast<decltype(&s3_program_v1)>(dlsym(library, "s3_program_v1"));
  if (find == nullptr) return fprintf(stderr, "run_kernel: %s exports no s3_program_v1\n", argv[1]), 2;
  for (uint32_t runs = read_value<uint32_t>(); runs > 0; --runs) {
    const std::string kernel = read_string(), isa = read_string();
    const uint32_t threads = read_value<uint32_t>(), repeats = read_value<uint32_t>();
    std::vector<uint32_t> rows(read_value<uint32_t>());
    const uint32_t stride = read_value<uint32_t>();
    for (uint32_t &r : rows) r = read_value<uint32_t>();
    std::vector<int64_t> dims(read_value<uint32_t>());
    for (int64_t &d : dims) d = read_value<int64_t>();
    std::vector<argument> arguments(read_value<uint32_t>());
    for (argument &a : arguments) {
      a.kind = read_value<uint32_t>();
      const uint64_t bytes = read_value<uint64_t>();
      if (a.kind != 1) a.given.resize(bytes), read_all(a.given.data(), bytes);
      a.memory = std::make_unique<block>(bytes, unwritten_byte);
    }
    const s3_program *const program = find(isa.empty() ? nullptr : isa.c_str());
    uint64_t fastest = 0;
    const std::string error = program == nullptr ? "this machine has no " + isa
                                                 : run(program, kernel, threads, repeats, stride, rows, dims, arguments, fastest);
    write_string(error);
    write_string(program == nullptr ? "" : program->isa);
    write_value(fastest);
    for (const argument &a : arguments)
      if (a.kind != 0) fwrite(a.memory->data, 1, a.memory->bytes, stdout);
    fflush(stdout);
  }
  return 0;
}
