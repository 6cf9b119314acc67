#include "generate.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "error.h"

namespace s3 {

namespace {

void writeAll(int fd, const void *bytes, std::size_t n, const std::string &path) {
  const auto *at = static_cast<const char *>(bytes);
  while (n > 0) {
    const ssize_t wrote = ::write(fd, at, n);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) s3::fail(exit_input, path, ": cannot be written (", std::strerror(errno), ")");
    at += wrote;
    n -= static_cast<std::size_t>(wrote);
  }
}

/// The ids of a prompt, or why it cannot run.
std::string checkIds(const Json &v, const Bundle &b, std::vector<std::int32_t> &ids) {
  const Manifest &m = b.manifest;
  for (const Json &id : v.items()) {
    const double n = id.number();
    if (n != std::floor(n) || n < 0 || n > INT32_MAX || (m.vocabulary && n >= static_cast<double>(*m.vocabulary)))
      return m.vocabulary ? say("token id ", n, " is not in the vocabulary of ", *m.vocabulary) : say("token id ", n, " is not a token id");
    for (const Refusal &r : m.refused)
      if (static_cast<double>(r.id) == n) return say("token id ", n, " is refused: ", r.why);
    ids.push_back(static_cast<std::int32_t>(n));
  }
  if (ids.empty()) return "the prompt is empty; give at least one token";
  if (m.maxContext > 0 && ids.size() > m.maxContext)
    return say("the prompt has ", ids.size(), " tokens, longer than the context of ", m.maxContext, "; shorten it, or compile with a larger --max-context");
  return {};
}

}  // namespace

