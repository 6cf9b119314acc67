#include "json.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>

#include "error.h"

namespace s3 {

namespace {
constexpr int max_depth = 64;
const char *kindName(Json::Kind k) {
  switch (k) {
    case Json::Kind::null: return "null";
    case Json::Kind::boolean: return "a boolean";
    case Json::Kind::number: return "a number";
    case Json::Kind::text: return "a string";
    case Json::Kind::array: return "an array";
    case Json::Kind::object: return "an object";
  }
  return "a value";
}
}  // namespace

void Json::refuse(const std::string &why) const {
  fail(exit_input, file_ ? *file_ : std::string("json"), ": at byte ", at_, ": ", why);
}

bool Json::flag() const {
  if (kind_ != Kind::boolean) refuse(say("expected true or false, found ", kindName(kind_)));
  return flag_;
}
double Json::number() const {
  if (kind_ != Kind::number) refuse(say("expected a number, found ", kindName(kind_)));
  return number_;
}
std::int64_t Json::whole(std::int64_t min, std::int64_t max) const {
  const double n = number();
  if (n != std::floor(n) || n < static_cast<double>(min) || n > static_cast<double>(max))
    refuse(say("expected a whole number from ", min, " to ", max, ", found ", n));
  return static_cast<std::int64_t>(n);
}
const std::string &Json::text() const {
  if (kind_ != Kind::text) refuse(say("expected a string, found ", kindName(kind_)));
  return text_;
}
const std::vector<Json> &Json::items() const {
  if (kind_ != Kind::array) refuse(say("expected an array, found ", kindName(kind_)));
  return items_;
}
const std::vector<std::pair<std::string, Json>> &Json::members() const {
  if (kind_ != Kind::object) refuse(say("expected an object, found ", kindName(kind_)));
  return members_;
}
const Json *Json::find(std::string_view name) const {
  for (const auto &[key, value] : members())
    if (key == name) return &value;
  return nullptr;
}
const Json &Json::operator[](std::string_view name) const {
  const Json *found = find(name);
  if (!found) refuse(say("'", name, "' is missing"));
  return *found;
}

class JsonReader {
 public:
  JsonReader(std::string_view text, const std::string *file) : text_(text), file_(file) {}

  Json document() {
    Json root = value(0);
    space();
    if (at_ != text_.size()) stop("something follows the end of the JSON value");
    return root;
  }

 private:
  std::string_view text_;
  const std::string *file_;
  std::size_t at_ = 0;

