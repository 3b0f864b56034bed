// Tensors in global memory, with as many elements as there are: the emulation checks every access.
#pragma once
#include <cstdint>

#include "layout.h"

namespace hopper {

template <class T>
struct Global {
    T* data;
    int64_t count;
};

template <class T>
HOPPER_BOTH constexpr Global<const T> as_const(const Global<T>& x) {
    return {x.data, x.count};
}

// [tokens, heads, dim], columns side by side; strides in elements.
template <class T>
struct Rows {
    Global<T> all;
    int64_t token_stride, head_stride;
};

struct alignas(8) Pair {
    int x, y;
};
struct alignas(16) Chunk {
    uint32_t x, y, z, w;
};

}  // namespace hopper
