// What a bundle says: manifest.json and schedule-*.json (ir/bundle.ts, ir/schedule.ts), read once and checked so far that nothing in them
// can lead a rank outside its memory: every offset, size, name and number is in range before it is used.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "json.h"

namespace s3 {

enum class Role : std::uint8_t { attention, ffn };
const char *roleName(Role role);

struct RankId {
  Role role = Role::attention;
  std::uint32_t index = 0;
  /// `a0`, `f1`
  std::string name() const { return (role == Role::attention ? "a" : "f") + std::to_string(index); }
  bool operator==(const RankId &) const = default;
};

/// A dimension: a number, or an expression over symbols as ir/dim.ts writes it.
struct Dim {
  std::uint64_t value = 0;
  std::string text;  // empty: `value`
  bool operator==(const Dim &) const = default;
};

/// A declared size of a schedule: a multiple of `multiple` from `min` to `max`.
struct Symbol {
  std::string name;
  std::uint64_t min = 0, max = 0, multiple = 1;
  std::optional<Dim> is;  // its value, where other symbols define it
};

/// The value of a dimension, given those of the symbols in their order. Throws std::string when it makes no sense.
std::uint64_t evalDim(const Dim &dim, const std::vector<Symbol> &symbols, const std::vector<std::uint64_t> &values);
/// What a dimension never exceeds, whatever the symbols are within their ranges: what is allocated. Throws std::string when it makes no sense.
std::uint64_t mostOf(const Dim &dim, const std::vector<Symbol> &symbols);

enum class Region : std::uint8_t { weights, state, exchange, scratch, input, output };
constexpr std::size_t regions = 6;
const char *regionName(Region region);

struct Buffer {
  std::string name;
  Region region = Region::scratch;
  std::string dtype;
  std::uint32_t width = 1;  // bytes of one element
  std::vector<Dim> shape;
  std::uint32_t segments = 1;
  std::uint64_t offset = 0, bytes = 0;
  std::uint32_t slot = 0;
  std::string binds;  // empty: nothing
};

struct Field {
  std::string name, dtype;
  std::uint32_t width = 1;
  std::vector<Dim> shape;
  std::uint64_t bytes = 0;
  std::uint64_t row = 0;      // bytes of one row of symbol T; 0: the header
  std::optional<std::uint64_t> below;
};

struct ExchangeType {
  std::string name;
  std::vector<Field> push, pull;
};

/// ir/schedule.ts `Key`, with buffers as indices into the programs of their ranks.
struct Key {
  std::uint64_t key = 0;
  bool push = true;  // a2f
  std::uint32_t a = 0, f = 0, slot = 0;
  std::uint32_t segment = 0;  // of the FFN rank's buffer
  std::string field;
  std::uint32_t source = 0, target = 0;
  std::uint64_t types = 0;  // bit i: exchange type i carries it
  std::uint64_t bytes = 0, row = 0;
};

struct Step {
  enum class Op : std::uint8_t { launch, post, wait, accept, reply };
  Op op = Op::launch;
  std::uint32_t slot = 0;
  // launch
  std::uint32_t kernel = 0;  // index into RankProgram::kernels
  std::vector<std::uint32_t> in, inout, out;
  std::uint32_t rows = 0;  // the buffer of headers
  // post, wait, accept, reply
  std::uint32_t exchange = 0, type = 0, peer = 0;
  std::int64_t after = -1;  // the step that must have finished; -1: none
};
const char *stepName(Step::Op op);

struct RankProgram {
  RankId rank;
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::vector<std::string> kernels;
  std::array<std::uint64_t, regions> memory{};
  std::unordered_map<std::string, std::uint32_t> names;  // of buffers

  /// the buffer that binds `name` in `slot`, or null
  const Buffer *bound(Region region, const std::string &name, std::uint32_t slot) const;
};

struct Schedule {
  std::string name;
  std::uint32_t slots = 0;
  std::uint64_t rows = 1;  // maximum of symbol T: rows of one slot of one attention rank
  std::vector<Symbol> symbols;
  std::optional<std::uint32_t> token;  // which symbol is T
  std::vector<std::uint32_t> exchanges;  // type of each exchange of a slot
  std::vector<ExchangeType> types;
  std::vector<Key> keys;
  std::vector<RankProgram> programs;

  const RankProgram &program(RankId rank) const;
};

struct KernelFacts {
  std::string name;
  std::uint64_t scratch = 0;
  std::vector<std::string> args;  // `bf16[T,256]` in launch order; empty: not said
};
struct ProgramFacts {
  Role role = Role::attention;
  std::string target, device;
  std::unordered_map<std::string, KernelFacts> kernels;
};
struct WeightsFile {
  std::string rank;
  std::optional<std::string> file;
  std::uint64_t seed = 0, bytes = 0;
};
struct KvFacts {
  std::uint64_t pageTokens = 0, pages = 0, pageBytes = 0;
};
struct Refusal {
  std::int64_t id = 0;
  std::string why;
};

struct Manifest {
  std::string model;
  std::array<std::uint8_t, 32> wire{};
  std::uint32_t attention = 1, ffn = 0;
  std::uint64_t maxBatch = 1, maxContext = 0;
  std::optional<std::uint64_t> vocabulary;
  std::vector<std::int64_t> eos;
  std::vector<Refusal> refused;
  std::optional<KvFacts> kv;
  std::vector<ProgramFacts> programs;
  std::vector<WeightsFile> weights;

  const ProgramFacts &program(Role role) const;
};

struct Bundle {
  std::string path;
  Manifest manifest;
  std::vector<Schedule> schedules;

  /// Reads and checks manifest and schedules. Throws a Failure (exit 1) that names the file and what is wrong with it.
  static Bundle open(const std::string &path);

  std::uint32_t ranks() const { return manifest.attention + manifest.ffn; }
  /// attention ranks first, then FFN ranks
  std::uint32_t number(RankId rank) const { return rank.role == Role::attention ? rank.index : manifest.attention + rank.index; }
  RankId rank(std::uint32_t number) const;
  /// index of a schedule, or -1
  int schedule(const std::string &name) const;
};

std::string hex(const std::uint8_t *bytes, std::size_t n);

}  // namespace s3
