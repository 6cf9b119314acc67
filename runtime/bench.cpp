// step3-bench: times the kernels and segments of one rank, without peers, and what its device can do at best. See compiler/bench.ts.
//
//   step3-bench --bundle DIR --program LIB --role attention|ffn [--schedule NAME] [--rows N] [--context N] [--threads N]
//
// Every buffer has memory of the device, exchanges too: no transport is measured. Prints one JSON object; times are in nanoseconds.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <thread>

#include "devices/device.h"
#include "error.h"
#include "library.h"
#include "trace.h"
#include "weights.h"

namespace s3 {
namespace {

struct Options {
  std::string bundle, program, schedule;
  Role role = Role::attention;
  std::uint64_t rows = 0, context = 0, threads = 0;  // 0: the default
};

/// Medians of one thing done again and again, with the spread.
struct Time {
  double median = 0, least = 0, most = 0;
  std::string json() const { return say("{\"median\":", jsonNumber(median), ",\"least\":", jsonNumber(least), ",\"most\":", jsonNumber(most), "}"); }
};

/// What costs.json says of a kernel whose rows choose their weights.
struct Experts {
  std::uint32_t argument = 0;
  std::int64_t first = 0, count = 0;
};

/// What the rows of one launch ask for.
struct Load {
  std::uint64_t rows = 0;
  std::uint64_t row_context = 0, sequence_context = 0;  // cached tokens: of each row, and of each sequence once
  std::uint64_t experts = 0, pairs = 0;                 // distinct experts of this rank that were chosen, and choices of them
};

constexpr std::uint64_t piece = 1 << 20, streamed = 512 * piece;
constexpr double sample_ns = 4e6;
constexpr std::size_t samples = 7;

class Bench {
 public:
  Bench(const Bundle &bundle, const Options &options)
      : bundle_(bundle), facts_(bundle.manifest.program(options.role)), schedule_(findSchedule(bundle, options.schedule)),
        program_(schedule_.program({options.role, 0})), segments_(options.role == Role::ffn ? bundle.manifest.attention : 1),
        rows_(options.rows ? options.rows : schedule_.rows), context_(options.context ? options.context : std::max<std::uint64_t>(1, bundle.manifest.maxContext)) {
    if (rows_ > schedule_.rows) fail(exit_usage, "--rows ", rows_, ": schedule ", schedule_.name, " has slots of ", schedule_.rows);
    if (bundle.manifest.maxContext > 0 && context_ > bundle.manifest.maxContext)
      fail(exit_usage, "--context ", context_, ": the bundle is for at most ", bundle.manifest.maxContext, " tokens");
    openDevice(options);
    for (std::size_t r = 0; r < regions; r++)
      if (program_.memory[r] > 0) memory_[r] = alloc(program_.memory[r], regionName(static_cast<Region>(r)));
    // sizes other than the rows are at their maxima
    std::vector<std::int64_t> dims;
    for (const Symbol &s : schedule_.symbols) dims.push_back(static_cast<std::int64_t>(s.max));
    if (!dims.empty()) dims_ = alloc(dims.size() * sizeof(std::int64_t), "sizes");
    write(dims_, dims.data(), dims.size() * sizeof(std::int64_t));
    readExperts();
    for (const Key &k : schedule_.keys)
      if (k.push && (options.role == Role::attention ? k.a : k.f) == 0) below(k, options.role == Role::attention ? k.source : k.target);
  }
  ~Bench() { device_->close(dev_); }
  Bench(const Bench &) = delete;
  Bench &operator=(const Bench &) = delete;

  std::string run() {
    fillWeights();
    for (const Buffer &b : program_.buffers)
      if (b.region == Region::exchange || b.region == Region::scratch) fill(b, 0);
    const auto rounds = prepareSegments();
    if (bundle_.manifest.kv && program_.memory[static_cast<std::size_t>(Region::state)] > 0) fillCache(rounds);
    fillInputs();
    std::string text = say("{\"rank\":\"", program_.rank.name(), "\",\"role\":\"", roleName(program_.rank.role), "\",\"target\":", jsonText(facts_.target),
                           ",\"threads\":", facts_.device == "cpp" ? threads_ : 0, ",\"schedule\":\"", schedule_.name, "\",\"slots\":", schedule_.slots, ",\"rows\":", rows_,
                           ",\"senders\":", segments_, ",\"context\":", program_.memory[static_cast<std::size_t>(Region::state)] > 0 ? context_ : 0);
    text += ",\"ceilings\":" + ceilings();
    text += ",\"groups\":" + groups(rounds);
    return text + ",\"kernels\":" + kernels() + "}";
  }

