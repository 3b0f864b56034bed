// What the host hands to a launch, on the device and in the emulation: plain addresses, sizes and strides.
#pragma once
#include "backward_tiles.h"
#include "shared_tiles.h"

namespace hopper {

// [tokens, heads, dim], columns side by side; strides in elements.
struct TensorView {
    void* data;
    int64_t tokens, heads, token_stride, head_stride;

    int64_t extent(int dim) const {  // elements from the first to behind the last
        return tokens && heads ? (tokens - 1) * token_stride + (heads - 1) * head_stride + dim : 0;
    }
    template <class T>
    Rows<T> rows(int dim) const {
        return {{static_cast<T*>(data), extent(dim)}, token_stride, head_stride};
    }
    int64_t numbers() const { return heads * tokens; }  // one a row
};

struct ForwardArguments {
    TensorView q, k, v, out;
    float* lse;  // [heads, tokens]
    Walk walk;   // from queries to keys
    Boxes boxes;
    float scale;  // of the scores; positive
    int dim;
    Mask mask;
    bool is_half;  // fp16, else bf16
};

// make_map(view, dim, rows): the tensor map whose boxes are 64 columns and so many tokens.
template <class T, class MakeMap>
AttentionForward<T> parameters(const ForwardArguments& x, MakeMap make_map) {
    return {
        make_map(x.q, x.dim, kQueries),
        make_map(x.k, x.dim, kKeys),
        make_map(x.v, x.dim, kKeys),
        x.out.rows<T>(x.dim),
        {x.lse, x.q.numbers()},
        x.walk,
        x.boxes,
        x.scale * 1.4426950408889634f,
        int(x.q.tokens),
        int(x.q.heads),
        int(x.q.heads / x.k.heads),
        x.dim,
    };
}

struct BackwardArguments {
    TensorView q, k, v, out, grad_out, grad_q, grad_k, grad_v;
    const float *lse, *grad_lse;  // [heads, tokens]; grad_lse: null where it is zero
    float *log2_lse, *delta;      // scratch, likewise
    Walk by_query, by_key;
    Boxes boxes;
    float scale;
    int dim;
    Mask mask;
    bool is_half;
};

template <class T, class MakeMap>
AttentionBackward<T> parameters(const BackwardArguments& x, const Walk& walk, MakeMap make_map) {
    int64_t numbers = x.q.numbers();
    return {
        make_map(x.q, x.dim, kRows),
        make_map(x.k, x.dim, kRows),
        make_map(x.v, x.dim, kRows),
        make_map(x.grad_out, x.dim, kRows),
        x.out.rows<const T>(x.dim),
        x.grad_out.rows<const T>(x.dim),
        x.grad_q.rows<T>(x.dim),
        x.grad_k.rows<T>(x.dim),
        x.grad_v.rows<T>(x.dim),
        {x.lse, numbers},
        {x.grad_lse, x.grad_lse ? numbers : 0},
        {x.log2_lse, numbers},
        {x.delta, numbers},
        walk,
        x.boxes,
        x.scale,
        x.scale * 1.4426950408889634f,
        int(x.q.tokens),
        int(x.k.tokens),
        int(x.q.heads),
        int(x.q.heads / x.k.heads),
        x.dim,
    };
}

// The narrowest form of a kernel that takes `dim` columns: columns that a tensor lacks are zeros on chip.
constexpr int kWidths[] = {64, 80, 96, 128};
inline int width_of(int dim) {
    for (int width : kWidths)
        if (dim <= width) return width;
    return 0;
}

}  // namespace hopper
