// --eval: one round of a graph on tensors from files, whatever the graph is.
#pragma once
#include <map>
#include <string>

#include "engine.h"

namespace s3 {

struct EvaluateOptions {
  std::string inputs, outputs;  // directories of NAME.bin, raw little-endian; / in a name becomes _
  std::uint64_t rows = 0;       // value of symbol T
  std::map<std::string, std::uint64_t> symbols;  // values of the others
};

/// Runs the schedule `main` (or the only one) once on attention rank 0, whose slot 0 gets the rows; other ranks and slots get none.
/// Throws a Failure (exit 1) that names the symbol whose value is missing or out of range, the tensor whose file is missing or has another size. Outputs appear when all are complete.
void evaluate(Engine &engine, const EvaluateOptions &options);

}  // namespace s3
