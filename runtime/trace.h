// Chrome trace events (load the file in Perfetto): one process for each rank, one thread for each slot.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace s3 {

struct TraceEvent {
  std::uint32_t name = 0;  // index into Trace::names
  std::uint32_t slot = 0, round = 0;
  std::int32_t exchange = -1, step = -1;
  std::int64_t from = 0, to = 0;  // ns
};

struct Trace {
  std::uint32_t pid = 0;
  std::string rank;
  std::uint32_t slots = 0;
  std::vector<std::string> names;
  std::vector<TraceEvent> events;

  /// events as JSON on one line, comma separated, without the enclosing array; times in microseconds since `zero` ns
  std::string json(std::int64_t zero) const;
};

/// ns of a clock that all processes of a host share
std::int64_t now();

}  // namespace s3
