// The four warps that bring data: one loads tiles, one tells of keys, one mends the ends of values, one clears padding.
#pragma once
#include "loading.h"
#include "shared_tiles.h"

namespace hopper {

// What the computing warps must know of an item; a head of -1 tells them that there is none left.
template <int DIM>
DEVICE void publish(const SharedTiles<DIM>& tiles, const Item& item) {
    store_shared(tiles.item(), Chunk{uint32_t(item.start), uint32_t(item.stop), uint32_t(item.head), uint32_t(item.unasked)});
    store_shared(tiles.item() + 16, item.steps);
}

// Q once an item, K and V once a step; by one thread. V lands before it is full: its end may have to be mended.
template <class T, int DIM>
DEVICE void load_tiles(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles) {
    using Tiles = SharedTiles<DIM>;
    bool leads = thread_index() % 32 == 0;
    Pipeline<Tiles::kStages> at;
    uint32_t item_parity = 1;  // passes at once for the first
    each_item(p.walk, p.num_heads, false, [&](const Item& item) {
        if (!leads) return;
        int key_head = item.head / p.heads_a_key;
        mbarrier_wait(tiles.q_empty(), item_parity);
        item_parity ^= 1;
        publish(tiles, item);
        mbarrier_arrive_expect_tx(tiles.q_full(), item.steps ? Tiles::Queries::kBytes : 0);
        if (item.steps) load_tile(tiles.q(), &p.q, tiles.q_full(), item.head, item.start);
        for (int step = 0; step < item.steps; step++, at.advance()) {
            int start = step_of(p.walk, item, step).start;
            mbarrier_wait(tiles.k_empty(at.stage), at.parity ^ 1);
            mbarrier_arrive_expect_tx(tiles.k_full(at.stage), Tiles::Keys::kBytes);
            load_tile(tiles.k(at.stage), &p.k, tiles.k_full(at.stage), key_head, start);
            mbarrier_wait(tiles.v_empty(at.stage), at.parity ^ 1);
            mbarrier_arrive_expect_tx(tiles.v_landed(at.stage), Tiles::Keys::kBytes);
            load_tile(tiles.v(at.stage), &p.v, tiles.v_landed(at.stage), key_head, start);
        }
    });
    if (!leads) return;
    Item none{};
    none.head = -1;
    mbarrier_wait(tiles.q_empty(), item_parity);
    publish(tiles, none);
    mbarrier_arrive(tiles.q_full());
}

// Beside each tile of keys: how many of them count, and where they lie, if they must be asked.
template <class T, Mask MASK, int DIM>
DEVICE void tell_places(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles) {
    int lane = thread_index() % 32;
    Pipeline<SharedTiles<DIM>::kStages> at;
    each_item(p.walk, p.num_heads, false, [&](const Item& item) {
        for (int number = 0; number < item.steps; number++, at.advance()) {
            Step step = step_of(p.walk, item, number);
            mbarrier_wait(tiles.k_empty(at.stage), at.parity ^ 1);
            if (lane == 0) store_shared(tiles.valid(at.stage), step.valid);
            if (MASK != Mask::full && number >= item.unasked)
                for (int key = lane; key < kKeys; key += 32) {
                    bool exists = key < step.valid;  // place 0 lies in no box
                    store_shared(tiles.places(at.stage) + 4 * key, exists ? load_global(p.boxes.place, step.start + key) : 0);
                    if (MASK == Mask::causal_boxes)
                        store_shared(tiles.rasters(at.stage) + 4 * key, exists ? load_global(p.boxes.raster, step.start + key) : 0);
                }
            release(tiles.k_full(at.stage));
        }
    });
}

template <class T, int DIM>
DEVICE void mend_values(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles) {
    Pipeline<SharedTiles<DIM>::kStages> at;
    each_item(p.walk, p.num_heads, false, [&](const Item& item) {
        for (int number = 0; number < item.steps; number++, at.advance()) {
            int valid = step_of(p.walk, item, number).valid;
            mbarrier_wait(tiles.v_landed(at.stage), at.parity);
            if (valid < kKeys) clear_end(tiles.v(at.stage), valid);
            release(tiles.v_full(at.stage));
        }
    });
}

// Padding attends nothing.
template <class T>
DEVICE void clear_padding(const AttentionForward<T>& p) {
    int first = load_global(p.walk.own, p.walk.num_tiles);
    clear_padding(p.out, first, p.num_tokens, p.num_heads, p.dim);
    for (int row = first + block_index(); row < p.num_tokens; row += num_blocks())
        for (int head = thread_index() % 32; head < p.num_heads; head += 32)
            store_global(p.lse, int64_t(head) * p.num_tokens + row, -INFINITY);
}

template <class T, Mask MASK, int DIM>
DEVICE void produce(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles) {
    int warp = warp_uniform(thread_index() / 32) % 4;
    if (warp == 0) return load_tiles(p, tiles);
    if (warp == 1) return tell_places<T, MASK>(p, tiles);
    if (warp == 2) return mend_values(p, tiles);
    clear_padding(p);
}

}  // namespace hopper