 private:
  const Bundle &bundle_;
  const ProgramFacts &facts_;
  const Schedule &schedule_;
  const RankProgram &program_;
  const std::uint32_t segments_;
  const std::uint64_t rows_;  // of each segment of a launch
  std::uint64_t context_;
  std::uint64_t threads_ = 1;
  const s3_device *device_ = nullptr;
  s3_dev *dev_ = nullptr;
  s3_queue *queue_ = nullptr;
  std::array<s3_span, regions> memory_{};
  s3_span dims_{};                                     // values of the symbols
  std::map<std::string, Experts> experts_;             // by kernel
  std::map<std::uint32_t, std::uint64_t> below_;       // buffers of choices: how many there are to choose from
  std::uint64_t drawn_ = 0;                            // of the generator

  struct Round {
    s3_segment *segment;
    std::vector<std::string> kernels;
  };

  static const Schedule &findSchedule(const Bundle &bundle, const std::string &name) {
    // of a language model decode, which is the last
    const int index = name.empty() ? static_cast<int>(bundle.schedules.size()) - 1 : bundle.schedule(name);
    if (index < 0) fail(exit_usage, "--schedule ", name, ": the bundle has no such schedule");
    return bundle.schedules[static_cast<std::size_t>(index)];
  }

  void check(int code, const std::string &doing) const {
    if (code != 0) fail(code, doing, ": ", device_->error(dev_));
  }

  void openDevice(const Options &o) {
    if (facts_.device == "cpp") {
      device_ = cppDevice();
    } else {
      const auto find = symbol<const s3_device *(*)()>(o.program, "s3_device_v1");
      if (!find) fail(exit_input, o.program, ": brings no driver for device '", facts_.device, "' (s3_device_v1); build the program again");
      device_ = find();
    }
    if (device_->abi != S3_ABI) fail(exit_input, o.program, ": its driver speaks abi ", device_->abi, ", this runtime ", S3_ABI, "; build both from the same bundle");
    const std::uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
    threads_ = o.threads ? o.threads : std::max(1u, cores / bundle_.ranks());
    std::string kernels;
    for (const auto &[name, facts] : facts_.kernels) kernels += say(kernels.empty() ? "" : ",", jsonText(name), ":", facts.scratch);
    const std::string options = say("{\"threads\":", threads_, ",\"spin\":", threads_ <= cores ? 4000 : 100, ",\"kernels\":{", kernels, "}}");
    check(device_->open(0, o.program.c_str(), options.c_str(), &dev_), "device");
    check(device_->queue(dev_, &queue_), "device queue");
  }

  s3_span alloc(std::uint64_t bytes, const std::string &what) const {
    s3_span s{};
    check(device_->alloc(dev_, bytes, 64, 0, &s), "memory for " + what);
    s.bytes = bytes;
    return s;
  }

  void readExperts() {
    const JsonFile costs = JsonFile::read(bundle_.path + "/costs.json", "costs.json");
    for (const auto &[kernel, cost] : costs[roleName(program_.rank.role)].members())
      if (const Json *e = cost.find("experts"))
        experts_[kernel] = {static_cast<std::uint32_t>((*e)["argument"].whole(0, 255)), (*e)["first"].whole(), (*e)["count"].whole(1)};
  }

  void below(const Key &k, std::uint32_t buffer) {
    for (const ExchangeType &t : schedule_.types)
      for (const Field &f : t.push)
        if (f.name == k.field && f.below) below_[buffer] = *f.below;
  }

  // --- data: valid values, the same in every run ---------------------------------------------------------------------------------

  std::uint64_t draw(std::uint64_t below) {
    drawn_ = drawn_ * 6364136223846793005u + 1442695040888963407u;
    return (drawn_ >> 33) % below;
  }

