// The gradients of keys and values: a block owns tiles of K and V, and walks over the queries that meet them. All scores
// are transposed, keys by queries, so that weights are operands where they are.
#pragma once
#include "backward_query.h"

namespace hopper {

template <class T, Mask MASK, int DIM>
struct KeyValueGradient {
    using Tiles = BackwardTiles<DIM>;
    const AttentionBackward<T>& p;
    const Tiles& tiles;
    int group;

    float scores[kBlockRows / 2], grads[kBlockRows / 2], grad_k[DIM / 2], grad_v[DIM / 2];
    uint32_t weights[kBlockRows / 4], grad_weights[kBlockRows / 4];
    int place[2], raster[2];  // of the thread's two keys

    DEVICE KeyValueGradient(const AttentionBackward<T>& parameters, const Tiles& shared, int warpgroup)
        : p(parameters), tiles(shared), group(warpgroup) {}

    DEVICE void begin(const OwnBlock& block) {
        clear(grad_k);
        clear(grad_v);
        if (MASK != Mask::full && block.any_asked) load_places(block);
    }

    DEVICE void load_places(const OwnBlock& block) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            int key = block.start + fragment_row(thread_index() % 128, 2 * row);
            bool exists = key < block.stop;
            place[row] = exists ? load_global(p.boxes.place, key) : 0;
            if (MASK == Mask::causal_boxes) raster[row] = exists ? load_global(p.boxes.raster, key) : 0;
        }
    }

    // Of the queries from `first` on; word: of two neighbouring ones.
    DEVICE Pair word(int stage, int which, int first, int i) const {
        return load_shared<Pair>(tiles.words(stage, which) + 4 * (first + fragment_column(thread_index(), i)));
    }

    DEVICE bool is_allowed(int row, int low, int high, int query_raster) const {
        return lies_inside(place[row], low, high) && (MASK != Mask::causal_boxes || raster[row] <= query_raster);
    }

    // Scores become weights.
    DEVICE void weigh(int stage, int first, bool asked) {
#pragma unroll
        for (int i = 0; i < kBlockRows / 2; i += 4) {  // two queries of two keys
            Pair lse = word(stage, kLse, first, i);
#pragma unroll
            for (int j = 0; j < 4; j++)
                scores[i + j] = exp2_approx(scores[i + j] * p.log2_scale - as_float(j % 2 ? lse.y : lse.x));
        }
        if (MASK != Mask::full && asked) mask(stage, first);
    }

    DEVICE void mask(int stage, int first) {
#pragma unroll
        for (int i = 0; i < kBlockRows / 2; i += 4) {
            Pair low = word(stage, kLow, first, i), high = word(stage, kHigh, first, i), after = {0, 0};
            if (MASK == Mask::causal_boxes) after = word(stage, kQueryRaster, first, i);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bool allowed = j % 2 ? is_allowed(j / 2, low.y, high.y, after.y) : is_allowed(j / 2, low.x, high.x, after.x);
                if (!allowed) scores[i + j] = 0;  // whatever exp2 made of it
            }
        }
    }

    DEVICE void meet(int stage, int valid, bool asked) {
        for (int first = 0; first < valid; first += kBlockRows) {
            auto queries = tiles.met(0, stage).from_row(first), grad_out = tiles.met(1, stage).from_row(first);
            wgmma_fence(scores, grads);
            issue_row_products<T>(scores, tiles.own(0).from_row(group * kBlockRows), queries);
            issue_row_products<T>(grads, tiles.own(1).from_row(group * kBlockRows), grad_out);
            wgmma_wait<1>(scores);
            weigh(stage, first, asked);
            pack_weights<T>(weights, scores);
            wgmma_fence(grad_v, weights);
            issue_weighted_rows<T>(grad_v, weights, grad_out);
            wgmma_wait<1>(grads);
#pragma unroll
            for (int i = 0; i < kBlockRows / 2; i += 4) {
                Pair delta = word(stage, kDelta, first, i);
#pragma unroll
                for (int j = 0; j < 4; j++) scores[i + j] *= grads[i + j] - as_float(j % 2 ? delta.y : delta.x);
            }
            pack_weights<T>(grad_weights, scores);
            wgmma_fence(grad_k, grad_weights);
            issue_weighted_rows<T>(grad_k, grad_weights, queries);
            wgmma_wait<1>(grad_v, weights);
            wgmma_wait<0>(grad_k, grad_weights);
        }
    }

    DEVICE void finish(const OwnBlock& block) {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) grad_k[i] *= p.scale;
        Place to{block.start, block.stop, block.head, p.dim};
        barrier_sync(kOwn + group, 128);  // all four warps are done with K and V, whose places the gradients take
        store_fragment(p.grad_k, to, tiles.own(0).from_row(group * kBlockRows), grad_k);
        store_fragment(p.grad_v, to, tiles.own(1).from_row(group * kBlockRows), grad_v);
        fence_proxy_async();
    }
};

template <class T, Mask MASK, int DIM>
DEVICE void attention_backward_key_value(const AttentionBackward<T>& p) {
    attention_backward<true, KeyValueGradient<T, MASK, DIM>, T, MASK, DIM>(p);
}

}  // namespace hopper
