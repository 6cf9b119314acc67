#include "bundle.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "error.h"
#include "step3.h"

namespace s3 {

namespace {

constexpr std::int64_t max_bytes = std::int64_t{1} << 46;
constexpr std::uint64_t header_bytes = sizeof(s3_head);
static_assert(sizeof(s3_head) == 64);

std::uint32_t dtypeBytes(const Json &v) {
  static const std::unordered_map<std::string, std::uint32_t> widths = {
      {"f64", 8}, {"f32", 4}, {"f16", 2}, {"bf16", 2}, {"e4m3", 1}, {"e5m2", 1}, {"i64", 8}, {"i32", 4},
      {"i16", 2}, {"i8", 1},  {"u64", 8}, {"u32", 4},  {"u16", 2},  {"u8", 1},   {"bool", 1}};
  const auto found = widths.find(v.text());
  if (found == widths.end()) v.refuse(say("unknown dtype '", v.text(), "'"));
  return found->second;
}

/// All that an expression may be.
struct Range {
  std::int64_t least = 0, most = 0;
};

/// Reads the canonical text of a dimension: sums of products, and floor division by a constant. Symbols have a value each, or their ranges.
class DimReader {
 public:
  DimReader(const std::string &text, const std::vector<Symbol> &symbols, const std::vector<std::uint64_t> *values)
      : text_(text), symbols_(symbols), values_(values) {}
  Range read() {
    const Range n = sum(0);
    if (at_ != text_.size()) stop();
    return n;
  }

 private:
  const std::string &text_;
  const std::vector<Symbol> &symbols_;
  const std::vector<std::uint64_t> *values_;
  std::size_t at_ = 0;