  s3_span span(const Buffer &b) const {
    const s3_span region = memory_[static_cast<std::size_t>(b.region)];
    return {region.mem, region.off + b.offset, b.bytes};
  }
  void write(s3_span to, const void *bytes, std::uint64_t n) const {
    to.bytes = n;
    if (n > 0) check(device_->write(dev_, to, bytes), "writing");
  }
  /// Writes `bytes` over and over.
  void repeat(s3_span to, const std::vector<std::uint8_t> &bytes) const {
    for (std::uint64_t at = 0; at < to.bytes; at += bytes.size()) write({to.mem, to.off + at, 0}, bytes.data(), std::min<std::uint64_t>(bytes.size(), to.bytes - at));
  }
  static std::vector<std::uint8_t> values(const std::string &dtype, std::uint64_t n) {
    std::vector<std::uint8_t> bytes(n);
    drawWeights(bytes.data(), n, dtype, 1, dtype);
    return bytes;
  }
  /// f32 that may be scales, weights or sums: positive and not too small.
  static std::vector<std::uint8_t> positive(std::uint64_t n) {
    std::vector<std::uint8_t> bytes = values("f32", n / 4 * 4);
    for (std::size_t i = 0; i < bytes.size(); i += 4) {
      float x;
      std::memcpy(&x, &bytes[i], 4);
      x = std::abs(x) + 1e-3f;
      std::memcpy(&bytes[i], &x, 4);
    }
    return bytes;
  }

  void fillWeights() {
    const auto file = std::find_if(bundle_.manifest.weights.begin(), bundle_.manifest.weights.end(), [&](const WeightsFile &w) {
      return w.rank == program_.rank.name() || w.rank == roleName(program_.rank.role);
    });
    if (file != bundle_.manifest.weights.end() && file->file) {
      const s3_span region = memory_[static_cast<std::size_t>(Region::weights)];
      WeightsTarget target;
      if (region.bytes > 0) target.direct = static_cast<std::uint8_t *>(device_->host(dev_, region));
      target.write = [&](std::uint64_t offset, const std::uint8_t *bytes, std::uint64_t n) { write({region.mem, region.off + offset, 0}, bytes, n); };
      loadWeights(bundle_, program_, target);
      return;
    }
    // nothing asks what they are: values of a dtype are drawn once and repeat
    std::map<std::string, std::vector<std::uint8_t>> drawn;
    for (const Buffer &b : program_.buffers) {
      if (b.region != Region::weights) continue;
      auto &bytes = drawn[b.dtype];
      if (bytes.empty()) bytes = values(b.dtype, 16 * piece);
      repeat(span(b), bytes);
    }
  }

  /// Choices among `most`, distinct in each row where there are enough.
  void fillChoices(const Buffer &b, std::uint64_t most) {
    const std::uint64_t n = b.bytes / sizeof(std::int32_t), columns = b.shape.empty() ? 1 : std::max<std::uint64_t>(1, b.shape.back().value);
    std::vector<std::int32_t> ids(n);
    for (std::uint64_t i = 0; i < n; i++) {
      const auto row = ids.begin() + static_cast<std::ptrdiff_t>(i / columns * columns), at = ids.begin() + static_cast<std::ptrdiff_t>(i);
      do *at = static_cast<std::int32_t>(draw(most));
      while (columns <= most && std::find(row, at, *at) != at);
    }
    write(span(b), ids.data(), b.bytes);
  }

  /// `most`: what integers stay below, where the exchange does not say
  void fill(const Buffer &b, std::uint64_t most) {
    const auto known = below_.find(program_.names.at(b.name));
    if (known != below_.end()) most = known->second;
    if (b.dtype == "i32" && most > 0) return fillChoices(b, most);
    repeat(span(b), b.dtype == "f32" ? positive(piece) : values(b.dtype, std::min(piece, (b.bytes + 7) / 8 * 8)));
  }

  bool oneSequence() const { return schedule_.name == "prefill"; }
  /// position of a row of a slot: prefill takes the last rows of one sequence, decode the last one of each
  std::uint64_t position(std::uint64_t row) const {
    const std::uint64_t first = context_ > rows_ ? context_ - rows_ : 0;
    return oneSequence() ? std::min(first + row, context_ - 1) : context_ - 1;
  }

  void fillHeads(std::uint64_t rows) {
    for (const Step &s : program_.steps) {
      if (s.op != Step::Op::launch) continue;
      s3_head head{};
      head.magic = S3_MAGIC;
      head.abi = S3_ABI;
      head.slot = s.slot;
      head.rows = static_cast<std::uint32_t>(rows);
      const std::vector<s3_head> heads(segments_, head);
      write(span(program_.buffers[s.rows]), heads.data(), heads.size() * sizeof head);
    }
  }

