#include "evaluate.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.h"

namespace s3 {

namespace {

std::string pathOf(const std::string &directory, std::string name) {
  std::replace(name.begin(), name.end(), '/', '_');
  return directory + "/" + name + ".bin";
}

/// The value of a dimension; `what` has it.
std::uint64_t sizeOf(const Dim &d, const Schedule &s, const std::vector<std::uint64_t> &values, const std::string &what) {
  try {
    return evalDim(d, s.symbols, values);
  } catch (const std::string &why) {
    std::string sizes;
    for (std::size_t i = 0; i < values.size(); i++) sizes += say(i ? ", " : "", s.symbols[i].name, "=", values[i]);
    fail(exit_input, what, " cannot be with ", sizes, ": ", why);
  }
}

/// The values of the schedule's symbols, each within its range.
std::vector<std::uint64_t> valuesOf(const Schedule &s, const EvaluateOptions &options) {
  if (options.rows > s.rows) fail(exit_input, "--rows ", options.rows, ": the schedule holds at most ", s.rows);
  for (const auto &[name, value] : options.symbols) {
    const bool known = std::any_of(s.symbols.begin(), s.symbols.end(), [&](const Symbol &x) { return x.name == name; });
    if (!known || name == "T") fail(exit_input, "--symbols ", name, "=", value, ": ", known ? "T is what --rows gives" : "the graph has no such symbol");
  }
  std::vector<std::uint64_t> values;
  for (const Symbol &x : s.symbols) {
    if (x.name == "T") {
      values.push_back(options.rows);
      continue;
    }
    const auto given = options.symbols.find(x.name);
    if (given == options.symbols.end()) fail(exit_input, "symbol ", x.name, " has no value; add --symbols ", x.name, "=N");
    if (given->second < x.min || given->second > x.max || given->second % x.multiple != 0)
      fail(exit_input, "--symbols ", x.name, "=", given->second, ": the graph was compiled for ", x.min, " to ", x.max,
           x.multiple == 1 ? "" : say(", a multiple of ", x.multiple));
    values.push_back(given->second);
  }
  for (std::size_t i = 0; i < values.size(); i++) {
    const Symbol &x = s.symbols[i];
    const std::uint64_t is = x.is ? sizeOf(*x.is, s, values, "symbol " + x.name) : values[i];
    if (is != values[i]) fail(exit_input, "symbol ", x.name, " is given as ", values[i], ", and is ", x.is->text, " = ", is);
  }
  return values;
}

/// Bytes of a buffer with these sizes; none is larger than at its maximum, for which it was allocated.
std::uint64_t bytesOf(const Buffer &b, const Schedule &s, const std::vector<std::uint64_t> &values) {
  std::uint64_t n = b.width;
  for (const Dim &d : b.shape) n *= sizeOf(d, s, values, "'" + (b.binds.empty() ? b.name : b.binds) + "'");
  return n;
}

std::vector<std::uint8_t> readFile(const std::string &path, const std::string &name, std::uint64_t bytes) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(exit_input, "input '", name, "': ", path, " cannot be opened (", std::strerror(errno), ")");
  struct stat st {};
  std::vector<std::uint8_t> data(bytes);
  std::uint64_t got = 0;
  const bool right = ::fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && static_cast<std::uint64_t>(st.st_size) == bytes;
  while (right && got < bytes) {
    const ssize_t n = ::read(fd, data.data() + got, bytes - got);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    got += static_cast<std::uint64_t>(n);
  }
  ::close(fd);
  if (!right || got != bytes)
    fail(exit_input, "input '", name, "': ", path, " has ", st.st_size, " bytes, its shape with these sizes has ", bytes, "; check --rows and --symbols");
  return data;
}

void writeFile(const std::string &path, const std::vector<std::uint8_t> &data) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) fail(exit_input, path, ": cannot be created (", std::strerror(errno), ")");
  std::size_t at = 0;
  while (at < data.size()) {
    const ssize_t n = ::write(fd, data.data() + at, data.size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      ::close(fd);
      fail(exit_input, path, ": cannot be written (", std::strerror(errno), ")");
    }
    at += static_cast<std::size_t>(n);
  }
  ::close(fd);
}

}  // namespace

void evaluate(Engine &engine, const EvaluateOptions &options) {
  const Bundle &b = engine.bundle();
  int index = b.schedule("main");
  if (index < 0 && b.schedules.size() == 1) index = 0;
  if (index < 0) fail(exit_input, "--eval runs the schedule 'main', which this bundle does not have");
  const auto schedule = static_cast<std::uint32_t>(index);
  const Schedule &s = b.schedules[schedule];
  const RankProgram &p = engine.program(schedule);
  const bool ours = engine.rank() == RankId{Role::attention, 0};
  const std::vector<std::uint64_t> values = valuesOf(s, options);
  for (const Buffer &buffer : p.buffers) bytesOf(buffer, s, values);
  const auto bound = [&](const Buffer &buffer, Region region) { return buffer.region == region && buffer.slot == 0 && !buffer.binds.empty(); };
  if (ours)
    for (const Buffer &buffer : p.buffers)
      if (bound(buffer, Region::input)) {
        const auto data = readFile(pathOf(options.inputs, buffer.binds), buffer.binds, bytesOf(buffer, s, values));
        engine.write(schedule, buffer, data.data(), data.size());
      }
  if (engine.rank().role == Role::attention) {
    // slots without rows have as little to do as there can be
    std::vector<std::uint64_t> least;
    for (const Symbol &x : s.symbols) least.push_back((x.min + x.multiple - 1) / x.multiple * x.multiple);
    for (std::uint32_t slot = 0; slot < s.slots; slot++) engine.setSymbols(schedule, slot, ours && slot == 0 ? values : least);
  }
  const s3_round round = engine.agree({ours ? schedule + 1 : 0, 1, 0});
  if (round.stop) fail(exit_internal, "the round of --eval was not run");
  std::vector<std::uint32_t> rows(s.slots, 0);
  if (ours) rows[0] = static_cast<std::uint32_t>(options.rows);
  engine.run(round, rows);
  std::vector<std::string> written;
  if (ours)
    for (const Buffer &buffer : p.buffers)
      if (bound(buffer, Region::output)) {
        std::vector<std::uint8_t> data(bytesOf(buffer, s, values));
        engine.read(schedule, buffer, 0, data.data(), data.size());
        const std::string path = pathOf(options.outputs, buffer.binds);
        writeFile(path + ".part", data);
        written.push_back(path);
      }
  for (const std::string &path : written)
    if (::rename((path + ".part").c_str(), path.c_str()) != 0) fail(exit_input, path, ": cannot be written (", std::strerror(errno), ")");
  engine.agree({});
}

}  // namespace s3
