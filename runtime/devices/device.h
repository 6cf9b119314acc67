// The device drivers that are built in.
#pragma once
#include <string>

#include "../step3.h"

namespace s3 {

/// the host's processor, running a shared library of kernels
const s3_device *cppDevice();

/// The kernel that this thread is running, for the message of a crash; null when it runs none.
extern thread_local const char *volatile running_kernel;

}  // namespace s3
