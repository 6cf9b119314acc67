// step3-selftest: runs kernels of a compiled program on inputs that the compiler drew, and compares with what its interpreter made of them.
//
//   step3-selftest CASES LIBRARY [--isa NAME] [--threads N] [--part I/N] [--verbose]
//   step3-selftest --logits EXPECTED GOT BOUND     two files of f32: the relative error, by the Frobenius norm, is at most BOUND
//
// --part I/N: of every N cases that with number I, 0 the first, so that processes can share a long list or tools that slow kernels down take some.
//
// CASES, little endian: "S3KT0002", u32 cases, then each case:
//   text name; u32 buffers, each: u8 kind (0 read, 1 written, 2 both), u64 bytes, the bytes unless it is only written
//   u32 launches, each: text kernel, u32 rows, u8 whether they may be divided, u32 symbols, each i64 value, u32 the one that is the rows (or
//     S3_NO_SYMBOL), u32 arguments, each u32 buffer
//   u32 checks, each: u32 buffer, text dtype, u64 count, expected[count], allowed[count]: f64 for f64 and integers of 32 bits and more, else f32
// A text is u32 bytes and the bytes. What is only written starts as 0xA5; every buffer lies between guard bytes that must survive; what is only
// read must not change. Every case runs with its rows in one segment, and again in several, where there is more than one and they may be divided: the same rows, in the same
// places, as they come from several attention ranks. A value is right when it differs from what is expected by at most what is allowed; where that is infinite, anything is.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "devices/device.h"
#include "error.h"
#include "library.h"

namespace s3 {
namespace {

constexpr std::uint64_t guard = 256;
constexpr std::uint8_t guard_byte = 0x5C, unwritten_byte = 0xA5;

/// A file of cases, read front to back.
class Reader {
 public:
  explicit Reader(const std::string &path) : path_(path), file_(path, std::ios::binary) {
    if (!file_) fail(exit_input, path, ": cannot be read");
    file_.seekg(0, std::ios::end);
    left_ = static_cast<std::uint64_t>(file_.tellg());
    file_.seekg(0);
  }
  void bytes(void *to, std::uint64_t n) {
    need(n);
    if (n > 0 && !file_.read(static_cast<char *>(to), static_cast<std::streamsize>(n))) fail(exit_input, path_, ": cannot be read to its end");
    left_ -= n;
  }
  /// refuses sizes that the file cannot hold before memory is taken for them
  void need(std::uint64_t n) const {
    if (n > left_) fail(exit_input, path_, ": is cut short or no file of cases");
  }
  template <class T>
  T number() {
    T x;
    bytes(&x, sizeof x);
    return x;
  }
  std::string text() {
    const auto n = number<std::uint32_t>();
    need(n);
    std::string s(n, '\0');
    bytes(s.data(), n);
    return s;
  }
  std::uint64_t left() const { return left_; }
  template <class T>
  std::vector<T> list(std::uint64_t n) {
    if (n > left_ / sizeof(T)) need(left_ + 1);
    std::vector<T> all(n);
    bytes(all.data(), n * sizeof(T));
    return all;
  }
  [[noreturn]] void broken(const std::string &what) const { fail(exit_input, path_, ": ", what); }

