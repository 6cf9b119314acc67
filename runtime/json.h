// A small strict JSON reader. Everything in a bundle and every prompt passes through it, so it trusts nothing.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace s3 {

/// One value. Accessors throw a Failure (exit 1) that names the file and the byte when the value is not what is asked for.
class Json {
 public:
  enum class Kind : std::uint8_t { null, boolean, number, text, array, object };

  Kind kind() const { return kind_; }
  bool is(Kind k) const { return kind_ == k; }

  bool flag() const;
  double number() const;
  /// an integer in [min, max]
  std::int64_t whole(std::int64_t min = 0, std::int64_t max = (std::int64_t{1} << 53) - 1) const;
  const std::string &text() const;
  const std::vector<Json> &items() const;
  const std::vector<std::pair<std::string, Json>> &members() const;

  /// a member that must be there
  const Json &operator[](std::string_view name) const;
  /// a member, or null when it is absent
  const Json *find(std::string_view name) const;

  /// throws what is wrong with this value
  [[noreturn]] void refuse(const std::string &why) const;

 private:
  friend class JsonReader;
  Kind kind_ = Kind::null;
  bool flag_ = false;
  double number_ = 0;
  std::size_t at_ = 0;
  const std::string *file_ = nullptr;
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

/// A parsed text and the name it goes by in messages.
class JsonFile {
 public:
  /// `where` names the text in messages. Throws a Failure (exit 1) on anything that RFC 8259 does not allow, on duplicate names,
  /// invalid UTF-8, and on more than 64 levels.
  static JsonFile parse(std::string_view text, std::string where);
  /// reads and parses a file of at most `limit` bytes
  static JsonFile read(const std::string &path, const std::string &where, std::uint64_t limit = std::uint64_t{1} << 30);

  const Json &root() const { return root_; }
  const Json &operator[](std::string_view name) const { return root_[name]; }

 private:
  std::unique_ptr<std::string> where_;
  Json root_;
};

/// a JSON string literal, with quotes
std::string jsonText(std::string_view text);
/// a finite number in the shortest form that reads back equal; anything else as null
std::string jsonNumber(double value);

}  // namespace s3
