// Index facts of Hopper's tensor cores, the same on the device and in the emulation: pure arithmetic.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HOPPER_BOTH __host__ __device__ __forceinline__
#else
#define HOPPER_BOTH inline
#endif

namespace hopper {

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows under the 128-byte swizzle; the tile
// starts at a multiple of 1,024 bytes.
HOPPER_BOTH constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

// Matrix descriptor: address, leading and stride byte offsets in units of 16 bytes, 128-byte swizzle (1 in bits 62-63).
HOPPER_BOTH constexpr uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t((leading_bytes & 0x3FFFF) >> 4) << 16 |
           uint64_t((stride_bytes & 0x3FFFF) >> 4) << 32 | uint64_t(1) << 62;
}

// The descriptor of what lies `bytes` further on: cheaper than one made anew.
HOPPER_BOTH constexpr uint64_t moved(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Where element i of a thread's accumulator fragment (m64nNk16, N/2 floats) lies in the 64 x N matrix. Two neighbouring
// blocks of 8 columns are the A fragment of a step of 16: weights become an operand where they are.
HOPPER_BOTH constexpr int fragment_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
HOPPER_BOTH constexpr int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace hopper