  std::uint64_t pagesOfSequence() const {
    const std::uint64_t tokens = bundle_.manifest.kv ? bundle_.manifest.kv->pageTokens : 1;
    return (context_ + tokens - 1) / tokens;
  }

  void fillInputs() {
    fillHeads(rows_);
    const std::uint64_t pages = bundle_.manifest.kv ? std::max<std::uint64_t>(bundle_.manifest.kv->pages, 2) : 2, each = pagesOfSequence();
    for (const Buffer &b : program_.buffers) {
      if (b.region != Region::input || b.bytes == 0) continue;
      const std::uint64_t per_row = std::max<std::uint64_t>(1, b.bytes / b.width / schedule_.rows);
      std::vector<std::int32_t> whole(b.bytes / sizeof(std::int32_t));
      for (std::uint64_t i = 0; i < whole.size(); i++) {
        const std::uint64_t row = i / per_row, sequence = oneSequence() ? b.slot : b.slot * rows_ + row;
        if (b.binds == "ids") whole[i] = static_cast<std::int32_t>(draw(bundle_.manifest.vocabulary.value_or(1)));
        else if (b.binds == "position") whole[i] = static_cast<std::int32_t>(position(row));
        else if (b.binds == "pages" && i % per_row < each) whole[i] = static_cast<std::int32_t>(1 + (sequence * each + i % per_row) % (pages - 1));
        else if (b.binds == "seed") whole[i] = static_cast<std::int32_t>(row);
      }
      if (b.dtype == "i32" || b.dtype == "u32") write(span(b), whole.data(), whole.size() * sizeof(std::int32_t));
      else if (b.binds == "temperature") repeat(span(b), std::vector<std::uint8_t>(b.bytes));  // the likeliest token, as by default
      else if (b.dtype != "u8") fill(b, 0);
    }
  }

  /// Real entries in the cache, in the layout that the kernels have made: rounds write the first page, and all others are copies of it.
  void fillCache(const std::vector<Round> &rounds) {
    const KvFacts &kv = *bundle_.manifest.kv;
    fillInputs();
    const std::uint64_t tokens = std::min(kv.pageTokens, bundle_.manifest.maxContext);
    for (std::uint64_t from = 0; from < tokens; from += schedule_.slots * rows_) {
      for (const Buffer &b : program_.buffers) {
        if (b.region != Region::input || (b.binds != "position" && b.binds != "pages")) continue;
        const std::uint64_t per_row = std::max<std::uint64_t>(1, b.bytes / b.width / schedule_.rows);
        std::vector<std::int32_t> whole(b.bytes / sizeof(std::int32_t));
        for (std::uint64_t i = 0; i < whole.size(); i++) {
          if (b.binds == "position") whole[i] = static_cast<std::int32_t>((from + b.slot * rows_ + i / per_row) % tokens);
          else whole[i] = i % per_row == 0;
        }
        write(span(b), whole.data(), whole.size() * sizeof(std::int32_t));
      }
      once(rounds);
    }
    const std::uint64_t used = std::min(kv.pages - 1, schedule_.slots * rows_ * pagesOfSequence());
    for (const Buffer &b : program_.buffers) {
      if (b.region != Region::state) continue;
      const s3_span pages = span(b);
      const auto page = [&](std::uint64_t n) { return s3_span{pages.mem, pages.off + n * kv.pageBytes, 0}; };
      for (std::uint64_t have = 1; have < used;) {
        const std::uint64_t more = std::min(have, used - have);
        check(device_->copy(queue_, page(1 + have), page(1), more * kv.pageBytes), "filling the cache");
        have += more;
      }
    }
  }

  // --- time ------------------------------------------------------------------------------------------------------------------------

