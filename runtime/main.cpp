// step3-run: runs a bundle's compiled programs. Takes token ids, gives token ids; needs no Node.js.
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "devices/device.h"
#include "error.h"
#include "evaluate.h"
#include "generate.h"
#include "launch.h"
#include "mesh/mesh.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

namespace s3 {
namespace {

const char usage[] = R"(step3-run: run the compiled programs of a bundle

  step3-run --bundle DIR --program-attention LIB --program-ffn LIB [options] < PROMPTS.jsonl
  step3-run --score --bundle DIR ... < PROMPTS.jsonl
  step3-run --eval  --bundle DIR ... --inputs DIR --outputs DIR --rows N [--symbols B=2,S=7]

prompts, one JSON object a line:
  {"prompt_ids":[1,2,3],"max_tokens":128,"temperature":0,"top_p":1,"seed":0}
events, one JSON object a line, on standard output:
  {"prompt":0,"token":17} ...   {"prompt":0,"tokens":[17,...],"stop":"eos|length|error","error":"..."}
  with --score: {"prompt":0,"nll":sum,"count":n}      (an end-of-text token is the last of "tokens")

options
  --transport local|shm|cuda
                           local: one process, a thread for every rank (default); shm: a process for every rank; cuda: for ranks that are all
                           on NVIDIA GPUs, messages go from GPU to GPU: one process, or, with --role, a process for every rank
  --role attention|ffn --rank N
                           be this one rank; the others are started apart, with the same --session
  --session NAME           what ranks in different processes find each other by
  --peers FILE             the same from a file: {"session":"NAME"}
  --threads N              threads of each rank (default: the cores divided by the ranks)
  --isa NAME               instruction set of the programs: baseline, avx2, avx512, amx (default: the best)
  --prompts FILE           prompts from a file; - is standard input (default)
  --max-tokens N --temperature X --top-p X --seed N
                           for prompts that do not say (default 128, 0, 1, 0)
  --score                  teacher-forced: the sum of -log p of the tokens of each prompt
  --logits FILE            f32, one row for every generated token (--score: for every position); FILE.0 FILE.1 ... with several prompts
  --stats FILE             times, waits and rows per expert, as JSON
  --trace FILE             Chrome trace events: a process for every rank, a thread for every slot
  --strict                 check the exchange contracts K1 to K6 while running (slow)
  --timeout SECONDS        how long to wait for ranks to appear (30) and for one message (600)
  --help

exit codes: 0 done, 1 the input is at fault, 2 usage, 3 a check or a peer failed, 70 our fault
)";

std::atomic<int> interrupted{0};
static_assert(std::atomic<int>::is_always_lock_free);

extern "C" void onInterrupt(int) {
  // the round in progress ends first; whoever insists need not wait for it
  if (interrupted.fetch_add(1) >= 4) ::_exit(130);
}

extern "C" void onCrash(int signal) {
  const auto put = [](const char *text) {
    if (::write(2, text, std::strlen(text)) < 0) return;
  };
  const char *kernel = running_kernel;
  put("step3-run: crashed (");
  put(signal == SIGSEGV ? "SIGSEGV" : signal == SIGBUS ? "SIGBUS" : signal == SIGFPE ? "SIGFPE" : signal == SIGILL ? "SIGILL" : "SIGABRT");
  put(")");
  if (kernel) {
    put(" in kernel ");
    put(kernel);
  }
  put(signal == SIGILL ? "; the processor may lack the --isa that was asked for\n" : "; this is a fault of the compiler or the runtime, not of the input\n");
  ::_exit(exit_internal);
}

void handle(int signal, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigaction(signal, &action, nullptr);
}

struct Options {
  std::string bundle, prompts = "-", stats, trace, inputs, outputs, logits, role, peers;
  std::string transport = "local";
  std::optional<std::uint64_t> rank, rows, threads;
  std::map<std::string, std::uint64_t> symbols;
  bool score = false, eval = false, help = false;
  PromptDefaults defaults;
  EngineOptions engine;
};

[[noreturn]] void misused(const std::string &what) { fail(exit_usage, what, "; see step3-run --help"); }

template <class T>
T numberOf(const std::string &flag, const std::string &text, T min, T max) {
  T n{};
  const auto read = std::from_chars(text.data(), text.data() + text.size(), n);
  if (read.ec != std::errc() || read.ptr != text.data() + text.size() || !(n >= min && n <= max))
    misused(say(flag, " takes a number from ", min, " to ", max, ", not '", text, "'"));
  return n;
}

/// `B=2,S=7`
std::map<std::string, std::uint64_t> symbolsOf(const std::string &text) {
  std::map<std::string, std::uint64_t> symbols;
  for (std::size_t from = 0; from <= text.size();) {
    const std::size_t end = std::min(text.find(',', from), text.size());
    const std::string one = text.substr(from, end - from);
    const std::size_t equals = one.find('=');
    if (equals == std::string::npos || equals == 0) misused("--symbols is written as B=2,S=7, not '" + text + "'");
    const std::string name = one.substr(0, equals);
    const auto value = numberOf<std::uint64_t>("--symbols " + name, one.substr(equals + 1), 0, 1u << 30);
    if (!symbols.emplace(name, value).second) misused("--symbols gives " + name + " twice");
    from = end + 1;
  }
  return symbols;
}

Options readArguments(int argc, char **argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    std::string flag = argv[i];
    std::optional<std::string> inlined;
    if (const auto equals = flag.find('='); flag.starts_with("--") && equals != std::string::npos) {
      inlined = flag.substr(equals + 1);
      flag.resize(equals);
    }
    const auto value = [&]() -> std::string {
      if (inlined) return *inlined;
      if (i + 1 >= argc) misused(flag + " needs a value");
      return argv[++i];
    };
    const auto simple = [&] {
      if (inlined) misused(flag + " takes no value");
      return true;
    };
    const auto whole = [&](std::uint64_t min, std::uint64_t max) { return numberOf<std::uint64_t>(flag, value(), min, max); };
    if (flag == "--bundle") o.bundle = value();
    else if (flag == "--program-attention") o.engine.program_attention = value();
    else if (flag == "--program-ffn") o.engine.program_ffn = value();
    else if (flag == "--transport") o.transport = value();
    else if (flag == "--role") o.role = value();
    else if (flag == "--rank") o.rank = whole(0, 1023);
    else if (flag == "--session") o.engine.session = value();
    else if (flag == "--peers") o.peers = value();
    else if (flag == "--threads") o.threads = whole(1, 1024);
    else if (flag == "--isa") o.engine.isa = value();
    else if (flag == "--prompts") o.prompts = value();
    else if (flag == "--max-tokens") o.defaults.max_tokens = whole(0, INT32_MAX);
    else if (flag == "--temperature") o.defaults.temperature = numberOf<float>(flag, value(), 0, 1e6f);
    else if (flag == "--top-p") o.defaults.top_p = numberOf<float>(flag, value(), 1e-6f, 1);
    else if (flag == "--seed") o.defaults.seed = static_cast<std::uint32_t>(whole(0, UINT32_MAX));
    else if (flag == "--score") o.score = simple();
    else if (flag == "--eval") o.eval = simple();
    else if (flag == "--inputs") o.inputs = value();
    else if (flag == "--outputs") o.outputs = value();
    else if (flag == "--rows") o.rows = whole(0, 1u << 24);
    else if (flag == "--symbols") o.symbols = symbolsOf(value());
    else if (flag == "--logits") o.logits = value();
    else if (flag == "--stats") o.stats = value();
    else if (flag == "--trace") o.trace = value();
    else if (flag == "--strict") o.engine.strict = simple();
    else if (flag == "--timeout") o.engine.meet_ms = o.engine.step_ms = static_cast<std::uint32_t>(whole(1, 1000000) * 1000);
    else if (flag == "--help" || flag == "-h") o.help = simple();
    else misused("unknown option '" + flag + "'");
  }
  if (o.help) return o;
  if (o.bundle.empty()) misused("--bundle is missing");
  if (o.transport != "local" && o.transport != "shm" && o.transport != "cuda") misused(say("--transport '", o.transport, "' is not local, shm or cuda"));
  if (!o.role.empty() && o.role != "attention" && o.role != "ffn") misused(say("--role '", o.role, "' is not attention or ffn"));
  if (o.role.empty() == o.rank.has_value()) misused("--role and --rank go together");
  if (!o.role.empty() && o.transport == "local") misused("--role needs a transport between processes, such as --transport shm");
  if (!o.peers.empty() && !o.engine.session.empty()) misused("--peers and --session say the same; give one");
  if (!o.role.empty() && o.peers.empty() && o.engine.session.empty()) misused("--role needs --session or --peers, the same for all ranks");
  if (o.score && o.eval) misused("--score and --eval do not go together");
  if (o.eval && (o.inputs.empty() || o.outputs.empty() || !o.rows)) misused("--eval needs --inputs, --outputs and --rows");
  if (!o.eval && (!o.inputs.empty() || !o.outputs.empty() || o.rows || !o.symbols.empty()))
    misused("--inputs, --outputs, --rows and --symbols are for --eval");
  return o;
}

