// How the runtime fails: one line for people, and the exit code of the command line's contract.
#pragma once
#include <cstdio>
#include <new>
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

/// Does work that may throw, where nothing must: gives the exit code, and in `why` the line for people.
template <class Work>
int caught(std::string &why, const Work &work) {
  try {
    work();
    return exit_done;
  } catch (const Failure &e) {
    why = e.what();
    return e.code;
  } catch (const std::bad_alloc &) {
    why = "out of memory; use more ranks, or a smaller batch or context";
    return exit_input;
  } catch (const std::exception &e) {
    why = say("internal error: ", e.what());
    return exit_internal;
  }
}

/// The main function of a tool: what went wrong on standard error, after the tool's name.
template <class Work>
int toolMain(const char *name, const Work &work) {
  std::string why;
  int code = exit_internal;
  if (const int failed = caught(why, [&] { code = work(); })) {
    std::fprintf(stderr, "%s: %s\n", name, why.c_str());
    return failed;
  }
  return code;
}

}  // namespace s3