  void once(const std::vector<Round> &rounds) const {
    s3_event done = 0;
    for (const Round &r : rounds) check(device_->submit(queue_, r.segment, &done), "launching");
    if (done) check(device_->wait(dev_, done, 600000), "running");
  }
  double timed(const std::vector<Round> &rounds, std::uint64_t repeats) const {
    const std::int64_t from = now();
    s3_event done = 0;
    for (std::uint64_t i = 0; i < repeats; i++)
      for (const Round &r : rounds) check(device_->submit(queue_, r.segment, &done), "launching");
    if (done) check(device_->wait(dev_, done, 600000), "running");
    return static_cast<double>(now() - from) / static_cast<double>(repeats);
  }
  Time measure(const std::vector<Round> &rounds) const {
    once(rounds);
    const double first = timed(rounds, 1);
    const auto repeats = static_cast<std::uint64_t>(std::clamp(sample_ns / first, 1.0, 500.0));
    std::vector<double> all(first < 1e8 ? samples : 5);
    for (double &t : all) t = timed(rounds, repeats);
    std::sort(all.begin(), all.end());
    return {all[all.size() / 2], all.front(), all.back()};
  }
  static Time each(Time t, double n) { return {t.median / n, t.least / n, t.most / n}; }

  s3_segment *prepare(const std::vector<s3_launch> &launches) const {
    s3_segment *segment = nullptr;
    check(device_->prepare(dev_, launches.data(), static_cast<std::uint32_t>(launches.size()), &segment), "preparing launches");
    return segment;
  }

  std::vector<const Buffer *> arguments(const Step &s) const {
    std::vector<const Buffer *> all;
    for (const auto *list : {&s.in, &s.inout, &s.out})
      for (const std::uint32_t b : *list) all.push_back(&program_.buffers[b]);
    return all;
  }

  /// A launch of a step; `spans` must live until it has been prepared.
  s3_launch launchOf(const Step &s, const std::vector<s3_span> &spans) const {
    std::uint32_t kernel = 0;
    check(device_->kernel(dev_, program_.kernels[s.kernel].c_str(), &kernel), "schedule " + schedule_.name);
    return {kernel, static_cast<std::uint32_t>(spans.size()), spans.data(), span(program_.buffers[s.rows]), segments_, static_cast<std::uint32_t>(schedule_.rows), dims_,
            schedule_.token.value_or(S3_NO_SYMBOL)};
  }

  /// The launches between two communication steps, as the engine takes them together, in the order of a round.
  std::vector<Round> prepareSegments() const {
    std::vector<Round> rounds;
    std::vector<const Step *> steps;
    const auto flush = [&] {
      if (steps.empty()) return;
      std::vector<std::vector<s3_span>> spans;
      Round round;
      for (const Step *s : steps) {
        spans.emplace_back();
        for (const Buffer *b : arguments(*s)) spans.back().push_back(span(*b));
        round.kernels.push_back(program_.kernels[s->kernel]);
      }
      std::vector<s3_launch> launches;
      for (std::size_t i = 0; i < steps.size(); i++) launches.push_back(launchOf(*steps[i], spans[i]));
      round.segment = prepare(launches);
      rounds.push_back(std::move(round));
      steps.clear();
    };
    for (const Step &s : program_.steps) {
      if (s.op == Step::Op::launch) steps.push_back(&s);
      else flush();
    }
    flush();
    return rounds;
  }

  // --- what is measured --------------------------------------------------------------------------------------------------------------

  /// Segments with the same kernels, timed together in the order of a round; and the round.
  std::string groups(const std::vector<Round> &rounds) const {
    std::vector<std::vector<Round>> all;
    for (const Round &r : rounds) {
      const auto like = std::find_if(all.begin(), all.end(), [&](const auto &g) { return g.front().kernels == r.kernels; });
      if (like == all.end()) all.push_back({r});
      else like->push_back(r);
    }
    std::string text = "[";
    for (const auto &group : all) {
      once(rounds);  // what one group reads, another has written
      text += say(text.size() > 1 ? "," : "", "{\"kernels\":[");
      for (std::size_t i = 0; i < group.front().kernels.size(); i++) text += say(i ? "," : "", jsonText(group.front().kernels[i]));
      text += say("],\"count\":", group.size(), ",\"time\":", each(measure(group), static_cast<double>(group.size())).json(), "}");
    }
    return text + "],\"round\":" + measure(rounds).json();
  }

