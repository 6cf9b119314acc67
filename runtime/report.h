// What a rank says at the end: its timings, for people and for --stats.
#pragma once
#include <string>
#include <vector>

#include "engine.h"

namespace s3 {

struct Report {
  std::string rank;
  std::uint64_t rounds = 0, prompts = 0, prompt_tokens = 0, tokens = 0;
  double load_ms = 0, compute_ms = 0, wait_ms = 0, send_ms = 0, agree_ms = 0, run_ms = 0;
  std::vector<double> first_ms, gap_ms;  // time to each prompt's first token; time between tokens
  std::vector<ValueCount> counts;

  void take(const EngineStats &stats);
  std::string json() const;
  static Report read(const std::string &json);
};

/// One JSON object over all ranks: time to first token, time per token, waits, rows per expert.
std::string statsJson(const std::vector<Report> &reports, const Bundle &bundle);

}  // namespace s3
