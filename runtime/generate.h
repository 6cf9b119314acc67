// Rounds: which rows of which sequences every slot carries, and what becomes of the tokens that come out.
//
// Pages. A sequence is admitted when all pages that it can ever need (prompt and all tokens it may still generate) are free, and keeps them to
// its end; waiting prompts are admitted in order. So an admitted sequence never waits for memory, every one of them ends, its pages come free,
// and the first in the queue, which by its limit fits an empty pool, is admitted at last: nothing can deadlock and nobody starves. The price is
// that pages reserved for tokens which an early end of text saves were idle.
//
// Rows. A round runs the prefill schedule when any attention rank has unread prompt. Chunks of prompts fill slots first, then one row of every
// sequence that is already generating, where rows are left. All rows of a sequence are in one slot of a round.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "engine.h"
#include "report.h"

namespace s3 {

struct Prompt {
  std::size_t index = 0;
  std::vector<std::int32_t> ids;
  std::uint64_t max_tokens = 0;
  float temperature = 0, top_p = 1;
  std::uint32_t seed = 0;
  std::string error;  // why it cannot run
};

struct PromptDefaults {
  std::uint64_t max_tokens = 128;
  float temperature = 0, top_p = 1;
  std::uint32_t seed = 0;
};

/// One prompt for every line of JSON that is not blank. What is wrong with one is noted in it; the others go on.
std::vector<Prompt> readPrompts(std::string_view jsonl, const PromptDefaults &defaults, const Bundle &bundle, bool score);

struct GenerateOptions {
  bool score = false;
  std::string logits;                                // file name, or empty
  const std::atomic<int> *interrupted = nullptr;     // not 0: stop before the next round
  std::function<void(const std::string &)> events;   // takes whole lines
};

/// Runs the prompts of one attention rank (those whose index is the rank's, modulo the attention ranks) until all ranks are done.
/// Returns false when a prompt ended in an error.
class Generator {
 public:
  Generator(Engine &engine, const std::vector<Prompt> &prompts, const GenerateOptions &options);
  bool run();
  Report report;

 private:
  struct Sequence {
    const Prompt *prompt = nullptr;
    std::uint64_t limit = 0;             // tokens it may generate
    std::uint64_t cached = 0;            // positions in the cache
    std::vector<std::int32_t> tokens;    // generated
    std::vector<std::int32_t> pages;
    double nll = 0;
    std::uint64_t scored = 0;
    std::int64_t last_ns = 0;
    int logits = -1;                     // descriptor
    std::string logits_path;
  };
  struct Row {
    Sequence *sequence;
    std::uint64_t position;
    bool newest;                         // its result is the sequence's next token
  };
  struct SlotBuffers {
    const Buffer *ids = nullptr, *position = nullptr, *pages = nullptr, *temperature = nullptr, *top_p = nullptr, *seed = nullptr;
    const Buffer *next = nullptr, *logits = nullptr;
  };

  Engine &engine_;
  const std::vector<Prompt> &prompts_;
  const GenerateOptions options_;
  std::uint32_t prefill_ = 0, decode_ = 0;           // schedules
  std::vector<std::vector<SlotBuffers>> buffers_;    // by schedule and slot
  std::uint64_t context_ = 0, page_tokens_ = 0, page_columns_ = 0, vocabulary_ = 0, capacity_ = 0;
  std::vector<std::int32_t> free_;
  std::deque<const Prompt *> waiting_;
  std::vector<std::unique_ptr<Sequence>> active_;
  std::string lines_;
  bool clean_ = true;
  std::int64_t start_ns_ = 0;
  std::vector<float> row_;

  void bind();
  std::uint64_t limit(const Prompt &p) const;
  std::uint64_t pages(const Prompt &p) const;
  void admit();
  std::vector<std::vector<Row>> plan(std::uint32_t schedule) const;
  void fill(std::uint32_t schedule, const std::vector<std::vector<Row>> &rows);
  void harvest(std::uint32_t schedule, const std::vector<std::vector<Row>> &rows);
  void token(Sequence &s, std::int32_t token);
  void score(Sequence &s, std::uint64_t position);
  void openLogits(Sequence &s);
  void keepLogits(Sequence &s);
  void finish(Sequence &s, const char *stop, const std::string &error);
  void fail(const Prompt &p, const std::string &error);
  void flush();
  bool unread(const Sequence &s) const { return s.cached < s.prompt->ids.size(); }
};

/// The rounds of an FFN rank.
void serve(Engine &engine);

}  // namespace s3