 private:
  const std::string path_;
  std::ifstream file_;
  std::uint64_t left_ = 0;
};

enum class Kind : std::uint8_t { read = 0, written = 1, both = 2 };
struct Buffer {
  Kind kind{};
  std::uint64_t bytes = 0;
  std::vector<std::uint8_t> given;
};
struct Launch {
  std::string kernel;
  std::uint32_t rows = 0;
  bool divides = false;
  std::vector<std::int64_t> dims;
  std::uint32_t rows_dim = S3_NO_SYMBOL;
  std::vector<std::uint32_t> args;
};
struct Check {
  std::uint32_t buffer = 0;
  std::string dtype;
  std::vector<double> expected, allowed;
};
struct Case {
  std::string name;
  std::vector<Buffer> buffers;
  std::vector<Launch> launches;
  std::vector<Check> checks;
};

bool isWide(const std::string &dtype) { return dtype == "f64" || dtype.ends_with("32") ? dtype != "f32" : dtype.ends_with("64"); }

Case readCase(Reader &in) {
  Case c;
  c.name = in.text();
  for (auto n = in.number<std::uint32_t>(); n > 0; n--) {
    Buffer b;
    b.kind = static_cast<Kind>(in.number<std::uint8_t>());
    b.bytes = in.number<std::uint64_t>();
    if (b.kind > Kind::both || b.bytes > (std::uint64_t{1} << 36)) in.broken("case '" + c.name + "' has an impossible buffer");
    if (b.kind != Kind::written) b.given = in.list<std::uint8_t>(b.bytes);
    c.buffers.push_back(std::move(b));
  }
  const auto index = [&] {
    const auto i = in.number<std::uint32_t>();
    if (i >= c.buffers.size()) in.broken("case '" + c.name + "' names a buffer that is not there");
    return i;
  };
  for (auto n = in.number<std::uint32_t>(); n > 0; n--) {
    Launch l;
    l.kernel = in.text();
    l.rows = in.number<std::uint32_t>();
    l.divides = in.number<std::uint8_t>() != 0;
    l.dims = in.list<std::int64_t>(in.number<std::uint32_t>());
    l.rows_dim = in.number<std::uint32_t>();
    if (l.rows_dim != S3_NO_SYMBOL && l.rows_dim >= l.dims.size()) in.broken("case '" + c.name + "' names a symbol that is not there");
    for (auto a = in.number<std::uint32_t>(); a > 0; a--) l.args.push_back(index());
    c.launches.push_back(std::move(l));
  }
  for (auto n = in.number<std::uint32_t>(); n > 0; n--) {
    Check k;
    k.buffer = index();
    k.dtype = in.text();
    const auto count = in.number<std::uint64_t>();
    for (auto *numbers : {&k.expected, &k.allowed}) {
      if (isWide(k.dtype)) {
        *numbers = in.list<double>(count);
      } else {
        const auto narrow = in.list<float>(count);
        numbers->assign(narrow.begin(), narrow.end());
      }
    }
    c.checks.push_back(std::move(k));
  }
  return c;
}

template <class T>
double element(const std::uint8_t *bytes, std::uint64_t i) {
  T x;
  std::memcpy(&x, bytes + i * sizeof x, sizeof x);
  return static_cast<double>(x);
}
/// A float of few bits: exponent bits, fraction bits, bias; `finite`: only the highest code is NaN.
double small(std::uint32_t code, int exponents, int fractions, bool finite) {
  const std::uint32_t exponent = code >> fractions & ((1u << exponents) - 1), fraction = code & ((1u << fractions) - 1);
  const double sign = code >> (exponents + fractions) & 1 ? -1.0 : 1.0;
  const int bias = (1 << (exponents - 1)) - 1;
  const bool top = exponent == (1u << exponents) - 1;
  if (finite ? top && fraction == (1u << fractions) - 1 : top && fraction != 0) return std::nan("");
  if (!finite && top) return sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fractions);
  return sign * std::ldexp(fraction + (1u << fractions), static_cast<int>(exponent) - bias - fractions);
}
struct Format {
  std::uint64_t bytes;
  double (*read)(const std::uint8_t *, std::uint64_t);
};
const std::map<std::string, Format> &formats() {
  static const std::map<std::string, Format> all = {
      {"f64", {8, element<double>}},
      {"f32", {4, element<float>}},
      {"f16", {2, [](const std::uint8_t *b, std::uint64_t i) { return small(static_cast<std::uint32_t>(element<std::uint16_t>(b, i)), 5, 10, false); }}},
      {"bf16", {2, [](const std::uint8_t *b, std::uint64_t i) { return small(static_cast<std::uint32_t>(element<std::uint16_t>(b, i)), 8, 7, false); }}},
      {"e4m3", {1, [](const std::uint8_t *b, std::uint64_t i) { return small(b[i], 4, 3, true); }}},
      {"e5m2", {1, [](const std::uint8_t *b, std::uint64_t i) { return small(b[i], 5, 2, false); }}},
      {"i64", {8, element<std::int64_t>}},
      {"i32", {4, element<std::int32_t>}},
      {"i16", {2, element<std::int16_t>}},
      {"i8", {1, element<std::int8_t>}},
      {"u64", {8, element<std::uint64_t>}},
      {"u32", {4, element<std::uint32_t>}},
      {"u16", {2, element<std::uint16_t>}},
      {"u8", {1, element<std::uint8_t>}},
      {"bool", {1, element<std::uint8_t>}},
  };
  return all;
}

/// The least number of equal parts, more than one, that so many rows can be divided into; 1 for a row alone.
std::uint32_t segmentsOf(std::uint32_t rows) {
  for (std::uint32_t n = 2; n <= rows; n++)
    if (rows % n == 0) return n;
  return 1;
}

/// One device and its queue.
class Machine {
 public:
  Machine(const s3_device *device, const std::string &library, const std::string &options) : device_(device) {
    if (const int code = device->open(0, library.c_str(), options.c_str(), &dev_)) fail(code, device->error(nullptr));
    check(device->queue(dev_, &queue_));
  }
  ~Machine() { device_->close(dev_); }
  Machine(const Machine &) = delete;
  Machine &operator=(const Machine &) = delete;