  [[noreturn]] void stop() const { throw say("dimension '", text_, "' cannot be read at ", at_); }
  [[noreturn]] void tooBig() const { throw say("dimension '", text_, "' is out of range"); }
  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    at_++;
    return true;
  }
  std::int64_t plus(std::int64_t a, std::int64_t b) const {
    std::int64_t n = 0;
    if (__builtin_add_overflow(a, b, &n) || n > max_bytes || n < -max_bytes) tooBig();
    return n;
  }
  std::int64_t times(std::int64_t a, std::int64_t b) const {
    std::int64_t n = 0;
    if (__builtin_mul_overflow(a, b, &n) || n > max_bytes || n < -max_bytes) tooBig();
    return n;
  }
  static std::int64_t floored(std::int64_t n, std::int64_t by) { return n >= 0 ? n / by : -((-n + by - 1) / by); }
  static Range negative(Range n) { return {-n.most, -n.least}; }
  Range plus(Range a, Range b) const { return {plus(a.least, b.least), plus(a.most, b.most)}; }
  Range times(Range a, Range b) const {
    const std::int64_t ends[] = {times(a.least, b.least), times(a.least, b.most), times(a.most, b.least), times(a.most, b.most)};
    return {*std::min_element(ends, ends + 4), *std::max_element(ends, ends + 4)};
  }
  Range sum(int depth) {
    Range n = take('-') ? negative(product(depth)) : product(depth);
    for (;;) {
      if (take('+')) n = plus(n, product(depth));
      else if (take('-')) n = plus(n, negative(product(depth)));
      else return n;
    }
  }
  Range product(int depth) {
    Range n = atom(depth);
    for (;;) {
      if (take('*')) {
        n = times(n, atom(depth));
      } else if (take('/')) {
        const Range by = atom(depth);
        if (by.least <= 0 || by.most != by.least) stop();
        n = {floored(n.least, by.least), floored(n.most, by.least)};
      } else {
        return n;
      }
    }
  }
  Range atom(int depth) {
    if (depth > 32) stop();
    if (take('(')) {
      const Range n = sum(depth + 1);
      if (!take(')')) stop();
      return n;
    }
    const std::size_t from = at_;
    const auto letter = [&] {
      const char c = at_ < text_.size() ? text_[at_] : ' ';
      return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_' || (at_ > from && c >= '0' && c <= '9');
    };
    while (letter()) at_++;
    if (at_ > from) {
      const std::string name = text_.substr(from, at_ - from);
      for (std::size_t i = 0; i < symbols_.size(); i++) {
        if (symbols_[i].name != name) continue;
        const auto number = [](std::uint64_t n) { return static_cast<std::int64_t>(n); };
        if (values_) return {number((*values_)[i]), number((*values_)[i])};
        return {number(symbols_[i].min), number(symbols_[i].max)};
      }
      throw say("dimension '", text_, "' mentions '", name, "', which is not declared");
    }
    std::int64_t n = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') n = plus(times(n, 10), text_[at_++] - '0');
    if (at_ == from) stop();
    return {n, n};
  }
};

std::uint64_t mostOr(const Json &where, const Dim &dim, const std::vector<Symbol> &symbols) {
  try {
    return mostOf(dim, symbols);
  } catch (const std::string &why) {
    where.refuse(why);
  }
}

Dim readDim(const Json &v) {
  if (v.is(Json::Kind::text)) return {0, v.text()};
  return {static_cast<std::uint64_t>(v.whole(0, max_bytes)), {}};
}
std::vector<Dim> readShape(const Json &v) {
  std::vector<Dim> shape;
  for (const Json &d : v.items()) shape.push_back(readDim(d));
  if (shape.size() > 16) v.refuse("more than 16 dimensions");
  return shape;
}

/// bytes of a shape at its largest
std::uint64_t shapeBytes(const Json &where, const std::vector<Dim> &shape, std::uint32_t width, const std::vector<Symbol> &symbols) {
  std::uint64_t n = width;
  for (const Dim &d : shape)
    if (__builtin_mul_overflow(n, mostOr(where, d, symbols), &n) || n > static_cast<std::uint64_t>(max_bytes))
      where.refuse("the shape is too large");
  return n;
}

std::array<std::uint8_t, 32> readHash(const Json &v) {
  const std::string &t = v.text();
  std::array<std::uint8_t, 32> hash{};
  const auto digit = [&](char c) -> unsigned {
    if (c >= '0' && c <= '9') return static_cast<unsigned>(c - '0');
    if (c >= 'a' && c <= 'f') return static_cast<unsigned>(c - 'a' + 10);
    v.refuse("a hash is written in lower-case hexadecimal");
  };
  if (t.size() != 64) v.refuse("a hash has 64 hexadecimal digits");
  for (std::size_t i = 0; i < 32; i++) hash[i] = static_cast<std::uint8_t>(digit(t[2 * i]) << 4 | digit(t[2 * i + 1]));
  return hash;
}

RankId readRankName(const Json &v) {
  const std::string &t = v.text();
  if (t.size() < 2 || t.size() > 6 || (t[0] != 'a' && t[0] != 'f')) v.refuse(say("'", t, "' is not the name of a rank (a0, f1 ...)"));
  std::uint32_t n = 0;
  for (const char c : t.substr(1)) {
    if (c < '0' || c > '9') v.refuse(say("'", t, "' is not the name of a rank (a0, f1 ...)"));
    n = n * 10 + static_cast<std::uint32_t>(c - '0');
  }
  return {t[0] == 'a' ? Role::attention : Role::ffn, n};
}

Role readRole(const Json &v) {
  if (v.text() == "attention") return Role::attention;
  if (v.text() == "ffn") return Role::ffn;
  v.refuse(say("'", v.text(), "' is not a role: attention or ffn"));
}

void nameOnly(const Json &v) {
  const std::string &t = v.text();
  if (t.empty() || t.size() > 64) v.refuse("a name has 1 to 64 characters");
  for (const char c : t)
    if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-'))
      v.refuse(say("'", t, "' is not a name of letters, digits, - and _"));
}

Manifest readManifest(const JsonFile &file, std::vector<std::string> &schedules) {
  Manifest m;
  if (file["format"].whole() != 1) file["format"].refuse("this runtime reads bundles of format 1; compile it again");
  m.wire = readHash(file["wire"]);
  const Json &model = file["model"];
  m.model = model["name"].text();
  if (const Json *v = model.find("vocabulary")) m.vocabulary = static_cast<std::uint64_t>(v->whole(1, INT32_MAX));
  if (const Json *v = model.find("eos"))
    for (const Json &id : v->items()) m.eos.push_back(id.whole());
  if (const Json *v = model.find("refused"))
    for (const Json &r : v->items()) m.refused.push_back({r["id"].whole(), r["why"].text()});
  m.attention = static_cast<std::uint32_t>(file["attention"].whole(1, 1024));
  m.ffn = static_cast<std::uint32_t>(file["ffn"].whole(0, 1024));
  m.maxBatch = static_cast<std::uint64_t>(file["maxBatch"].whole(0, 1 << 24));
  m.maxContext = static_cast<std::uint64_t>(file["maxContext"].whole(0, INT32_MAX));
  if (const Json *kv = file.root().find("kv"))
    m.kv = KvFacts{static_cast<std::uint64_t>((*kv)["pageTokens"].whole(1, 1 << 20)),
                   static_cast<std::uint64_t>((*kv)["pages"].whole(1, INT32_MAX)),
                   static_cast<std::uint64_t>((*kv)["pageBytes"].whole(1, max_bytes))};
  for (const Json &p : file["programs"].items()) {
    ProgramFacts facts;
    facts.role = readRole(p["role"]);
    facts.target = p["target"].text();
    facts.device = p["device"].text();
    for (const Json &k : p["kernels"].items()) {
      KernelFacts kernel{k["name"].text(), static_cast<std::uint64_t>(k["scratch"].whole(0, max_bytes)), {}};
      if (const Json *args = k.find("args"))
        for (const Json &a : args->items()) kernel.args.push_back(a.text());
      facts.kernels.emplace(kernel.name, std::move(kernel));
    }
    for (const auto &other : m.programs)
      if (other.role == facts.role) p.refuse(say("a second program of the ", roleName(facts.role), " side"));
    m.programs.push_back(std::move(facts));
  }
  for (const Json &w : file["weights"].items()) {
    WeightsFile f;
    f.rank = w["rank"].text();
    if (const Json *path = w.find("file")) {
      f.file = path->text();
      if (f.file->empty() || f.file->front() == '/' || f.file->find("..") != std::string::npos)
        path->refuse("a weights file lies inside the bundle");
    }
    if (const Json *seed = w.find("seed")) f.seed = static_cast<std::uint64_t>(seed->whole());
    else if (!f.file) w.refuse("neither a file nor a seed");
    f.bytes = static_cast<std::uint64_t>(w["bytes"].whole(0, max_bytes));
    m.weights.push_back(std::move(f));
  }
  std::set<std::string> seen;
  for (const Json &s : file["schedules"].items()) {
    nameOnly(s);
    if (!seen.insert(s.text()).second) s.refuse(say("schedule '", s.text(), "' is listed twice"));
    schedules.push_back(s.text());
  }
  if (schedules.empty()) file["schedules"].refuse("a bundle has at least one schedule");
  if (schedules.size() > 64) file["schedules"].refuse("more than 64 schedules");
  return m;
}

class ScheduleReader {
 public:
  ScheduleReader(const JsonFile &file, const Manifest &manifest) : file_(file), manifest_(manifest) {}

