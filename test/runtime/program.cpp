// The programs of the runtime's test bundle: a model of a few small integers, so that every sum is exact and any order gives the same bits.
// Kernels named stray_* write what the schedule says they only read; --strict has to notice.
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include <chrono>
#include <thread>

#include "step3.h"

namespace {

constexpr int H = 8, V = 32, J = 2, page_tokens = 4, columns = 4;
constexpr std::size_t page_bytes = 64;

/// Calls `row(index)` for this thread's share of all rows of all segments.
template <class Row>
void rows(const s3_call *c, Row row) {
  std::uint32_t n = 0;
  for (std::uint32_t s = 0; s < c->segments; s++)
    for (std::uint32_t r = 0; r < c->heads[s].rows; r++)
      if (n++ % c->threads == c->thread) row(static_cast<std::size_t>(s) * c->stride + r);
}
template <class T>
T *arg(const s3_call *c, int i) {
  return static_cast<T *>(c->args[i]);
}
int wanted(const char *name) {
  const char *text = std::getenv(name);
  return text ? std::atoi(text) : 0;
}

// ids, position, pages, kv -> x
void embed(const s3_call *c) {
  const auto *ids = arg<std::int32_t>(c, 0), *position = arg<std::int32_t>(c, 1), *pages = arg<std::int32_t>(c, 2);
  auto *kv = arg<std::uint8_t>(c, 3);
  auto *x = arg<float>(c, 4);
  const auto place = [&](std::size_t r, int p) {
    return reinterpret_cast<std::int32_t *>(kv + static_cast<std::size_t>(pages[r * columns + static_cast<std::size_t>(p / page_tokens)]) * page_bytes) +
           p % page_tokens;
  };
  rows(c, [&](std::size_t r) { *place(r, position[r]) = ids[r] + 1; });
  c->barrier(c);
  // a sum that the team shares, to use the scratch
  auto *sums = static_cast<std::int32_t *>(c->scratch);
  rows(c, [&](std::size_t r) {
    std::int32_t sum = 0;
    for (int p = 0; p <= position[r]; p++) sum = (sum + (p + 1) * *place(r, p)) % 997;
    sums[r] = sum;
  });
  c->barrier(c);
  rows(c, [&](std::size_t r) {
    for (int i = 0; i < H; i++) x[r * H + static_cast<std::size_t>(i)] = static_cast<float>(sums[r] * (i + 3) % 101);
  });
}

// x -> tok, ids, wgt
void route(const s3_call *c) {
  rows(c, [&](std::size_t r) {
    std::memcpy(arg<float>(c, 1) + r * H, arg<float>(c, 0) + r * H, H * sizeof(float));
    const int first = static_cast<int>(arg<float>(c, 0)[r * H + 1]) % 4;
    for (int j = 0; j < J; j++) {
      arg<std::int32_t>(c, 2)[r * J + static_cast<std::size_t>(j)] = (first + j) % 4;
      arg<float>(c, 3)[r * J + static_cast<std::size_t>(j)] = j == 0 ? 0.5f : 0.25f;
    }
  });
}

// x -> tok
void copy(const s3_call *c) {
  rows(c, [&](std::size_t r) { std::memcpy(arg<float>(c, 1) + r * H, arg<float>(c, 0) + r * H, H * sizeof(float)); });
}

// x, back of every FFN rank -> y
template <int F>
void merge(const s3_call *c) {
  rows(c, [&](std::size_t r) {
    for (std::size_t i = r * H; i < (r + 1) * H; i++) {
      float y = arg<float>(c, 0)[i];
      for (int f = 0; f < F; f++) y += arg<float>(c, 1 + f)[i];
      arg<float>(c, 1 + F)[i] = std::fmod(y, 1009.0f);
    }
  });
}

// x, w, temperature, seed, position -> next, logits
void head(const s3_call *c) {
  rows(c, [&](std::size_t r) {
    const float *x = arg<float>(c, 0) + r * H, *w = arg<float>(c, 1);
    float *logits = arg<float>(c, 6) + r * V;
    int best = 0;
    for (int v = 0; v < V; v++) {
      float sum = 0;
      for (int i = 0; i < H; i++) sum += x[i] * w[v * H + i];
      logits[v] = std::fmod(sum, 127.0f);
      if (logits[v] > logits[best]) best = v;
    }
    if (arg<float>(c, 2)[r] > 0)
      best = static_cast<int>((arg<std::uint32_t>(c, 3)[r] * 31u + static_cast<std::uint32_t>(arg<std::int32_t>(c, 4)[r])) % V);
    arg<std::int32_t>(c, 5)[r] = best;
  });
}

// tok, ids, wgt, w -> back
void experts(const s3_call *c) {
  if (c->thread == 0) {
    if (const int ms = wanted("STEP3_TEST_SLEEP_MS")) std::this_thread::sleep_for(std::chrono::milliseconds(ms));
    if (wanted("STEP3_TEST_CRASH")) std::raise(SIGSEGV);
  }
  rows(c, [&](std::size_t r) {
    float scale = 0;
    for (int j = 0; j < J; j++) {
      const int id = arg<std::int32_t>(c, 1)[r * J + static_cast<std::size_t>(j)];
      if (id >= 0 && id < 4) scale += arg<float>(c, 2)[r * J + static_cast<std::size_t>(j)] * arg<float>(c, 3)[id];
    }
    for (std::size_t i = r * H; i < (r + 1) * H; i++) arg<float>(c, 4)[i] = scale * arg<float>(c, 0)[i];
  });
}

// tok, w -> back
void dense(const s3_call *c) {
  rows(c, [&](std::size_t r) {
    for (std::size_t i = r * H; i < (r + 1) * H; i++) arg<float>(c, 2)[i] = arg<float>(c, 0)[i] * arg<float>(c, 1)[3];
  });
}

// x -> y
void twice(const s3_call *c) {
  rows(c, [&](std::size_t r) {
    for (std::size_t i = r * H; i < (r + 1) * H; i++) arg<float>(c, 1)[i] = 2 * arg<float>(c, 0)[i];
  });
}

// x [B,S] -> y [S,B], of a graph with the symbols B, T, S, P
void turn(const s3_call *c) {
  const std::int64_t B = c->dims[0], S = c->dims[2];
  for (std::int64_t s = c->thread; s < S; s += c->threads)
    for (std::int64_t b = 0; b < B; b++) arg<float>(c, 1)[s * B + b] = arg<float>(c, 0)[b * S + s];
}

// past [P,B], y [S,B] -> all [P+S,B]
void extend(const s3_call *c) {
  const auto columns = static_cast<std::size_t>(c->dims[0]), rows = static_cast<std::size_t>(c->dims[2]), past = static_cast<std::size_t>(c->dims[3]);
  if (c->thread != 0) return;
  std::memcpy(arg<float>(c, 2), arg<float>(c, 0), past * columns * sizeof(float));
  std::memcpy(arg<float>(c, 2) + past * columns, arg<float>(c, 1), rows * columns * sizeof(float));
}

// x [T,8] -> y [T,8]: each row the values of the four symbols, and nothing
void tell(const s3_call *c) {
  rows(c, [&](std::size_t r) {
    for (std::size_t i = 0; i < H; i++) arg<float>(c, 1)[r * H + i] = i < 4 ? static_cast<float>(c->dims[i]) : 0;
  });
}

// any: changes what it is given to read
void stray(const s3_call *c) {
  if (c->thread == 0) arg<std::uint8_t>(c, 0)[1] ^= 0x55;
}

const s3_kernel_entry kernels[] = {
    {"embed", 4096, embed}, {"route", 0, route},   {"copy", 0, copy},   {"merge1", 0, merge<1>}, {"merge2", 0, merge<2>},
    {"head", 0, head},      {"experts", 0, experts}, {"dense", 0, dense}, {"twice", 0, twice},     {"stray", 0, stray},
    {"turn", 0, turn},      {"extend", 0, extend}, {"tell", 0, tell},
};
const s3_program baseline = {S3_ABI, sizeof kernels / sizeof kernels[0], "baseline", kernels};

}  // namespace

extern "C" const s3_program *s3_program_v1(const char *isa) { return !isa || std::strcmp(isa, "baseline") == 0 ? &baseline : nullptr; }
