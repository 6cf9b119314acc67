// One process, a thread for every rank: ranks meet in a hub that they find by the name of the session.
#include <condition_variable>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "../error.h"
#include "host.h"
#include "mesh.h"

namespace s3 {
namespace {

struct Hub {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Mesh *> members;
  std::vector<std::array<std::uint8_t, 32>> wires;
  std::vector<std::unique_ptr<std::uint8_t, decltype(&std::free)>> boards;
  std::size_t arrived = 0;
  std::atomic<bool> failed{false};
  std::string failure;  // under the mutex
};

/// sessions of this process; a hub lives as long as one of its ranks
struct Hubs {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<Hub>> bySession;
};
Hubs &hubs() {
  static Hubs all;
  return all;
}

thread_local std::string open_error;

struct Local {
  HostMesh mesh;
  std::shared_ptr<Hub> hub;
  std::array<std::uint8_t, 32> wire{};

  Local(MeshConfig c, std::uint32_t rank, s3_dev *dev, const s3_device *device) : mesh(std::move(c), rank, dev, device) {}
};
Local &of(s3_net *net) { return *reinterpret_cast<Local *>(net); }

int localOpen(const char *config, std::uint32_t rank, const std::uint8_t wire[32], s3_dev *dev, const s3_device *device, s3_net **out) {
  return caught(open_error, [&] {
    const MeshConfig c = MeshConfig::read(config);
    auto local = std::make_unique<Local>(c, rank, dev, device);
    std::copy(wire, wire + 32, local->wire.begin());
    Hubs &all = hubs();
    const std::lock_guard lock(all.mutex);
    auto &known = all.bySession[c.session];
    local->hub = known.lock();
    if (!local->hub) {
      local->hub = std::make_shared<Hub>();
      known = local->hub;
      local->hub->members.resize(c.ranks());
      local->hub->wires.resize(c.ranks());
      for (std::uint32_t r = 0; r < c.ranks(); r++) {
        void *memory = std::aligned_alloc(64, Board::bytes(c));
        if (!memory) throw std::bad_alloc();
        auto *board = new (memory) Board();
        for (std::size_t i = 0; i < (Board::bytes(c) - sizeof(Board)) / sizeof(Line); i++) new (board->lines() + i) Line();
        local->hub->boards.emplace_back(static_cast<std::uint8_t *>(memory), &std::free);
      }
    }
    Hub &hub = *local->hub;
    if (rank >= hub.members.size() || hub.members.size() != c.ranks() || hub.members[rank])
      fail(exit_internal, "rank ", rank, " joins session '", c.session, "' twice");
    const std::lock_guard in(hub.mutex);
    hub.members[rank] = &local->mesh;
    hub.wires[rank] = local->wire;
    for (std::uint32_t r = 0; r < c.ranks(); r++) local->mesh.boards[r] = reinterpret_cast<Board *>(hub.boards[r].get());
    local->mesh.lost = [h = local->hub.get()]() -> std::string {
      if (!h->failed.load(std::memory_order_acquire)) return {};
      const std::lock_guard inside(h->mutex);
      return h->failure;
    };
    *out = reinterpret_cast<s3_net *>(local.release());
  });
}

int localBind(s3_net *net, const s3_key *key) { return of(net).mesh.bind(*key); }

int localStart(s3_net *net) {
  Local &self = of(net);
  HostMesh &mesh = self.mesh;
  Hub &hub = *self.hub;
  std::unique_lock lock(hub.mutex);
  hub.arrived++;
  hub.changed.notify_all();
  hub.changed.wait(lock, [&] { return hub.arrived == hub.members.size() || hub.failed.load(); });
  if (hub.failed.load()) return mesh.refuse(exit_peer, hub.failure);
  for (std::uint32_t r = 0; r < hub.members.size(); r++)
    if (hub.wires[r] != self.wire)
      return mesh.refuse(exit_peer, say("rank ", mesh.config.name(r), " speaks another wire contract: the hashes differ"));
  for (Pairing &p : mesh.pairings) {
    if (!p.key.outgoing) continue;
    for (const Pairing &q : hub.members[p.key.peer]->pairings) {
      if (q.key.outgoing || q.key.peer != mesh.rank || q.key.key != p.key.key || q.key.schedule != p.key.schedule) continue;
      if (q.key.memory.bytes != p.key.memory.bytes)
        return mesh.refuse(exit_peer, say("key ", p.key.key, ": rank ", mesh.config.name(mesh.rank), " sends ", p.key.memory.bytes, " bytes, rank ",
                                          mesh.config.name(p.key.peer), " expects ", q.key.memory.bytes, " (contract K3)"));
      p.remote = {reinterpret_cast<std::uint64_t>(q.memory), 0, q.key.memory.bytes};
    }
  }
  return mesh.ready();
}

int localAgree(s3_net *net, const s3_wish *mine, s3_round *out, std::uint32_t ms) { return of(net).mesh.agree(*mine, *out, ms); }
int localPost(s3_net *net, const s3_exchange *x, const s3_head *head, s3_event after) { return of(net).mesh.post(*x, *head, after); }
int localAwait(s3_net *net, const s3_exchange *x, s3_queue *queue, std::uint32_t ms) { return of(net).mesh.await(*x, queue, ms); }
int localAccept(s3_net *net, const s3_exchange *x, std::uint32_t from, s3_queue *queue, std::uint32_t ms) {
  return of(net).mesh.accept(*x, from, queue, ms);
}
int localReply(s3_net *net, const s3_exchange *x, std::uint32_t to, s3_event after) { return of(net).mesh.reply(*x, to, after); }

void localClose(s3_net *net, const char *why) {
  const std::unique_ptr<Local> self(&of(net));
  Hub &hub = *self->hub;
  {
    const std::lock_guard lock(hub.mutex);
    if (why && !hub.failed.load()) {
      hub.failure = say("rank ", self->mesh.config.name(self->mesh.rank), " failed (", why, ")");
      hub.failed.store(true, std::memory_order_release);
    }
    hub.changed.notify_all();
  }
  if (why)
    for (Board *board : self->mesh.boards) board->bell.ring();
}

const char *localError(s3_net *net) { return net ? of(net).mesh.why.c_str() : open_error.c_str(); }

}  // namespace

const s3_transport *localTransport() {
  static const s3_transport table = {S3_ABI,     0,           localOpen,   localBind,  localStart, localAgree,
                                     localPost,  localAwait,  localAccept, localReply, localClose, localError, nullptr};
  return &table;
}

}  // namespace s3
