// One host, a process for every rank, in two ways: `shm`, whose messages go through the host's memory, and `cuda`, for devices that copy into each
// other's. Ranks find each other through abstract Unix sockets named after the session, compare hashes, and pass each other descriptors of
// anonymous memory, or what their devices say of theirs. Nothing has a name in a file system, so nothing is left behind however a process ends; and
// the end of a process closes its sockets, which is how its peers learn of it.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "../bundle.h"
#include "../error.h"
#include "direct.h"
#include "host.h"
#include "mesh.h"

namespace s3 {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t max_fds = 8;
constexpr char protocol[8] = {'s', '3', 's', 'h', 'm', '0', '0', '2'};

enum class Kind : std::uint32_t { hello = 1, memory = 2, bye = 3, fail = 4 };

/// How a rank's messages travel.
enum class Way : std::uint32_t { host = 0, direct = 1, unable = 2 };  // unable: it should be direct, but the device cannot

/// What a device says of memory that it shares. Of the host's memory: an s3_share, whose descriptor is the number among those sent along.
struct Token {
  std::uint32_t bytes;
  std::uint8_t data[S3_TOKEN];
};

/// Every message; `text` only in `fail`, `flags` in `memory` of a direct rank.
struct Message {
  char protocol[8];
  Kind kind;
  std::uint32_t abi, rank, attention, ffn, schedules;
  Way way;
  std::uint64_t board_bytes, offers;
  std::uint8_t wire[32];
  Token flags;
  char text[1024];
};

/// A receive slot that a rank offers to a peer: it follows the lines of the rank's board.
struct Offer {
  std::uint64_t key, bytes;
  std::uint32_t schedule, slot, peer;
  Token place;
};

struct Mapping {
  std::uint8_t *memory = nullptr;
  std::uint64_t bytes = 0;
};

struct Peer {
  int fd = -1;
  bool greeted = false, mapped = false, gone = false;
  pid_t pid = 0;
  Board *board = nullptr;
  std::vector<Mapping> mappings;
};

struct Shm {
  const std::unique_ptr<Mesh> owned;
  Mesh &mesh;
  DirectMesh *const direct;  // null: messages go through the host's memory
  const char *const name;    // of the transport
  s3_dev *dev;
  const s3_device *device;
  std::uint8_t wire[32];
  Token flags{};
  int listener = -1, board_fd = -1, stop = -1;
  Mapping own;
  std::vector<int> fds;  // of our receive slots; the device's, or duplicates
  std::vector<Offer> offers;
  std::vector<Peer> peers;
  std::vector<int> strangers;  // connected, not yet introduced
  std::thread monitor;
  std::mutex mutex;
  std::string failure;  // under the mutex
  std::atomic<bool> failed{false};

  Shm(std::unique_ptr<Mesh> m, bool queues, const std::uint8_t w[32], s3_dev *d, const s3_device *table)
      : owned(std::move(m)), mesh(*owned), direct(queues ? static_cast<DirectMesh *>(owned.get()) : nullptr),
        name(queues ? "transport cuda: " : "transport shm: "), dev(d), device(table), peers(mesh.config.ranks()) {
    std::memcpy(wire, w, 32);
  }
  ~Shm();

  int start();

