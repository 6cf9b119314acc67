// --strict: a rank watches itself keep the contracts K1 to K6 of the exchange library that the schedule is made for. They are kept by
// construction and proven by the checker; this is for schedules and kernels under suspicion. It costs a checksum of everything that travels.
//
//   K1 a push source is one buffer for ever, and is not touched while its exchange is in flight
//   K2 a receive slot is not overwritten before it was consumed: no second post before the wait, no reading after the reply
//   K3 both ends of a key have one length (checked whenever a bundle is read and ranks meet)
//   K4 every post reaches all FFN ranks, every launch on a slot follows its acceptance from all attention ranks
//   K5 a wait stands for all replies: nothing reads replies before it, every post is waited for, every accept replied to
//   K6 a reply buffer is not touched until the slot's next push has come
//
// A buffer is concerned only by exchanges whose type carries it: what another exchange brought stays good until its own key is used again.
// Memory that holds nothing any more is filled with 0xFF (NaN in every float type), so that a kernel that reads it is seen in the result.
#pragma once
#include <functional>

#include "bundle.h"
#include "step3.h"

namespace s3 {

class Strict {
 public:
  /// `host` gives the address of a buffer
  Strict(const Schedule &schedule, const RankProgram &program, std::uint32_t attention, std::function<std::uint8_t *(const Buffer &)> host);

  void begin();
  void beforeLaunch(std::size_t step);
  void afterLaunch(std::size_t step);
  void beforePost(std::size_t step);  // the header is written
  void afterWait(std::size_t step);
  void beforeAccept(std::size_t step);
  void afterAccept(std::size_t step);
  void beforeReply(std::size_t step);
  void end();

 private:
  struct Sum {
    const Key *key = nullptr;
    const std::uint8_t *at = nullptr;
    std::uint64_t bytes = 0, sum = 0;
  };
  struct Slot {  // of an attention rank, or of an FFN rank with one attention rank
    bool busy = false;  // posted, or accepted
    std::size_t step = 0;
    std::uint32_t exchange = 0, type = 0;
    std::vector<Sum> sent, received;
  };

  const Schedule &schedule_;
  const RankProgram &program_;
  const bool attention_;
  const std::uint32_t peers_;  // FFN rank: attention ranks; attention rank: 1
  std::function<std::uint8_t *(const Buffer &)> host_;
  struct Use {
    int slot = -1;            // whose messages leave from the buffer, or arrive in it
    std::uint64_t types = 0;  // of the exchanges that carry it
    bool carried(std::uint32_t type) const { return types >> type & 1; }
  };
  std::vector<Use> sends_, receives_;             // by buffer
  std::vector<std::vector<std::uint32_t>> dies_;  // by step: scratch buffers that no later step uses
  std::vector<Slot> slots_;

  Slot &slot(std::uint32_t slot, std::uint32_t peer) { return slots_[static_cast<std::size_t>(slot) * peers_ + peer]; }
  std::vector<Sum> sums(std::uint32_t slot, std::uint32_t peer, std::uint32_t type, bool pushes, bool once) const;
  void verify(const std::vector<Sum> &sums, std::uint32_t slot, std::size_t step, const char *contract, const char *what) const;
  void poison(const Buffer &b) const;
  std::string about(std::size_t step) const;
  template <class... Parts>
  [[noreturn]] void violated(const char *contract, std::uint32_t slot, std::size_t step, const Parts &...parts) const;
};

}  // namespace s3