std::string readAll(const std::string &path) {
  const int fd = path == "-" ? 0 : ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(exit_input, "prompts: ", path, " cannot be opened (", std::strerror(errno), ")");
  std::string text;
  char piece[65536];
  for (;;) {
    const ssize_t n = ::read(fd, piece, sizeof piece);
    if (n < 0 && errno == EINTR && interrupted.load() == 0) continue;
    if (n < 0 && errno != EINTR) fail(exit_input, "prompts: ", path, " cannot be read (", std::strerror(errno), ")");
    if (n <= 0) break;
    text.append(piece, static_cast<std::size_t>(n));
    if (text.size() > (std::size_t{1} << 30)) fail(exit_input, "prompts: more than a gigabyte");
  }
  if (fd != 0) ::close(fd);
  return text;
}

/// A file appears under its name only when it is complete.
void writeFile(const std::string &path, const std::string &text) {
  const std::string part = path + ".part";
  std::FILE *f = std::fopen(part.c_str(), "we");
  bool good = f && std::fwrite(text.data(), 1, text.size(), f) == text.size();
  if (f) good = std::fclose(f) == 0 && good;
  if (!good || std::rename(part.c_str(), path.c_str()) != 0) {
    const int why = errno;
    ::unlink(part.c_str());
    fail(exit_input, path, ": cannot be written (", std::strerror(why), ")");
  }
}