  Schedule read() {
    if (file_["abi"].whole() != S3_ABI) file_["abi"].refuse(say("this runtime speaks abi ", S3_ABI, "; compile the bundle again"));
    if (readHash(file_["wire"]) != manifest_.wire) file_["wire"].refuse("not the wire hash of manifest.json; the bundle is mixed from two");
    s_.name = file_["name"].text();
    s_.slots = static_cast<std::uint32_t>(file_["slots"].whole(1, 1024));
    for (const Json &v : file_["symbols"].items()) {
      const auto size = [&](const char *name, std::int64_t least) { return static_cast<std::uint64_t>(v[name].whole(least, 1 << 30)); };
      Symbol symbol{v["name"].text(), size("min", 0), size("max", 0), size("multiple", 1), {}};
      if (const Json *is = v.find("is")) symbol.is = readDim(*is);
      if (symbol.min > symbol.max) v.refuse(say("symbol '", symbol.name, "' has a minimum above its maximum"));
      for (const Symbol &other : s_.symbols)
        if (other.name == symbol.name) v.refuse(say("symbol '", symbol.name, "' is declared twice"));
      if (symbol.name == "T") {
        s_.rows = symbol.max;
        s_.token = static_cast<std::uint32_t>(s_.symbols.size());
      }
      s_.symbols.push_back(std::move(symbol));
    }
    if (s_.symbols.size() > 256) file_["symbols"].refuse("more than 256 symbols");
    if (s_.rows < 1 || s_.rows > (1u << 24)) file_["symbols"].refuse("symbol T needs a maximum from 1 to 2^24");
    types();
    for (const Json &v : file_["exchanges"].items()) s_.exchanges.push_back(type(v));
    if (!s_.exchanges.empty() && manifest_.ffn == 0) file_["exchanges"].refuse("exchanges, but the bundle has no FFN ranks");
    if (s_.exchanges.size() > 1000000) file_["exchanges"].refuse("too many exchanges");
    programs();
    keys();
    return std::move(s_);
  }

 private:
  const JsonFile &file_;
  const Manifest &manifest_;
  Schedule s_;

  std::uint32_t type(const Json &v) const {
    for (std::uint32_t i = 0; i < s_.types.size(); i++)
      if (s_.types[i].name == v.text()) return i;
    v.refuse(say("'", v.text(), "' is not among the types of exchange"));
  }

