// Messages through memory that the host reaches: the sending rank's thread copies them, and the receiving one waits for their sequence.
#pragma once
#include "board.h"

namespace s3 {

class HostMesh final : public Mesh {
 public:
  using Mesh::Mesh;
  int bind(const s3_key &key) override;
  int post(const s3_exchange &x, const s3_head &head, s3_event after) override;
  int await(const s3_exchange &x, s3_queue *, std::uint32_t ms) override;
  int accept(const s3_exchange &x, std::uint32_t from, s3_queue *, std::uint32_t ms) override;
  int reply(const s3_exchange &x, std::uint32_t to, s3_event after) override;

 private:
  Line &line(Board &board, std::uint32_t schedule, std::uint32_t peer, std::uint32_t slot) const;
  int finished(s3_event after);
  int send(const Route &route, const s3_exchange &x, const s3_head &head, std::uint32_t to);
};

}  // namespace s3
