#include "launch.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <mutex>
#include <thread>

#include "devices/device.h"
#include "error.h"
#include "library.h"

namespace s3 {

namespace {

/// What a child tells its parent: one byte of kind, four of length, then the text.
enum class Frame : std::uint8_t { print = 'P', report = 'R', trace = 'T', error = 'E' };

bool writeAll(int fd, const void *bytes, std::size_t n) {
  const auto *at = static_cast<const char *>(bytes);
  while (n > 0) {
    const ssize_t wrote = ::write(fd, at, n);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return false;
    at += wrote;
    n -= static_cast<std::size_t>(wrote);
  }
  return true;
}

void tell(int fd, Frame kind, const std::string &text) {
  std::string frame(5, static_cast<char>(kind));
  const auto n = static_cast<std::uint32_t>(text.size());
  std::memcpy(frame.data() + 1, &n, sizeof n);
  frame += text;
  writeAll(fd, frame.data(), frame.size());
}

}  // namespace

/// The driver of a rank's device: the built-in one, or the one that its program brings.
const s3_device *Launcher::device(RankId rank) const {
  const std::string &name = bundle_.manifest.program(rank.role).device;
  if (name == "cpp") return cppDevice();
  const std::string &program = rank.role == Role::attention ? options_.engine.program_attention : options_.engine.program_ffn;
  const auto find = symbol<const s3_device *(*)()>(program, "s3_device_v1");
  if (!find) fail(exit_input, program, ": brings no driver for device '", name, "' of rank ", rank.name(), " (s3_device_v1); build the program again");
  const s3_device *driver = find();
  if (driver->abi != S3_ABI) fail(exit_input, program, ": its driver speaks abi ", driver->abi, ", this runtime ", S3_ABI, "; build both from the same bundle");
  return driver;
}

/// Ranks as threads of this process. Engines go only when every thread has left, since ranks write each other's memory.
Outcome Launcher::threads(const RankWork &work, const std::vector<RankId> &ranks) const {
  Outcome outcome;
  WeightsPool pool;
  std::vector<std::unique_ptr<Engine>> engines;
  std::vector<Report> reports(ranks.size());
  std::mutex mutex;
  const auto failed = [&](int code, const std::string &why) {
    const std::lock_guard lock(mutex);
    if (outcome.error.empty()) {  // the first is the cause of the rest
      outcome.error = why;
      outcome.code = code;
    }
  };
  const auto guarded = [&](const auto &what, Engine *engine) {
    const auto note = [&](int code, const std::string &why) {
      failed(code, why);
      // only now, or a peer that hears of it would seem to be the first
      if (engine) engine->leave(why.c_str());
    };
    try {
      what();
    } catch (const Failure &e) {
      note(e.code, e.what());
    } catch (const std::bad_alloc &) {
      note(exit_input, "out of memory; use more ranks, or a smaller batch or context");
    } catch (const std::exception &e) {
      note(exit_internal, say("internal error: ", e.what()));
    }
  };
  guarded(
      [&] {
        for (const RankId rank : ranks) {
          engines.push_back(std::make_unique<Engine>(bundle_, rank, options_.engine, device(rank), options_.transport, &pool));
          engines.back()->open();
        }
      },
      nullptr);
  if (!outcome.error.empty()) return outcome;
  int worst = 0;
  const auto one = [&](std::size_t i) {
    Engine &engine = *engines[i];
    guarded(
        [&] {
          engine.start();
          reports[i].rank = ranks[i].name();
          const int code = work(engine, reports[i]);
          engine.leave(nullptr);
          reports[i].take(engine.stats);
          const std::lock_guard lock(mutex);
          worst = std::max(worst, code);
        },
        &engine);
  };
  if (ranks.size() == 1) {
    one(0);
  } else {
    std::vector<std::thread> all;
    for (std::size_t i = 0; i < ranks.size(); i++) all.emplace_back(one, i);
    for (auto &t : all) t.join();
  }
  if (outcome.error.empty()) outcome.code = worst;
  for (std::size_t i = 0; i < ranks.size(); i++) {
    outcome.reports.push_back(reports[i]);
    if (options_.engine.trace) outcome.traces.push_back(engines[i]->trace.json(zero_));
  }
  return outcome;
}

Outcome Launcher::processes(const std::function<RankWork(std::function<void(const std::string &)>)> &work,
                            const std::function<void(const std::string &)> &print) const {
  struct Child {
    pid_t pid = -1;
    int fd = -1, status = 0;
    bool ended = false, killed = false;  // killed: by us
    std::string pending, error;
  };
  std::vector<Child> children(bundle_.ranks());
  const pid_t parent = ::getpid();
  for (std::uint32_t r = 0; r < children.size(); r++) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) fail(exit_internal, "no pipe (", std::strerror(errno), ")");
    const pid_t pid = ::fork();
    if (pid < 0) fail(exit_internal, "no process (", std::strerror(errno), ")");
    if (pid == 0) {
      // a child must not outlive the process that gathers its output
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(exit_peer);
      for (const Child &c : children)
        if (c.fd >= 0) ::close(c.fd);
      ::close(ends[0]);
      const int fd = ends[1];
      int code = 0;
      {
        const Outcome outcome = threads(work([fd](const std::string &lines) { tell(fd, Frame::print, lines); }), {bundle_.rank(r)});
        if (!outcome.error.empty()) tell(fd, Frame::error, outcome.error);
        for (const Report &report : outcome.reports) tell(fd, Frame::report, report.json());
        for (const std::string &trace : outcome.traces) tell(fd, Frame::trace, trace);
        code = outcome.code;
      }
      ::exit(code);
    }
    ::close(ends[1]);
    children[r].pid = pid;
    children[r].fd = ends[0];
  }

  Outcome outcome;
  outcome.reports.resize(children.size());
  outcome.traces.resize(options_.engine.trace ? children.size() : 0);
  // what is told in the end: our own faults before others, causes before the peers that noticed them, the first before the later
  struct {
    int rank = 0, code = 0;
    std::string text;
  } worst;
  const auto blame = [&](int rank, int code, const std::string &text) {
    if (rank > worst.rank) worst = {rank, code, text};
  };
  int finished = 0;
  std::int64_t kill_at = 0;
  int passed_on = 0;
  for (std::size_t open = children.size(); open > 0;) {
    std::vector<pollfd> list;
    std::vector<std::size_t> index;
    for (std::size_t i = 0; i < children.size(); i++)
      if (!children[i].ended) {
        list.push_back({children[i].fd, POLLIN, 0});
        index.push_back(i);
      }
    ::poll(list.data(), list.size(), 100);
    const int signals = options_.interrupted ? options_.interrupted->load() : 0;
    if (signals > passed_on) {
      passed_on = signals;
      for (const Child &c : children)
        if (!c.ended) ::kill(c.pid, SIGTERM);
    }
    if (kill_at != 0 && now() > kill_at) {
      for (Child &c : children)
        if (!c.ended) {
          c.killed = true;
          ::kill(c.pid, SIGKILL);
        }
      kill_at = 0;
    }
    for (std::size_t k = 0; k < list.size(); k++) {
      if (!list[k].revents) continue;
      Child &c = children[index[k]];
      const std::string name = bundle_.rank(static_cast<std::uint32_t>(index[k])).name();
      char bytes[65536];
      const ssize_t n = ::read(c.fd, bytes, sizeof bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n > 0) {
        c.pending.append(bytes, static_cast<std::size_t>(n));
        std::size_t at = 0;
        std::uint32_t length = 0;
        while (c.pending.size() - at >= 5) {
          std::memcpy(&length, c.pending.data() + at + 1, sizeof length);
          if (c.pending.size() - at - 5 < length) break;
          const std::string text = c.pending.substr(at + 5, length);
          switch (static_cast<Frame>(c.pending[at])) {
            case Frame::print: print(text); break;
            case Frame::report: outcome.reports[index[k]] = Report::read(text); break;
            case Frame::trace: outcome.traces[index[k]] = text; break;
            case Frame::error: c.error = text; break;
          }
          at += 5 + length;
        }
        c.pending.erase(0, at);
        continue;
      }
      ::close(c.fd);
      while (::waitpid(c.pid, &c.status, 0) < 0 && errno == EINTR) {
      }
      c.ended = true;
      open--;
      const int code = WIFEXITED(c.status) ? WEXITSTATUS(c.status) : exit_peer;
      if (!WIFSIGNALED(c.status) && c.error.empty() && (code == exit_done || code == exit_input)) {
        finished = std::max(finished, code);
        continue;
      }
      if (kill_at == 0) kill_at = now() + 3000000000;  // the others notice by themselves, unless they have not met it yet
      if (c.killed) continue;
      if (WIFSIGNALED(c.status))
        blame(2, exit_peer, say("rank ", name, " (process ", c.pid, ") was ended by signal ", WTERMSIG(c.status), " (", ::strsignal(WTERMSIG(c.status)), ")"));
      else
        blame(code == exit_internal ? 3 : code == exit_peer ? 1 : 2, code, 
              // a crash has told about itself
              c.error.empty() && code != exit_internal ? say("rank ", name, " ended with exit code ", code) : c.error);
    }
  }
  outcome.error = worst.text;
  outcome.code = worst.rank > 0 ? worst.code : finished;
  return outcome;
}

Outcome Launcher::run(const std::function<RankWork(std::function<void(const std::string &)> print)> &work,
                      const std::function<void(const std::string &)> &print) {
  if (options_.only) return threads(work(print), {*options_.only});
  if (options_.processes) return processes(work, print);
  std::vector<RankId> ranks;
  for (std::uint32_t r = 0; r < bundle_.ranks(); r++) ranks.push_back(bundle_.rank(r));
  return threads(work(print), ranks);
}

}  // namespace s3