int run(int argc, char **argv) {
  Options o = readArguments(argc, argv);
  if (o.help) {
    std::fputs(usage, stdout);
    return exit_done;
  }
  const Bundle bundle = Bundle::open(o.bundle);
  LaunchOptions launch;
  if (!o.role.empty()) {
    launch.only = RankId{o.role == "attention" ? Role::attention : Role::ffn, static_cast<std::uint32_t>(*o.rank)};
    const std::uint32_t count = launch.only->role == Role::attention ? bundle.manifest.attention : bundle.manifest.ffn;
    if (*o.rank >= count) misused(say("--rank ", *o.rank, ": the bundle has ", count, " ", o.role, " ranks"));
  }
  launch.transport = o.transport == "cuda" ? cudaTransport() : o.transport == "shm" ? shmTransport() : localTransport();
  launch.processes = o.transport == "shm" && o.role.empty();
  launch.interrupted = &interrupted;
  if (!o.peers.empty()) o.engine.session = JsonFile::read(o.peers, o.peers, 1 << 20)["session"].text();
  if (o.engine.session.empty()) o.engine.session = say("run-", ::getpid(), "-", std::random_device{}());
  // a team larger than the machine spins in vain
  const std::uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  o.engine.threads = static_cast<std::uint32_t>(o.threads.value_or(std::max(1u, cores / bundle.ranks())));
  o.engine.spin = o.engine.threads * bundle.ranks() <= cores ? 4000 : 100;
  o.engine.trace = !o.trace.empty();
  o.engine.count = !o.stats.empty();
  launch.engine = o.engine;

  const bool attends = !launch.only || launch.only->role == Role::attention;
  std::vector<Prompt> prompts;
  if (!o.eval && attends) prompts = readPrompts(readAll(o.prompts), o.defaults, bundle, o.score);

  std::mutex mutex;
  bool closed = false;
  const auto print = [&](const std::string &lines) {
    const std::lock_guard lock(mutex);
    const char *at = lines.data();
    std::size_t n = lines.size();
    while (n > 0 && !closed) {
      const ssize_t wrote = ::write(1, at, n);
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote <= 0) {
        // nobody reads any more: end as if interrupted
        closed = true;
        interrupted.fetch_add(1);
        return;
      }
      at += wrote;
      n -= static_cast<std::size_t>(wrote);
    }
  };
  const auto work = [&](std::function<void(const std::string &)> events) -> RankWork {
    return [&, events = std::move(events)](Engine &engine, Report &report) {
      if (o.eval) {
        evaluate(engine, {o.inputs, o.outputs, *o.rows, o.symbols});
        return int{exit_done};
      }
      if (engine.rank().role == Role::ffn) {
        const std::int64_t from = now();
        serve(engine);
        report.run_ms = static_cast<double>(now() - from) / 1e6;
        return int{exit_done};
      }
      GenerateOptions g;
      g.score = o.score;
      g.logits = o.logits;
      g.interrupted = &interrupted;
      g.events = events;
      Generator generator(engine, prompts, g);
      const bool clean = generator.run();
      report = generator.report;
      return int{clean ? exit_done : exit_input};
    };
  };
  const Outcome outcome = Launcher(bundle, launch).run(work, print);
  if (!outcome.error.empty()) fail(outcome.code, outcome.error);
  if (outcome.code != exit_done && outcome.code != exit_input) return outcome.code;
  if (!o.stats.empty()) writeFile(o.stats, statsJson(outcome.reports, bundle) + "\n");
  if (!o.trace.empty()) {
    std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
    for (std::size_t i = 0; i < outcome.traces.size(); i++) text += (i ? ",\n" : "") + outcome.traces[i];
    writeFile(o.trace, text + "\n]}\n");
  }
  if (closed) fail(exit_input, "standard output was closed before all was written");
  return outcome.code;
}

}  // namespace
}  // namespace s3

int main(int argc, char **argv) {
  using namespace s3;
  handle(SIGINT, onInterrupt);
  handle(SIGTERM, onInterrupt);
  handle(SIGPIPE, SIG_IGN);
  if (!sanitized)
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) handle(signal, onCrash);
  int code = exit_internal;
  std::string why;
  try {
    code = run(argc, argv);
  } catch (const Failure &e) {
    code = e.code;
    why = e.what();
  } catch (const std::bad_alloc &) {
    code = exit_input;
    why = "out of memory; use more ranks, or a smaller batch or context";
  } catch (const std::exception &e) {
    why = say("internal error: ", e.what());
  }
  if (!why.empty()) {
    std::replace(why.begin(), why.end(), '\n', ' ');
    std::fprintf(stderr, "step3-run: %s\n", why.c_str());
  }
  if (interrupted.load() > 0 && (why.empty() || code == exit_peer)) {
    // end as a program does that did not catch the signal, so that the shell knows
    if (why.empty()) std::fputs("step3-run: interrupted\n", stderr);
    handle(SIGINT, SIG_DFL);
    ::raise(SIGINT);
  }
  return code;
}
