// step3-rounds: times whole rounds of a bundle's decode schedule on drawn tokens, with a cache of a given length; all ranks in this process.
//
//   step3-rounds --bundle DIR --program-attention LIB --program-ffn LIB [--transport local|cuda] [--rounds N] [--rows N,N,...] [--context N]
//                [--skew X] [--trace FILE]
//
// Nothing is right about the results: weights may be drawn, the cache holds drawn bytes. What is real is the work: kernels, exchanges, sampling.
// --skew: expert e is chosen with a weight of (e + 1)^-X instead of evenly, in the rows that nobody sends (see bench/emulate.ts).
// --rows: of each slot; several numbers, one after another. The trace has the last two rounds of each.
// Prints one JSON object for each number of rows: times of rounds, tokens a second of an attention rank by the median, and with --trace which part
// of its last rounds each rank computed.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "error.h"
#include "json.h"
#include "launch.h"
#include "mesh/mesh.h"
#include "trace.h"

namespace s3 {
namespace {

struct Options {
  std::string bundle, transport = "local", trace;
  std::uint64_t rounds = 40, context = 0;
  std::vector<std::uint64_t> rows;
  double skew = 0;
  EngineOptions engine;
};

constexpr std::uint64_t warm_up = 3;

/// Draws for everything that a decode round reads.
class Draw {
 public:
  Draw(const Bundle &bundle, const Options &options, std::size_t schedule, std::uint64_t seed)
      : bundle_(bundle), options_(options), schedule_(schedule), random_(seed) {}

  void inputs(Engine &engine) {
    const RankProgram &program = engine.program(schedule_);
    for (const Buffer &b : program.buffers) {
      if (b.region == Region::state) bytes(engine, b);
      if (b.region != Region::input) continue;
      const std::uint64_t n = b.bytes / b.width;
      if (b.binds == "ids") numbers<std::int32_t>(engine, b, n, [&](auto) { return static_cast<std::int32_t>(below(bundle_.manifest.vocabulary.value_or(1))); });
      else if (b.binds == "position") numbers<std::int32_t>(engine, b, n, [&](auto) { return static_cast<std::int32_t>(options_.context - 1); });
      else if (b.binds == "pages") pages(engine, b, n);
      else if (b.binds == "top_p") numbers<float>(engine, b, n, [](auto) { return 1.0f; });
      else bytesOf(engine, b, 0);
    }
  }

  /// Rows that stand for those of ranks that are not there: all of them until a peer writes its own.
  void exchanges(Engine &engine) {
    for (const Buffer &b : engine.program(schedule_).buffers) {
      if (b.region != Region::exchange) continue;
      if (b.name.starts_with("ids")) choices(engine, b);
      else if (b.name.starts_with("wgt")) numbers<float>(engine, b, b.bytes / 4, [](auto) { return 0.4f; });
    }
  }

  /// How many rows ranks that are not there send; whoever is there sends the first header itself.
  void heads(Engine &engine, std::uint64_t rows) {
    for (const Buffer &b : engine.program(schedule_).buffers) {
      if (b.region != Region::exchange || !b.name.starts_with("head") || b.bytes <= sizeof(s3_head)) continue;
      s3_head head{};
      head.magic = S3_MAGIC;
      head.abi = S3_ABI;
      head.slot = b.slot;
      head.rows = static_cast<std::uint32_t>(rows);
      Buffer others = b;
      others.offset += sizeof head;
      others.bytes -= sizeof head;
      const std::vector<s3_head> all(others.bytes / sizeof head, head);
      engine.write(schedule_, others, all.data(), others.bytes);
    }
  }

 private:
  const Bundle &bundle_;
  const Options &options_;
  const std::size_t schedule_;
  std::mt19937_64 random_;
  std::vector<std::uint8_t> stretch_;

