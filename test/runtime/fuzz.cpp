// Reads spoiled bundles in one process, many thousand times: whatever the bytes, the reader says no in words or says yes; it never falls.
// usage: fuzz BUNDLE WORK SECONDS SEED
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>

#include "bundle.h"
#include "error.h"
#include "generate.h"
#include "weights.h"

namespace {

std::string slurp(const std::filesystem::path &path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  const std::filesystem::path from = argv[1], work = argv[2];
  std::mt19937 random(static_cast<unsigned>(std::stoul(argv[4])));
  std::vector<std::filesystem::path> files;
  for (const auto &entry : std::filesystem::recursive_directory_iterator(from))
    if (entry.is_regular_file() && entry.path().filename() != "COMPLETE") files.push_back(std::filesystem::relative(entry.path(), from));
  std::sort(files.begin(), files.end());
  std::filesystem::remove_all(work);
  std::filesystem::copy(from, work, std::filesystem::copy_options::recursive);
  const std::string prompts = R"({"prompt_ids":[1,2,3],"max_tokens":8,"temperature":0.5,"top_p":0.9,"seed":1})" "\n";
  const std::string alphabet = "0123456789-+.eE\"{}[],:\\ utrnTfalse*/()";

  const std::int64_t end = s3::now() + std::stoll(argv[3]) * 1000000000;
  std::uint64_t runs = 0, refused = 0;
  while (s3::now() < end) {
    const auto &file = files[random() % files.size()];
    const std::string whole = slurp(from / file);
    std::string text = whole;
    for (unsigned n = 1 + random() % 3; n > 0; n--) {
      const std::size_t at = random() % text.size();
      switch (random() % 5) {
        case 0: text[at] = static_cast<char>(random()); break;
        case 1: text[at] = alphabet[random() % alphabet.size()]; break;
        case 2: text[at] = static_cast<char>(text[at] ^ (1 << random() % 8)); break;
        case 3: text.erase(at, 1 + random() % 16); break;
        default: text.insert(at, text.substr(random() % text.size(), 1 + random() % 16)); break;
      }
      if (text.empty()) text = "x";
    }
    std::ofstream(work / file, std::ios::binary) << text;
    try {
      const s3::Bundle bundle = s3::Bundle::open(work);
      for (std::uint32_t r = 0; r < bundle.ranks(); r++)
        for (const s3::Schedule &s : bundle.schedules) {
          const s3::RankProgram &p = s.program(bundle.rank(r));
          std::vector<std::uint8_t> region(p.memory[0]);
          s3::WeightsTarget target;
          target.direct = region.data();
          s3::loadWeights(bundle, p, target);
        }
      std::string line = prompts;
      line[random() % line.size()] = static_cast<char>(random());
      s3::readPrompts(line, {}, bundle, false);
    } catch (const s3::Failure &e) {
      refused++;
      if (e.code != s3::exit_input || std::string(e.what()).find('\n') != std::string::npos) {
        std::cerr << file << ": " << e.what() << "\n";
        return 1;
      }
    }
    std::ofstream(work / file, std::ios::binary) << whole;
    runs++;
  }
  std::cout << runs << " spoiled bundles, " << refused << " refused\n";
  return 0;
}