std::vector<Prompt> readPrompts(std::string_view jsonl, const PromptDefaults &defaults, const Bundle &bundle, bool score) {
  std::vector<Prompt> prompts;
  std::size_t line = 0;
  for (std::size_t at = 0; at < jsonl.size();) {
    const std::size_t end = std::min(jsonl.find('\n', at), jsonl.size());
    const std::string_view text = jsonl.substr(at, end - at);
    at = end + 1;
    line++;
    if (text.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    Prompt p;
    p.index = prompts.size();
    p.max_tokens = score ? 0 : defaults.max_tokens;
    p.temperature = defaults.temperature;
    p.top_p = defaults.top_p;
    p.seed = defaults.seed;
    try {
      const JsonFile json = JsonFile::parse(text, say("prompts, line ", line));
      if (const Json *v = json.root().find("max_tokens"); v && !score) p.max_tokens = static_cast<std::uint64_t>(v->whole(0, INT32_MAX));
      if (const Json *v = json.root().find("temperature")) p.temperature = static_cast<float>(v->number());
      if (const Json *v = json.root().find("top_p")) p.top_p = static_cast<float>(v->number());
      if (const Json *v = json.root().find("seed")) p.seed = static_cast<std::uint32_t>(v->whole(0, UINT32_MAX));
      if (!(p.temperature >= 0) || !std::isfinite(p.temperature)) json["temperature"].refuse("a temperature is 0 or more");
      if (!(p.top_p > 0 && p.top_p <= 1)) json["top_p"].refuse("top_p is more than 0 and at most 1");
      p.error = checkIds(json["prompt_ids"], bundle, p.ids);
    } catch (const Failure &e) {
      p.error = e.what();
    }
    prompts.push_back(std::move(p));
  }
  return prompts;
}

Generator::Generator(Engine &engine, const std::vector<Prompt> &prompts, const GenerateOptions &options)
    : engine_(engine), prompts_(prompts), options_(options) {
  bind();
  const Bundle &b = engine.bundle();
  for (const Prompt &p : prompts)
    if (p.index % b.manifest.attention == engine.rank().index) waiting_.push_back(&p);
  report.rank = engine.rank().name();
  report.prompts = waiting_.size();
}

/// Finds the buffers that the host writes and reads, and what they allow.
void Generator::bind() {
  const Bundle &b = engine_.bundle();
  const int prefill = b.schedule("prefill"), decode = b.schedule("decode");
  prefill_ = static_cast<std::uint32_t>(prefill >= 0 ? prefill : std::max(decode, 0));
  decode_ = static_cast<std::uint32_t>(decode >= 0 ? decode : static_cast<int>(prefill_));
  context_ = b.manifest.maxContext > 0 ? b.manifest.maxContext : INT32_MAX;
  buffers_.resize(b.schedules.size());
  capacity_ = UINT64_MAX;
  for (const std::uint32_t index : {prefill_, decode_}) {
    const Schedule &s = b.schedules[index];
    const RankProgram &p = engine_.program(index);
    const std::string file = "schedule-" + s.name + ".json";
    capacity_ = std::min<std::uint64_t>(capacity_, s.slots * s.rows);
    if (!buffers_[index].empty()) continue;
    for (std::uint32_t m = 0; m < s.slots; m++) {
      SlotBuffers slot;
      const auto find = [&](Region region, const char *name, const char *dtype, bool needed) -> const Buffer * {
        const Buffer *buffer = p.bound(region, name, m);
        if (!buffer && needed) s3::fail(exit_input, file, ": slot ", m, " of rank ", p.rank.name(), " has no ", regionName(region), " '", name, "'");
        if (buffer && (buffer->dtype != dtype || buffer->bytes < s.rows * buffer->width))
          s3::fail(exit_input, file, ": ", regionName(region), " '", name, "' should be ", dtype, " with a row for each of ", s.rows, " tokens");
        return buffer;
      };
      slot.ids = find(Region::input, "ids", "i32", true);
      slot.position = find(Region::input, "position", "i32", true);
      slot.pages = find(Region::input, "pages", "i32", b.manifest.kv.has_value());
      slot.temperature = find(Region::input, "temperature", "f32", false);
      slot.top_p = find(Region::input, "top_p", "f32", false);
      slot.seed = find(Region::input, "seed", "u32", false);
      slot.next = find(Region::output, "next", "i32", !options_.score);
      slot.logits = find(Region::output, "logits", "f32", options_.score || !options_.logits.empty());
      const auto columnsOf = [&](const Buffer &buffer) -> std::uint64_t {
        if (buffer.shape.size() != 2 || !buffer.shape[1].text.empty() || buffer.shape[1].value == 0)
          s3::fail(exit_input, file, ": '", buffer.name, "' should have the shape [T, columns]");
        return buffer.shape[1].value;
      };
      if (slot.pages) {
        const std::uint64_t columns = columnsOf(*slot.pages);
        if (!b.manifest.kv) s3::fail(exit_input, "manifest.json: no 'kv' facts, though ", file, " reads pages");
        if (page_columns_ != 0 && columns != page_columns_) s3::fail(exit_input, file, ": slots disagree on the columns of 'pages'");
        page_columns_ = columns;
      }
      if (slot.logits) {
        const std::uint64_t width = columnsOf(*slot.logits);
        if (vocabulary_ != 0 && width != vocabulary_) s3::fail(exit_input, file, ": slots disagree on the columns of 'logits'");
        vocabulary_ = width;
        if (b.manifest.vocabulary && width < *b.manifest.vocabulary)
          s3::fail(exit_input, file, ": 'logits' has ", width, " columns, the vocabulary ", *b.manifest.vocabulary);
      }
      for (const Buffer &buffer : p.buffers)
        if (buffer.region == Region::input && buffer.slot == m && !buffer.binds.empty() && &buffer != slot.ids && &buffer != slot.position &&
            &buffer != slot.pages && &buffer != slot.temperature && &buffer != slot.top_p && &buffer != slot.seed)
          s3::fail(exit_input, file, ": input '", buffer.binds, "' is not one that text generation can fill; use --eval");
      buffers_[index].push_back(slot);
    }
  }
  if (b.manifest.maxBatch > 0) capacity_ = std::min(capacity_, b.manifest.maxBatch);
  if (b.manifest.kv && page_columns_ > 0) {
    page_tokens_ = b.manifest.kv->pageTokens;
    // page 0 is zero and never allocated
    const std::uint64_t usable = b.manifest.kv->pages - 1;
    for (std::uint64_t page = usable; page >= 1; page--) free_.push_back(static_cast<std::int32_t>(page));
    context_ = std::min({context_, usable * page_tokens_, page_columns_ * page_tokens_});
  }
}

/// A sequence ends when prompt and generated tokens fill the context; a prompt that fills it alone still gets one token.
std::uint64_t Generator::limit(const Prompt &p) const {
  const std::uint64_t room = std::max<std::uint64_t>(context_ - p.ids.size(), 1);
  return std::min(p.max_tokens, room);
}

/// All pages that a prompt can come to need. The last token is never read back, so it needs no place.
std::uint64_t Generator::pages(const Prompt &p) const {
  if (page_tokens_ == 0) return 0;
  const std::uint64_t tokens = p.ids.size() + (options_.score ? 0 : limit(p) - 1);
  return (tokens + page_tokens_ - 1) / page_tokens_;
}

void Generator::fail(const Prompt &p, const std::string &error) {
  clean_ = false;
  lines_ += say("{\"prompt\":", p.index, options_.score ? "" : ",\"tokens\":[]", ",\"stop\":\"error\",\"error\":", jsonText(error), "}\n");
}

void Generator::flush() {
  if (lines_.empty()) return;
  options_.events(lines_);
  lines_.clear();
}

void Generator::admit() {
  while (!waiting_.empty() && active_.size() < capacity_) {
    const Prompt &p = *waiting_.front();
    std::string error = p.error;
    if (error.empty() && p.ids.size() > context_)
      error = say("the prompt has ", p.ids.size(), " tokens, the KV cache holds ", context_, "; shorten it, or compile with more pages");
    if (error.empty() && options_.score)
      for (const std::int32_t id : p.ids)
        if (static_cast<std::uint64_t>(id) >= vocabulary_) error = say("token id ", id, " is not among the ", vocabulary_, " logits");
    if (!error.empty() || (!options_.score && p.max_tokens == 0)) {
      if (!error.empty()) fail(p, error);
      else lines_ += say("{\"prompt\":", p.index, ",\"tokens\":[],\"stop\":\"length\"}\n");
      waiting_.pop_front();
      continue;
    }
    const std::uint64_t need = pages(p);
    if (need > free_.size()) break;
    waiting_.pop_front();
    auto s = std::make_unique<Sequence>();
    s->prompt = &p;
    s->limit = limit(p);
    for (std::uint64_t i = 0; i < need; i++) {
      s->pages.push_back(free_.back());
      free_.pop_back();
    }
    report.prompt_tokens += p.ids.size();
    if (!options_.logits.empty()) openLogits(*s);
    active_.push_back(std::move(s));
  }
}

std::vector<std::vector<Generator::Row>> Generator::plan(std::uint32_t schedule) const {
  const Schedule &s = engine_.bundle().schedules[schedule];
  std::vector<std::vector<Row>> rows(s.slots);
  const auto emptiest = [&]() -> std::vector<Row> & {
    return *std::min_element(rows.begin(), rows.end(), [](const auto &a, const auto &b) { return a.size() < b.size(); });
  };
  for (const auto &q : active_) {
    if (!unread(*q)) continue;
    auto &slot = emptiest();
    const std::uint64_t n = std::min<std::uint64_t>(q->prompt->ids.size() - q->cached, s.rows - slot.size());
    for (std::uint64_t i = 0; i < n; i++) {
      const std::uint64_t position = q->cached + i;
      slot.push_back({q.get(), position, position + 1 == q->prompt->ids.size()});
    }
  }
  for (const auto &q : active_) {
    if (unread(*q)) continue;
    auto &slot = emptiest();
    if (slot.size() < s.rows) slot.push_back({q.get(), q->cached, true});
  }
  return rows;
}

void Generator::fill(std::uint32_t schedule, const std::vector<std::vector<Row>> &rows) {
  for (std::size_t m = 0; m < rows.size(); m++) {
    const SlotBuffers &b = buffers_[schedule][m];
    const std::size_t n = rows[m].size();
    std::vector<std::int32_t> ids(n), position(n), pages(n * page_columns_);
    std::vector<float> temperature(n), top_p(n);
    std::vector<std::uint32_t> seed(n);
    for (std::size_t r = 0; r < n; r++) {
      const Sequence &s = *rows[m][r].sequence;
      const std::uint64_t at = rows[m][r].position;
      ids[r] = at < s.prompt->ids.size() ? s.prompt->ids[at] : s.tokens[at - s.prompt->ids.size()];
      position[r] = static_cast<std::int32_t>(at);
      std::copy(s.pages.begin(), s.pages.end(), pages.begin() + static_cast<std::ptrdiff_t>(r * page_columns_));
      temperature[r] = s.prompt->temperature;
      top_p[r] = s.prompt->top_p;
      seed[r] = s.prompt->seed;
    }
    const auto put = [&](const Buffer *buffer, const auto &values) {
      if (buffer) engine_.write(schedule, *buffer, values.data(), values.size() * sizeof values[0]);
    };
    put(b.ids, ids);
    put(b.position, position);
    put(b.pages, pages);
    put(b.temperature, temperature);
    put(b.top_p, top_p);
    put(b.seed, seed);
  }
}

void Generator::openLogits(Sequence &s) {
  s.logits_path = prompts_.size() == 1 ? options_.logits : say(options_.logits, '.', s.prompt->index);
  s.logits = ::open((s.logits_path + ".part").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (s.logits < 0) s3::fail(exit_input, s.logits_path, ": cannot be created (", std::strerror(errno), ")");
}

void Generator::keepLogits(Sequence &s) {
  if (s.logits >= 0) writeAll(s.logits, row_.data(), row_.size() * sizeof(float), s.logits_path);
}

void Generator::finish(Sequence &s, const char *stop, const std::string &error) {
  if (s.logits >= 0) {
    ::close(s.logits);
    const std::string part = s.logits_path + ".part";
    if (!error.empty()) ::unlink(part.c_str());
    else if (::rename(part.c_str(), s.logits_path.c_str()) != 0) s3::fail(exit_input, s.logits_path, ": cannot be written (", std::strerror(errno), ")");
    s.logits = -1;
  }
  for (auto page = s.pages.rbegin(); page != s.pages.rend(); ++page) free_.push_back(*page);
  s.pages.clear();
  std::string text = say("{\"prompt\":", s.prompt->index);
  if (options_.score) {
    if (error.empty()) text += say(",\"nll\":", jsonNumber(s.nll), ",\"count\":", s.scored);
    else text += ",\"stop\":\"error\"";
  } else {
    text += ",\"tokens\":[";
    for (std::size_t i = 0; i < s.tokens.size(); i++) text += say(i ? "," : "", s.tokens[i]);
    text += say("],\"stop\":\"", stop, "\"");
  }
  if (!error.empty()) {
    text += ",\"error\":" + jsonText(error);
    clean_ = false;
  }
  lines_ += text + "}\n";
  s.prompt = nullptr;  // over
}

void Generator::token(Sequence &s, std::int32_t token) {
  const std::int64_t t = now();
  if (s.tokens.empty()) report.first_ms.push_back(static_cast<double>(t - start_ns_) / 1e6);
  else report.gap_ms.push_back(static_cast<double>(t - s.last_ns) / 1e6);
  s.last_ns = t;
  const Manifest &m = engine_.bundle().manifest;
  if (token < 0 || (m.vocabulary && static_cast<std::uint64_t>(token) >= *m.vocabulary))
    return finish(s, "error", say("the program gave token ", token, ", which is not in the vocabulary; its logits may not be finite"));
  s.tokens.push_back(token);
  report.tokens++;
  lines_ += say("{\"prompt\":", s.prompt->index, ",\"token\":", token, "}\n");
  if (std::find(m.eos.begin(), m.eos.end(), token) != m.eos.end()) finish(s, "eos", {});
  else if (s.tokens.size() >= s.limit) finish(s, "length", {});
}

/// -log p of the token that follows, from the logits in `row_`
void Generator::score(Sequence &s, std::uint64_t position) {
  if (position + 1 >= s.prompt->ids.size()) return;
  double most = -INFINITY, sum = 0;
  for (const float x : row_) most = std::max<double>(most, x);
  for (const float x : row_) sum += std::exp(static_cast<double>(x) - most);
  s.nll += most + std::log(sum) - static_cast<double>(row_[static_cast<std::size_t>(s.prompt->ids[position + 1])]);
  s.scored++;
}

void Generator::harvest(std::uint32_t schedule, const std::vector<std::vector<Row>> &rows) {
  for (std::size_t m = 0; m < rows.size(); m++) {
    const SlotBuffers &b = buffers_[schedule][m];
    std::vector<std::int32_t> next(rows[m].size());
    if (b.next && !options_.score) engine_.read(schedule, *b.next, 0, next.data(), next.size() * sizeof next[0]);
    for (std::size_t r = 0; r < rows[m].size(); r++) {
      const Row &row = rows[m][r];
      Sequence &s = *row.sequence;
      s.cached = row.position + 1;
      if (options_.score || (row.newest && s.logits >= 0)) {
        row_.resize(vocabulary_);
        engine_.read(schedule, *b.logits, r * vocabulary_ * sizeof(float), row_.data(), vocabulary_ * sizeof(float));
        keepLogits(s);
        if (options_.score) score(s, row.position);
      }
      if (!row.newest) continue;
      if (!options_.score) token(s, next[r]);
      else if (std::isfinite(s.nll)) finish(s, "length", {});
      else finish(s, "error", "the logits are not finite");
    }
  }
  std::erase_if(active_, [](const auto &s) { return s->prompt == nullptr; });
}

bool Generator::run() {
  start_ns_ = now();
  try {
    for (;;) {
      admit();
      flush();
      const bool any_unread = std::any_of(active_.begin(), active_.end(), [&](const auto &s) { return unread(*s); });
      s3_wish wish{};
      if (any_unread) wish = {prefill_ + 1, 2, 0};
      else if (!active_.empty()) wish = {decode_ + 1, 1, 0};
      if (options_.interrupted && options_.interrupted->load() != 0) wish.abort = 1;
      const s3_round round = engine_.agree(wish);
      if (round.stop) {
        for (auto &s : active_) finish(*s, "error", "interrupted");
        active_.clear();
        for (const Prompt *p : waiting_) fail(*p, "interrupted");
        waiting_.clear();
        flush();
        report.run_ms = static_cast<double>(now() - start_ns_) / 1e6;
        return clean_;
      }
      if (round.schedule != prefill_ && round.schedule != decode_)
        s3::fail(exit_peer, "round ", round.round, " announces schedule ", round.schedule, ", which does not generate");
      const auto rows = plan(round.schedule);
      fill(round.schedule, rows);
      std::vector<std::uint32_t> counts;
      for (const auto &slot : rows) counts.push_back(static_cast<std::uint32_t>(slot.size()));
      engine_.run(round, counts);
      harvest(round.schedule, rows);
    }
  } catch (...) {
    for (const auto &s : active_)
      if (s->logits >= 0) {
        ::close(s->logits);
        ::unlink((s->logits_path + ".part").c_str());
      }
    throw;
  }
}

void serve(Engine &engine) {
  for (;;) {
    const s3_round round = engine.agree({});
    if (round.stop) return;
    engine.run(round, {});
  }
}

}  // namespace s3