  /// What travels between ranks, and what FFN ranks have: headers tell the rows and no other size.
  void onlyTokensVary(const Json &v, const std::string &name, const std::vector<Dim> &shape) const {
    const std::vector<Symbol> tokens = s_.token ? std::vector<Symbol>{s_.symbols[*s_.token]} : std::vector<Symbol>{};
    try {
      for (const Dim &d : shape) mostOf(d, tokens);
    } catch (const std::string &) {
      v.refuse(say("'", name, "' depends on a symbol other than T, which FFN ranks are not told"));
    }
  }

  Field field(const Json &v) const {
    Field f;
    f.name = v["name"].text();
    f.dtype = v["dtype"].text();
    f.width = dtypeBytes(v["dtype"]);
    f.shape = readShape(v["shape"]);
    f.bytes = static_cast<std::uint64_t>(v["bytes"].whole(1, max_bytes));
    if (const Json *below = v.find("below")) f.below = static_cast<std::uint64_t>(below->whole(1, 1 << 24));
    if (f.below && f.dtype != "i32") v.refuse("'below' is for i32 fields");
    if (shapeBytes(v, f.shape, f.width, s_.symbols) != f.bytes)
      v.refuse(say("field '", f.name, "': ", f.bytes, " bytes, but its shape at its maximum has another size (contract K3)"));
    onlyTokensVary(v, f.name, f.shape);
    if (f.name == "head") {
      if (f.bytes != header_bytes) v.refuse(say("the header has ", header_bytes, " bytes"));
    } else {
      // the bytes of one row, so that only rows that are there travel
      f.row = f.bytes / s_.rows;
      if (f.row == 0 || f.row * s_.rows != f.bytes) v.refuse(say("field '", f.name, "' is not a whole number of bytes for each row"));
    }
    return f;
  }

  void types() {
    for (const Json &v : file_["types"].items()) {
      ExchangeType t;
      t.name = v["name"].text();
      for (const Json &f : v["push"].items()) t.push.push_back(field(f));
      for (const Json &f : v["pull"].items()) t.pull.push_back(field(f));
      if (t.push.empty() || t.push.back().name != "head") v.refuse(say("exchange '", t.name, "' does not push its header last"));
      for (std::size_t i = 0; i + 1 < t.push.size(); i++)
        if (t.push[i].row == 0) v.refuse(say("exchange '", t.name, "' pushes its header twice"));
      for (const Field &f : t.pull)
        if (f.row == 0) v.refuse(say("exchange '", t.name, "' pulls a header"));
      s_.types.push_back(std::move(t));
    }
    if (s_.types.size() > 64) file_["types"].refuse("more than 64 types of exchange");
  }

  Buffer buffer(const Json &v, const RankProgram &p) const {
    static const std::unordered_map<std::string, Region> byName = {{"weights", Region::weights}, {"state", Region::state},
                                                                    {"exchange", Region::exchange}, {"scratch", Region::scratch},
                                                                    {"input", Region::input},     {"output", Region::output}};
    Buffer b;
    b.name = v["name"].text();
    const auto region = byName.find(v["region"].text());
    if (region == byName.end()) v["region"].refuse(say("unknown region '", v["region"].text(), "'"));
    b.region = region->second;
    b.dtype = v["dtype"].text();
    b.width = dtypeBytes(v["dtype"]);
    b.shape = readShape(v["shape"]);
    b.segments = static_cast<std::uint32_t>(v["segments"].whole(1, 1024));
    b.offset = static_cast<std::uint64_t>(v["offset"].whole(0, max_bytes));
    b.bytes = static_cast<std::uint64_t>(v["bytes"].whole(0, max_bytes));
    if (const Json *slot = v.find("slot")) b.slot = static_cast<std::uint32_t>(slot->whole(0, s_.slots - 1));
    if (const Json *binds = v.find("binds")) b.binds = binds->text();
    if (b.offset % 64 != 0) v.refuse(say("buffer '", b.name, "' is not on a multiple of 64 bytes"));
    const std::uint64_t region_bytes = p.memory[static_cast<std::size_t>(b.region)];
    if (b.bytes > region_bytes || b.offset > region_bytes - b.bytes)
      v.refuse(say("buffer '", b.name, "' lies outside region ", regionName(b.region), " of ", region_bytes, " bytes"));
    if (b.region == Region::state && manifest_.kv) {
      if (b.bytes != manifest_.kv->pages * manifest_.kv->pageBytes)
        v.refuse(say("state '", b.name, "' is not ", manifest_.kv->pages, " pages of ", manifest_.kv->pageBytes, " bytes"));
    } else if (b.region != Region::weights && b.region != Region::state) {
      if (p.rank.role == Role::ffn) onlyTokensVary(v, b.name, b.shape);
      const std::uint64_t one = shapeBytes(v, b.shape, b.width, s_.symbols);
      if (b.bytes / b.segments < one) v.refuse(say("buffer '", b.name, "' is smaller than its shape"));
    }
    return b;
  }

