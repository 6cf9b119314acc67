// Puts a rank's packed weights where its schedule wants them: from weights/RANK.safetensors, or, for a bundle without weights, from a seeded
// generator (constants such as rope tables are always in weights/constants.safetensors).
#pragma once
#include <functional>

#include "bundle.h"

namespace s3 {

/// Where the weights go: `direct` is the region's address where the host can reach it, else null and `write` takes pieces.
struct WeightsTarget {
  std::uint8_t *direct = nullptr;
  std::function<void(std::uint64_t offset, const std::uint8_t *bytes, std::uint64_t n)> write;
};

/// Throws a Failure (exit 1) that names the file and the tensor when they do not fit the schedule.
void loadWeights(const Bundle &bundle, const RankProgram &program, const WeightsTarget &target);

/// What tells two ranks' weights apart: equal text, equal bytes in the region.
std::string weightsIdentity(const Bundle &bundle, const RankProgram &program);

/// Fills `n` bytes with small normal-ish values of a dtype, the same for the same seed and name on every machine.
void drawWeights(std::uint8_t *bytes, std::uint64_t n, const std::string &dtype, std::uint64_t seed, const std::string &name);

}  // namespace s3
