// Memory of the host that a driver hands out: private, or shared with other processes through a descriptor.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include "error.h"
#include "step3.h"

namespace s3 {

struct HostMemory {
  void *address = nullptr;
  std::uint64_t bytes = 0;
  int fd = -1;  // of shared memory

  static constexpr std::uint64_t page = 4096, huge = 2u << 20;

  /// Zeroed, at a page. Throws a Failure when there is none.
  static HostMemory map(std::uint64_t bytes, bool shared) {
    HostMemory m;
    m.bytes = (std::max<std::uint64_t>(bytes, 1) + page - 1) / page * page;
    if (shared) {
      m.fd = ::memfd_create("step3c-exchange", MFD_CLOEXEC | MFD_ALLOW_SEALING);
      if (m.fd < 0 || ::ftruncate(m.fd, static_cast<off_t>(m.bytes)) != 0) {
        const int why = errno;
        if (m.fd >= 0) ::close(m.fd);
        fail(exit_input, "no ", m.bytes, " bytes of shared memory (", std::strerror(why), ")");
      }
      ::fcntl(m.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    }
    m.address = ::mmap(nullptr, m.bytes, PROT_READ | PROT_WRITE, shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, m.fd, 0);
    if (m.address == MAP_FAILED) {
      const int why = errno;
      if (m.fd >= 0) ::close(m.fd);
      fail(exit_input, "no ", m.bytes, " bytes of memory (", std::strerror(why), "); use more ranks or a smaller batch or context");
    }
    if (!shared && m.bytes >= huge) ::madvise(m.address, m.bytes, MADV_HUGEPAGE);
    return m;
  }
  void unmap() const {
    ::munmap(address, bytes);
    if (fd >= 0) ::close(fd);
  }
  /// whether `bytes` from an address on lie in it
  bool holds(std::uint64_t from, std::uint64_t n) const {
    const auto base = reinterpret_cast<std::uint64_t>(address);
    return from >= base && from - base <= bytes && n <= bytes - (from - base);
  }
};

/// What share() of a driver writes for a span of addresses: 0, or the exit code with the reason in `why`.
inline int describeShared(const std::vector<HostMemory> &all, s3_span span, void *token, std::uint32_t *bytes, std::string &why) {
  if (*bytes < sizeof(s3_share)) {
    why = "share: the token is too small";
    return exit_internal;
  }
  const std::uint64_t from = span.mem + span.off;
  for (const HostMemory &m : all) {
    if (m.fd < 0 || !m.holds(from, span.bytes)) continue;
    const s3_share share = {m.fd, 0, from - reinterpret_cast<std::uint64_t>(m.address), span.bytes};
    std::memcpy(token, &share, sizeof share);
    *bytes = sizeof share;
    return 0;
  }
  why = "share: not shared memory of this device";
  return exit_internal;
}

}  // namespace s3
