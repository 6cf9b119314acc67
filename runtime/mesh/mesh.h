// The transports that are built in.
#pragma once
#include "../step3.h"

namespace s3 {

/// one process, a thread for every rank
const s3_transport *localTransport();
/// one host, a process for every rank
const s3_transport *shmTransport();
/// the same, for devices that copy into each other's memory
const s3_transport *cudaTransport();

}  // namespace s3
