#include "weights.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <thread>
#include <vector>

#include "error.h"

namespace s3 {

namespace {

class SafeTensors {
 public:
  struct Tensor {
    std::uint64_t from = 0, bytes = 0;  // from: in the file
  };

  SafeTensors(const std::string &directory, const std::string &name) : name_(name) {
    fd_ = ::open((directory + "/" + name).c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) fail(exit_input, name, ": cannot be opened (", std::strerror(errno), "); is the bundle complete?");
    try {
      readHeader();
    } catch (...) {
      ::close(fd_);
      throw;
    }
  }
  SafeTensors(const SafeTensors &) = delete;
  SafeTensors &operator=(const SafeTensors &) = delete;
  ~SafeTensors() { ::close(fd_); }

  const Tensor *find(const std::string &tensor) const {
    const auto found = tensors_.find(tensor);
    return found == tensors_.end() ? nullptr : &found->second;
  }
  const std::string &name() const { return name_; }

  void read(std::uint64_t from, std::uint8_t *to, std::uint64_t n) const {
    while (n > 0) {
      const ssize_t got = ::pread(fd_, to, std::min<std::uint64_t>(n, 1u << 30), static_cast<off_t>(from));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(exit_input, name_, ": cannot be read (", std::strerror(errno), ")");
      if (got == 0) fail(exit_input, name_, ": ends early; copy the bundle again");
      to += got;
      from += static_cast<std::uint64_t>(got);
      n -= static_cast<std::uint64_t>(got);
    }
  }

 private:
  std::string name_;
  int fd_ = -1;
  std::unordered_map<std::string, Tensor> tensors_;

