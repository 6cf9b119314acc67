// Shared libraries of programs, drivers and transports.
#pragma once
#include <string>

namespace s3 {

/// Loads a library, which stays loaded. Throws a Failure that says why it cannot be.
void *loadLibrary(const std::string &path);

/// What a library has under a name.
void *findSymbol(void *library, const char *name);

/// A function of a library, or null when it has none of that name.
template <class Function>
Function symbol(const std::string &path, const char *name) {
  return reinterpret_cast<Function>(findSymbol(loadLibrary(path), name));
}

}  // namespace s3
