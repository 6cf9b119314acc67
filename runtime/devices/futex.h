// Waiting that is quick when the wait is short and gives the processor away when it is not: a team of threads, and two ranks on one
// machine, may well have more threads than there are cores.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <ctime>

namespace s3 {

using Word = std::atomic<std::uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

/// Sleeps while the word has this value, at most `ms` (0: without end). May return early. Works between processes too.
inline void futexWait(Word &word, std::uint32_t value, std::uint32_t ms) {
  timespec limit{static_cast<time_t>(ms / 1000), static_cast<long>(ms % 1000) * 1000000};
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t *>(&word), FUTEX_WAIT, value, ms ? &limit : nullptr, nullptr, 0);
}
inline void futexWake(Word &word, int threads = INT32_MAX) {
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t *>(&word), FUTEX_WAKE, threads, nullptr, nullptr, 0);
}
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// A word that changes, and whether anyone sleeps until it does.
struct Bell {
  Word word{0}, sleepers{0};

  void ring() {
    word.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) != 0) futexWake(word);
  }

  /// Until `done()`: spins, then sleeps in slices of `slice` ms. After each slice asks `give_up()`, and returns false when that is true.
  template <class Done, class GiveUp>
  bool wait(std::uint32_t spin, std::uint32_t slice, Done done, GiveUp give_up) {
    for (std::uint32_t i = 0; i < spin; i++) {
      if (done()) return true;
      relax();
    }
    for (;;) {
      const std::uint32_t now = word.load(std::memory_order_seq_cst);
      sleepers.fetch_add(1, std::memory_order_seq_cst);
      const bool there = done();
      if (!there) futexWait(word, now, slice);
      sleepers.fetch_sub(1, std::memory_order_seq_cst);
      if (there || done()) return true;
      if (give_up()) return done();
    }
  }
};

}  // namespace s3