 private:
  void offer();
  void listen();
  void meet();
  void introduce(std::uint32_t rank);
  void lend(std::uint32_t rank);
  bool receive(int fd, Message &m, std::vector<int> &got, std::string &why);
  void hear(std::uint32_t rank);
  void check(const Message &m, std::uint32_t rank);
  void map(std::uint32_t rank, const Message &m, std::vector<int> &got);
  Token share(s3_span memory);
  s3_span find(std::uint32_t rank, const Token &place, std::uint64_t bytes);
  Way way() const { return !direct ? Way::host : device->caps & S3_DEVICE_DIRECT ? Way::direct : Way::unable; }
  void watch();
  std::string unable(std::uint32_t rank) const {
    return say("the device of rank ", mesh.config.name(rank), " does not exchange through its own memory; use --transport shm");
  }
  std::string who(std::uint32_t rank) const { return say("rank ", mesh.config.name(rank), " (process ", peers[rank].pid, ")"); }
  friend void send(Shm &, int, Kind, const std::string &, const std::vector<int> &);
};

Shm &of(s3_net *net) { return *reinterpret_cast<Shm *>(net); }
thread_local std::string open_error;

sockaddr_un address(const std::string &session, std::uint32_t rank, socklen_t &length) {
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  const std::string name = say("step3c/", session, "/", rank);
  std::memcpy(a.sun_path + 1, name.data(), name.size());  // leading NUL: abstract, without a file
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return a;
}

void send(Shm &s, int fd, Kind kind, const std::string &text, const std::vector<int> &fds) {
  Message m{};
  std::memcpy(m.protocol, protocol, sizeof protocol);
  m.kind = kind;
  m.abi = S3_ABI;
  m.rank = s.mesh.rank;
  m.attention = s.mesh.config.attention;
  m.ffn = s.mesh.config.ffn;
  m.schedules = static_cast<std::uint32_t>(s.mesh.config.slots.size());
  m.way = s.way();
  m.flags = s.flags;
  m.board_bytes = Board::bytes(s.mesh.config);
  m.offers = s.offers.size();
  std::memcpy(m.wire, s.wire, 32);
  std::memcpy(m.text, text.data(), std::min(text.size(), sizeof m.text - 1));
  iovec io{&m, sizeof m};
  alignas(cmsghdr) char control[CMSG_SPACE(max_fds * sizeof(int))] = {};
  msghdr h{};
  h.msg_iov = &io;
  h.msg_iovlen = 1;
  if (!fds.empty()) {
    h.msg_control = control;
    h.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr *c = CMSG_FIRSTHDR(&h);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
  }
  // a peer that is gone is noticed when we listen to it
  while (::sendmsg(fd, &h, MSG_NOSIGNAL) < 0 && errno == EINTR) {
  }
}

/// One message, and the descriptors that came with it. False: the other side is gone, or `why` says what is wrong.
bool Shm::receive(int fd, Message &m, std::vector<int> &got, std::string &why) {
  for (int attempt = 0; attempt < 3; attempt++) {
    iovec io{&m, sizeof m};
    alignas(cmsghdr) char control[CMSG_SPACE(max_fds * sizeof(int))];
    msghdr h{};
    h.msg_iov = &io;
    h.msg_iovlen = 1;
    h.msg_control = control;
    h.msg_controllen = sizeof control;
    const ssize_t n = ::recvmsg(fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    // a peer that closed with something of ours unread resets the connection once; what it said last is still there
    if (n < 0 && (errno == EINTR || errno == ECONNRESET)) continue;
    if (n <= 0) return false;
    for (cmsghdr *c = CMSG_FIRSTHDR(&h); c; c = CMSG_NXTHDR(&h, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; i++) {
        int one = -1;
        std::memcpy(&one, CMSG_DATA(c) + i * sizeof(int), sizeof one);
        got.push_back(one);
      }
    }
    if (n != static_cast<ssize_t>(sizeof m) || std::memcmp(m.protocol, protocol, sizeof protocol) != 0) {
      why = "it speaks another protocol";
      return false;
    }
    m.text[sizeof m.text - 1] = 0;
    return true;
  }
  return false;
}

/// What the device says of memory of ours.
Token Shm::share(s3_span memory) {
  Token token{sizeof token.data, {}};
  if (device->share(dev, memory, token.data, &token.bytes) != 0)
    fail(exit_input, name, "the device cannot share its memory with other processes (", device->error(dev), "); choose another transport");
  if (direct) return token;
  s3_share host{};
  if (token.bytes != sizeof host) fail(exit_internal, name, "the device shares memory that the host cannot map");
  std::memcpy(&host, token.data, sizeof host);
  const auto at = std::find(fds.begin(), fds.end(), host.fd);
  if (at == fds.end() && fds.size() + 2 > max_fds) fail(exit_internal, name, "receive slots in too many pieces of memory");
  const auto n = at - fds.begin();
  if (at == fds.end()) fds.push_back(host.fd);
  host.fd = static_cast<std::int32_t>(n);
  std::memcpy(token.data, &host, sizeof host);
  return token;
}

/// Memory of a peer, as we address it.
s3_span Shm::find(std::uint32_t rank, const Token &place, std::uint64_t bytes) {
  if (place.bytes > sizeof place.data) fail(exit_peer, name, who(rank), ": its memory is not described");
  if (direct) {
    s3_span found{};
    const bool here = peers[rank].pid == ::getpid();
    if (const int code = device->map(dev, place.data, place.bytes, here, &found)) fail(code, name, who(rank), ": ", device->error(dev));
    if (found.bytes != bytes) fail(exit_peer, name, who(rank), ": it offers ", found.bytes, " bytes where ", bytes, " were expected");
    return found;
  }
  s3_share at{};
  std::memcpy(&at, place.data, sizeof at);
  const auto &mappings = peers[rank].mappings;  // the board is the first
  const std::size_t n = static_cast<std::size_t>(at.fd) + 1;
  if (at.fd < 0 || n >= mappings.size() || at.off > mappings[n].bytes || bytes > mappings[n].bytes - at.off)
    fail(exit_peer, name, who(rank), ": a receive slot lies outside its memory");
  return {reinterpret_cast<std::uint64_t>(mappings[n].memory), at.off, bytes};
}

/// Memory of our receive slots, and the board with the table of them. A device that cannot offers nothing, and is refused when ranks meet.
void Shm::offer() {
  if (way() == Way::direct) {
    if (const int code = direct->prepare()) throw Failure(code, mesh.why);
    flags = share(direct->flags);
  }
  for (const Pairing &p : mesh.pairings)
    if (!p.key.outgoing && way() != Way::unable) offers.push_back({p.key.key, p.key.memory.bytes, p.key.schedule, p.key.slot, p.key.peer, share(p.key.memory)});
  const std::uint64_t lines = Board::bytes(mesh.config);
  own.bytes = lines + offers.size() * sizeof(Offer);
  board_fd = ::memfd_create("step3c-board", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (board_fd < 0 || ::ftruncate(board_fd, static_cast<off_t>(own.bytes)) != 0)
    fail(exit_internal, name, "no shared memory (", std::strerror(errno), ")");
  ::fcntl(board_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  void *memory = ::mmap(nullptr, own.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, board_fd, 0);
  if (memory == MAP_FAILED) fail(exit_internal, name, "shared memory cannot be mapped (", std::strerror(errno), ")");
  own.memory = static_cast<std::uint8_t *>(memory);
  auto *board = new (memory) Board();
  for (std::size_t i = 0; i < (lines - sizeof(Board)) / sizeof(Line); i++) new (board->lines() + i) Line();
  if (!offers.empty()) std::memcpy(own.memory + lines, offers.data(), offers.size() * sizeof(Offer));
  mesh.boards[mesh.rank] = board;
}

void Shm::listen() {
  listener = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener < 0) fail(exit_internal, name, "no socket (", std::strerror(errno), ")");
  socklen_t length = 0;
  const sockaddr_un a = address(mesh.config.session, mesh.rank, length);
  if (::bind(listener, reinterpret_cast<const sockaddr *>(&a), length) != 0) {
    if (errno == EADDRINUSE)
      fail(exit_peer, name, "session '", mesh.config.session, "' already has a rank ", mesh.config.name(mesh.rank),
           " on this host; choose another --session");
    fail(exit_internal, name, "the socket cannot be named (", std::strerror(errno), ")");
  }
  if (::listen(listener, 128) != 0) fail(exit_internal, name, "cannot listen (", std::strerror(errno), ")");
}

void Shm::introduce(std::uint32_t rank) { send(*this, peers[rank].fd, Kind::hello, {}, {}); }

void Shm::lend(std::uint32_t rank) {
  std::vector<int> all = {board_fd};
  all.insert(all.end(), fds.begin(), fds.end());
  send(*this, peers[rank].fd, Kind::memory, {}, all);
}

/// Refuses a peer that runs another model, another layout of ranks, or another version.
void Shm::check(const Message &m, std::uint32_t rank) {
  const MeshConfig &c = mesh.config;
  std::string why;
  if (std::memcmp(m.wire, wire, 32) != 0)
    why = say("the wire contracts differ: rank ", c.name(mesh.rank), " has ", hex(wire, 32), ", rank ", c.name(rank), " has ", hex(m.wire, 32),
              "; both sides need bundles of the same model, precision and ranks");
  else if (m.abi != S3_ABI)
    why = say("rank ", c.name(mesh.rank), " speaks abi ", S3_ABI, ", rank ", c.name(rank), " abi ", m.abi, "; build both from the same version");
  else if (way() == Way::unable || m.way == Way::unable)
    why = unable(way() == Way::unable ? mesh.rank : rank);
  else if (m.way != way())
    why = say("rank ", c.name(mesh.rank), " runs with --transport ", direct ? "cuda" : "shm", ", rank ", c.name(rank), " with --transport ",
              direct ? "shm" : "cuda", "; give all ranks the same");
  else if (m.attention != c.attention || m.ffn != c.ffn || m.schedules != c.slots.size() || m.board_bytes != Board::bytes(c))
    why = say("rank ", c.name(mesh.rank), " has ", c.attention, "A", c.ffn, "F and ", c.slots.size(), " schedules, rank ", c.name(rank), " has ",
              m.attention, "A", m.ffn, "F and ", m.schedules, ", or their slots differ");
  if (why.empty()) return;
  send(*this, peers[rank].fd, Kind::fail, why, {});
  fail(exit_peer, name, why);
}

/// Maps what a peer lends, and finds there the receive slot of everything that we send to it.
void Shm::map(std::uint32_t rank, const Message &m, std::vector<int> &got) {
  Peer &peer = peers[rank];
  const std::uint64_t lines = Board::bytes(mesh.config);
  std::string why;
  if (got.empty()) why = "it sent no memory";
  if (m.offers > (1u << 20)) why = "it offers too many receive slots";
  for (std::size_t i = 0; i < got.size() && why.empty(); i++) {
    struct stat st {};
    const int seals = ::fcntl(got[i], F_GET_SEALS);
    if (::fstat(got[i], &st) != 0 || st.st_size <= 0) why = "its memory has no size";
    else if (seals < 0 || !(seals & F_SEAL_SHRINK)) why = "its memory could shrink under us";
    else if (i == 0 && static_cast<std::uint64_t>(st.st_size) < lines + m.offers * sizeof(Offer)) why = "its board is too small";
    else {
      void *memory = ::mmap(nullptr, static_cast<std::size_t>(st.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, got[i], 0);
      if (memory == MAP_FAILED) why = say("its memory cannot be mapped (", std::strerror(errno), ")");
      else peer.mappings.push_back({static_cast<std::uint8_t *>(memory), static_cast<std::uint64_t>(st.st_size)});
    }
  }
  for (const int fd : got) ::close(fd);
  got.clear();
  if (!why.empty()) fail(exit_peer, name, who(rank), ": ", why);
  peer.board = reinterpret_cast<Board *>(peer.mappings[0].memory);
  mesh.boards[rank] = peer.board;
  std::vector<Offer> table(m.offers);
  if (!table.empty()) std::memcpy(table.data(), peer.mappings[0].memory + lines, table.size() * sizeof(Offer));
  std::map<std::pair<std::uint32_t, std::uint64_t>, const Offer *> byKey;
  for (const Offer &o : table)
    if (o.peer == mesh.rank) byKey.emplace(std::pair(o.schedule, o.key), &o);
  for (Pairing &p : mesh.pairings) {
    if (!p.key.outgoing || p.key.peer != rank) continue;
    const auto found = byKey.find({p.key.schedule, p.key.key});
    if (found == byKey.end()) continue;  // Mesh::ready names it
    const Offer &o = *found->second;
    if (o.bytes != p.key.memory.bytes)
      fail(exit_peer, name, "key ", p.key.key, " of slot ", p.key.slot, ": rank ", mesh.config.name(mesh.rank), " sends ", p.key.memory.bytes,
           " bytes, rank ", mesh.config.name(rank), " expects ", o.bytes, " (contract K3)");
    p.remote = find(rank, o.place, o.bytes);
  }
  if (direct && (rank < mesh.config.attention) != (mesh.rank < mesh.config.attention)) direct->remote[rank] = find(rank, m.flags, direct->flags.bytes);
  peer.mapped = true;
}

/// A peer that we know said something, or ended.
void Shm::hear(std::uint32_t rank) {
  Message m{};
  std::vector<int> got;
  std::string why;
  if (!receive(peers[rank].fd, m, got, why)) {
    for (const int fd : got) ::close(fd);
    fail(exit_peer, name, who(rank), why.empty() ? " ended before the first round" : ": " + why);
  }
  if (m.kind == Kind::fail) fail(exit_peer, m.text[0] ? std::string(name) + m.text : who(rank) + " failed");
  if (m.kind == Kind::bye) fail(exit_peer, name, who(rank), " left before the first round");
  if (m.kind == Kind::hello && !peers[rank].greeted) {
    check(m, rank);
    peers[rank].greeted = true;
    lend(rank);
  } else if (m.kind == Kind::memory && peers[rank].greeted && !peers[rank].mapped) {
    map(rank, m, got);
  } else {
    for (const int fd : got) ::close(fd);
    fail(exit_peer, name, who(rank), " said something out of turn");
  }
}

pid_t credentials(int fd) {
  ucred c{};
  socklen_t length = sizeof c;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &length) != 0 || c.uid != ::geteuid()) return -1;
  return c.pid;
}

/// Until every peer is known and its memory mapped. Ranks may start in any order; the higher one of a pair connects.
void Shm::meet() {
  const auto deadline = Clock::now() + std::chrono::milliseconds(mesh.config.timeout_ms);
  const std::uint32_t n = mesh.config.ranks();
  for (;;) {
    std::string missing;
    bool knocking = false, all = true;
    for (std::uint32_t r = 0; r < n; r++) {
      if (r == mesh.rank) continue;
      Peer &peer = peers[r];
      if (peer.fd < 0 && r < mesh.rank) {
        const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        if (fd < 0) fail(exit_internal, name, "no socket (", std::strerror(errno), ")");
        socklen_t length = 0;
        const sockaddr_un a = address(mesh.config.session, r, length);
        if (::connect(fd, reinterpret_cast<const sockaddr *>(&a), length) != 0) {
          ::close(fd);
          knocking = true;
        } else if (const pid_t pid = credentials(fd); pid < 0) {
          ::close(fd);
          fail(exit_peer, name, "rank ", mesh.config.name(r), " of session '", mesh.config.session,
               "' belongs to another user; choose another --session");
        } else {
          peer.fd = fd;
          peer.pid = pid;
          introduce(r);
        }
      }
      if (!peer.mapped) {
        all = false;
        if (peer.fd < 0) missing += (missing.empty() ? "" : ", ") + mesh.config.name(r);
      }
    }
    if (all) return;
    if (Clock::now() > deadline)
      fail(exit_peer, name, "rank ", mesh.config.name(mesh.rank), " waited ", mesh.config.timeout_ms / 1000.0, " s for rank ",
           missing.empty() ? "s that had connected" : missing, " of session '", mesh.config.session, "'; start it with the same --session");

    std::vector<pollfd> list = {{listener, POLLIN, 0}};
    std::vector<std::uint32_t> ranks = {mesh.rank};
    for (std::uint32_t r = 0; r < n; r++)
      if (peers[r].fd >= 0 && !peers[r].mapped) {
        list.push_back({peers[r].fd, POLLIN, 0});
        ranks.push_back(r);
      }
    const std::size_t known = list.size();
    for (const int fd : strangers) list.push_back({fd, POLLIN, 0});
    const int ready = ::poll(list.data(), list.size(), knocking ? 10 : 100);
    if (ready < 0 && errno == EINTR) fail(exit_peer, name, "interrupted while waiting for the other ranks");
    if (ready <= 0) continue;
    for (std::size_t i = 1; i < known; i++)
      if (list[i].revents) hear(ranks[i]);
    for (std::size_t i = known; i < list.size(); i++) {
      if (!list[i].revents) continue;
      const int fd = list[i].fd;
      std::erase(strangers, fd);
      Message m{};
      std::vector<int> got;
      std::string why;
      const bool heard = receive(fd, m, got, why);
      for (const int g : got) ::close(g);
      if (!heard || m.kind != Kind::hello || m.rank >= n || m.rank <= mesh.rank || peers[m.rank].fd >= 0) {
        if (heard) send(*this, fd, Kind::fail, say("session '", mesh.config.session, "' has no place for another rank ", m.rank), {});
        ::close(fd);  // not one of us
        continue;
      }
      Peer &peer = peers[m.rank];
      peer.fd = fd;
      peer.pid = credentials(fd);
      introduce(m.rank);
      check(m, m.rank);
      peer.greeted = true;
      lend(m.rank);
    }
    if (list[0].revents) {
      const int fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd >= 0 && (credentials(fd) < 0 || strangers.size() > 64)) ::close(fd);
      else if (fd >= 0) strangers.push_back(fd);
    }
  }
}

/// The thread that notices when a peer ends. The rank itself sees it at its next wait; one that is in a long kernel is not waited for.
void Shm::watch() {
  Clock::time_point failed_at;
  for (;;) {
    std::vector<pollfd> list = {{stop, POLLIN, 0}};
    std::vector<std::uint32_t> ranks = {mesh.rank};
    for (std::uint32_t r = 0; r < peers.size(); r++)
      if (peers[r].fd >= 0 && !peers[r].gone) {
        list.push_back({peers[r].fd, POLLIN, 0});
        ranks.push_back(r);
      }
    const bool hurry = failed.load() && mesh.config.leave_ms > 0;
    if (::poll(list.data(), list.size(), hurry ? 50 : -1) < 0) continue;
    if (list[0].revents) return;
    if (hurry && Clock::now() - failed_at > std::chrono::milliseconds(mesh.config.leave_ms)) {
      const std::lock_guard lock(mutex);
      const std::string text = say("step3-run: ", failure, " while rank ", mesh.config.name(mesh.rank), " was computing\n");
      if (::write(2, text.data(), text.size()) < 0) ::_exit(exit_internal);
      ::_exit(exit_peer);
    }
    for (std::size_t i = 1; i < list.size(); i++) {
      if (!list[i].revents) continue;
      Peer &peer = peers[ranks[i]];
      Message m{};
      std::vector<int> got;
      std::string why;
      const bool heard = receive(peer.fd, m, got, why);
      for (const int fd : got) ::close(fd);
      peer.gone = true;
      if (heard && m.kind == Kind::bye) continue;
      if (!heard && mesh.boards[0]->stopped.load(std::memory_order_acquire)) continue;
      {
        const std::lock_guard lock(mutex);
        if (failure.empty()) failure = heard && m.kind == Kind::fail ? say(who(ranks[i]), " failed (", m.text, ")") : say(who(ranks[i]), " ended unexpectedly");
      }
      if (!failed.load()) failed_at = Clock::now();
      failed.store(true, std::memory_order_release);
      mesh.boards[mesh.rank]->bell.ring();
    }
  }
}

int Shm::start() {
  try {
    offer();
    listen();
    meet();
    if (way() == Way::unable) fail(exit_input, name, unable(mesh.rank));
    ::close(listener);
    listener = -1;
    for (const int fd : strangers) ::close(fd);
    strangers.clear();
    if (const int code = mesh.ready()) return code;
    mesh.lost = [this]() -> std::string {
      if (!failed.load(std::memory_order_acquire)) return {};
      const std::lock_guard lock(mutex);
      return failure;
    };
    stop = ::eventfd(0, EFD_CLOEXEC);
    if (stop < 0) fail(exit_internal, name, "no eventfd (", std::strerror(errno), ")");
    monitor = std::thread([this] { watch(); });
    return 0;
  } catch (const Failure &e) {
    return mesh.refuse(e.code, e.what());
  } catch (const std::exception &e) {
    return mesh.refuse(exit_internal, e.what());
  }
}

Shm::~Shm() {
  if (monitor.joinable()) {
    const std::uint64_t one = 1;
    while (::write(stop, &one, sizeof one) < 0 && errno == EINTR) {
    }
    monitor.join();
  }
  for (Peer &peer : peers) {
    if (peer.fd >= 0) ::close(peer.fd);
    for (const Mapping &m : peer.mappings) ::munmap(m.memory, m.bytes);
  }
  for (const int fd : strangers) ::close(fd);
  for (const int fd : {listener, board_fd, stop})
    if (fd >= 0) ::close(fd);
  if (own.memory) ::munmap(own.memory, own.bytes);
}

int open(bool direct, const char *config, std::uint32_t rank, const std::uint8_t wire[32], s3_dev *dev, const s3_device *device, s3_net **out) {
  return caught(open_error, [&] {
    MeshConfig c = MeshConfig::read(config);
    if (c.session.empty() || c.session.size() > 60) fail(exit_usage, "--session needs a name of 1 to 60 characters");
    for (const char ch : c.session)
      if (!std::isalnum(static_cast<unsigned char>(ch)) && ch != '-' && ch != '_' && ch != '.')
        fail(exit_usage, "--session '", c.session, "': use letters, digits, - _ and .");
    if (rank >= c.ranks()) fail(exit_internal, "rank ", rank, " of ", c.ranks());
    std::unique_ptr<Mesh> mesh;
    if (direct) mesh = std::make_unique<DirectMesh>(std::move(c), rank, dev, device);
    else mesh = std::make_unique<HostMesh>(std::move(c), rank, dev, device);
    *out = reinterpret_cast<s3_net *>(std::make_unique<Shm>(std::move(mesh), direct, wire, dev, device).release());
  });
}
int shmOpen(const char *config, std::uint32_t rank, const std::uint8_t wire[32], s3_dev *dev, const s3_device *device, s3_net **out) {
  return open(false, config, rank, wire, dev, device, out);
}
int cudaOpen(const char *config, std::uint32_t rank, const std::uint8_t wire[32], s3_dev *dev, const s3_device *device, s3_net **out) {
  return open(true, config, rank, wire, dev, device, out);
}
int netBind(s3_net *net, const s3_key *key) { return of(net).mesh.bind(*key); }
int netStart(s3_net *net) { return of(net).start(); }
int netAgree(s3_net *net, const s3_wish *mine, s3_round *out, std::uint32_t ms) { return of(net).mesh.agree(*mine, *out, ms); }
int netPost(s3_net *net, const s3_exchange *x, const s3_head *head, s3_event after) { return of(net).mesh.post(*x, *head, after); }
int netAwait(s3_net *net, const s3_exchange *x, s3_queue *queue, std::uint32_t ms) { return of(net).mesh.await(*x, queue, ms); }
int netAccept(s3_net *net, const s3_exchange *x, std::uint32_t from, s3_queue *queue, std::uint32_t ms) {
  return of(net).mesh.accept(*x, from, queue, ms);
}
int netReply(s3_net *net, const s3_exchange *x, std::uint32_t to, s3_event after) { return of(net).mesh.reply(*x, to, after); }
int netSettle(s3_net *net, s3_queue *queue, std::uint32_t ms) { return of(net).direct->settle(queue, ms); }

void netClose(s3_net *net, const char *why) {
  const std::unique_ptr<Shm> self(&of(net));
  for (const Peer &peer : self->peers)
    if (peer.fd >= 0) send(*self, peer.fd, why ? Kind::fail : Kind::bye, why ? why : "", {});
  if (why && self->direct) self->direct->release();
}
const char *netError(s3_net *net) { return net ? of(net).mesh.why.c_str() : open_error.c_str(); }

}  // namespace

const s3_transport *shmTransport() {
  static const s3_transport table = {S3_ABI,  0,        shmOpen,   netBind,  netStart, netAgree, netPost,
                                     netAwait, netAccept, netReply, netClose, netError, nullptr};
  return &table;
}
const s3_transport *cudaTransport() {
  static const s3_transport table = {S3_ABI,   S3_TRANSPORT_QUEUES, cudaOpen, netBind,  netStart, netAgree, netPost,
                                     netAwait, netAccept,           netReply, netClose, netError, netSettle};
  return &table;
}

}  // namespace s3
