// What the transports on one host have in common. Every rank owns a board: a piece of memory that its peers write. On it are a bell, its wish
// for the next round, and one line for every peer and slot with the sequence of the newest message. Sequences only grow and are compared with
// >=, so nothing is ever reset. Payload goes straight from the sender's buffer into the receiver's, the header last, then the line, then the bell.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../devices/futex.h"
#include "../step3.h"

namespace s3 {

struct MeshConfig {
  std::uint32_t attention = 1, ffn = 0;
  std::vector<std::uint32_t> slots;  // of each schedule
  std::string session;
  std::uint32_t spin = 2000, timeout_ms = 30000, leave_ms = 0;

  std::uint32_t ranks() const { return attention + ffn; }
  static MeshConfig read(const char *json);
  std::string name(std::uint32_t rank) const;
};

struct alignas(64) Line {
  std::atomic<std::uint64_t> sequence{0};
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// Fixed part of a board; lines follow, one for each schedule, peer of the other side and slot.
struct alignas(64) Board {
  Bell bell;
  alignas(64) std::atomic<std::uint64_t> wished{0};  // how many wishes its owner has written
  s3_wish wish{};
  alignas(64) std::atomic<std::uint64_t> agreed{0};  // rank 0: how many rounds it has announced
  s3_round round{};
  std::atomic<std::uint32_t> stopped{0};             // rank 0: the announced round is the end, so peers may leave

  Line *lines() { return reinterpret_cast<Line *>(this + 1); }
  static std::uint64_t bytes(const MeshConfig &);
};

/// Where a message goes or comes from, in addresses of this process.
struct Pairing {
  s3_key key{};
  std::uint8_t *memory = nullptr;  // of this side
  std::uint8_t *remote = nullptr;  // outgoing: the receiver's memory
};

/// One rank's view of the mesh, once boards and pairings are known. Every call returns 0 or an exit code, with the reason in `why`.
class Mesh {
 public:
  Mesh(MeshConfig config, std::uint32_t rank, s3_dev *dev, const s3_device *device);

  const MeshConfig config;
  const std::uint32_t rank;
  std::string why;

  std::vector<Board *> boards;                 // of all ranks; ours included
  std::vector<Pairing> pairings;               // as bound
  std::function<std::string()> lost;           // what became of a peer, or nothing: asked while waiting

  int bind(const s3_key &key);
  /// sorts pairings for use; call when `remote` of every outgoing one is set
  int ready();
  int agree(const s3_wish &mine, s3_round &out, std::uint32_t ms);
  int post(const s3_exchange &x, s3_event after);
  int await(const s3_exchange &x, std::uint32_t ms);
  int accept(const s3_exchange &x, std::uint32_t from, std::uint32_t ms);
  int reply(const s3_exchange &x, std::uint32_t to, s3_event after);
  int refuse(int code, std::string text);

 private:
  s3_dev *dev_;
  const s3_device *device_;
  bool attention_;
  std::uint32_t peers_;                        // ranks of the other side
  std::vector<std::size_t> firsts_;            // by schedule: index of its first (peer, slot) in `routes_`
  struct Route {
    std::vector<const Pairing *> out, in;      // in posting order
  };
  std::vector<Route> routes_;
  std::uint64_t rounds_ = 0;

  std::size_t index(std::uint32_t schedule, std::uint32_t peer, std::uint32_t slot) const {
    return firsts_[schedule] + static_cast<std::size_t>(peer) * config.slots[schedule] + slot;
  }
  bool known(const s3_exchange &x, std::uint32_t peer);
  Line &line(Board &board, std::uint32_t schedule, std::uint32_t peers_peer, std::uint32_t slot) const;
  int wait(const std::function<bool()> &done, std::uint32_t ms, const std::function<std::string()> &what);
  int finished(s3_event after);
  int send(const Route &route, const s3_exchange &x, const s3_head &head, std::uint32_t to);
};

}  // namespace s3
