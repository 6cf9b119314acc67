#include "trace.h"

#include <ctime>

#include "error.h"
#include "json.h"

namespace s3 {

std::int64_t now() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

std::string Trace::json(std::int64_t zero) const {
  std::string text = say("{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":", pid, ",\"args\":{\"name\":", jsonText(rank), "}}");
  for (std::uint32_t slot = 0; slot <= slots; slot++)
    text += say(",{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":", pid, ",\"tid\":", slot, ",\"args\":{\"name\":",
                jsonText(slot == slots ? std::string("rounds") : say("slot ", slot)), "}}");
  for (const TraceEvent &e : events) {
    text += say(",{\"ph\":\"X\",\"name\":", jsonText(names[e.name]), ",\"pid\":", pid, ",\"tid\":", e.slot, ",\"ts\":",
                jsonNumber(static_cast<double>(e.from - zero) / 1000), ",\"dur\":", jsonNumber(static_cast<double>(e.to - e.from) / 1000),
                ",\"args\":{\"round\":", e.round);
    if (e.step >= 0) text += say(",\"step\":", e.step);
    if (e.exchange >= 0) text += say(",\"exchange\":", e.exchange);
    text += "}}";
  }
  return text;
}

}  // namespace s3
