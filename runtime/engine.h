// Executes the schedules of one rank. Knows buffers, kernels, slots and steps; knows no op.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.h"
#include "step3.h"
#include "strict.h"
#include "trace.h"

namespace s3 {

struct EngineOptions {
  std::string program_attention, program_ffn;  // compiled libraries
  std::string isa;                             // empty: the best
  std::string session;
  std::uint32_t threads = 1, spin = 2000;
  std::uint32_t meet_ms = 30000;   // to wait for peers to appear
  std::uint32_t step_ms = 600000;  // to wait for one message; a peer that dies is noticed at once
  std::uint32_t leave_ms = 1500;   // to end by itself after a peer in another process died
  bool strict = false, trace = false, count = false;
};

/// Weights that several ranks of one process need are loaded once, where the device allows it.
class WeightsPool {
 public:
  struct Entry {
    std::once_flag once;
    s3_span span{};
  };
  Entry &entry(const std::string &identity);

 private:
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Entry>> entries_;
};

/// How often each value of a counted field travelled (rows per expert).
struct ValueCount {
  std::uint32_t schedule = 0, exchange = 0;
  std::string field;
  std::vector<std::uint64_t> rows;
};

struct EngineStats {
  std::uint64_t rounds = 0;
  std::int64_t compute_ns = 0, wait_ns = 0, send_ns = 0, agree_ns = 0, load_ns = 0;
  std::vector<ValueCount> counts;
};

class Engine {
 public:
  Engine(const Bundle &bundle, RankId rank, const EngineOptions &options, const s3_device *device, const s3_transport *transport, WeightsPool *pool);
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;
  /// Frees device memory: with ranks in one process, only when all of them have left.
  ~Engine();

  /// Opens the device, allocates memory and finds the kernels. Throws a Failure.
  void open();
  /// Meets the other ranks and loads weights. Throws a Failure.
  void start();
  /// Asks for a round; returns what all ranks do next.
  s3_round agree(const s3_wish &wish);
  /// Sets the values of a schedule's symbols for the rounds of a slot, within their ranges; until then they are at their maxima. That of T does
  /// not matter: kernels find the rows there.
  void setSymbols(std::size_t schedule, std::uint32_t slot, const std::vector<std::uint64_t> &values);
  /// Executes the round's schedule once; `rows` of each slot, attention ranks only.
  void run(const s3_round &round, const std::vector<std::uint32_t> &rows);
  /// Leaves the other ranks: done (null), or with what went wrong.
  void leave(const char *why);

  /// host access to the start of a buffer
  void write(std::size_t schedule, const Buffer &buffer, const void *bytes, std::uint64_t n);
  void read(std::size_t schedule, const Buffer &buffer, std::uint64_t offset, void *bytes, std::uint64_t n);

  const Bundle &bundle() const { return bundle_; }
  RankId rank() const { return rank_; }
  const RankProgram &program(std::size_t schedule) const { return *plans_[schedule].program; }
  EngineStats stats;
  Trace trace;

 private:
  struct Action {
    Step::Op op = Step::Op::launch;
    std::size_t step = 0;  // of a segment: its first
    std::size_t count = 1;
    s3_segment *segment = nullptr;
    std::uint32_t name = 0;  // of the trace
  };
  struct Plan {
    const Schedule *schedule = nullptr;
    const RankProgram *program = nullptr;
    std::array<s3_span, regions> memory{};
    std::vector<Action> actions;
    std::vector<std::vector<std::uint32_t>> heads;  // by slot: header buffers that the host writes
    std::vector<int> push_head;                     // by slot: the one that is pushed
    std::unique_ptr<Strict> strict;
    struct Counted {
      std::uint32_t buffer = 0;
      std::size_t count = 0;  // index into stats.counts
      std::uint64_t per_row = 0;
      std::uint64_t kept = 0;  // index into `kept`
    };
    std::vector<std::vector<std::vector<Counted>>> counted;  // by exchange and slot
    s3_span dims{};  // by slot, in cache lines of their own: the values of the symbols
    s3_span kept{};  // a transport of queues: counted fields of the round, which the host reads when it ends
    std::vector<s3_event> events;
  };

  const Bundle &bundle_;
  const RankId rank_;
  const EngineOptions options_;
  const s3_device *device_;
  const s3_transport *transport_;
  WeightsPool *pool_;
  s3_dev *dev_ = nullptr;
  s3_queue *queue_ = nullptr;
  const bool queued_;  // the transport works through the device's queues
  s3_net *net_ = nullptr;
  std::vector<Plan> plans_;
  std::vector<std::int32_t> ids_;

  void dev(int code, const char *doing);
  void net(int code);
  s3_span alloc(std::uint64_t bytes, bool shared, const char *what);
  s3_span span(const Plan &plan, const Buffer &b) const;
  static s3_span dims(const Plan &plan, std::uint32_t slot);
  std::uint8_t *host(const Plan &plan, const Buffer &b) const;
  void allocate();
  void connect();
  void prepare(std::size_t index);
  void loadWeights();
  std::uint32_t traceName(const std::string &name);
  void traced(const Plan &plan, const Action &action, std::uint32_t round, std::int64_t from, std::int64_t to);
  void header(const Plan &plan, std::uint32_t buffer, const s3_head &head);
  void count(const Plan &plan, std::uint32_t exchange, std::uint32_t slot, std::uint32_t rows);
  void tally(const Plan::Counted &counted, const std::int32_t *values, std::uint64_t n);
};

}  // namespace s3
