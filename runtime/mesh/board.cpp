#include "board.h"

#include <chrono>

#include "../error.h"
#include "../json.h"

namespace s3 {

MeshConfig MeshConfig::read(const char *json) {
  const JsonFile file = JsonFile::parse(json, "transport configuration");
  MeshConfig c;
  c.attention = static_cast<std::uint32_t>(file["attention"].whole(1, 1024));
  c.ffn = static_cast<std::uint32_t>(file["ffn"].whole(0, 1024));
  c.session = file["session"].text();
  for (const Json &s : file["schedules"].items()) c.slots.push_back(static_cast<std::uint32_t>(s["slots"].whole(1, 1024)));
  if (const Json *v = file.root().find("spin")) c.spin = static_cast<std::uint32_t>(v->whole(0, 1 << 30));
  if (const Json *v = file.root().find("timeout_ms")) c.timeout_ms = static_cast<std::uint32_t>(v->whole(1, INT32_MAX));
  if (const Json *v = file.root().find("leave_ms")) c.leave_ms = static_cast<std::uint32_t>(v->whole(0, INT32_MAX));
  return c;
}

std::string MeshConfig::name(std::uint32_t r) const { return r < attention ? say('a', r) : say('f', r - attention); }

std::uint64_t Board::bytes(const MeshConfig &c) {
  return sizeof(Board) + Mesh::count(c) * sizeof(Line);
}

std::size_t Mesh::count(const MeshConfig &c) {
  std::size_t n = 0;
  for (const std::uint32_t slots : c.slots) n += static_cast<std::size_t>(std::max(c.attention, c.ffn)) * slots;
  return n;
}

Mesh::Mesh(MeshConfig c, std::uint32_t r, s3_dev *dev, const s3_device *device)
    : config(std::move(c)), rank(r), boards(config.ranks()), dev_(dev), device_(device), attention_(r < config.attention),
      peers_(attention_ ? config.ffn : config.attention) {
  std::size_t first = 0;
  for (const std::uint32_t slots : config.slots) {
    firsts_.push_back(first);
    first += static_cast<std::size_t>(std::max(config.attention, config.ffn)) * slots;
  }
}

int Mesh::refuse(int code, std::string text) {
  why = std::move(text);
  return code;
}

int Mesh::bind(const s3_key &key) {
  if (key.schedule >= config.slots.size() || key.slot >= config.slots[key.schedule] || key.peer >= config.ranks() ||
      (key.peer < config.attention) == attention_)
    return refuse(exit_internal, say("key ", key.key, " names a slot or a rank that is not there"));
  pairings.push_back({key, nullptr, {}});
  return 0;
}

int Mesh::ready() {
  routes_.assign(count(config), {});
  for (const Pairing &p : pairings) {
    Route &route = routes_[index(p.key.schedule, number(p.key.peer), p.key.slot)];
    (p.key.outgoing ? route.out : route.in).push_back(&p);
    if (p.key.outgoing && p.remote.bytes == 0)
      return refuse(exit_peer, say("rank ", config.name(p.key.peer), " has no receive slot for key ", p.key.key, " of slot ", p.key.slot));
  }
  return 0;
}

int Mesh::wait(const std::function<bool()> &done, std::uint32_t ms, const std::function<std::string()> &what) {
  const auto start = std::chrono::steady_clock::now();
  std::string gone;
  bool late = false;
  const bool there = boards[rank]->bell.wait(config.spin, 100, done, [&] {
    gone = lost();
    late = ms != 0 && std::chrono::steady_clock::now() - start > std::chrono::milliseconds(ms);
    return late || !gone.empty();
  });
  if (there) return 0;
  if (!gone.empty()) return refuse(exit_peer, say(gone, " while rank ", config.name(rank), " waited for ", what()));
  return refuse(exit_peer, say("rank ", config.name(rank), " waited ", ms / 1000.0, " s for ", what(), " in vain; do the ranks run the same schedule?"));
}

int Mesh::agree(const s3_wish &mine, s3_round &out, std::uint32_t ms) {
  Board &own = *boards[rank];
  const std::uint64_t n = ++rounds_;
  own.wish = mine;
  own.wished.store(n, std::memory_order_release);
  if (rank != 0) {
    boards[0]->bell.ring();
    const Board &first = *boards[0];
    if (const int code = wait([&] { return first.agreed.load(std::memory_order_acquire) >= n; }, ms,
                              [&] { return say("round ", n - 1, " to be announced"); }))
      return code;
    out = first.round;
    return 0;
  }
  s3_wish best{};
  for (std::uint32_t r = 0; r < config.ranks(); r++) {
    if (const int code = wait([&] { return boards[r]->wished.load(std::memory_order_acquire) >= n; }, ms,
                              [&] { return say("rank ", config.name(r), " to be ready for round ", n - 1); }))
      return code;
    const s3_wish w = boards[r]->wish;
    if (w.abort) best.abort = 1;
    if (w.schedule != 0 && (best.schedule == 0 || w.priority > best.priority)) {
      best.schedule = w.schedule;
      best.priority = w.priority;
    }
  }
  own.round.round = static_cast<std::uint32_t>(n - 1);
  own.round.schedule = best.schedule == 0 ? 0 : best.schedule - 1;
  own.round.stop = best.abort ? S3_STOP_ABORT : best.schedule == 0 ? S3_STOP_DONE : 0;
  out = own.round;
  if (out.stop) own.stopped.store(1, std::memory_order_release);
  own.agreed.store(n, std::memory_order_release);
  for (std::uint32_t r = 1; r < config.ranks(); r++) boards[r]->bell.ring();
  return 0;
}

bool Mesh::known(const s3_exchange &x, std::uint32_t peer) {
  if (x.schedule < config.slots.size() && x.slot < config.slots[x.schedule] && peer < peers_ && x.type < 64) return true;
  refuse(exit_internal, say("exchange ", x.exchange, " names a schedule, slot or rank that is not there"));
  return false;
}

}  // namespace s3