  [[noreturn]] void stop(const std::string &why) const { fail(exit_input, *file_, ": not valid JSON at byte ", at_, ": ", why); }
  int peek() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : -1; }
  void space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) at_++;
  }
  void word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) stop(say("expected '", w, "'"));
    at_ += w.size();
  }

  Json value(int depth) {
    if (depth > max_depth) stop(say("nested more than ", max_depth, " deep"));
    space();
    Json v;
    v.file_ = file_;
    v.at_ = at_;
    switch (peek()) {
      case -1: stop("the text ends early");
      case 'n': word("null"); break;
      case 't': word("true"); v.kind_ = Json::Kind::boolean; v.flag_ = true; break;
      case 'f': word("false"); v.kind_ = Json::Kind::boolean; break;
      case '"': v.kind_ = Json::Kind::text; v.text_ = string(); break;
      case '[': array(v, depth); break;
      case '{': object(v, depth); break;
      default: v.kind_ = Json::Kind::number; v.number_ = number();
    }
    return v;
  }

  void array(Json &v, int depth) {
    v.kind_ = Json::Kind::array;
    at_++;
    space();
    if (peek() == ']') {
      at_++;
      return;
    }
    for (;;) {
      v.items_.push_back(value(depth + 1));
      space();
      const int c = peek();
      if (c != ',' && c != ']') stop("expected ',' or ']'");
      at_++;
      if (c == ']') return;
    }
  }

  void object(Json &v, int depth) {
    v.kind_ = Json::Kind::object;
    at_++;
    space();
    if (peek() == '}') {
      at_++;
      return;
    }
    for (;;) {
      space();
      if (peek() != '"') stop("expected a name in quotes");
      std::string name = string();
      space();
      if (peek() != ':') stop("expected ':'");
      at_++;
      v.members_.emplace_back(std::move(name), value(depth + 1));
      space();
      const int c = peek();
      if (c != ',' && c != '}') stop("expected ',' or '}'");
      at_++;
      if (c == '}') break;
    }
    std::vector<std::string_view> names;
    names.reserve(v.members_.size());
    for (const auto &m : v.members_) names.push_back(m.first);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) stop(say("the name '", *twice, "' appears twice"));
  }

  double number() {
    const std::size_t from = at_;
    if (peek() == '-') at_++;
    if (peek() == '0') at_++;
    else if (peek() >= '1' && peek() <= '9') digits();
    else stop("expected a value");
    if (peek() == '.') {
      at_++;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      at_++;
      if (peek() == '+' || peek() == '-') at_++;
      digits();
    }
    double n = 0;
    const auto end = text_.data() + at_;
    const auto read = std::from_chars(text_.data() + from, end, n);
    if (read.ec != std::errc() || read.ptr != end || !std::isfinite(n)) {
      at_ = from;
      stop("the number is out of range");
    }
    return n;
  }
  void digits() {
    const std::size_t from = at_;
    while (peek() >= '0' && peek() <= '9') at_++;
    if (at_ == from) stop("expected a digit");
  }

  unsigned hex4() {
    if (text_.size() - at_ < 4) stop("\\u needs four digits");
    unsigned n = 0;
    const auto read = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, n, 16);
    if (read.ec != std::errc() || read.ptr != text_.data() + at_ + 4) stop("\\u needs four hexadecimal digits");
    at_ += 4;
    return n;
  }
  static void append(std::string &out, unsigned code) {
    const auto byte = [&](unsigned b) { out.push_back(static_cast<char>(b)); };
    if (code < 0x80) {
      byte(code);
    } else if (code < 0x800) {
      byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
    } else {
      byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F)), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
    }
  }

  /// copies one multi-byte UTF-8 character, refusing overlong forms, surrogates and what is beyond U+10FFFF
  void utf8(std::string &out) {
    const unsigned lead = static_cast<unsigned char>(text_[at_]);
    const int more = lead >= 0xC2 && lead <= 0xDF ? 1 : lead >= 0xE0 && lead <= 0xEF ? 2 : lead >= 0xF0 && lead <= 0xF4 ? 3 : 0;
    if (more == 0 || text_.size() - at_ <= static_cast<std::size_t>(more)) stop("the text is not UTF-8");
    unsigned code = lead & (0x3F >> more);
    for (int i = 1; i <= more; i++) {
      const unsigned b = static_cast<unsigned char>(text_[at_ + static_cast<std::size_t>(i)]);
      if ((b & 0xC0) != 0x80) stop("the text is not UTF-8");
      code = code << 6 | (b & 0x3F);
    }
    const unsigned least = more == 1 ? 0x80 : more == 2 ? 0x800 : 0x10000;
    if (code < least || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) stop("the text is not UTF-8");
    out.append(text_.substr(at_, static_cast<std::size_t>(more) + 1));
    at_ += static_cast<std::size_t>(more) + 1;
  }

  std::string string() {
    std::string out;
    at_++;
    for (;;) {
      const int c = peek();
      if (c < 0) stop("a string has no end");
      if (c < 0x20) stop("a control character in a string");
      if (c == '"') {
        at_++;
        return out;
      }
      if (c >= 0x80) {
        utf8(out);
        continue;
      }
      at_++;
      if (c != '\\') {
        out.push_back(static_cast<char>(c));
        continue;
      }
      const int e = peek();
      at_++;
      switch (e) {
        case '"': case '\\': case '/': out.push_back(static_cast<char>(e)); break;
        case 'b': out.push_back('\b'); break;
        case 'f': out.push_back('\f'); break;
        case 'n': out.push_back('\n'); break;
        case 'r': out.push_back('\r'); break;
        case 't': out.push_back('\t'); break;
        case 'u': {
          unsigned code = hex4();
          if (code >= 0xD800 && code < 0xDC00) {
            if (peek() != '\\') stop("half of a surrogate pair");
            at_++;
            if (peek() != 'u') stop("half of a surrogate pair");
            at_++;
            const unsigned low = hex4();
            if (low < 0xDC00 || low >= 0xE000) stop("half of a surrogate pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
          } else if (code >= 0xDC00 && code < 0xE000) {
            stop("half of a surrogate pair");
          }
          append(out, code);
          break;
        }
        default: at_--; stop("unknown escape in a string");
      }
    }
  }
};

JsonFile JsonFile::parse(std::string_view text, std::string where) {
  JsonFile f;
  f.where_ = std::make_unique<std::string>(std::move(where));
  f.root_ = JsonReader(text, f.where_.get()).document();
  return f;
}

JsonFile JsonFile::read(const std::string &path, const std::string &where, std::uint64_t limit) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(exit_input, where, ": cannot be opened (", std::strerror(errno), "); is ", path, " there?");
  struct stat st {};
  if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    ::close(fd);
    fail(exit_input, where, ": not a regular file");
  }
  const auto size = static_cast<std::uint64_t>(st.st_size);
  if (size > limit) {
    ::close(fd);
    fail(exit_input, where, ": ", size, " bytes, more than the ", limit, " that such a file may have");
  }
  std::string text(size, '\0');
  std::size_t got = 0;
  while (got < text.size()) {
    const ssize_t n = ::read(fd, text.data() + got, text.size() - got);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    got += static_cast<std::size_t>(n);
  }
  ::close(fd);
  if (got != text.size()) fail(exit_input, where, ": ends early, after ", got, " of ", size, " bytes");
  return parse(text, where);
}

std::string jsonText(std::string_view text) {
  static const char hex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto b = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (b < 0x20) {
      out += "\\u00";
      out += hex[b >> 4];
      out += hex[b & 15];
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string jsonNumber(double value) {
  if (!std::isfinite(value)) return "null";
  char text[40];
  const auto end = std::to_chars(text, text + sizeof text, value);
  return std::string(text, end.ptr);
}

}  // namespace s3
