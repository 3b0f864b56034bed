// What a kernel is written with: inline PTX for nvcc, the emulator for everything else. A kernel has no #ifdef, and
// touches shared and global memory through these functions alone.
#pragma once
#ifdef __CUDACC__
#include "primitives_device.cuh"
#else
#include "primitives_emulated.h"
#endif
