// Deals out the tiles of drawn contractions as deal_hopper.cuh does on a GPU, and checks that every step of every tile is done once: by one couple, or by
// neighbours of which each goes on where the one before has left. A warp is 32 threads of the host, which meet wherever lanes do.
//
//   cuda_deal TRIALS SEED
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
struct Index {
  unsigned x;
};
inline thread_local Index threadIdx{}, blockIdx{};
inline thread_local uint32_t own_cluster = 0, own_rank = 0;
inline uint32_t all_clusters = 1;
template <class A, class B>
constexpr auto max(A a, B b) { return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? static_cast<std::common_type_t<A, B>>(b) : static_cast<std::common_type_t<A, B>>(a); }
template <class A, class B>
constexpr auto min(A a, B b) { return static_cast<std::common_type_t<A, B>>(b) < static_cast<std::common_type_t<A, B>>(a) ? static_cast<std::common_type_t<A, B>>(b) : static_cast<std::common_type_t<A, B>>(a); }

inline std::barrier<> lanes_meet(32);
inline uint32_t lane_words[32];
inline uint32_t lane() { return threadIdx.x % 32; }
/// What all lanes gave, to be read before they meet again.
template <class Take>
auto exchanged(uint32_t own, const Take &take) {
  lane_words[lane()] = own;
  lanes_meet.arrive_and_wait();
  const auto taken = take();
  lanes_meet.arrive_and_wait();
  return taken;
}
template <class T>
uint32_t word_of(T value) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
template <class T>
T value_of(uint32_t word) {
  T value;
  std::memcpy(&value, &word, 4);
  return value;
}
template <class T>
T __shfl_sync(unsigned, T own, int from) { return exchanged(word_of(own), [&] { return value_of<T>(lane_words[from % 32]); }); }
template <class T>
T __shfl_xor_sync(unsigned, T own, int by) { return exchanged(word_of(own), [&] { return value_of<T>(lane_words[lane() ^ static_cast<unsigned>(by)]); }); }
template <class T>
T __shfl_up_sync(unsigned, T own, int by) { return exchanged(word_of(own), [&] { return value_of<T>(lane_words[lane() < static_cast<unsigned>(by) ? lane() : lane() - by]); }); }
inline uint32_t __ballot_sync(unsigned, bool own) {
  return exchanged(own, [] {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= lane_words[i] << i;
    return bits;
  });
}
template <class Combine>
uint32_t reduced(uint32_t own, const Combine &combine) {
  return exchanged(own, [&] {
    uint32_t all = lane_words[0];
    for (int i = 1; i < 32; ++i) all = combine(all, lane_words[i]);
    return all;
  });
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t own) { return reduced(own, [](uint32_t a, uint32_t b) { return a + b; }); }
inline uint32_t __reduce_min_sync(unsigned, uint32_t own) { return reduced(own, [](uint32_t a, uint32_t b) { return std::min(a, b); }); }
inline uint32_t __reduce_max_sync(unsigned, uint32_t own) { return reduced(own, [](uint32_t a, uint32_t b) { return std::max(a, b); }); }
inline int __ffs(uint32_t bits) { return bits == 0 ? 0 : __builtin_ctz(bits) + 1; }
inline void __syncwarp() { lanes_meet.arrive_and_wait(); }
inline void __syncthreads() {}
inline float __fdividef(float a, float b) { return a / b; }

struct CUtensorMap {
  char bytes[128];
};
struct s3_head {
  uint32_t rows;
};
#include "device.h" // cuda_deal.test.ts takes it from the headers of the backend

using namespace s3;
using namespace s3::hopper;

