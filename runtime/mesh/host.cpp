#include "host.h"

#include <cstring>

#include "../error.h"

namespace s3 {

int HostMesh::bind(const s3_key &key) {
  if (const int code = Mesh::bind(key)) return code;
  pairings.back().memory = static_cast<std::uint8_t *>(device_->host(dev_, key.memory));
  if (pairings.back().memory) return 0;
  return refuse(exit_input, "this transport needs device memory that the host can reach; choose another transport");
}

Line &HostMesh::line(Board &board, std::uint32_t schedule, std::uint32_t peer, std::uint32_t slot) const {
  return board.lines()[index(schedule, peer, slot)];
}

int HostMesh::finished(s3_event after) {
  if (after == 0 || device_->wait(dev_, after, 0) == 0) return 0;
  return refuse(exit_internal, device_->error(dev_));
}

int HostMesh::send(const Route &route, const s3_exchange &x, const s3_head &head, std::uint32_t to) {
  const std::uint64_t rows = head.rows;
  for (const Pairing *p : route.out) {
    if (!(p->key.types >> x.type & 1)) continue;
    // rows past those that are there are never read, so they do not travel
    const std::uint64_t bytes = p->key.row ? p->key.row * rows : sizeof(s3_head);
    if (bytes > p->key.memory.bytes)
      return refuse(exit_peer, say("slot ", x.slot, ": the header of exchange ", x.exchange, " with rank ", config.name(to), " counts ", rows,
                                   " rows, more than a slot holds"));
    std::memcpy(reinterpret_cast<std::uint8_t *>(p->remote.mem) + p->remote.off, p->memory, bytes);
  }
  return 0;
}

int HostMesh::post(const s3_exchange &x, const s3_head &head, s3_event after) {
  if (!known(x, 0)) return exit_internal;
  if (const int code = finished(after)) return code;
  for (std::uint32_t f = 0; f < peers_; f++) {
    const Route &route = routes_[index(x.schedule, f, x.slot)];
    if (route.out.empty()) return refuse(exit_internal, say("slot ", x.slot, " has nothing to push to rank f", f));
    if (const int code = send(route, x, head, config.attention + f)) return code;
    Board &board = *boards[config.attention + f];
    line(board, x.schedule, rank, x.slot).sequence.store(x.sequence, std::memory_order_release);
    board.bell.ring();
  }
  return 0;
}

int HostMesh::await(const s3_exchange &x, s3_queue *, std::uint32_t ms) {
  if (!known(x, 0)) return exit_internal;
  for (std::uint32_t f = 0; f < peers_; f++) {
    const Line &l = line(*boards[rank], x.schedule, f, x.slot);
    if (const int code = wait([&] { return l.sequence.load(std::memory_order_acquire) >= x.sequence; }, ms,
                              [&] { return say("the reply of rank f", f, " to exchange ", x.exchange, " of slot ", x.slot); }))
      return code;
  }
  return 0;
}

int HostMesh::accept(const s3_exchange &x, std::uint32_t from, s3_queue *, std::uint32_t ms) {
  if (!known(x, from)) return exit_internal;
  const Line &l = line(*boards[rank], x.schedule, from, x.slot);
  if (const int code = wait([&] { return l.sequence.load(std::memory_order_acquire) >= x.sequence; }, ms,
                            [&] { return say("exchange ", x.exchange, " of slot ", x.slot, " from rank a", from); }))
    return code;
  const Route &route = routes_[index(x.schedule, from, x.slot)];
  if (route.in.empty()) return refuse(exit_internal, say("slot ", x.slot, " receives nothing from rank a", from));
  const s3_head &head = *reinterpret_cast<const s3_head *>(route.in.back()->memory);
  if (head.magic != S3_MAGIC || head.abi != S3_ABI)
    return refuse(exit_peer, say("slot ", x.slot, ": what rank a", from, " sent for exchange ", x.exchange, " has no valid header"));
  if (head.sequence != x.sequence || head.exchange != x.exchange || head.slot != x.slot || head.schedule != x.schedule)
    return refuse(exit_peer, say("slot ", x.slot, ": the receive slot of rank a", from, " holds exchange ", head.exchange, " (sequence ", head.sequence,
                                 ") where exchange ", x.exchange, " (sequence ", x.sequence,
                                 ") was expected: it was overwritten before it was consumed (contract K2), or the ranks run different schedules"));
  for (const Pairing *p : route.in)
    if (p->key.row * head.rows > p->key.memory.bytes)
      return refuse(exit_peer, say("slot ", x.slot, ": the header of exchange ", x.exchange, " from rank a", from, " counts ", head.rows,
                                   " rows, more than a slot holds"));
  return 0;
}

int HostMesh::reply(const s3_exchange &x, std::uint32_t to, s3_event after) {
  if (!known(x, to)) return exit_internal;
  if (const int code = finished(after)) return code;
  const Route &route = routes_[index(x.schedule, to, x.slot)];
  if (route.in.empty()) return refuse(exit_internal, say("slot ", x.slot, " receives nothing from rank a", to));
  const s3_head &head = *reinterpret_cast<const s3_head *>(route.in.back()->memory);
  if (const int code = send(route, x, head, to)) return code;
  Board &board = *boards[to];
  line(board, x.schedule, rank - config.attention, x.slot).sequence.store(x.sequence, std::memory_order_release);
  board.bell.ring();
  return 0;
}

}  // namespace s3