  /// Runs a case, with its rows in one segment or in several; gives what is wrong, or nothing, and the worst error in units of what is allowed.
  std::string run(const Case &c, bool several, double &worst) {
    std::vector<s3_span> spans;
    for (const Buffer &b : c.buffers) {
      std::vector<std::uint8_t> all(b.bytes + 2 * guard, guard_byte);
      if (b.kind == Kind::written) std::fill_n(all.begin() + guard, b.bytes, unwritten_byte);
      else std::copy(b.given.begin(), b.given.end(), all.begin() + guard);
      const s3_span whole = span(all.size());
      check(device_->write(dev_, whole, all.data()));
      spans.push_back({whole.mem, whole.off + guard, b.bytes});
    }
    for (const Launch &l : c.launches) {
      const std::uint32_t segments = several ? segmentsOf(l.rows) : 1;
      s3_head head{};
      head.magic = S3_MAGIC;
      head.abi = S3_ABI;
      head.rows = l.rows / segments;
      const std::vector<s3_head> all(segments, head);
      const s3_span heads = span(segments * sizeof head);
      check(device_->write(dev_, heads, all.data()));
      std::vector<s3_span> args;
      for (const std::uint32_t a : l.args) args.push_back(spans[a]);
      s3_span dims{};
      if (!l.dims.empty()) {
        dims = span(l.dims.size() * sizeof(std::int64_t));
        check(device_->write(dev_, dims, l.dims.data()));
      }
      s3_launch launch{0, static_cast<std::uint32_t>(args.size()), args.data(), heads, segments, std::max(1u, head.rows), dims, l.rows_dim};
      check(device_->kernel(dev_, l.kernel.c_str(), &launch.kernel));
      s3_segment *segment = nullptr;
      s3_event done = 0;
      check(device_->prepare(dev_, &launch, 1, &segment));
      check(device_->submit(queue_, segment, &done));
      check(device_->wait(dev_, done, 60000));
    }
    std::string wrong;
    std::vector<std::vector<std::uint8_t>> after;
    for (std::size_t i = 0; i < c.buffers.size(); i++) {
      const Buffer &b = c.buffers[i];
      std::vector<std::uint8_t> all(b.bytes + 2 * guard);
      check(device_->read(dev_, all.data(), {spans[i].mem, spans[i].off - guard, all.size()}));
      const bool intact = std::all_of(all.begin(), all.begin() + guard, [](auto x) { return x == guard_byte; }) &&
                          std::all_of(all.end() - guard, all.end(), [](auto x) { return x == guard_byte; });
      after.emplace_back(all.begin() + guard, all.end() - guard);
      if (!intact) wrong = say("it wrote outside buffer ", i);
      else if (b.kind == Kind::read && after.back() != b.given) wrong = say("it changed buffer ", i, ", which is only read");
    }
    for (const Check &k : c.checks) {
      const auto format = formats().find(k.dtype);
      if (format == formats().end()) fail(exit_input, "case '", c.name, "' has values of the unknown dtype '", k.dtype, "'");
      if (k.expected.size() * format->second.bytes != after[k.buffer].size())
        fail(exit_input, "case '", c.name, "' expects ", k.expected.size(), " values in ", after[k.buffer].size(), " bytes");
      for (std::size_t i = 0; i < k.expected.size(); i++) {
        const double got = format->second.read(after[k.buffer].data(), i), want = k.expected[i];
        if (got == want || (std::isnan(got) && std::isnan(want)) || std::isinf(k.allowed[i])) continue;
        const double error = std::abs(got - want) / k.allowed[i];
        if (error <= worst) continue;
        worst = std::isnan(error) ? INFINITY : error;
        if (!(error <= 1) && wrong.empty()) wrong = say("value ", i, " of buffer ", k.buffer, " is ", got, " instead of ", want, ", ", worst, " times what is allowed");
      }
    }
    return wrong;
  }

 private:
  const s3_device *device_;
  s3_dev *dev_ = nullptr;
  s3_queue *queue_ = nullptr;