  void readHeader() {
    struct stat st {};
    if (::fstat(fd_, &st) != 0 || !S_ISREG(st.st_mode)) fail(exit_input, name_, ": not a regular file");
    const auto size = static_cast<std::uint64_t>(st.st_size);
    if (size < 8) fail(exit_input, name_, ": too short for a safetensors file");
    std::uint8_t first[8];
    read(0, first, 8);
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | first[i];
    if (length > size - 8 || length > (100u << 20)) fail(exit_input, name_, ": its header claims ", length, " bytes, the file has ", size);
    std::string text(length, '\0');
    read(8, reinterpret_cast<std::uint8_t *>(text.data()), length);
    const std::uint64_t data = size - 8 - length;
    const JsonFile json = JsonFile::parse(text, name_);
    std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
    for (const auto &[tensor, v] : json.root().members()) {
      if (tensor == "__metadata__") continue;
      v["dtype"].text();
      v["shape"].items();
      const auto &offsets = v["data_offsets"].items();
      if (offsets.size() != 2) v["data_offsets"].refuse("a tensor has two data offsets");
      const auto begin = static_cast<std::uint64_t>(offsets[0].whole()), end = static_cast<std::uint64_t>(offsets[1].whole());
      if (begin > end || end > data) v["data_offsets"].refuse(say("tensor '", tensor, "' lies outside the ", data, " bytes of data"));
      tensors_.emplace(tensor, Tensor{8 + length + begin, end - begin});
      ranges.emplace_back(begin, end);
    }
    std::sort(ranges.begin(), ranges.end());
    std::uint64_t at = 0;
    for (const auto &[begin, end] : ranges) {
      if (begin != at) fail(exit_input, name_, ": tensors overlap or leave a gap at byte ", at, " of the data");
      at = end;
    }
    if (at != data) fail(exit_input, name_, ": ", data - at, " bytes at its end belong to no tensor");
  }
};

const WeightsFile *fileOf(const Bundle &b, RankId rank) {
  const char *role = roleName(rank.role);
  const std::string index = std::to_string(rank.index);
  for (const std::string &name : {rank.name(), role + index, std::string(role)})
    for (const WeightsFile &w : b.manifest.weights)
      if (w.rank == name) return &w;
  return nullptr;
}

const std::string &tensorOf(const Buffer &b) { return b.binds.empty() ? b.name : b.binds; }

constexpr std::uint64_t mix(std::uint64_t z) {  // splitmix64's finaliser
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

/// About normal, deviation 1: the sum of the eight bytes of a hash.
inline double normal(std::uint64_t key, std::uint64_t i) {
  const std::uint64_t h = mix(key + i * 0x9E3779B97F4A7C15u);
  // bytes added pairwise inside the word
  std::uint64_t s = (h & 0x00FF00FF00FF00FFu) + (h >> 8 & 0x00FF00FF00FF00FFu);
  s = (s * 0x0001000100010001u) >> 48;
  return (static_cast<double>(s) - 1020.0) * (1.0 / 209.0);  // deviation of the sum of 8 uniform bytes
}

std::uint16_t bf16(float f) {
  const auto u = std::bit_cast<std::uint32_t>(f);
  return static_cast<std::uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

std::uint16_t f16(float f) {  // |f| is far below the largest half
  const auto u = std::bit_cast<std::uint32_t>(f);
  const auto sign = static_cast<std::uint16_t>(u >> 16 & 0x8000);
  const int exponent = static_cast<int>(u >> 23 & 0xFF) - 112;
  if (exponent <= 0) return sign;  // small enough to be nothing
  const std::uint32_t half = (static_cast<std::uint32_t>(exponent) << 10) | (u >> 13 & 0x3FF);
  return static_cast<std::uint16_t>(sign | (half + (u >> 12 & 1)));
}

/// e4m3 or e5m2 of a value of moderate size, cut to its leading bits
std::uint8_t f8(float f, int fraction, int bias) {
  const auto u = std::bit_cast<std::uint32_t>(f);
  const auto sign = static_cast<std::uint8_t>(u >> 24 & 0x80);
  const int exponent = static_cast<int>(u >> 23 & 0xFF) - 127 + bias;
  if (exponent <= 0) return sign;
  return static_cast<std::uint8_t>(sign | exponent << fraction | static_cast<int>(u >> (23 - fraction) & ((1u << fraction) - 1)));
}

/// Elements by their index, large tensors by all processors.
template <class T, class Make>
void each(std::uint8_t *bytes, std::uint64_t n, Make make) {
  constexpr std::uint64_t part = 1u << 20;
  const std::uint64_t count = n / sizeof(T);
  const auto range = [&](std::uint64_t from, std::uint64_t to) {
    for (std::uint64_t i = from; i < to; i++) {
      const T v = make(i);
      std::memcpy(bytes + i * sizeof(T), &v, sizeof(T));
    }
  };
  const std::uint64_t threads = std::min<std::uint64_t>(std::max(1u, std::thread::hardware_concurrency()), count / part + 1);
  std::vector<std::thread> others;
  for (std::uint64_t t = 1; t < threads; t++) others.emplace_back(range, count * t / threads, count * (t + 1) / threads);
  range(0, count / threads);
  for (std::thread &other : others) other.join();
}

}  // namespace

void drawWeights(std::uint8_t *bytes, std::uint64_t n, const std::string &dtype, std::uint64_t seed, const std::string &name) {
  std::uint64_t key = seed ^ 0xCBF29CE484222325u;
  for (const char c : name) key = (key ^ static_cast<std::uint8_t>(c)) * 0x100000001B3u;
  key = mix(key);
  constexpr double small = 0.02;
  const auto value = [key](std::uint64_t i) { return normal(key, i); };
  if (dtype == "f64") each<double>(bytes, n, [&](auto i) { return small * value(i); });
  else if (dtype == "f32") each<float>(bytes, n, [&](auto i) { return static_cast<float>(small * value(i)); });
  else if (dtype == "bf16") each<std::uint16_t>(bytes, n, [&](auto i) { return bf16(static_cast<float>(small * value(i))); });
  else if (dtype == "f16") each<std::uint16_t>(bytes, n, [&](auto i) { return f16(static_cast<float>(small * value(i))); });
  // codes of quantised weights: their scales, f32, are small
  else if (dtype == "e4m3") each<std::uint8_t>(bytes, n, [&](auto i) { return f8(static_cast<float>(value(i)), 3, 7); });
  else if (dtype == "e5m2") each<std::uint8_t>(bytes, n, [&](auto i) { return f8(static_cast<float>(value(i)), 2, 15); });
  else if (dtype == "i8") each<std::int8_t>(bytes, n, [&](auto i) { return static_cast<std::int8_t>(16 * value(i)); });
  else std::memset(bytes, 0, n);
}

std::string weightsIdentity(const Bundle &b, const RankProgram &p) {
  const WeightsFile *file = fileOf(b, p.rank);
  std::string text = !file ? p.rank.name() : file->file ? *file->file : say("seed ", file->seed);
  for (const Buffer &buffer : p.buffers)
    if (buffer.region == Region::weights) text += say(';', tensorOf(buffer), ':', buffer.dtype, '@', buffer.offset, '+', buffer.bytes);
  return text;
}

void loadWeights(const Bundle &b, const RankProgram &p, const WeightsTarget &target) {
  std::vector<const Buffer *> wanted;
  for (const Buffer &buffer : p.buffers)
    if (buffer.region == Region::weights && buffer.bytes > 0) wanted.push_back(&buffer);
  if (wanted.empty()) return;
  const WeightsFile *facts = fileOf(b, p.rank);
  if (!facts) fail(exit_input, "manifest.json: no weights for rank ", p.rank.name(), "; compile the bundle again");

  std::optional<SafeTensors> file;
  struct stat st {};
  if (facts->file) file.emplace(b.path, *facts->file);
  else if (::stat((b.path + "/weights/constants.safetensors").c_str(), &st) == 0) file.emplace(b.path, "weights/constants.safetensors");

  constexpr std::uint64_t piece = 16u << 20;
  std::vector<std::uint8_t> staging;
  for (const Buffer *buffer : wanted) {
    const std::string &name = tensorOf(*buffer);
    const SafeTensors::Tensor *tensor = file ? file->find(name) : nullptr;
    if (facts->file && !tensor) fail(exit_input, file->name(), ": tensor '", name, "' is missing; compile the bundle again");
    if (tensor && tensor->bytes != buffer->bytes)
      fail(exit_input, file->name(), ": tensor '", name, "' has ", tensor->bytes, " bytes, the schedule wants ", buffer->bytes,
           "; compile the bundle again");
    if (tensor && target.direct) {
      file->read(tensor->from, target.direct + buffer->offset, buffer->bytes);
    } else if (tensor) {
      staging.resize(std::min(piece, buffer->bytes));
      for (std::uint64_t at = 0; at < buffer->bytes; at += piece) {
        const std::uint64_t n = std::min(piece, buffer->bytes - at);
        file->read(tensor->from + at, staging.data(), n);
        target.write(buffer->offset + at, staging.data(), n);
      }
    } else if (target.direct) {
      drawWeights(target.direct + buffer->offset, buffer->bytes, buffer->dtype, facts->seed, name);
    } else {
      staging.resize(buffer->bytes);
      drawWeights(staging.data(), buffer->bytes, buffer->dtype, facts->seed, name);
      target.write(buffer->offset, staging.data(), buffer->bytes);
    }
  }
}

}  // namespace s3
