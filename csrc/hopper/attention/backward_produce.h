// The warps that bring data in the backward's two passes: one loads tiles, one tells of tokens, one mends the ends of
// tiles, one clears padding.
#pragma once
#include "backward_tiles.h"

namespace hopper {

// The pass over keys owns tiles of K and V, and meets those of Q and dO: of all heads that share the keys.
template <class T>
DEVICE int key_heads(const AttentionBackward<T>& p) { return p.num_heads / p.heads_a_key; }

// Calls use(item, step, head of what is met, number of the step) for each step of this block.
template <bool BY_KEY, class T, class Begin, class Use>
DEVICE void each_step(const AttentionBackward<T>& p, Begin begin, Use use) {
    each_item(p.walk, BY_KEY ? key_heads(p) : p.num_heads, BY_KEY, [&](const Item& item) {
        begin(item);
        int head = BY_KEY ? item.head * p.heads_a_key : item.head / p.heads_a_key, number = 0;
        for (int left = item.steps * (BY_KEY ? p.heads_a_key : 1); left > 0; left--) {
            use(item, step_of(p.walk, item, number), head, number);
            if (++number == item.steps) number = 0, head++;
        }
    });
}

template <bool BY_KEY, class T, int DIM>
DEVICE void load_tiles(const AttentionBackward<T>& p, const BackwardTiles<DIM>& tiles) {
    using Tiles = BackwardTiles<DIM>;
    const TensorMap *own[] = {BY_KEY ? &p.k : &p.q, BY_KEY ? &p.v : &p.grad_out};
    const TensorMap *met[] = {BY_KEY ? &p.q : &p.k, BY_KEY ? &p.grad_out : &p.v};
    bool leads = thread_index() % 32 == 0;
    Pipeline<Tiles::kStages> at;
    uint32_t item_parity = 1;  // passes at once for the first
    auto next_item = [&](const Item& item) {
        if (!leads) return;
        mbarrier_wait(tiles.own_empty(), item_parity);
        item_parity ^= 1;
        publish(tiles, item);
        mbarrier_arrive_expect_tx(tiles.own_full(), item.steps ? 2 * Tiles::Side::kBytes : 0);
        if (!item.steps) return;
#pragma unroll
        for (int which = 0; which < 2; which++) load_tile(tiles.own(which), own[which], tiles.own_full(), item.head, item.start);
    };
    each_step<BY_KEY>(p, next_item, [&](const Item&, const Step& step, int head, int) {
        if (!leads) return;
        mbarrier_wait(tiles.empty(at.stage), at.parity ^ 1);
        mbarrier_arrive_expect_tx(tiles.landed(at.stage), 2 * Tiles::Side::kBytes);
#pragma unroll
        for (int which = 0; which < 2; which++) load_tile(tiles.met(which, at.stage), met[which], tiles.landed(at.stage), head, step.start);
        at.advance();
    });
    Item none{};
    none.head = -1;
    none.steps = 0;
    next_item(none);
}

// Of queries: what their weights are computed from, +inf and 0 of those that do not exist; their boxes, where they are asked.
template <class T, Mask MASK, int DIM>
DEVICE void tell_query(const AttentionBackward<T>& p, const BackwardTiles<DIM>& tiles, int stage, int row, int query, bool exists,
                       int head, bool asked) {
    auto tell = [&](int word, int value) { store_shared(tiles.words(stage, word) + 4 * row, value); };
    int64_t place = int64_t(head) * p.num_queries + query;
    tell(kLse, as_int(exists ? load_global(as_const(p.log2_lse), place) : INFINITY));
    tell(kDelta, as_int(exists ? load_global(as_const(p.delta), place) : 0.0f));
    if (MASK == Mask::full || !asked) return;
    tell(kLow, exists ? load_global(p.boxes.low, query) : 0);
    tell(kHigh, exists ? load_global(p.boxes.high, query) : 0);
    if (MASK == Mask::causal_boxes) tell(kQueryRaster, exists ? load_global(p.boxes.raster, query) : 0);
}

template <class T, Mask MASK, int DIM>
DEVICE void tell_key(const AttentionBackward<T>& p, const BackwardTiles<DIM>& tiles, int stage, int row, int key, bool exists, bool asked) {
    if (MASK == Mask::full || !asked) return;
    auto tell = [&](int word, int value) { store_shared(tiles.words(stage, word) + 4 * row, value); };
    tell(kPlace, exists ? load_global(p.boxes.place, key) : 0);  // 0 lies in no box
    if (MASK == Mask::causal_boxes) tell(kKeyRaster, exists ? load_global(p.boxes.raster, key) : 0);
}

template <bool BY_KEY, class T, Mask MASK, int DIM>
DEVICE void tell_tokens(const AttentionBackward<T>& p, const BackwardTiles<DIM>& tiles) {
    int lane = thread_index() % 32;
    Pipeline<BackwardTiles<DIM>::kStages> at;
    each_step<BY_KEY>(p, [](const Item&) {}, [&](const Item& item, const Step& step, int head, int number) {
        mbarrier_wait(tiles.empty(at.stage), at.parity ^ 1);
        bool asked = number >= item.unasked;
        if (lane == 0) store_shared(tiles.step(at.stage), Pair{step.valid, asked});
#pragma unroll 1
        for (int row = lane; row < kRows; row += 32) {
            bool exists = row < step.valid;
            if (BY_KEY)
                tell_query<T, MASK>(p, tiles, at.stage, row, step.start + row, exists, head, asked);
            else
                tell_key<T, MASK>(p, tiles, at.stage, row, step.start + row, exists, asked);
        }
        release(tiles.full(at.stage));
        at.advance();
    });
}

template <bool BY_KEY, class T, int DIM>
DEVICE void mend_ends(const AttentionBackward<T>& p, const BackwardTiles<DIM>& tiles) {
    Pipeline<BackwardTiles<DIM>::kStages> at;
    each_step<BY_KEY>(p, [](const Item&) {}, [&](const Item&, const Step& step, int, int) {
        mbarrier_wait(tiles.landed(at.stage), at.parity);
#pragma unroll
        for (int which = 0; which < 2; which++)
            if (step.valid < kRows) clear_end(tiles.met(which, at.stage), step.valid);
        release(tiles.full(at.stage));
        at.advance();
    });
}

template <bool BY_KEY, class T>
DEVICE void clear_padding(const AttentionBackward<T>& p) {
    int first = load_global(p.walk.own, p.walk.num_tiles);
    if (!BY_KEY) return clear_padding(p.grad_q, first, p.num_queries, p.num_heads, p.dim);
    clear_padding(p.grad_k, first, p.num_keys, key_heads(p), p.dim);
    clear_padding(p.grad_v, first, p.num_keys, key_heads(p), p.dim);
}

template <bool BY_KEY, class T, Mask MASK, int DIM>
DEVICE void produce(const AttentionBackward<T>& p, const BackwardTiles<DIM>& tiles) {
    int warp = warp_uniform(thread_index() / 32) % 4;
    if (warp == 0) return load_tiles<BY_KEY>(p, tiles);
    if (warp == 1) return tell_tokens<BY_KEY, T, MASK>(p, tiles);
    if (warp == 2) return mend_ends<BY_KEY>(p, tiles);
    clear_padding<BY_KEY>(p);
}

// The pass's two computing warpgroups: `Compute` is made of (parameters, tiles, group), and has begin(block), meet(stage,
// valid, asked), and finish(block).
template <bool BY_KEY, class Compute, class T, int DIM>
DEVICE void consume(const AttentionBackward<T>& p, const BackwardTiles<DIM>& tiles, int group) {
    Compute compute(p, tiles, group);
    Pipeline<BackwardTiles<DIM>::kStages> at;
    for (uint32_t parity = 0;; parity ^= 1) {
        mbarrier_wait(tiles.own_full(), parity);
        OwnBlock block = published(tiles, group);
        if (block.head < 0) return;
        bool has_rows = block.start < block.stop;
        if (has_rows) compute.begin(block);
        int steps = load_shared<int>(tiles.item() + 16) * (BY_KEY ? p.heads_a_key : 1);
        for (; steps > 0; steps--, at.advance()) {
            mbarrier_wait(tiles.full(at.stage), at.parity);
            Pair step = load_shared<Pair>(tiles.step(at.stage));
            if (has_rows) compute.meet(at.stage, step.x, step.y);
            release(tiles.empty(at.stage));
        }
        if (has_rows) compute.finish(published(tiles, group));
        release(tiles.own_empty());
    }
}

template <bool BY_KEY, class Compute, class T, Mask MASK, int DIM>
DEVICE void attention_backward(const AttentionBackward<T>& p) {
    BackwardTiles<DIM> tiles(shared_base());
    int group = warp_uniform(thread_index() / 128);
    if (thread_index() == 0) tiles.init_mbarriers();
    block_sync();
    if (group == 2) {
        registers_shrink<40>();
        produce<BY_KEY, T, MASK>(p, tiles);
    } else {
        registers_grow<232>();
        consume<BY_KEY, Compute>(p, tiles, group);
    }
}

}  // namespace hopper
