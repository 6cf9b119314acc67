// How the runtime fails: one line for people, and the exit code of the command line's contract.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace s3 {

enum Exit : int { exit_done = 0, exit_input = 1, exit_usage = 2, exit_peer = 3, exit_internal = 70 };

class Failure : public std::runtime_error {
 public:
  Failure(int code, const std::string &what) : std::runtime_error(what), code(code) {}
  const int code;
};

template <class... Parts>
std::string say(const Parts &...parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// Throws a Failure: what, where, and the mend, in one line.
template <class... Parts>
[[noreturn]] void fail(int code, const Parts &...parts) {
  throw Failure(code, say(parts...));
}

}  // namespace s3
