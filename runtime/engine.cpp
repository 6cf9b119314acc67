#include "engine.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "error.h"
#include "weights.h"

namespace s3 {

WeightsPool::Entry &WeightsPool::entry(const std::string &identity) {
  const std::lock_guard lock(mutex_);
  auto &e = entries_[identity];
  if (!e) e = std::make_unique<Entry>();
  return *e;
}

Engine::Engine(const Bundle &bundle, RankId rank, const EngineOptions &options, const s3_device *device, const s3_transport *transport,
               WeightsPool *pool)
    : bundle_(bundle), rank_(rank), options_(options), device_(device), transport_(transport), pool_(pool),
      queued_(transport->caps & S3_TRANSPORT_QUEUES) {
  trace.pid = bundle.number(rank);
  trace.rank = say("rank ", rank.name(), " (", roleName(rank.role), ")");
  for (const Schedule &s : bundle.schedules) {
    Plan plan;
    plan.schedule = &s;
    plan.program = &s.program(rank);
    trace.slots = std::max(trace.slots, s.slots);
    plans_.push_back(std::move(plan));
  }
}

Engine::~Engine() {
  leave("it stopped");
  if (dev_) device_->close(dev_);
}

void Engine::leave(const char *why) {
  if (net_) transport_->close(net_, why);
  net_ = nullptr;
}

void Engine::dev(int code, const char *doing) {
  if (code == 0) return;
  fail(code, "rank ", rank_.name(), ": ", doing, ": ", device_->error(dev_));
}
void Engine::net(int code) {
  if (code == 0) return;
  fail(code, transport_->error(net_));
}

void Engine::open() {
  const std::string &library = rank_.role == Role::attention ? options_.program_attention : options_.program_ffn;
  std::string options = say("{\"threads\":", options_.threads, ",\"spin\":", options_.spin);
  if (queued_) options += ",\"exchange\":\"device\"";
  if (queued_ && options_.trace) options += ",\"timing\":true";
  if (!options_.isa.empty()) options += ",\"isa\":" + jsonText(options_.isa);
  // what the manifest says of the kernels, so that programs of another bundle are noticed
  std::string kernels;
  for (const auto &[name, facts] : bundle_.manifest.program(rank_.role).kernels)
    kernels += say(kernels.empty() ? "" : ",", jsonText(name), ":", facts.scratch);
  options += ",\"kernels\":{" + kernels + "}";
  dev(device_->open(static_cast<int>(bundle_.number(rank_)), library.c_str(), (options + "}").c_str(), &dev_), "device");
  dev(device_->queue(dev_, &queue_), "device queue");
  allocate();
  for (std::size_t i = 0; i < plans_.size(); i++) prepare(i);
}

void Engine::start() {
  const std::int64_t from = now();
  connect();
  loadWeights();
  stats.load_ns = now() - from;
}

s3_span Engine::alloc(std::uint64_t bytes, bool shared, const char *what) {
  s3_span s{};
  if (bytes > 0) dev(device_->alloc(dev_, bytes, 64, shared, &s), what);
  s.bytes = bytes;
  return s;
}

/// Weights and state are shared by all schedules; scratch too, since nothing in it outlives a round; the rest is each schedule's own.
void Engine::allocate() {
  constexpr std::uint64_t page = 4096;
  std::array<std::uint64_t, regions> most{};
  std::uint64_t exchange = 0;
  for (const Plan &p : plans_) {
    for (std::size_t r = 0; r < regions; r++) most[r] = std::max(most[r], p.program->memory[r]);
    exchange += (p.program->memory[static_cast<std::size_t>(Region::exchange)] + page - 1) / page * page;
  }
  const auto bytes = [&](Region r) { return most[static_cast<std::size_t>(r)]; };
  const s3_span state = alloc(bytes(Region::state), false, "memory for the KV cache");
  const s3_span scratch = alloc(bytes(Region::scratch), false, "scratch memory");
  const s3_span shared = alloc(exchange, true, "memory for exchanges");
  std::uint64_t at = 0;
  for (Plan &p : plans_) {
    const auto own = [&](Region r) { return p.program->memory[static_cast<std::size_t>(r)]; };
    const auto set = [&](Region r, s3_span s) { p.memory[static_cast<std::size_t>(r)] = s; };
    set(Region::state, state);
    set(Region::scratch, scratch);
    set(Region::exchange, {shared.mem, shared.off + at, own(Region::exchange)});
    at += (own(Region::exchange) + page - 1) / page * page;
    set(Region::input, alloc(own(Region::input), false, "memory for inputs"));
    set(Region::output, alloc(own(Region::output), false, "memory for outputs"));
  }
  const std::uint64_t weights = bytes(Region::weights);
  s3_span region{};
  if (weights > 0 && pool_ && (device_->caps & S3_DEVICE_SHARES_SPANS)) {
    auto &entry = pool_->entry(say("memory of ", weightsIdentity(bundle_, *plans_.front().program)));
    std::call_once(entry.once, [&] { entry.span = alloc(weights, false, "memory for weights"); });
    region = entry.span;
  } else {
    region = alloc(weights, false, "memory for weights");
  }
  for (Plan &p : plans_) p.memory[static_cast<std::size_t>(Region::weights)] = region;
}

void Engine::loadWeights() {
  // schedules share weights, but one may use some that another does not
  const auto load = [&] {
    std::set<std::string> done;
    for (const Plan &p : plans_) {
      RankProgram part;
      part.rank = rank_;
      for (const Buffer &b : p.program->buffers)
        if (b.region == Region::weights && done.insert(b.name).second) part.buffers.push_back(b);
      const s3_span region = p.memory[static_cast<std::size_t>(Region::weights)];
      WeightsTarget target;
      if (region.bytes > 0) target.direct = static_cast<std::uint8_t *>(device_->host(dev_, region));
      target.write = [&](std::uint64_t offset, const std::uint8_t *bytes, std::uint64_t n) {
        dev(device_->write(dev_, {region.mem, region.off + offset, n}, bytes), "writing weights");
      };
      s3::loadWeights(bundle_, part, target);
    }
  };
  if (pool_ && (device_->caps & S3_DEVICE_SHARES_SPANS))
    std::call_once(pool_->entry(say("bytes of ", weightsIdentity(bundle_, *plans_.front().program))).once, load);
  else
    load();
}

s3_span Engine::span(const Plan &plan, const Buffer &b) const {
  const s3_span region = plan.memory[static_cast<std::size_t>(b.region)];
  return {region.mem, region.off + b.offset, b.bytes};
}
std::uint8_t *Engine::host(const Plan &plan, const Buffer &b) const { return static_cast<std::uint8_t *>(device_->host(dev_, span(plan, b))); }

void Engine::write(std::size_t schedule, const Buffer &b, const void *bytes, std::uint64_t n) {
  if (n > b.bytes) fail(exit_internal, "writing ", n, " bytes into buffer '", b.name, "' of ", b.bytes);
  s3_span s = span(plans_[schedule], b);
  s.bytes = n;
  if (n > 0) dev(device_->write(dev_, s, bytes), "writing inputs");
}
void Engine::read(std::size_t schedule, const Buffer &b, std::uint64_t offset, void *bytes, std::uint64_t n) {
  if (offset > b.bytes || n > b.bytes - offset) fail(exit_internal, "reading ", n, " bytes at ", offset, " of buffer '", b.name, "' of ", b.bytes);
  s3_span s = span(plans_[schedule], b);
  s.off += offset;
  s.bytes = n;
  if (n > 0) dev(device_->read(dev_, bytes, s), "reading outputs");
}

s3_span Engine::dims(const Plan &plan, std::uint32_t slot) {
  const std::uint64_t each = plan.dims.bytes / plan.schedule->slots;
  return {plan.dims.mem, plan.dims.off + slot * each, plan.schedule->symbols.size() * sizeof(std::int64_t)};
}
void Engine::setSymbols(std::size_t schedule, std::uint32_t slot, const std::vector<std::uint64_t> &values) {
  const s3_span s = dims(plans_[schedule], slot);
  const std::vector<std::int64_t> all(values.begin(), values.end());
  if (all.size() * sizeof(std::int64_t) != s.bytes) fail(exit_internal, all.size(), " values for ", plans_[schedule].schedule->symbols.size(), " symbols");
  if (s.bytes > 0) dev(device_->write(dev_, s, all.data()), "writing sizes");
}

std::uint32_t Engine::traceName(const std::string &name) {
  for (std::uint32_t i = 0; i < trace.names.size(); i++)
    if (trace.names[i] == name) return i;
  trace.names.push_back(name);
  return static_cast<std::uint32_t>(trace.names.size() - 1);
}

/// Segments out of the launches between two communication steps; under strict and trace every launch is one, unless the device keeps the time.
void Engine::prepare(std::size_t index) {
  Plan &plan = plans_[index];
  const RankProgram &p = *plan.program;
  const Schedule &schedule = *plan.schedule;
  const bool attention = rank_.role == Role::attention;
  plan.events.assign(p.steps.size(), 0);
  plan.heads.resize(schedule.slots);
  plan.push_head.assign(schedule.slots, -1);

  std::vector<std::uint32_t> kernels;
  for (const std::string &name : p.kernels) {
    std::uint32_t kernel = 0;
    dev(device_->kernel(dev_, name.c_str(), &kernel), say("schedule ", schedule.name).c_str());
    kernels.push_back(kernel);
  }

  constexpr std::uint64_t line = 64;
  plan.dims = alloc((schedule.symbols.size() * sizeof(std::int64_t) + line - 1) / line * line * schedule.slots, false, "memory for sizes");
  std::vector<std::uint64_t> most;
  for (const Symbol &s : schedule.symbols) most.push_back(s.max);
  for (std::uint32_t m = 0; m < schedule.slots; m++) setSymbols(index, m, most);

  std::vector<std::vector<s3_span>> args;
  std::vector<s3_launch> launches;
  std::size_t first = 0;
  const auto flush = [&] {
    if (launches.empty()) return;
    for (std::size_t i = 0; i < launches.size(); i++) {
      launches[i].args = args[i].data();
      launches[i].nargs = static_cast<std::uint32_t>(args[i].size());
    }
    Action a;
    a.step = first;
    a.count = launches.size();
    const std::string &kernel = p.kernels[p.steps[first].kernel];
    a.name = traceName(launches.size() == 1 ? kernel : say(kernel, " and ", launches.size() - 1, " more"));
    dev(device_->prepare(dev_, launches.data(), static_cast<std::uint32_t>(launches.size()), &a.segment), "preparing launches");
    plan.actions.push_back(a);
    launches.clear();
    args.clear();
  };
  for (std::size_t i = 0; i < p.steps.size(); i++) {
    const Step &s = p.steps[i];
    if (s.op != Step::Op::launch) {
      flush();
      Action a;
      a.op = s.op;
      a.step = i;
      a.name = traceName(say(stepName(s.op), ' ', schedule.types[s.type].name));
      plan.actions.push_back(a);
      continue;
    }
    if (launches.empty()) first = i;
    std::vector<s3_span> spans;
    for (const auto *list : {&s.in, &s.inout, &s.out})
      for (const std::uint32_t b : *list) spans.push_back(span(plan, p.buffers[b]));
    args.push_back(std::move(spans));
    const Buffer &rows = p.buffers[s.rows];
    launches.push_back({kernels[s.kernel], 0, nullptr, span(plan, rows), rows.segments, static_cast<std::uint32_t>(schedule.rows), dims(plan, s.slot),
                        schedule.token.value_or(S3_NO_SYMBOL)});
    if (attention && std::find(plan.heads[s.slot].begin(), plan.heads[s.slot].end(), s.rows) == plan.heads[s.slot].end())
      plan.heads[s.slot].push_back(s.rows);
    if (options_.strict || (options_.trace && !queued_)) flush();
  }
  flush();

  for (const Key &k : schedule.keys) {
    if (!attention || !k.push || k.row != 0 || k.a != rank_.index) continue;
    plan.push_head[k.slot] = static_cast<int>(k.source);
    auto &heads = plan.heads[k.slot];
    if (std::find(heads.begin(), heads.end(), k.source) == heads.end()) heads.push_back(k.source);
  }

  if (attention && options_.count) {
    std::uint64_t kept = 0;
    plan.counted.resize(schedule.exchanges.size(), std::vector<std::vector<Plan::Counted>>(schedule.slots));
    for (std::uint32_t e = 0; e < schedule.exchanges.size(); e++)
      for (const Field &f : schedule.types[schedule.exchanges[e]].push) {
        if (!f.below) continue;
        stats.counts.push_back({static_cast<std::uint32_t>(index), e, f.name, std::vector<std::uint64_t>(*f.below)});
        for (const Key &k : schedule.keys)
          if (k.push && k.a == rank_.index && k.f == 0 && k.field == f.name) {
            plan.counted[e][k.slot].push_back({k.source, stats.counts.size() - 1, f.row / f.width, kept});
            kept += f.row / f.width * schedule.rows;
          }
      }
    if (queued_) plan.kept = alloc(kept * sizeof(std::int32_t), false, "memory for statistics");
  }

  if (options_.strict) {
    for (std::size_t r = 0; r < regions; r++)
      if (plan.memory[r].bytes > 0 && !device_->host(dev_, plan.memory[r]))
        fail(exit_usage, "--strict needs device memory that the host can read; run rank ", rank_.name(), " without it");
    plan.strict = std::make_unique<Strict>(schedule, p, bundle_.manifest.attention, [this, index](const Buffer &b) { return host(plans_[index], b); });
  }
}

void Engine::connect() {
  std::string config = say("{\"attention\":", bundle_.manifest.attention, ",\"ffn\":", bundle_.manifest.ffn, ",\"session\":", jsonText(options_.session),
                           ",\"spin\":", options_.spin, ",\"timeout_ms\":", options_.meet_ms, ",\"leave_ms\":", options_.leave_ms, ",\"schedules\":[");
  for (std::size_t i = 0; i < plans_.size(); i++) config += say(i ? "," : "", "{\"slots\":", plans_[i].schedule->slots, "}");
  net(transport_->open((config + "]}").c_str(), bundle_.number(rank_), bundle_.manifest.wire.data(), dev_, device_, &net_));
  const bool attention = rank_.role == Role::attention;
  for (std::size_t i = 0; i < plans_.size(); i++) {
    const Plan &plan = plans_[i];
    for (const Key &k : plan.schedule->keys) {
      if ((attention ? k.a : k.f) != rank_.index) continue;
      const bool outgoing = k.push == attention;
      s3_key key{};
      key.key = k.key;
      key.schedule = static_cast<std::uint32_t>(i);
      key.slot = k.slot;
      key.peer = attention ? bundle_.manifest.attention + k.f : k.a;
      key.outgoing = outgoing;
      key.types = k.types;
      key.row = k.row;
      key.memory = span(plan, plan.program->buffers[outgoing ? k.source : k.target]);
      if (!attention) key.memory.off += k.segment * k.bytes;
      key.memory.bytes = k.bytes;
      net(transport_->bind(net_, &key));
    }
  }
  net(transport_->start(net_));
}

s3_round Engine::agree(const s3_wish &wish) {
  const std::int64_t from = now();
  s3_round round{};
  net(transport_->agree(net_, &wish, &round, 0));
  const std::int64_t to = now();
  stats.agree_ns += to - from;
  if (options_.trace) trace.events.push_back({traceName("agree"), trace.slots, round.round, -1, -1, from, to});
  if (!round.stop && round.schedule >= plans_.size())
    fail(exit_peer, "rank ", rank_.name(), ": round ", round.round, " announces schedule ", round.schedule, ", the bundle has ", plans_.size());
  return round;
}

void Engine::header(const Plan &plan, std::uint32_t buffer, const s3_head &head) {
  s3_span s = span(plan, plan.program->buffers[buffer]);
  s.bytes = sizeof head;
  dev(device_->write(dev_, s, &head), "writing a header");
}

/// Counts values of the fields that an exchange pushes, over the rows that are there; with a transport of queues, when the round ends.
void Engine::count(const Plan &plan, std::uint32_t exchange, std::uint32_t slot, std::uint32_t rows) {
  for (const Plan::Counted &c : plan.counted[exchange][slot]) {
    s3_span s = span(plan, plan.program->buffers[c.buffer]);
    s.bytes = c.per_row * rows * sizeof(std::int32_t);
    if (s.bytes == 0) continue;
    if (queued_) {
      const s3_span kept = {plan.kept.mem, plan.kept.off + c.kept * sizeof(std::int32_t), s.bytes};
      dev(device_->copy(queue_, kept, s, s.bytes), "keeping a field");
      continue;
    }
    ids_.resize(c.per_row * rows);
    dev(device_->read(dev_, ids_.data(), s), "reading a field");
    tally(c, ids_.data(), ids_.size());
  }
}

void Engine::tally(const Plan::Counted &c, const std::int32_t *values, std::uint64_t n) {
  auto &counts = stats.counts[c.count].rows;
  for (const std::int32_t *v = values; v < values + n; v++)
    if (*v >= 0 && static_cast<std::size_t>(*v) < counts.size()) counts[static_cast<std::size_t>(*v)]++;
}

void Engine::traced(const Plan &plan, const Action &a, std::uint32_t round, std::int64_t from, std::int64_t to) {
  const Step &s = plan.program->steps[a.step];
  trace.events.push_back({a.name, s.slot, round, a.op == Step::Op::launch ? -1 : static_cast<std::int32_t>(s.exchange),
                          static_cast<std::int32_t>(a.step), from, to});
}

void Engine::run(const s3_round &round, const std::vector<std::uint32_t> &rows) {
  Plan &plan = plans_[round.schedule];
  const RankProgram &p = *plan.program;
  const auto exchanges = static_cast<std::uint64_t>(plan.schedule->exchanges.size());
  Strict *strict = plan.strict.get();
  if (strict) strict->begin();
  s3_head head{};
  head.magic = S3_MAGIC;
  head.abi = S3_ABI;
  head.round = round.round;
  head.schedule = round.schedule;
  for (std::uint32_t m = 0; m < plan.heads.size(); m++) {
    head.slot = m;
    head.rows = m < rows.size() ? rows[m] : 0;
    if (head.rows > plan.schedule->rows) fail(exit_internal, "slot ", m, " of ", plan.schedule->rows, " rows gets ", head.rows);
    for (const std::uint32_t b : plan.heads[m]) header(plan, b, head);
  }

  s3_queue *const queue = queued_ ? queue_ : nullptr;
  const bool timed = queued_ && options_.trace;
  s3_event last = 0, begin = 0;
  std::int64_t zero = 0;
  std::vector<s3_event> ends;  // of the actions in the queue
  if (timed) {
    dev(device_->mark(queue_, &begin), "timing");
    dev(device_->wait(dev_, begin, 0), "timing");
    zero = now();
  }
  for (const Action &a : plan.actions) {
    const Step &s = p.steps[a.step];
    const std::int64_t from = now();
    s3_exchange x{round.schedule, s.exchange, s.type, s.slot, round.round * exchanges + s.exchange + 1};
    const s3_event after = s.after >= 0 ? plan.events[static_cast<std::size_t>(s.after)] : 0;
    switch (a.op) {
      case Step::Op::launch:
        if (strict) strict->beforeLaunch(a.step);
        dev(device_->submit(queue_, a.segment, &last), "launching");
        for (std::size_t i = 0; i < a.count; i++) plan.events[a.step + i] = last;
        if (strict) {
          if (last) dev(device_->wait(dev_, last, 0), "running");
          strict->afterLaunch(a.step);
        }
        break;
      case Step::Op::post:
        head.slot = s.slot;
        head.exchange = s.exchange;
        head.sequence = x.sequence;
        head.rows = s.slot < rows.size() ? rows[s.slot] : 0;
        if (!queued_) header(plan, static_cast<std::uint32_t>(plan.push_head[s.slot]), head);
        if (strict) strict->beforePost(a.step);
        net(transport_->post(net_, &x, &head, after));
        if (options_.count) count(plan, s.exchange, s.slot, head.rows);
        break;
      case Step::Op::wait:
        net(transport_->await(net_, &x, queue, options_.step_ms));
        if (strict) strict->afterWait(a.step);
        break;
      case Step::Op::accept:
        if (strict) strict->beforeAccept(a.step);
        net(transport_->accept(net_, &x, s.peer, queue, options_.step_ms));
        if (strict) strict->afterAccept(a.step);
        break;
      case Step::Op::reply:
        if (strict) strict->beforeReply(a.step);
        net(transport_->reply(net_, &x, s.peer, after));
        break;
    }
    const std::int64_t to = now();
    (a.op == Step::Op::launch                                 ? stats.compute_ns
     : a.op == Step::Op::wait || a.op == Step::Op::accept ? stats.wait_ns
                                                              : stats.send_ns) += to - from;
    if (timed) {
      ends.push_back(last);
      if (a.op == Step::Op::wait || a.op == Step::Op::accept) dev(device_->mark(queue_, &ends.back()), "timing");
    } else if (options_.trace) {
      traced(plan, a, round.round, from, to);
    }
  }
  const std::int64_t from = now();
  if (queued_) net(transport_->settle(net_, queue_, options_.step_ms));
  else if (last) dev(device_->wait(dev_, last, 0), "running");
  const std::int64_t settled = now();
  stats.compute_ns += settled - from;
  struct Timed {
    const Action *action;
    std::int64_t end;
  };
  std::vector<Timed> times;
  for (std::size_t i = 0; i < ends.size(); i++) {
    const Action &a = plan.actions[i];
    if (a.op == Step::Op::post || a.op == Step::Op::reply) continue;  // in the queue of a peer
    times.push_back({&a, 0});
    dev(device_->elapsed(dev_, begin, ends[i], &times.back().end), "timing");
  }
  // the host may have looked at its clock late: all of the round lies before its end
  for (const Timed &t : times) zero = std::min(zero, settled - t.end);
  std::int64_t done = 0;
  for (const Timed &t : times) {
    traced(plan, *t.action, round.round, zero + done, zero + t.end);
    done = t.end;
  }
  if (plan.kept.bytes > 0) {
    ids_.resize(plan.kept.bytes / sizeof(std::int32_t));
    dev(device_->read(dev_, ids_.data(), plan.kept), "reading fields");
    for (const auto &slots : plan.counted)
      for (std::uint32_t m = 0; m < slots.size(); m++)
        for (const Plan::Counted &c : slots[m]) tally(c, ids_.data() + c.kept, m < rows.size() ? c.per_row * rows[m] : 0);
  }
  if (strict) strict->end();
  stats.rounds++;
}

}  // namespace s3