  std::uint64_t below(std::uint64_t n) { return random_() % n; }
  template <class T, class Make>
  void numbers(Engine &engine, const Buffer &b, std::uint64_t n, Make make) {
    std::vector<T> all(n);
    for (std::uint64_t i = 0; i < n; i++) all[i] = make(i);
    engine.write(schedule_, b, all.data(), n * sizeof(T));
  }
  void bytesOf(Engine &engine, const Buffer &b, std::uint8_t value) {
    const std::vector<std::uint8_t> all(b.bytes, value);
    engine.write(schedule_, b, all.data(), b.bytes);
  }
  /// Bytes that are moderate numbers in every format: floats of 8 bits from 0.7 to 1.9 of either sign, and as longer floats below 1. The same
  /// stretch again and again, longer than caches are.
  void bytes(Engine &engine, const Buffer &b) {
    if (stretch_.empty()) {
      stretch_.resize(std::size_t{192} << 20);
      for (std::size_t i = 0; i < stretch_.size(); i += 8) {
        const std::uint64_t r = random_();
        for (std::size_t j = 0; j < 8; j++) {
          const auto one = static_cast<std::uint8_t>(r >> (8 * j));
          stretch_[i + j] = static_cast<std::uint8_t>((one & 0x80) | (0x34 + (one & 7)));
        }
      }
    }
    Buffer part = b;
    for (std::uint64_t at = 0; at < b.bytes; at += stretch_.size()) {
      part.offset = b.offset + at;
      part.bytes = std::min<std::uint64_t>(stretch_.size(), b.bytes - at);
      engine.write(schedule_, part, stretch_.data(), part.bytes);
    }
  }
  /// Every row of every slot has pages of its own while there are enough.
  void pages(Engine &engine, const Buffer &b, std::uint64_t n) {
    const Schedule &schedule = bundle_.schedules[schedule_];
    const std::uint64_t perRow = n / schedule.rows, there = bundle_.manifest.kv ? bundle_.manifest.kv->pages - 1 : 1;
    const std::uint64_t used = bundle_.manifest.kv ? (options_.context + bundle_.manifest.kv->pageTokens - 1) / bundle_.manifest.kv->pageTokens : 1;
    numbers<std::int32_t>(engine, b, n, [&](std::uint64_t i) {
      const std::uint64_t row = b.slot * schedule.rows + i / perRow, page = i % perRow;
      return page < used ? static_cast<std::int32_t>(1 + (row * used + page) % there) : 0;
    });
  }
  /// Different experts for each row, by --skew.
  void choices(Engine &engine, const Buffer &b) {
    std::uint64_t experts = 1;
    for (const ExchangeType &type : bundle_.schedules[schedule_].types)
      for (const Field &f : type.push)
        if (f.below) experts = *f.below;
    const std::uint64_t rows = bundle_.schedules[schedule_].rows * b.segments, perRow = b.bytes / 4 / rows;
    std::vector<double> weights(experts);
    for (std::uint64_t e = 0; e < experts; e++) weights[e] = std::pow(static_cast<double>(e + 1), -options_.skew);
    std::vector<std::int32_t> all(rows * perRow);
    for (std::uint64_t row = 0; row < rows; row++) {
      std::vector<double> left = weights;
      for (std::uint64_t j = 0; j < perRow; j++) {
        const auto e = std::discrete_distribution<std::int32_t>(left.begin(), left.end())(random_);
        left[static_cast<std::size_t>(e)] = 0;
        all[row * perRow + j] = e;
      }
    }
    engine.write(schedule_, b, all.data(), all.size() * 4);
  }
};

std::string percentiles(std::vector<double> ms) {
  std::sort(ms.begin(), ms.end());
  const auto at = [&](double q) { return ms[static_cast<std::size_t>(std::min(q * static_cast<double>(ms.size()), static_cast<double>(ms.size() - 1)))]; };
  return say("{\"count\":", ms.size(), ",\"least\":", ms.front(), ",\"p50\":", at(0.5), ",\"p90\":", at(0.9), ",\"p99\":", at(0.99), ",\"most\":", ms.back(), "}");
}

/// The part of the time from the first to the last of a rank's events that its launches take.
double computing(const std::vector<TraceEvent> &events) {
  std::int64_t sum = 0, from = INT64_MAX, to = 0;
  for (const TraceEvent &e : events) {
    from = std::min(from, e.from);
    to = std::max(to, e.to);
    if (e.step >= 0 && e.exchange < 0) sum += e.to - e.from;
  }
  return to > from ? static_cast<double>(sum) / static_cast<double>(to - from) : 0;
}

Options readArguments(int argc, char **argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    const std::string flag = argv[i];
    if (i + 1 >= argc) fail(exit_usage, flag, " needs a value, or is unknown");
    const std::string value = argv[++i];
    const auto numberOf = [&](std::string_view text, auto min, auto max) {
      auto n = min;
      const auto read = std::from_chars(text.data(), text.data() + text.size(), n);
      if (read.ec != std::errc() || read.ptr != text.data() + text.size() || n < min || n > max)
        fail(exit_usage, flag, " takes a number from ", min, " to ", max, ", not '", text, "'");
      return n;
    };
    const auto number = [&](auto min, auto max) { return numberOf(value, min, max); };
    const auto numbers = [&](std::string_view list) {
      std::vector<std::uint64_t> all;
      for (std::size_t at = 0; at <= list.size();) {
        const std::size_t comma = std::min(list.find(',', at), list.size());
        all.push_back(numberOf(list.substr(at, comma - at), std::uint64_t{1}, std::uint64_t{1} << 20));
        at = comma + 1;
      }
      return all;
    };
    if (flag == "--bundle") o.bundle = value;
    else if (flag == "--program-attention") o.engine.program_attention = value;
    else if (flag == "--program-ffn") o.engine.program_ffn = value;
    else if (flag == "--transport") o.transport = value;
    else if (flag == "--trace") o.trace = value;
    else if (flag == "--rounds") o.rounds = number(std::uint64_t{1}, std::uint64_t{100000});
    else if (flag == "--rows") o.rows = numbers(value);
    else if (flag == "--context") o.context = number(std::uint64_t{1}, std::uint64_t{1} << 24);
    else if (flag == "--threads") o.engine.threads = number(1u, 1024u);
    else if (flag == "--skew") o.skew = number(0.0, 10.0);
    else fail(exit_usage, "no flag ", flag);
  }
  if (o.bundle.empty()) fail(exit_usage, "--bundle DIR is missing");
  if (o.transport != "local" && o.transport != "cuda") fail(exit_usage, "--transport '", o.transport, "' is not local or cuda");
  return o;
}

int run(int argc, char **argv) {
  Options o = readArguments(argc, argv);
  const Bundle bundle = Bundle::open(o.bundle);
  const int found = bundle.schedule("decode");
  if (found < 0) fail(exit_input, o.bundle, ": has no decode schedule");
  const auto index = static_cast<std::size_t>(found);
  const Schedule &schedule = bundle.schedules[index];
  if (o.rows.empty()) o.rows.push_back(schedule.rows);
  for (const std::uint64_t rows : o.rows)
    if (rows > schedule.rows) fail(exit_usage, "--rows ", rows, ": a slot holds ", schedule.rows);
  if (o.context == 0) o.context = bundle.manifest.maxContext;
  if (o.context > bundle.manifest.maxContext) fail(exit_usage, "--context ", o.context, ": the bundle is for at most ", bundle.manifest.maxContext, " tokens");

  LaunchOptions launch;
  launch.transport = o.transport == "cuda" ? cudaTransport() : localTransport();
  launch.engine = o.engine;
  launch.engine.session = say("rounds-", std::random_device{}());
  launch.engine.trace = !o.trace.empty();
  std::vector<std::vector<double>> ms(o.rows.size());
  std::vector<std::vector<double>> busy(o.rows.size(), std::vector<double>(bundle.ranks()));  // by rank
  const auto work = [&](std::function<void(const std::string &)>) -> RankWork {
    return [&](Engine &engine, Report &) {
      const bool attention = engine.rank().role == Role::attention;
      Draw draw(bundle, o, index, bundle.number(engine.rank()) + 1);
      if (attention) draw.inputs(engine);
      else draw.exchanges(engine);
      const std::uint64_t each = warm_up + o.rounds;
      std::vector<std::uint32_t> rows;
      std::size_t kept = 0;
      for (std::uint64_t i = 0;; i++) {
        const std::int64_t from = now();
        const std::size_t part = i / each;
        const bool more = attention && part < o.rows.size();
        const s3_round round = engine.agree({more ? static_cast<std::uint32_t>(index + 1) : 0, 1, 0});
        if (round.stop) break;
        if (attention) rows.assign(schedule.slots, static_cast<std::uint32_t>(o.rows[part]));
        else if (i % each == 0) draw.heads(engine, o.rows[part]);
        engine.run(round, rows);
        if (engine.rank() == RankId{Role::attention, 0} && i % each >= warm_up) ms[part].push_back(static_cast<double>(now() - from) / 1e6);
        std::vector<TraceEvent> &events = engine.trace.events;
        if (i % each + 2 < each) events.resize(kept);
        if (i % each + 1 == each && launch.engine.trace) busy[part][bundle.number(engine.rank())] = computing({events.begin() + static_cast<std::ptrdiff_t>(kept), events.end()});
        if (i % each + 1 == each) kept = events.size();
      }
      return int{exit_done};
    };
  };
  const Outcome outcome = Launcher(bundle, launch).run(work, [](const std::string &) {});
  if (!outcome.error.empty()) fail(outcome.code, outcome.error);
  if (!o.trace.empty()) {
    std::ofstream file(o.trace);
    file << "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
    for (std::size_t i = 0; i < outcome.traces.size(); i++) file << (i ? ",\n" : "") << outcome.traces[i];
    file << "\n]}\n";
    if (!file.flush()) fail(exit_input, o.trace, ": cannot be written");
  }
  for (std::size_t i = 0; i < ms.size(); i++) {
    std::nth_element(ms[i].begin(), ms[i].begin() + static_cast<std::ptrdiff_t>(ms[i].size() / 2), ms[i].end());
    const double tokens = static_cast<double>(o.rows[i] * schedule.slots), second = tokens / ms[i][ms[i].size() / 2] * 1e3;
    std::string ranks;
    for (std::uint32_t r = 0; r < bundle.ranks() && launch.engine.trace; r++)
      ranks += say(r ? "," : ",\"computing\":{", jsonText(bundle.rank(r).name()), ":", jsonNumber(busy[i][r]), r + 1 == bundle.ranks() ? "}" : "");
    std::printf("{\"model\":\"%s\",\"rows\":%llu,\"slots\":%u,\"context\":%llu,\"skew\":%g,\"round_ms\":%s,\"tokens_per_second\":%.0f%s}\n", bundle.manifest.model.c_str(),
                static_cast<unsigned long long>(o.rows[i]), schedule.slots, static_cast<unsigned long long>(o.context), o.skew, percentiles(ms[i]).c_str(), second, ranks.c_str());
  }
  return exit_done;
}

}  // namespace
}  // namespace s3

int main(int argc, char **argv) {
  return s3::toolMain("step3-rounds", [&] { return s3::run(argc, argv); });
}
