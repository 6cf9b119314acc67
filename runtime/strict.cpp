#include "strict.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace s3 {

namespace {

std::uint64_t checksum(const std::uint8_t *at, std::uint64_t n) {
  std::uint64_t h = 0x9E3779B97F4A7C15u + n;
  const auto step = [&](std::uint64_t w) {
    h = (h ^ w) * 0xFF51AFD7ED558CCDu;
    h ^= h >> 32;
  };
  std::uint64_t w = 0;
  for (; n >= 8; n -= 8, at += 8) {
    std::memcpy(&w, at, 8);
    step(w);
  }
  w = 0;
  if (n > 0) std::memcpy(&w, at, n);
  step(w);
  return h;
}

bool overlap(const Buffer &a, const Buffer &b) {
  return a.region == b.region && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
}

}  // namespace

Strict::Strict(const Schedule &schedule, const RankProgram &program, std::uint32_t attention,
               std::function<std::uint8_t *(const Buffer &)> host)
    : schedule_(schedule), program_(program), attention_(program.rank.role == Role::attention), peers_(attention_ ? 1 : attention),
      host_(std::move(host)), sends_(program.buffers.size()), receives_(program.buffers.size()), dies_(program.steps.size()),
      slots_(static_cast<std::size_t>(schedule.slots) * peers_) {
  for (const Key &k : schedule.keys) {
    if ((attention_ ? k.a : k.f) != program.rank.index) continue;
    const bool ours = k.push == attention_;
    Use &use = (ours ? sends_ : receives_)[ours ? k.source : k.target];
    use.slot = static_cast<int>(k.slot);
    use.types |= k.types;
  }
  constexpr std::size_t never = SIZE_MAX;
  std::vector<std::size_t> last(program.buffers.size(), never);
  for (std::size_t i = 0; i < program.steps.size(); i++) {
    const Step &s = program.steps[i];
    for (const auto *list : {&s.in, &s.inout, &s.out})
      for (const std::uint32_t b : *list) last[b] = i;
  }
  for (std::uint32_t b = 0; b < program.buffers.size(); b++)
    if (program.buffers[b].region == Region::scratch && last[b] != never) dies_[last[b]].push_back(b);
}

std::string Strict::about(std::size_t step) const {
  const Step &s = program_.steps[step];
  return s.op == Step::Op::launch ? say("step ", step, " (launch ", program_.kernels[s.kernel], ")") : say("step ", step, " (", stepName(s.op), ")");
}

template <class... Parts>
void Strict::violated(const char *contract, std::uint32_t slot, std::size_t step, const Parts &...parts) const {
  fail(exit_peer, "strict: schedule ", schedule_.name, ", rank ", program_.rank.name(), ", slot ", slot, ", ", about(step), ": ", parts..., " (contract ",
       contract, ")");
}

void Strict::poison(const Buffer &b) const { std::memset(host_(b), 0xFF, b.bytes); }

/// Checksums of the rows of a slot's messages on this side: those that `pushes` go from attention to FFN.
std::vector<Strict::Sum> Strict::sums(std::uint32_t slot, std::uint32_t peer, std::uint32_t type, bool pushes, bool once) const {
  const auto address = [&](const Key &k) {
    const bool source = pushes == attention_;
    return host_(program_.buffers[source ? k.source : k.target]) + (attention_ ? 0 : peer * k.bytes);
  };
  const auto mine = [&](const Key &k) { return k.slot == slot && (attention_ ? k.a == program_.rank.index : k.f == program_.rank.index && k.a == peer); };
  std::uint64_t rows = 0;
  for (const Key &k : schedule_.keys)
    if (k.push && k.row == 0 && mine(k)) {
      s3_head head;
      std::memcpy(&head, host_(program_.buffers[attention_ ? k.source : k.target]) + (attention_ ? 0 : peer * k.bytes), sizeof head);
      rows = head.rows;
      break;
    }
  std::vector<Sum> all;
  for (const Key &k : schedule_.keys) {
    if (k.push != pushes || !mine(k) || !(k.types >> type & 1)) continue;
    if (once && k.f != 0) continue;  // the same source goes to every FFN rank
    Sum s{&k, address(k), k.row ? std::min(k.row * rows, k.bytes) : k.bytes, 0};
    s.sum = checksum(s.at, s.bytes);
    all.push_back(s);
  }
  return all;
}

