// Messages that devices copy into each other's memory by themselves, in the order of their queues. For every peer a rank has a queue of its own:
// it goes on when the kernels before a message have ended, copies its tensors and its header, and then the header's sequence into a flag of the
// receiver's. The receiver's launches wait in their queue for that flag. The host waits only where a round ends. Copies are the same in every
// round, so they are segments, prepared once.
//
// Tensors travel at their full size: how many rows there are, an FFN rank's host does not know.
#pragma once
#include "board.h"

namespace s3 {

class DirectMesh final : public Mesh {
 public:
  using Mesh::Mesh;

  /// Flags and queues; before ranks meet.
  int prepare();
  s3_span flags{};               // of this rank, a line for every schedule, peer and slot: what peers write
  std::vector<s3_span> remote;   // of the other ranks

  int ready() override;
  int post(const s3_exchange &x, const s3_head &head, s3_event after) override;
  int await(const s3_exchange &x, s3_queue *queue, std::uint32_t ms) override;
  int accept(const s3_exchange &x, std::uint32_t from, s3_queue *queue, std::uint32_t ms) override;
  int reply(const s3_exchange &x, std::uint32_t to, s3_event after) override;
  /// Until the queue of the launches has done all that it was given.
  int settle(s3_queue *queue, std::uint32_t ms);
  /// What waits for a message that will never come goes on, so that the queues end. For when the round is lost.
  void release();

 private:
  std::vector<s3_queue *> queues_;  // by peer of the other side
  s3_queue *rescue_ = nullptr;      // which nothing holds up
  s3_queue *launches_ = nullptr;    // the last one that waited for a message
  s3_span headers_{};               // a line for every schedule, peer and slot: headers on their way
  s3_span ever_{};                  // a sequence that ends every wait
  std::vector<std::vector<s3_segment *>> messages_;  // by index() and type of exchange: the copies, flag last
  s3_segment *release_ = nullptr;
  bool released_ = false;

  int device(int code);
  int expect(const s3_exchange &x, std::uint32_t peer, s3_queue *queue);
  std::vector<s3_copy> copiesOf(std::size_t i, std::uint32_t type, s3_span flag) const;
  int send(const s3_exchange &x, std::uint32_t peer, s3_event after);
};

}  // namespace s3
