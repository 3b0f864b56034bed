// What a launch of attention gets: tensors, and the tile schedule that says which of their tiles meet.
#pragma once
#include "../primitives.h"

namespace hopper {

using Ints = Global<const int>;

// What pairs of tokens must be asked in tiles that a mask only partly allows: nothing (full masks have none), whether the
// key lies in the query's box, or that and whether it comes before it in raster order.
enum class Mask { full, boxes, causal_boxes };

// own, other [tiles + 1]: tile boundaries in tokens, of queries and of keys. begin, split, end, order [tiles]: of
// `TileLists` (lists: places in `tiles`) or of `TokenRanges` (tokens).
struct Walk {
    Ints own, other, begin, split, end, order, tiles;
    int num_tiles;
    bool lists;
};

// Packed coordinates and raster places, of queries and of keys.
struct Boxes {
    Ints low, high, place, raster;
};

template <class T>
struct AttentionForward {
    TensorMap q, k, v;  // (column, head, token); boxes of 64 columns and 128 tokens
    Rows<T> out;
    Global<float> lse;  // [heads, tokens]
    Walk walk;
    Boxes boxes;
    float scale;  // times log2 e; positive
    int num_tokens, num_heads, heads_a_key, dim;
};

// With P the weights and dS = P (dO Vᵀ - delta), delta = rowsum(dO O) - dlse: dV = Pᵀ dO, dQ = scale dS K, dK = scale dSᵀ Q.
template <class T>
struct AttentionBackward {
    TensorMap q, k, v, grad_out;  // as the forward's
    Rows<const T> out, grad_out_rows;
    Rows<T> grad_q, grad_k, grad_v;
    Global<const float> lse, grad_lse;   // [heads, tokens]; grad_lse: empty where it is zero
    Global<float> log2_lse, delta;       // written by the pass over queries, read by the one over keys
    Walk walk;                           // from queries to keys, or from keys to queries
    Boxes boxes;
    float scale, log2_scale;  // of the scores; times log2 e; positive
    int num_queries, num_keys, num_heads, heads_a_key, dim;
};

}  // namespace hopper