  std::uint32_t named(const RankProgram &p, const Json &v) const {
    const auto found = p.names.find(v.text());
    if (found == p.names.end()) v.refuse(say("rank ", p.rank.name(), " has no buffer '", v.text(), "'"));
    return found->second;
  }

  std::vector<std::uint32_t> named(const RankProgram &p, const Json *list) const {
    std::vector<std::uint32_t> buffers;
    if (list)
      for (const Json &v : list->items()) buffers.push_back(named(p, v));
    return buffers;
  }

  Step step(const Json &v, RankProgram &p, std::unordered_map<std::string, std::uint32_t> &kernels, std::size_t index) const {
    Step s;
    const std::string &op = v["op"].text();
    s.slot = static_cast<std::uint32_t>(v["slot"].whole(0, s_.slots - 1));
    if (op == "launch") {
      s.op = Step::Op::launch;
      const std::string &kernel = v["kernel"].text();
      if (!manifest_.program(p.rank.role).kernels.contains(kernel))
        v["kernel"].refuse(say("kernel '", kernel, "' is not in the ", roleName(p.rank.role), " program of manifest.json"));
      const auto [at, fresh] = kernels.emplace(kernel, p.kernels.size());
      if (fresh) p.kernels.push_back(kernel);
      s.kernel = at->second;
      s.in = named(p, &v["in"]);
      s.inout = named(p, v.find("inout"));
      s.out = named(p, &v["out"]);
      s.rows = named(p, v["rows"]);
      const Buffer &rows = p.buffers[s.rows];
      if (rows.bytes / rows.segments < header_bytes) v["rows"].refuse(say("buffer '", rows.name, "' holds no headers"));
      if (s.in.size() + s.inout.size() + s.out.size() > 256) v.refuse("a launch with more than 256 arguments");
      return s;
    }
    s.exchange = static_cast<std::uint32_t>(v["exchange"].whole(0, static_cast<std::int64_t>(s_.exchanges.size()) - 1));
    s.type = s_.exchanges[s.exchange];
    const bool attention = p.rank.role == Role::attention;
    if (op == "post" || op == "wait") {
      s.op = op == "post" ? Step::Op::post : Step::Op::wait;
      if (!attention) v["op"].refuse(say("only attention ranks ", op));
      if (s.op == Step::Op::post && type(v["type"]) != s.type)
        v["type"].refuse(say("exchange ", s.exchange, " is of type '", s_.types[s.type].name, "'"));
    } else if (op == "accept" || op == "reply") {
      s.op = op == "accept" ? Step::Op::accept : Step::Op::reply;
      if (attention) v["op"].refuse(say("only FFN ranks ", op == "reply" ? "reply" : op));
      s.peer = static_cast<std::uint32_t>(v[op == "accept" ? "from" : "to"].whole(0, manifest_.attention - 1));
    } else {
      v["op"].refuse(say("unknown step '", op, "'"));
    }
    if (s.op == Step::Op::post || s.op == Step::Op::reply) s.after = v["after"].whole(-1, static_cast<std::int64_t>(index) - 1);
    return s;
  }

  /// Only scratch is used for one thing after another; everything else keeps its memory.
  static void disjoint(const Json &v, const RankProgram &p) {
    std::vector<const Buffer *> all;
    for (const Buffer &b : p.buffers)
      if (b.region != Region::scratch && b.bytes > 0) all.push_back(&b);
    std::sort(all.begin(), all.end(), [](const Buffer *x, const Buffer *y) { return std::pair(x->region, x->offset) < std::pair(y->region, y->offset); });
    for (std::size_t i = 1; i < all.size(); i++)
      if (all[i]->region == all[i - 1]->region && all[i - 1]->offset + all[i - 1]->bytes > all[i]->offset)
        v.refuse(say("buffers '", all[i - 1]->name, "' and '", all[i]->name, "' of rank ", p.rank.name(), " overlap in region ", regionName(all[i]->region)));
  }

  /// How a kernel sees an argument. Weights and states are the kernel's own affair: their bytes are packed.
  static std::string signature(const Buffer &b) {
    if (b.region == Region::weights) return "weight";
    if (b.region == Region::state) return "state";
    std::string text = b.dtype + "[";
    for (std::size_t i = 0; i < b.shape.size(); i++) {
      if (i > 0) text += ",";
      text += b.shape[i].text.empty() ? std::to_string(b.shape[i].value) : b.shape[i].text;
    }
    return text + "]";
  }

