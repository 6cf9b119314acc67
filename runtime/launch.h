// Ranks in this process or in children of it.
#pragma once
#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "report.h"

namespace s3 {

/// What a rank does once it has started; returns the exit code.
using RankWork = std::function<int(Engine &, Report &)>;

struct LaunchOptions {
  EngineOptions engine;
  const s3_transport *transport = nullptr;
  std::optional<RankId> only;  // this process is one rank
  bool processes = false;      // else: a process for every rank
  const std::atomic<int> *interrupted = nullptr;
};

struct Outcome {
  int code = 0;
  std::string error;              // one line, when something failed
  std::vector<Report> reports;    // of the ranks that ran here, by rank
  std::vector<std::string> traces;
};

/// Starts the ranks, does the work, and gathers what they report. `events` receives the lines that ranks in other processes print with `say`
/// of `work`; in this process they print themselves.
class Launcher {
 public:
  Launcher(const Bundle &bundle, LaunchOptions options) : bundle_(bundle), options_(std::move(options)) {}
  /// `print` writes whole lines to the output; safe from several threads
  Outcome run(const std::function<RankWork(std::function<void(const std::string &)> print)> &work,
              const std::function<void(const std::string &)> &print);

 private:
  const Bundle &bundle_;
  const LaunchOptions options_;
  const std::int64_t zero_ = now();  // of the trace

  const s3_device *device(RankId rank) const;
  Outcome threads(const RankWork &work, const std::vector<RankId> &ranks) const;
  Outcome processes(const std::function<RankWork(std::function<void(const std::string &)>)> &work,
                    const std::function<void(const std::string &)> &print) const;
};

}  // namespace s3