using Looked = Table<48, 2>;
/// Rows of each segment, or of each matrix, blocks of columns, and steps.
struct Given {
  bool direct;
  std::vector<int> counts;
  int tiles, steps;
};
/// Steps of a row of a tile that a couple does.
struct Seen {
  int first, last;
  uint32_t couple;
  bool resumes, leaves;
};
static int faults = 0;
#define CHECK(x, ...)                                    \
  do {                                                   \
    if (!(x) && ++faults < 20) {                         \
      std::printf("%s: ", #x);                           \
      std::printf(__VA_ARGS__);                          \
      std::printf("\n");                                 \
    }                                                    \
  } while (0)

template <int Many>
void trial(const std::vector<Given> &given, uint32_t weights, uint32_t couples) {
  Work<Many> work{};
  Looked first{};
  for (int q = 0; q < Many; ++q) {
    Problem &p = work.of[q];
    p.direct = given[q].direct, p.groups = given[q].counts.size(), p.tiles = given[q].tiles, p.steps = given[q].steps, p.blocks = weights == 2 ? 2 : 4, p.together = 2, p.parts = 1, p.dealt = true;
    p.columns_first = int64_t(p.tiles) * p.steps * tile_bytes <= int64_t{16} << 20;
    int base = 0;
    for (size_t g = 0; g < given[q].counts.size(); ++g) {
      const int count = given[q].counts[g];
      first.of[q].groups[g] = {given[q].direct ? int(g) * 300 : base, count};
      base += (count + 7) / 8 * 8;
    }
    if (!given[q].direct) first.of[q].groups[given[q].counts.size()] = {base, 0};
  }
  first.begin(work, weights, weights == 1 ? turned_bytes : 0, true);
  all_clusters = couples;
  // (problem, matrix, tile, row) -> pieces
  std::map<std::tuple<int, int, int, int>, std::vector<Seen>> seen;
  for (uint32_t couple = 0; couple < couples; ++couple) {
    Looked table = first;
    std::vector<std::thread> lanes;
    for (unsigned l = 0; l < 32; ++l) lanes.emplace_back([&, l] { threadIdx.x = l, own_cluster = couple, own_rank = 0; deal(table); });
    for (auto &t : lanes) t.join();
    own_cluster = couple;
    for (uint32_t rank = 0; rank < 2; ++rank) {
      own_rank = rank;
      for (uint32_t n = 0; n < item_count(table); ++n) {
        const Item item = dealt_item(table, n);
        const Given &g = given[item.problem];
        CHECK(item.blocks <= (weights == 2 ? 2 : 4), "blocks %d", item.blocks);
        CHECK(RingSize::of(item.blocks, true, weights, first.turned).stage_bytes <= table.ring.stage_bytes && table.ring.stages >= 4, "ring of %u for %d blocks", table.ring.stage_bytes, item.blocks);
        if (item.tile >= g.tiles) continue; // keeps in step
        for (int row = item.row; row < item.end; ++row) seen[{item.problem, item.matrix, item.tile, row}].push_back({item.first, item.last, couple, item.resumes, item.leaves});
      }
    }
  }
  size_t expected = 0;
  for (int q = 0; q < Many; ++q) {
    const Given &g = given[q];
    int base = 0, all = 0;
    for (size_t m = 0; m < g.counts.size(); ++m) all += g.direct ? (g.counts[m] + 7) / 8 * 8 : g.counts[m];
    expected += size_t(all) * g.tiles;
    for (size_t m = 0; m < (g.direct ? 1 : g.counts.size()); ++m) {
      const int count = g.direct ? all : g.counts[m];
      for (int tile = 0; tile < g.tiles; ++tile)
        for (int r = 0; r < count; ++r) {
          auto found = seen.find({q, int(m), tile, base + r});
          CHECK(found != seen.end(), "problem %d matrix %zu tile %d row %d is nobody's", q, m, tile, base + r);
          if (found == seen.end()) continue;
          auto pieces = found->second;
          std::sort(pieces.begin(), pieces.end(), [](const Seen &a, const Seen &b) { return a.first < b.first; });
          int at = 0;
          for (size_t i = 0; i < pieces.size(); ++i) {
            CHECK(pieces[i].first == at && pieces[i].last > at, "steps %d..%d after %d", pieces[i].first, pieces[i].last, at);
            CHECK(pieces[i].resumes == (i > 0) && pieces[i].leaves == (i + 1 < pieces.size()), "piece %zu of %zu", i, pieces.size());
            CHECK(i == 0 || pieces[i].couple == pieces[i - 1].couple + 1, "couples %u after %u", pieces[i].couple, pieces[i - 1].couple);
            at = pieces[i].last;
          }
          CHECK(at == g.steps, "ends at %d of %d", at, g.steps);
        }
      base += g.direct ? 0 : (count + 7) / 8 * 8;
    }
  }
  CHECK(seen.size() == expected, "%zu places, %zu wanted", seen.size(), expected);
}
int main(int argc, char **argv) {
  const int trials = argc > 1 ? std::atoi(argv[1]) : 20;
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 1);
  const auto below = [&](int n) { return int(random() % unsigned(n)); };
  for (int t = 0; t < trials; ++t) {
    const auto steps = [&] { return std::vector<int>{2, 3, 8, 16, 20, 40, 56}[below(7)]; };
    const uint32_t couples = std::vector<uint32_t>{1, 3, 12, 33, 66}[below(5)];
    Given direct{true, {}, 1 + below(8), steps()}, packed{false, {}, 1 + below(40), steps()};
    for (int i = 1 + below(16); i > 0; --i) direct.counts.push_back(below(4) == 0 ? 0 : below(260));
    for (int i = 1 + below(t % 5 == 0 ? 24 : 6); i > 0; --i) packed.counts.push_back(below(4) == 0 ? 0 : below(300));
    const uint32_t weights = 1 + below(2);
    const int before = faults;
    switch (below(4)) {
      case 0: trial<1>({direct}, weights, couples); break;
      case 1: trial<1>({packed}, weights, couples); break;
      case 2: trial<2>({direct, packed}, weights, couples); break;
      default: trial<2>({packed, direct}, weights, couples);
    }
    if (faults != before) std::printf("in trial %d: weights %u couples %u, %zu segments x %d tiles of %d steps, %zu matrices x %d tiles of %d\n", t, weights, couples, direct.counts.size(), direct.tiles, direct.steps, packed.counts.size(), packed.tiles, packed.steps);
  }
  std::printf("%d trials, %d faults\n", trials, faults);
  return faults != 0;
}