  /// A kernel is compiled for its arguments: every launch of it must bring the same ones, and those of the manifest where it says.
  void signatures(const Json &v, const RankProgram &p) const {
    std::unordered_map<std::uint32_t, std::vector<std::string>> first;
    for (std::size_t i = 0; i < p.steps.size(); i++) {
      const Step &s = p.steps[i];
      if (s.op != Step::Op::launch) continue;
      std::vector<std::string> now;
      for (const auto *list : {&s.in, &s.inout, &s.out})
        for (const std::uint32_t b : *list) now.push_back(signature(p.buffers[b]));
      const std::string &kernel = p.kernels[s.kernel];
      const auto differ = [&](const std::vector<std::string> &want, const char *whose) {
        if (want.size() != now.size())
          v.items()[i].refuse(say("kernel '", kernel, "' gets ", now.size(), " arguments, ", whose, " has ", want.size()));
        for (std::size_t a = 0; a < want.size(); a++) {
          const bool packed = now[a] == "weight" || now[a] == "state";
          if (want[a] != now[a] && !(packed && whose[0] == 'm'))
            v.items()[i].refuse(say("argument ", a, " of kernel '", kernel, "' is ", now[a], ", ", whose, " has ", want[a]));
        }
      };
      const auto &facts = manifest_.program(p.rank.role).kernels.at(kernel).args;
      if (!facts.empty()) differ(facts, "manifest.json");
      const auto [known, fresh] = first.emplace(s.kernel, now);
      if (!fresh) differ(known->second, "its first launch");
    }
  }

  void programs() {
    for (const Json &v : file_["programs"].items()) {
      RankProgram p;
      const Json &rank = v["rank"];
      p.rank = readRankName(rank["name"]);
      if (readRole(rank["role"]) != p.rank.role || rank["index"].whole() != p.rank.index)
        rank.refuse("name, role and index of the rank do not agree");
      if (p.rank.index >= (p.rank.role == Role::attention ? manifest_.attention : manifest_.ffn))
        rank.refuse(say("manifest.json has no rank ", p.rank.name()));
      for (const auto &other : s_.programs)
        if (other.rank == p.rank) rank.refuse(say("a second program of rank ", p.rank.name()));
      for (std::size_t r = 0; r < regions; r++)
        p.memory[r] = static_cast<std::uint64_t>(v["memory"][regionName(static_cast<Region>(r))].whole(0, max_bytes));
      for (const Json &b : v["buffers"].items()) {
        Buffer read = buffer(b, p);
        if (!p.names.emplace(read.name, p.buffers.size()).second) b.refuse(say("a second buffer '", read.name, "'"));
        p.buffers.push_back(std::move(read));
      }
      disjoint(v["buffers"], p);
      std::unordered_map<std::string, std::uint32_t> kernels;
      const auto &steps = v["steps"].items();
      for (std::size_t i = 0; i < steps.size(); i++) p.steps.push_back(step(steps[i], p, kernels, i));
      signatures(v["steps"], p);
      s_.programs.push_back(std::move(p));
    }
    if (s_.programs.size() != manifest_.attention + manifest_.ffn)
      file_["programs"].refuse(say(s_.programs.size(), " programs for ", manifest_.attention + manifest_.ffn, " ranks"));
  }

  void keys() {
    const Json &list = file_["keys"];
    for (const Json &v : list.items()) {
      Key k;
      k.key = static_cast<std::uint64_t>(v["key"].whole());
      const std::string &direction = v["direction"].text();
      if (direction != "a2f" && direction != "f2a") v["direction"].refuse("a direction is a2f or f2a");
      k.push = direction == "a2f";
      k.a = static_cast<std::uint32_t>(v["a"].whole(0, manifest_.attention - 1));
      k.f = static_cast<std::uint32_t>(v["f"].whole(0, static_cast<std::int64_t>(manifest_.ffn) - 1));
      k.slot = static_cast<std::uint32_t>(v["slot"].whole(0, s_.slots - 1));
      k.field = v["field"].text();
      const Json *segment = v.find("segment");
      k.segment = segment ? static_cast<std::uint32_t>(segment->whole(0, 1023)) : k.a;
      const RankProgram &attention = s_.program({Role::attention, k.a}), &ffn = s_.program({Role::ffn, k.f});
      const RankProgram &from = k.push ? attention : ffn, &to = k.push ? ffn : attention;
      k.source = named(from, v["source"]);
      k.target = named(to, v["target"]);
      for (std::uint32_t t = 0; t < s_.types.size(); t++)
        for (const Field &f : k.push ? s_.types[t].push : s_.types[t].pull) {
          if (f.name != k.field) continue;
          if (k.types != 0 && f.bytes != k.bytes)
            v.refuse(say("field '", k.field, "' has two lengths in two types of exchange (contract K3)"));
          k.types |= std::uint64_t{1} << t;
          k.bytes = f.bytes;
          k.row = f.row;
        }
      if (k.types == 0) v["field"].refuse(say("no type of exchange has a field '", k.field, "'"));
      const std::uint32_t segments = segment ? std::max(k.segment + 1, ffn.buffers[k.push ? k.target : k.source].segments) : manifest_.attention;
      room(v, from, k.source, k.push ? 1 : segments, k);
      room(v, to, k.target, k.push ? segments : 1, k);
      s_.keys.push_back(std::move(k));
    }
    if (s_.keys.size() > (1u << 20)) list.refuse("too many keys");
    complete(list);
  }

