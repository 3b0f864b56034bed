// The gradient of the queries: a block owns tiles of Q and dO, and walks over the keys and values that they meet.
#pragma once
#include "backward_produce.h"
#include "softmax.h"

namespace hopper {

constexpr int kOwn = 1;  // named barriers: kOwn + warpgroup

template <class T, Mask MASK, int DIM>
struct QueryGradient {
    using Tiles = BackwardTiles<DIM>;
    const AttentionBackward<T>& p;
    const Tiles& tiles;
    int group;

    float scores[kBlockRows / 2], grads[kBlockRows / 2], sum[DIM / 2];
    uint32_t weights[kBlockRows / 4];
    float log2_lse[2], delta[2];
    QueryBoxes boxes;

    DEVICE QueryGradient(const AttentionBackward<T>& parameters, const Tiles& shared, int warpgroup)
        : p(parameters), tiles(shared), group(warpgroup) {}

    DEVICE static int query(const OwnBlock& block, int row) { return block.start + fragment_row(thread_index() % 128, 2 * row); }

    // Of the thread's two rows; and for the pass over keys.
    DEVICE void load_statistics(const OwnBlock& block) {
        int lane = thread_index() % 4;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            bool exists = query(block, row) < block.stop;
            float sum = 0;
            for (int column = 8 * lane; exists && column < p.dim; column += 32) sum += product_of(block, query(block, row), column);
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            log2_lse[row] = INFINITY, delta[row] = 0;  // a weight of 0
            if (!exists) continue;
            int64_t place = int64_t(block.head) * p.num_queries + query(block, row);
            float lse = load_global(p.lse, place);
            if (lse != -INFINITY) log2_lse[row] = lse * 1.4426950408889634f, delta[row] = sum;
            if (lse != -INFINITY && p.grad_lse.count) delta[row] -= load_global(p.grad_lse, place);
            if (lane == 0) store_global(p.log2_lse, place, log2_lse[row]), store_global(p.delta, place, delta[row]);
        }
    }
    // Of eight columns of O and dO.
    DEVICE float product_of(const OwnBlock& block, int query, int column) const {
        const Rows<const T>&a = p.out, &b = p.grad_out_rows;
        Chunk x = load_chunk(a.all, query * a.token_stride + block.head * a.head_stride + column);
        Chunk y = load_chunk(b.all, query * b.token_stride + block.head * b.head_stride + column);
        uint32_t pairs[4][2] = {{x.x, y.x}, {x.y, y.y}, {x.z, y.z}, {x.w, y.w}};
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += unpack<T>(pairs[i / 2][0], i % 2) * unpack<T>(pairs[i / 2][1], i % 2);
        return sum;
    }

    DEVICE void begin(const OwnBlock& block) {
        clear(sum);
        load_statistics(block);
        if (MASK != Mask::full && block.any_asked)
#pragma unroll
            for (int row = 0; row < 2; row++) boxes.template load<MASK>(p.boxes, row, query(block, row), query(block, row) < block.stop);
    }

    DEVICE void meet(int stage, int valid, bool asked) {
        for (int first = 0; first < valid; first += kBlockRows) {
            auto keys = tiles.met(0, stage).from_row(first), values = tiles.met(1, stage).from_row(first);
            wgmma_fence(scores, grads);
            issue_row_products<T>(scores, tiles.own(0).from_row(group * kBlockRows), keys);
            issue_row_products<T>(grads, tiles.own(1).from_row(group * kBlockRows), values);
            wgmma_wait<1>(scores);
            if (MASK != Mask::full && asked)
                mask_boxes<MASK == Mask::causal_boxes>(scores, boxes, tiles.words(stage, kPlace) + 4 * first,
                                                       tiles.words(stage, kKeyRaster) + 4 * first);
            else if (valid < first + kBlockRows)
                mask_tail(scores, valid - first);
            wgmma_wait<0>(grads);
#pragma unroll
            for (int i = 0; i < kBlockRows / 2; i++) {
                int row = i / 2 % 2;
                scores[i] = exp2_approx(scores[i] * p.log2_scale - log2_lse[row]) * (grads[i] - delta[row]);
            }
            pack_weights<T>(weights, scores);
            wgmma_fence(sum, weights);
            issue_weighted_rows<T>(sum, weights, keys);
            wgmma_wait<0>(sum, weights);
        }
    }

    DEVICE void finish(const OwnBlock& block) {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) sum[i] *= p.scale;
        barrier_sync(kOwn + group, 128);  // all four warps are done with Q, whose place the gradient takes
        store_fragment(p.grad_q, {block.start, block.stop, block.head, p.dim}, tiles.own(0).from_row(group * kBlockRows), sum);
        fence_proxy_async();
    }
};

template <class T, Mask MASK, int DIM>
DEVICE void attention_backward_query(const AttentionBackward<T>& p) {
    attention_backward<false, QueryGradient<T, MASK, DIM>, T, MASK, DIM>(p);
}

}  // namespace hopper
