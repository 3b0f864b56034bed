// The index facts of csrc/hopper/layout.h as plain C functions.
#include "hopper/layout.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED uint32_t swizzled(uint32_t row, uint32_t chunk) { return hopper::swizzled(row, chunk); }
EXPORTED uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) { return hopper::descriptor(address, leading, stride); }
EXPORTED uint64_t moved(uint64_t descriptor, uint32_t bytes) { return hopper::moved(descriptor, bytes); }
EXPORTED int fragment_row(int thread, int i) { return hopper::fragment_row(thread, i); }
EXPORTED int fragment_column(int thread, int i) { return hopper::fragment_column(thread, i); }
