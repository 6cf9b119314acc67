#include "library.h"

#include <dlfcn.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>

#include "error.h"

namespace s3 {

void *loadLibrary(const std::string &path) {
  if (path.empty()) fail(exit_usage, "the program of this side is not given; use --program-attention and --program-ffn");
  // a full path, so that the loader does not search for it
  char full[PATH_MAX];
  if (!::realpath(path.c_str(), full)) fail(exit_input, path, ": not there (", std::strerror(errno), "); build the bundle's programs first");
  void *library = ::dlopen(full, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(exit_input, path, ": cannot be loaded (", ::dlerror(), "); build the bundle's programs again");
  return library;
}

void *findSymbol(void *library, const char *name) { return ::dlsym(library, name); }

}  // namespace s3