  void room(const Json &v, const RankProgram &p, std::uint32_t buffer, std::uint32_t segments, const Key &k) const {
    const Buffer &b = p.buffers[buffer];
    if (b.region != Region::exchange) v.refuse(say("buffer '", b.name, "' of rank ", p.rank.name(), " is not in region exchange"));
    if (b.segments != segments || b.bytes / segments < k.bytes)
      v.refuse(say("slot ", k.slot, ", field '", k.field, "': buffer '", b.name, "' of rank ", p.rank.name(), " has ", b.bytes, " bytes in ",
                   b.segments, " segments, the exchange needs ", k.bytes, " in each of ", segments, " (contract K3)"));
  }

  /// Contracts K1 and K4, as far as the table of keys shows: one key has one source, and every slot reaches every FFN rank with every field.
  void complete(const Json &list) const {
    std::unordered_map<std::string, const Key *> seen;
    std::unordered_map<std::uint64_t, const Key *> pushed;
    std::unordered_map<std::string, const Key *> numbered;
    const auto name = [](bool push, std::uint32_t a, std::uint32_t f, std::uint32_t slot, const std::string &field) {
      return say(push ? 'p' : 'r', a, '.', f, '.', slot, '.', field);
    };
    for (std::size_t i = 0; i < s_.keys.size(); i++) {
      const Key &k = s_.keys[i];
      const Json &v = list.items()[i];
      const auto [other, fresh] = seen.emplace(name(k.push, k.a, k.f, k.slot, k.field), &k);
      if (!fresh) {
        const auto &buffers = s_.program(k.push ? RankId{Role::attention, k.a} : RankId{Role::ffn, k.f}).buffers;
        v.refuse(say("slot ", k.slot, ", field '", k.field, "' has two keys between a", k.a, " and f", k.f, ", with sources '",
                     buffers[other->second->source].name, "' and '", buffers[k.source].name, "' (contract K1)"));
      }
      if (!numbered.emplace(say(k.key, '.', k.a, '.', k.f, '.', k.push), &k).second)
        v.refuse(say("key ", k.key, " is used twice between a", k.a, " and f", k.f));
      if (!k.push) continue;
      const auto [first, alone] = pushed.emplace(k.key, &k);
      if (!alone && (first->second->source != k.source || first->second->a != k.a))
        v.refuse(say("slot ", k.slot, ", field '", k.field, "': the source of key ", k.key, " changes (contract K1)"));
    }
    std::vector<bool> used(s_.types.size());
    for (const std::uint32_t t : s_.exchanges) used[t] = true;
    for (std::uint32_t t = 0; t < s_.types.size(); t++) {
      if (!used[t]) continue;
      for (std::uint32_t a = 0; a < manifest_.attention; a++)
        for (std::uint32_t f = 0; f < manifest_.ffn; f++)
          for (std::uint32_t slot = 0; slot < s_.slots; slot++)
            for (const bool push : {true, false})
              for (const Field &field : push ? s_.types[t].push : s_.types[t].pull)
                if (!seen.contains(name(push, a, f, slot, field.name)))
                  list.refuse(say("slot ", slot, ": no key carries '", field.name, "' ", push ? "from a" : "to a", a, push ? " to f" : " from f", f,
                                  ", though every exchange reaches every FFN rank (contract K4)"));
    }
  }
};

/// A region that all schedules share must look the same in all of them.
void sameLayout(const Bundle &b, Region region) {
  const Schedule &first = b.schedules.front();
  for (const Schedule &s : b.schedules)
    for (const RankProgram &p : s.programs) {
      const RankProgram &q = first.program(p.rank);
      std::unordered_map<std::string, const Buffer *> known;
      for (const Buffer &buffer : q.buffers)
        if (buffer.region == region) known.emplace(buffer.binds.empty() ? buffer.name : buffer.binds, &buffer);
      for (const Buffer &buffer : p.buffers) {
        if (buffer.region != region) continue;
        const auto found = known.find(buffer.binds.empty() ? buffer.name : buffer.binds);
        if (found != known.end() && (found->second->offset != buffer.offset || found->second->bytes != buffer.bytes))
          fail(exit_input, "schedule-", s.name, ".json: '", buffer.name, "' of rank ", p.rank.name(), " lies elsewhere than in schedule-",
               first.name, ".json, though schedules share ", regionName(region), "; compile the bundle again");
      }
    }
}

}  // namespace

