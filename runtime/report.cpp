#include "report.h"

#include <algorithm>
#include <map>

#include "error.h"

namespace s3 {

namespace {

std::string list(const std::vector<double> &values) {
  std::string text = "[";
  for (std::size_t i = 0; i < values.size(); i++) text += (i ? "," : "") + jsonNumber(values[i]);
  return text + "]";
}
std::string list(const std::vector<std::uint64_t> &values) {
  std::string text = "[";
  for (std::size_t i = 0; i < values.size(); i++) text += (i ? "," : "") + std::to_string(values[i]);
  return text + "]";
}

/// nearest rank
double percentile(std::vector<double> &values, double p) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const auto i = static_cast<std::size_t>(p / 100 * static_cast<double>(values.size()));
  return values[std::min(i, values.size() - 1)];
}

std::string percentiles(std::vector<double> values) {
  double sum = 0;
  for (const double v : values) sum += v;
  const auto n = values.size();
  return say("{\"count\":", n, ",\"mean\":", jsonNumber(n ? sum / static_cast<double>(n) : 0), ",\"p50\":", jsonNumber(percentile(values, 50)),
             ",\"p99\":", jsonNumber(percentile(values, 99)), "}");
}

}  // namespace

void Report::take(const EngineStats &s) {
  const auto ms = [](std::int64_t ns) { return static_cast<double>(ns) / 1e6; };
  rounds = s.rounds;
  load_ms = ms(s.load_ns);
  compute_ms = ms(s.compute_ns);
  wait_ms = ms(s.wait_ns);
  send_ms = ms(s.send_ns);
  agree_ms = ms(s.agree_ns);
  counts = s.counts;
}

std::string Report::json() const {
  std::string text = say("{\"rank\":", jsonText(rank), ",\"rounds\":", rounds, ",\"prompts\":", prompts, ",\"prompt_tokens\":", prompt_tokens,
                         ",\"tokens\":", tokens, ",\"load_ms\":", jsonNumber(load_ms), ",\"compute_ms\":", jsonNumber(compute_ms),
                         ",\"wait_ms\":", jsonNumber(wait_ms), ",\"send_ms\":", jsonNumber(send_ms), ",\"agree_ms\":", jsonNumber(agree_ms),
                         ",\"run_ms\":", jsonNumber(run_ms), ",\"first_ms\":", list(first_ms), ",\"gap_ms\":", list(gap_ms), ",\"counts\":[");
  for (std::size_t i = 0; i < counts.size(); i++)
    text += say(i ? "," : "", "{\"schedule\":", counts[i].schedule, ",\"exchange\":", counts[i].exchange, ",\"field\":", jsonText(counts[i].field),
                ",\"rows\":", list(counts[i].rows), "}");
  return text + "]}";
}

Report Report::read(const std::string &json) {
  const JsonFile file = JsonFile::parse(json, "report of a rank");
  Report r;
  const auto count = [&](const char *name) { return static_cast<std::uint64_t>(file[name].whole()); };
  r.rank = file["rank"].text();
  r.rounds = count("rounds");
  r.prompts = count("prompts");
  r.prompt_tokens = count("prompt_tokens");
  r.tokens = count("tokens");
  r.load_ms = file["load_ms"].number();
  r.compute_ms = file["compute_ms"].number();
  r.wait_ms = file["wait_ms"].number();
  r.send_ms = file["send_ms"].number();
  r.agree_ms = file["agree_ms"].number();
  r.run_ms = file["run_ms"].number();
  for (const Json &v : file["first_ms"].items()) r.first_ms.push_back(v.number());
  for (const Json &v : file["gap_ms"].items()) r.gap_ms.push_back(v.number());
  for (const Json &v : file["counts"].items()) {
    ValueCount c{static_cast<std::uint32_t>(v["schedule"].whole()), static_cast<std::uint32_t>(v["exchange"].whole()), v["field"].text(), {}};
    for (const Json &n : v["rows"].items()) c.rows.push_back(static_cast<std::uint64_t>(n.whole()));
    r.counts.push_back(std::move(c));
  }
  return r;
}

std::string statsJson(const std::vector<Report> &reports, const Bundle &bundle) {
  std::vector<double> first, gap;
  std::uint64_t prompts = 0, prompt_tokens = 0, tokens = 0;
  double run = 0;
  std::map<std::pair<std::uint32_t, std::string>, std::vector<std::uint64_t>> rows;  // over schedules and attention ranks
  std::string ranks;
  for (const Report &r : reports) {
    first.insert(first.end(), r.first_ms.begin(), r.first_ms.end());
    gap.insert(gap.end(), r.gap_ms.begin(), r.gap_ms.end());
    prompts += r.prompts;
    prompt_tokens += r.prompt_tokens;
    tokens += r.tokens;
    run = std::max(run, r.run_ms);
    for (const ValueCount &c : r.counts) {
      auto &sum = rows[{c.exchange, c.field}];
      if (sum.size() < c.rows.size()) sum.resize(c.rows.size());
      for (std::size_t i = 0; i < c.rows.size(); i++) sum[i] += c.rows[i];
    }
    ranks += say(ranks.empty() ? "" : ",", "{\"rank\":", jsonText(r.rank), ",\"rounds\":", r.rounds, ",\"load_ms\":", jsonNumber(r.load_ms),
                 ",\"compute_ms\":", jsonNumber(r.compute_ms), ",\"exchange_wait_ms\":", jsonNumber(r.wait_ms), ",\"send_ms\":", jsonNumber(r.send_ms),
                 ",\"between_rounds_ms\":", jsonNumber(r.agree_ms), ",\"run_ms\":", jsonNumber(r.run_ms), "}");
  }
  std::string experts;
  for (const auto &[key, counts] : rows)
    experts += say(experts.empty() ? "" : ",", "{\"exchange\":", key.first, ",\"field\":", jsonText(key.second), ",\"rows\":", list(counts), "}");
  return say("{\"model\":", jsonText(bundle.manifest.model), ",\"prompts\":", prompts, ",\"prompt_tokens\":", prompt_tokens, ",\"tokens\":", tokens,
             ",\"run_ms\":", jsonNumber(run), ",\"tokens_per_second\":", jsonNumber(run > 0 ? static_cast<double>(tokens) * 1000 / run : 0),
             ",\"time_to_first_token_ms\":", percentiles(first), ",\"time_per_token_ms\":", percentiles(gap), ",\"rows_per_value\":[", experts,
             "],\"ranks\":[", ranks, "]}");
}

}  // namespace s3