  Load load(const Step &s, std::uint64_t rows) const {
    Load l;
    l.rows = rows * segments_;
    for (std::uint64_t r = 0; r < rows; r++) l.row_context += position(r) + 1;
    l.sequence_context = oneSequence() && rows > 0 ? position(rows - 1) + 1 : l.row_context;
    const auto known = experts_.find(program_.kernels[s.kernel]);
    if (known == experts_.end()) return l;
    const Experts &e = known->second;
    const Buffer &b = *arguments(s)[e.argument];
    std::vector<std::int32_t> ids(b.bytes / sizeof(std::int32_t));
    check(device_->read(dev_, ids.data(), span(b)), "reading choices");
    const std::uint64_t one = ids.size() / segments_, columns = one / schedule_.rows;
    std::vector<std::uint64_t> chosen(static_cast<std::size_t>(e.count));
    for (std::uint64_t i = 0; i < ids.size(); i++)
      if (i % one < rows * columns && ids[i] >= e.first && ids[i] - e.first < e.count) chosen[static_cast<std::size_t>(ids[i] - e.first)]++;
    for (const std::uint64_t n : chosen) l.pairs += n;
    l.experts = chosen.size() - static_cast<std::size_t>(std::count(chosen.begin(), chosen.end(), 0u));
    return l;
  }
  static std::string json(const Load &l, const Time &t) {
    return say("{\"rows\":", l.rows, ",\"rowContext\":", l.row_context, ",\"sequenceContext\":", l.sequence_context, ",\"experts\":", l.experts, ",\"pairs\":", l.pairs,
               ",\"time\":", t.json(), "}");
  }

  /**
   * A kernel by itself: its launches of one slot, one after another, so that weights and cache are of one layer after the other as in a round.
   * All take the other arguments of the first, which hold valid values. Again with half the rows, to see whether time goes with them.
   */
  std::string kernel(std::uint32_t kernel) {
    std::vector<const Step *> steps;
    std::uint64_t launches = 0;
    for (const Step &s : program_.steps) {
      if (s.op != Step::Op::launch || s.kernel != kernel) continue;
      launches++;
      if (steps.empty() || s.slot == steps.front()->slot) steps.push_back(&s);
    }
    const Step &model = *steps.front();
    const std::vector<const Buffer *> own = arguments(model);
    const auto known = experts_.find(program_.kernels[kernel]);
    for (std::size_t a = 0; a < model.in.size(); a++) {
      const bool choices = known != experts_.end() && known->second.argument == a;
      if (own[a]->region == Region::scratch) fill(*own[a], choices ? static_cast<std::uint64_t>(known->second.first + known->second.count) : 0);
    }
    std::vector<std::vector<s3_span>> spans;
    for (const Step *s : steps) {
      spans.emplace_back();
      const auto theirs = arguments(*s);
      for (std::size_t a = 0; a < own.size(); a++) {
        const bool moves = theirs[a]->region == Region::weights || theirs[a]->region == Region::state;
        spans.back().push_back(span(moves ? *theirs[a] : *own[a]));
      }
    }
    const auto segmentOf = [&](std::uint64_t passes) {
      std::vector<s3_launch> list;
      for (std::uint64_t i = 0; i < passes; i++)
        for (const auto &s : spans) list.push_back(launchOf(model, s));
      return std::vector<Round>{{prepare(list), {}}};
    };
    fillHeads(rows_);
    auto segment = segmentOf(1);
    once(segment);
    // enough launches in a row that the host does not count
    const auto passes = static_cast<std::uint64_t>(std::clamp(sample_ns / 2 / timed(segment, 1), 1.0, std::max(1.0, 256.0 / static_cast<double>(steps.size()))));
    if (passes > 1) segment = segmentOf(passes);
    const double n = static_cast<double>(passes * steps.size());
    std::string text = say("{\"name\":", jsonText(program_.kernels[kernel]), ",\"launches\":", launches, ",\"distinct\":", steps.size(),
                           ",\"full\":", json(load(model, rows_), each(measure(segment), n)));
    if (rows_ > 1) {
      fillHeads(rows_ / 2);
      text += ",\"half\":" + json(load(model, rows_ / 2), each(measure(segment), n));
      fillHeads(rows_);
    }
    return text + "}";
  }

  std::string kernels() {
    std::string text = "[";
    for (std::uint32_t k = 0; k < program_.kernels.size(); k++) text += (k ? "," : "") + kernel(k);
    return text + "]";
  }