const char *roleName(Role role) { return role == Role::attention ? "attention" : "ffn"; }
const char *regionName(Region region) {
  static const char *names[regions] = {"weights", "state", "exchange", "scratch", "input", "output"};
  return names[static_cast<std::size_t>(region)];
}
const char *stepName(Step::Op op) {
  static const char *names[] = {"launch", "post", "wait", "accept", "reply"};
  return names[static_cast<std::size_t>(op)];
}

std::uint64_t evalDim(const Dim &dim, const std::vector<Symbol> &symbols, const std::vector<std::uint64_t> &values) {
  if (dim.text.empty()) return dim.value;
  const std::int64_t n = DimReader(dim.text, symbols, &values).read().most;
  if (n < 0) throw say("dimension '", dim.text, "' is ", n);
  return static_cast<std::uint64_t>(n);
}

std::uint64_t mostOf(const Dim &dim, const std::vector<Symbol> &symbols) {
  if (dim.text.empty()) return dim.value;
  const std::int64_t n = DimReader(dim.text, symbols, nullptr).read().most;
  if (n < 0) throw say("dimension '", dim.text, "' is always negative");
  return static_cast<std::uint64_t>(n);
}

const Buffer *RankProgram::bound(Region region, const std::string &name, std::uint32_t slot) const {
  for (const Buffer &b : buffers)
    if (b.region == region && b.slot == slot && b.binds == name) return &b;
  return nullptr;
}

const RankProgram &Schedule::program(RankId rank) const {
  for (const RankProgram &p : programs)
    if (p.rank == rank) return p;
  fail(exit_input, "schedule-", name, ".json: no program for rank ", rank.name(), "; compile the bundle again");
}

const ProgramFacts &Manifest::program(Role role) const {
  for (const ProgramFacts &p : programs)
    if (p.role == role) return p;
  fail(exit_input, "manifest.json: no program of the ", roleName(role), " side; compile the bundle again");
}

RankId Bundle::rank(std::uint32_t number) const {
  return number < manifest.attention ? RankId{Role::attention, number} : RankId{Role::ffn, number - manifest.attention};
}

int Bundle::schedule(const std::string &name) const {
  for (std::size_t i = 0; i < schedules.size(); i++)
    if (schedules[i].name == name) return static_cast<int>(i);
  return -1;
}

Bundle Bundle::open(const std::string &path) {
  struct stat st {};
  if (::stat(path.c_str(), &st) != 0 || !S_ISDIR(st.st_mode))
    fail(exit_input, path, ": not a bundle directory; give what `step3c compile --out` wrote");
  if (::stat((path + "/manifest.json").c_str(), &st) != 0) fail(exit_input, path, ": no manifest.json; give what `step3c compile --out` wrote");
  if (::stat((path + "/COMPLETE").c_str(), &st) != 0) fail(exit_input, path, ": no COMPLETE: the bundle was not written to its end; compile it again");
  Bundle b;
  b.path = path;
  std::vector<std::string> names;
  b.manifest = readManifest(JsonFile::read(path + "/manifest.json", "manifest.json"), names);
  for (const std::string &name : names) {
    const std::string file = "schedule-" + name + ".json";
    const JsonFile json = JsonFile::read(path + "/" + file, file);
    b.schedules.push_back(ScheduleReader(json, b.manifest).read());
    if (b.schedules.back().name != name) fail(exit_input, file, ": is named '", b.schedules.back().name, "' inside; the bundle is mixed from two");
  }
  sameLayout(b, Region::weights);
  sameLayout(b, Region::state);
  return b;
}

std::string hex(const std::uint8_t *bytes, std::size_t n) {
  static const char digits[] = "0123456789abcdef";
  std::string text;
  for (std::size_t i = 0; i < n; i++) {
    text += digits[bytes[i] >> 4];
    text += digits[bytes[i] & 15];
  }
  return text;
}

}  // namespace s3