void Strict::verify(const std::vector<Sum> &sums, std::uint32_t slot, std::size_t step, const char *contract, const char *what) const {
  for (const Sum &s : sums)
    if (checksum(s.at, s.bytes) != s.sum) {
      const Buffer &b = program_.buffers[s.key->push == attention_ ? s.key->source : s.key->target];
      violated(contract, slot, step, "buffer '", b.name, "' ", what);
    }
}

void Strict::begin() {
  for (const Buffer &b : program_.buffers)
    if (b.region == Region::scratch || b.region == Region::output) poison(b);
}

void Strict::beforeLaunch(std::size_t step) {
  const Step &s = program_.steps[step];
  const auto name = [&](std::uint32_t b) -> const std::string & { return program_.buffers[b].name; };
  const auto check = [&](std::uint32_t b, bool writes) {
    if (const Use use = sends_[b]; use.slot >= 0 && writes) {
      const auto at = static_cast<std::uint32_t>(use.slot);
      for (std::uint32_t p = 0; p < peers_; p++) {
        const Slot &state = slot(at, p);
        if (attention_ && state.busy && use.carried(state.type))
          violated("K1", at, step, "writes push source '", name(b), "' while exchange ", state.exchange, ", posted by step ", state.step, ", is in flight");
        if (!attention_ && !state.busy)
          violated("K6", at, step, "writes reply buffer '", name(b), "' before the next push from rank a", p, " has been accepted");
      }
    }
    if (const Use use = receives_[b]; use.slot >= 0) {
      const auto at = static_cast<std::uint32_t>(use.slot);
      for (std::uint32_t p = 0; p < peers_; p++) {
        const Slot &state = slot(at, p);
        if (attention_ && state.busy && use.carried(state.type))
          violated("K5", at, step, writes ? "writes" : "reads", " '", name(b), "' before the wait for exchange ", state.exchange, ", posted by step ",
                   state.step);
        if (!attention_ && writes) violated("K2", at, step, "writes receive slot '", name(b), "', which belongs to the attention ranks");
        if (!attention_ && !state.busy) {
          // others accepted, and this one not yet: the launch does not wait for all attention ranks
          bool partly = false;
          for (std::uint32_t q = 0; q < peers_; q++)
            partly = partly || (slot(at, q).busy && (state.sent.empty() || slot(at, q).exchange != state.exchange));
          if (partly) violated("K4", at, step, "reads receive slot '", name(b), "' before rank a", p, "'s push has been accepted");
          violated("K2", at, step, "reads receive slot '", name(b), "', which holds nothing from rank a", p, " that was not replied to");
        }
      }
    }
  };
  for (const std::uint32_t b : s.in) check(b, false);
  for (const std::uint32_t b : s.inout) check(b, true);
  for (const std::uint32_t b : s.out) check(b, true);
  for (const std::uint32_t b : s.out) {
    const Buffer &out = program_.buffers[b];
    if (out.region != Region::scratch && out.region != Region::output && out.region != Region::exchange) continue;
    bool kept = false;
    for (const auto *list : {&s.in, &s.inout})
      for (const std::uint32_t other : *list) kept = kept || overlap(out, program_.buffers[other]);
    if (!kept) poison(out);
  }
}

void Strict::afterLaunch(std::size_t step) {
  for (const std::uint32_t b : dies_[step]) poison(program_.buffers[b]);
}

