// What the transports on one host have in common. Every rank owns a board: a piece of the host's memory that its peers write. On it are a bell,
// its wish for the next round, and one line for every peer and slot with the sequence of the newest message. Sequences only grow and are compared
// with >=, so nothing is ever reset. Payload goes straight from the sender's buffer into the receiver's, the header last, then the sequence.
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

/// One pairing of memory, and where its other end is.
struct Pairing {
  s3_key key{};
  std::uint8_t *memory = nullptr;  // of this side, where the host reaches it
  s3_span remote{};                // outgoing: the receiver's memory, as this process or its device addresses it; no bytes: not found yet
};

/// One rank's view of the mesh, once boards and pairings are known: what all ways to move messages have in common. Every call returns 0 or an
/// exit code, with the reason in `why`.
class Mesh {
 public:
  Mesh(MeshConfig config, std::uint32_t rank, s3_dev *dev, const s3_device *device);
  Mesh(const Mesh &) = delete;
  Mesh &operator=(const Mesh &) = delete;
  virtual ~Mesh() = default;

  const MeshConfig config;
  const std::uint32_t rank;
  std::string why;

  std::vector<Board *> boards;                 // of all ranks; ours included
  std::vector<Pairing> pairings;               // as bound
  std::function<std::string()> lost;           // what became of a peer, or nothing: asked while waiting

  virtual int bind(const s3_key &key);
  /// sorts pairings for use; call when `remote` of every outgoing one is set
  virtual int ready();
  int agree(const s3_wish &mine, s3_round &out, std::uint32_t ms);
  virtual int post(const s3_exchange &x, const s3_head &head, s3_event after) = 0;
  virtual int await(const s3_exchange &x, s3_queue *queue, std::uint32_t ms) = 0;
  virtual int accept(const s3_exchange &x, std::uint32_t from, s3_queue *queue, std::uint32_t ms) = 0;
  virtual int reply(const s3_exchange &x, std::uint32_t to, s3_event after) = 0;
  int refuse(int code, std::string text);
  /// how many lines, or routes, a rank has
  static std::size_t count(const MeshConfig &config);

 protected:
  s3_dev *const dev_;
  const s3_device *const device_;
  const bool attention_;
  const std::uint32_t peers_;                  // ranks of the other side
  struct Route {
    std::vector<const Pairing *> out, in;      // in posting order
  };
  std::vector<Route> routes_;                  // by index()

  /// of the line or route for a schedule, peer of the other side and slot
  std::size_t index(std::uint32_t schedule, std::uint32_t peer, std::uint32_t slot) const {
    return firsts_[schedule] + static_cast<std::size_t>(peer) * config.slots[schedule] + slot;
  }
  /// among the ranks of its side
  std::uint32_t number(std::uint32_t r) const { return r < config.attention ? r : r - config.attention; }
  bool known(const s3_exchange &x, std::uint32_t peer);
  int wait(const std::function<bool()> &done, std::uint32_t ms, const std::function<std::string()> &what);

 private:
  std::vector<std::size_t> firsts_;            // by schedule: index of its first peer and slot
  std::uint64_t rounds_ = 0;
};

}  // namespace s3