  /// What the device does at best: the kernels of the program called ceiling_*, in bytes or operations a second.
  std::string ceilings() const {
    const s3_span in = alloc(streamed, "measuring the device"), out = alloc(4096 * sizeof(double), "measuring the device"), heads = alloc(sizeof(s3_head), "measuring the device");
    std::string text = "{";
    // one launch of a ceiling with so many rows: nanoseconds, and the work it says it did
    const auto measured = [&](const std::string &name, std::uint64_t rows, std::uint64_t times, double &work) -> std::optional<Time> {
      s3_span args[] = {in, out};
      s3_launch one{0, 2, args, heads, 1, UINT32_MAX, {}, S3_NO_SYMBOL};
      if (device_->kernel(dev_, name.c_str(), &one.kernel) != 0) return std::nullopt;
      s3_head head{};
      head.magic = S3_MAGIC;
      head.abi = S3_ABI;
      head.rows = static_cast<std::uint32_t>(rows);
      write(heads, &head, sizeof head);
      const std::vector<Round> segment{{prepare(std::vector<s3_launch>(times, one)), {}}};
      const Time t = each(measure(segment), static_cast<double>(times));
      check(device_->read(dev_, &work, {out.mem, out.off, sizeof work}), "measuring the device");
      return t;
    };
    const auto put = [&](const char *name, double value) {
      if (value > 0) text += say(text.size() > 1 ? "," : "", "\"", name, "\":", jsonNumber(value));
    };
    double work = 0;
    if (const auto t = measured("ceiling_launch", 1, 64, work)) put("launch", t->median);
    repeat(in, values("bf16", 16 * piece));
    const auto reading = [&](std::uint64_t bytes, std::uint64_t times) {
      double best = 0;
      for (const char *name : {"ceiling_read", "ceiling_read_2", "ceiling_read_3"})
        if (const auto t = measured(name, bytes / piece, times, work)) best = std::max(best, work / t->least * 1e9);
      return best;
    };
    put("read", reading(streamed, 4));
    put("cached", std::max({reading(8 * piece, 64), reading(16 * piece, 32), reading(32 * piece, 16)}));
    for (const auto &[name, dtype] : {std::pair{"f32", "f32"}, {"bf16", "bf16"}, {"fp8", "e4m3"}, {"int8", "i8"}}) {
      repeat({in.mem, in.off, piece}, values(dtype, piece));
      const std::string kernel = say("ceiling_", name);
      std::uint64_t rows = 1;
      auto t = measured(kernel, rows, 1, work);
      if (!t) continue;
      rows = static_cast<std::uint64_t>(std::clamp(sample_ns / t->median, 1.0, 1e5));
      t = measured(kernel, rows, 1, work);
      rows = static_cast<std::uint64_t>(std::clamp(static_cast<double>(rows) * sample_ns / t->median, 1.0, 1e6));
      t = measured(kernel, rows, 1, work);
      put(name, work / t->least * 1e9);
    }
    return text + "}";
  }
};

Options readArguments(int argc, char **argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    const std::string flag = argv[i];
    if (i + 1 >= argc) fail(exit_usage, flag, " needs a value");
    const std::string value = argv[++i];
    const auto whole = [&](std::uint64_t max) {
      std::uint64_t n = 0;
      const auto read = std::from_chars(value.data(), value.data() + value.size(), n);
      if (read.ec != std::errc() || read.ptr != value.data() + value.size() || n < 1 || n > max)
        fail(exit_usage, flag, " takes a number from 1 to ", max, ", not '", value, "'");
      return n;
    };
    if (flag == "--bundle") o.bundle = value;
    else if (flag == "--program") o.program = value;
    else if (flag == "--schedule") o.schedule = value;
    else if (flag == "--rows") o.rows = whole(1 << 24);
    else if (flag == "--context") o.context = whole(INT32_MAX);
    else if (flag == "--threads") o.threads = whole(1024);
    else if (flag == "--role" && (value == "attention" || value == "ffn")) o.role = value == "ffn" ? Role::ffn : Role::attention;
    else fail(exit_usage, "no option ", flag, " ", value);
  }
  if (o.bundle.empty() || o.program.empty())
    fail(exit_usage, "usage: step3-bench --bundle DIR --program LIB --role attention|ffn [--schedule NAME] [--rows N] [--context N] [--threads N]");
  return o;
}

}  // namespace
}  // namespace s3

int main(int argc, char **argv) {
  using namespace s3;
  return toolMain("step3-bench", [&] {
    const Options options = readArguments(argc, argv);
    const Bundle bundle = Bundle::open(options.bundle);
    std::printf("%s\n", Bench(bundle, options).run().c_str());
    return int{exit_done};
  });
}