void Strict::beforePost(std::size_t step) {
  const Step &s = program_.steps[step];
  Slot &state = slot(s.slot, 0);
  if (state.busy)
    violated("K2", s.slot, step, "posts exchange ", s.exchange, " while exchange ", state.exchange, ", posted by step ", state.step, ", has not been waited for");
  state.busy = true;
  state.step = step;
  state.exchange = s.exchange;
  state.type = s.type;
  state.sent = sums(s.slot, 0, s.type, true, true);
  for (std::uint32_t b = 0; b < receives_.size(); b++)
    if (receives_[b].slot == static_cast<int>(s.slot) && receives_[b].carried(s.type)) poison(program_.buffers[b]);
}

void Strict::afterWait(std::size_t step) {
  const Step &s = program_.steps[step];
  Slot &state = slot(s.slot, 0);
  if (!state.busy) violated("K5", s.slot, step, "waits for exchange ", s.exchange, ", which was not posted");
  if (state.exchange != s.exchange)
    violated("K5", s.slot, step, "waits for exchange ", s.exchange, ", but step ", state.step, " posted exchange ", state.exchange);
  verify(state.sent, s.slot, step, "K1", say("changed while exchange ", s.exchange, ", posted by step ", state.step, ", was in flight").c_str());
  state.busy = false;
}

void Strict::beforeAccept(std::size_t step) {
  const Step &s = program_.steps[step];
  const Slot &state = slot(s.slot, s.peer);
  if (state.busy)
    violated("K2", s.slot, step, "accepts exchange ", s.exchange, " from rank a", s.peer, " while exchange ", state.exchange, ", accepted by step ",
             state.step, ", has not been replied to");
  verify(state.sent, s.slot, step, "K6", say("changed after the reply to rank a", s.peer, " and before its next push").c_str());
}

void Strict::afterAccept(std::size_t step) {
  const Step &s = program_.steps[step];
  Slot &state = slot(s.slot, s.peer);
  state.busy = true;
  state.step = step;
  state.exchange = s.exchange;
  state.type = s.type;
  state.sent.clear();
  state.received = sums(s.slot, s.peer, s.type, true, false);
}

void Strict::beforeReply(std::size_t step) {
  const Step &s = program_.steps[step];
  Slot &state = slot(s.slot, s.peer);
  if (!state.busy) violated("K5", s.slot, step, "replies to rank a", s.peer, ", from which nothing was accepted");
  if (state.exchange != s.exchange)
    violated("K5", s.slot, step, "replies to exchange ", s.exchange, ", but step ", state.step, " accepted exchange ", state.exchange);
  verify(state.received, s.slot, step, "K2", say("was overwritten before the exchange that rank a", s.peer, " pushed was replied to").c_str());
  state.sent = sums(s.slot, s.peer, s.type, false, false);
  state.busy = false;
  // from now on the slot's next exchange may come
  const bool last = s.exchange + 1 == schedule_.exchanges.size();
  for (const Key &k : schedule_.keys)
    if (k.push && k.row != 0 && k.f == program_.rank.index && k.a == s.peer && k.slot == s.slot &&
        (last || (k.types >> schedule_.exchanges[s.exchange + 1] & 1)))
      std::memset(host_(program_.buffers[k.target]) + s.peer * k.bytes, 0xFF, k.bytes);
}

void Strict::end() {
  for (std::uint32_t m = 0; m < schedule_.slots; m++)
    for (std::uint32_t p = 0; p < peers_; p++) {
      const Slot &state = slot(m, p);
      if (state.busy && attention_) violated("K5", m, state.step, "posts exchange ", state.exchange, ", which is never waited for");
      if (state.busy) violated("K5", m, state.step, "accepts exchange ", state.exchange, " from rank a", p, ", which is never replied to");
      if (!attention_) verify(state.sent, m, state.step, "K6", say("changed after the reply to rank a", p, " and before its next push").c_str());
    }
}

}  // namespace s3