  void check(int code) {
    if (code != 0) fail(code, device_->error(dev_));
  }
  s3_span span(std::uint64_t bytes) {
    s3_span s{};
    check(device_->alloc(dev_, bytes, 64, 0, &s));
    s.bytes = bytes;
    return s;
  }
};

std::vector<float> readFloats(const std::string &path) {
  Reader in(path);
  return in.list<float>(in.left() / sizeof(float));
}

/// Compares logits with those of another target; the error counts every element, a NaN is infinitely wrong.
int compareLogits(const std::string &expected, const std::string &got, const std::string &bound) {
  const std::vector<float> want = readFloats(expected), have = readFloats(got);
  double most = 0;
  if (std::from_chars(bound.data(), bound.data() + bound.size(), most).ptr != bound.data() + bound.size() || !(most > 0))
    fail(exit_usage, "--logits takes a bound above 0, not '", bound, "'");
  if (want.size() != have.size()) fail(exit_peer, got, " has ", have.size(), " numbers, ", expected, " has ", want.size());
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); i++) {
    const double d = static_cast<double>(have[i]) - static_cast<double>(want[i]);
    difference += d * d;
    size += static_cast<double>(want[i]) * static_cast<double>(want[i]);
  }
  const double error = std::sqrt(difference / size);
  std::printf("relative error %.3g of %zu logits, at most %.3g\n", error, want.size(), most);
  return error <= most ? exit_done : exit_peer;
}

int run(int argc, char **argv) {
  if (argc == 5 && std::string(argv[1]) == "--logits") return compareLogits(argv[2], argv[3], argv[4]);
  std::vector<std::string> places;
  std::string isa;
  std::uint32_t threads = 1, part = 0, parts = 1;
  bool verbose = false;
  for (int i = 1; i < argc; i++) {
    const std::string flag = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) fail(exit_usage, flag, " needs a value");
      return argv[++i];
    };
    if (flag == "--isa") isa = value();
    else if (flag == "--threads") {
      const std::string text = value();
      if (std::from_chars(text.data(), text.data() + text.size(), threads).ptr != text.data() + text.size() || threads < 1 || threads > 1024)
        fail(exit_usage, "--threads takes a number from 1 to 1024, not '", text, "'");
    } else if (flag == "--part") {
      const std::string text = value();
      const char *const end = text.data() + text.size();
      const auto first = std::from_chars(text.data(), end, part);
      const auto second = std::from_chars(std::min(first.ptr + 1, end), end, parts);
      if (first.ec != std::errc() || *first.ptr != '/' || second.ec != std::errc() || second.ptr != end || part >= parts)
        fail(exit_usage, "--part takes I/N with I below N, not '", text, "'");
    } else if (flag == "--verbose") verbose = true;
    else if (flag.starts_with("--")) fail(exit_usage, "no flag ", flag);
    else places.push_back(flag);
  }
  if (places.size() != 2) fail(exit_usage, "usage: step3-selftest CASES LIBRARY [--isa NAME] [--threads N] [--part I/N] [--verbose]");
  Reader in(places[0]);
  char magic[8];
  in.bytes(magic, sizeof magic);
  if (std::memcmp(magic, "S3KT0002", sizeof magic) != 0) in.broken("no file of cases");
  // a program that brings its own driver is run by that
  const auto own = symbol<const s3_device *(*)()>(places[1], "s3_device_v1");
  std::string options = say("{\"threads\":", threads, ",\"spin\":100");
  if (!isa.empty()) options += say(",\"isa\":\"", isa, "\"");
  std::uint32_t passed = 0, failed = 0;
  const auto count = in.number<std::uint32_t>();
  for (std::uint32_t n = 0; n < count; n++) {
    const Case c = readCase(in);
    if (n % parts != part) continue;
    double worst = 0;
    // a device of its own for every case: memory goes with it, and one that breaks does not take the others with it
    std::string wrong;
    try {
      Machine machine(own ? own() : cppDevice(), places[1], options + "}");
      wrong = machine.run(c, false, worst);
      const bool more = std::all_of(c.launches.begin(), c.launches.end(), [](const Launch &l) { return l.divides; }) &&
                        std::any_of(c.launches.begin(), c.launches.end(), [](const Launch &l) { return l.rows > 1; });
      if (wrong.empty() && more) {
        wrong = machine.run(c, true, worst);
        if (!wrong.empty()) wrong = "in several segments, " + wrong;
      }
    } catch (const Failure &e) {
      if (e.code == exit_input) throw;
      wrong = e.what();
    }
    (wrong.empty() ? passed : failed)++;
    if (verbose || !wrong.empty()) std::printf("%s %s: %s (%.3g of what is allowed)\n", wrong.empty() ? "right" : "WRONG", c.name.c_str(), wrong.c_str(), worst);
  }
  std::printf("%u passed, %u failed\n", passed, failed);
  return failed == 0 ? exit_done : exit_peer;
}

}  // namespace
}  // namespace s3

int main(int argc, char **argv) {
  return s3::toolMain("step3-selftest", [&] { return s3::run(argc, argv); });
}
