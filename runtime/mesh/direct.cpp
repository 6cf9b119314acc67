#include "direct.h"

#include <chrono>

#include "../error.h"

namespace s3 {

namespace {
constexpr std::uint64_t line_bytes = sizeof(Line);
s3_span lineOf(s3_span lines, std::size_t i) { return {lines.mem, lines.off + i * line_bytes, line_bytes}; }
s3_span sequenceIn(s3_span s, std::uint64_t at) { return {s.mem, s.off + at, sizeof(std::uint64_t)}; }
std::uint64_t address(s3_span s) { return s.mem + s.off; }
}  // namespace

int DirectMesh::device(int code) {
  if (code == 0) return 0;
  return refuse(code, say("rank ", config.name(rank), ": ", device_->error(dev_)));
}

int DirectMesh::prepare() {
  const std::uint64_t bytes = count(config) * line_bytes;
  remote.resize(config.ranks());
  queues_.resize(peers_);
  if (const int code = device(device_->alloc(dev_, bytes, line_bytes, 1, &flags))) return code;
  if (const int code = device(device_->alloc(dev_, bytes, line_bytes, 0, &headers_))) return code;
  if (const int code = device(device_->alloc(dev_, line_bytes, line_bytes, 0, &ever_))) return code;
  ever_.bytes = sizeof(std::uint64_t);
  const std::uint64_t ever = std::uint64_t{1} << 62;  // devices may compare the difference, as a signed number
  if (const int code = device(device_->write(dev_, ever_, &ever))) return code;
  if (const int code = device(device_->queue(dev_, &rescue_))) return code;
  for (s3_queue *&queue : queues_)
    if (const int code = device(device_->queue(dev_, &queue))) return code;
  return 0;
}

int DirectMesh::ready() {
  if (const int code = Mesh::ready()) return code;
  messages_.resize(routes_.size());
  for (std::uint32_t schedule = 0; schedule < config.slots.size(); schedule++)
    for (std::uint32_t peer = 0; peer < peers_; peer++)
      for (std::uint32_t slot = 0; slot < config.slots[schedule]; slot++) {
        const std::size_t i = index(schedule, peer, slot);
        const Route &route = routes_[i];
        const auto &pushed = attention_ ? route.out : route.in;
        if (pushed.empty() || pushed.back()->key.row != 0)
          return refuse(exit_internal, say("slot ", slot, ": no header goes from attention rank to FFN rank, of rank ", config.name(rank)));
        std::uint64_t types = 0;
        for (const Pairing *p : route.out) types |= p->key.types;
        const s3_span flag = lineOf(remote[attention_ ? config.attention + peer : peer], index(schedule, number(rank), slot));
        for (std::uint32_t type = 0; type < 64; type++) {
          messages_[i].push_back(nullptr);
          if (!(types >> type & 1)) continue;
          const std::vector<s3_copy> copies = copiesOf(i, type, flag);
          if (const int code = device(device_->copies(dev_, copies.data(), static_cast<std::uint32_t>(copies.size()), &messages_[i].back()))) return code;
        }
      }
  std::vector<s3_copy> all;
  for (std::size_t l = 0; l < routes_.size(); l++) all.push_back({sequenceIn(lineOf(flags, l), 0), ever_});
  return device(device_->copies(dev_, all.data(), static_cast<std::uint32_t>(all.size()), &release_));
}

/// A message to a peer. Tensors that follow one another in both memories are one copy: what each costs beside its bytes is most of the time.
std::vector<s3_copy> DirectMesh::copiesOf(std::size_t i, std::uint32_t type, s3_span flag) const {
  // buffers begin at 64 bytes, so what lies between two is nobody's, unless a buffer has a part for every attention rank
  const std::uint64_t between = config.attention == 1 ? 63 : 0;
  const Route &route = routes_[i];
  std::vector<s3_copy> all;
  for (const Pairing *p : route.out) {
    if (p->key.row == 0 || !(p->key.types >> type & 1)) continue;
    if (!all.empty()) {
      s3_copy &last = all.back();
      const std::uint64_t gap = address(p->key.memory) - address(last.src) - last.src.bytes;
      if (gap <= between && gap == address(p->remote) - address(last.dst) - last.dst.bytes) {
        last.src.bytes = last.dst.bytes = last.src.bytes + gap + p->key.memory.bytes;
        continue;
      }
    }
    all.push_back({p->remote, p->key.memory});
  }
  // what a push brought stays until the slot's next one, which comes only after the reply
  const s3_span header = attention_ ? lineOf(headers_, i) : route.in.back()->key.memory;
  if (attention_) all.push_back({route.out.back()->remote, header});
  all.push_back({sequenceIn(flag, 0), sequenceIn(header, offsetof(s3_head, sequence))});
  return all;
}

int DirectMesh::send(const s3_exchange &x, std::uint32_t peer, s3_event after) {
  s3_segment *message = messages_[index(x.schedule, peer, x.slot)][x.type];
  if (!message) return refuse(exit_internal, say("slot ", x.slot, " has nothing to send of exchange ", x.exchange));
  if (const int code = device(device_->after(queues_[peer], after))) return code;
  return device(device_->submit(queues_[peer], message, nullptr));
}

int DirectMesh::post(const s3_exchange &x, const s3_head &head, s3_event after) {
  if (!known(x, 0)) return exit_internal;
  for (std::uint32_t f = 0; f < peers_; f++) {
    // the header is on the device before the kernels end; the one before it in this line left in the order of the same queue
    if (const int code = device(device_->put(queues_[f], lineOf(headers_, index(x.schedule, f, x.slot)), &head))) return code;
    if (const int code = send(x, f, after)) return code;
  }
  return 0;
}

int DirectMesh::expect(const s3_exchange &x, std::uint32_t peer, s3_queue *queue) {
  if (!known(x, peer)) return exit_internal;
  if (!queue) return refuse(exit_internal, "this transport needs the queue of the launches");
  launches_ = queue;
  return device(device_->await(queue, lineOf(flags, index(x.schedule, peer, x.slot)), x.sequence));
}

int DirectMesh::await(const s3_exchange &x, s3_queue *queue, std::uint32_t) {
  for (std::uint32_t f = 0; f < peers_; f++)
    if (const int code = expect(x, f, queue)) return code;
  return 0;
}

int DirectMesh::accept(const s3_exchange &x, std::uint32_t from, s3_queue *queue, std::uint32_t) { return expect(x, from, queue); }

int DirectMesh::reply(const s3_exchange &x, std::uint32_t to, s3_event after) {
  return known(x, to) ? send(x, to, after) : int{exit_internal};
}

int DirectMesh::settle(s3_queue *queue, std::uint32_t ms) {
  constexpr std::uint32_t slice = 20;
  s3_event end = 0;
  if (const int code = device(device_->mark(queue, &end))) return code;
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const int code = device_->wait(dev_, end, slice);
    if (code == 0) return 0;
    if (code != exit_peer) return device(code);
    const std::string gone = lost();
    const bool late = ms != 0 && std::chrono::steady_clock::now() - start > std::chrono::milliseconds(ms);
    if (gone.empty() && !late) continue;
    release();
    if (!gone.empty()) return refuse(exit_peer, say(gone, " while rank ", config.name(rank), " waited for the end of a round"));
    return refuse(exit_peer, say("rank ", config.name(rank), " waited ", ms / 1000.0, " s for the end of a round in vain; do the ranks run the same schedule?"));
  }
}

void DirectMesh::release() {
  constexpr std::uint32_t slice = 20, most = 50;
  if (released_ || !launches_) return;
  released_ = true;
  s3_event end = 0;
  if (device_->mark(launches_, &end) != 0) return;
  // again and again: a peer that lives may set a flag back to what it has sent
  for (std::uint32_t i = 0; i < most; i++) {
    if (device_->submit(rescue_, release_, nullptr) != 0) return;
    if (device_->wait(dev_, end, slice) != exit_peer) break;
  }
  // what we still send must arrive before a peer of this process gives its memory back
  for (s3_queue *queue : queues_)
    if (device_->mark(queue, &end) == 0) device_->wait(dev_, end, slice);
}

}  // namespace s3
