// The four warps that bring data: one loads tiles, one tells of keys, one mends the ends of values, one clears padding.
#pragma once
#include "shared_tiles.h"

namespace hopper {

template <int DIM>
DEVICE void load_tile(uint32_t to, const TensorMap* map, uint32_t full, int head, int row) {
    using Tiles = SharedTiles<DIM>;
    mbarrier_arrive_expect_tx(full, Tiles::kTileBytes);
#pragma unroll
    for (int half = 0; half < Tiles::kHalves; half++)
        tma_load(to + half * Tiles::kHalfBytes, map, full, half * kHalfColumns, head, row);
}

// What the computing warps must know of an item; a head of -1 tells them that there is none left.
template <int DIM>
DEVICE void publish(const SharedTiles<DIM>& tiles, const Item& item) {
    store_shared(tiles.item(), Chunk{uint32_t(item.start), uint32_t(item.stop), uint32_t(item.head), uint32_t(item.unasked)});
    store_shared(tiles.item() + 16, item.steps);
}

// Q once an item, K and V once a step. V lands before it is full: its end may have to be mended.
template <class T, int DIM>
DEVICE void load_tiles(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles, int num_tiles) {
    bool leads = thread_index() % 32 == 0;
    Pipeline<SharedTiles<DIM>::kStages> at;
    int turns = count_turns(num_tiles, p.num_heads);
    uint32_t item_parity = 1;  // passes at once for the first
    Item item;
    for (int turn = 0; turn < turns; turn++) {
        if (!leads || !take_item(item, p.walk, num_tiles, p.num_heads, turn)) continue;
        int key_head = item.head / p.heads_a_key;
        mbarrier_wait(tiles.q_empty(), item_parity);
        item_parity ^= 1;
        publish(tiles, item);
        if (item.steps)
            load_tile<DIM>(tiles.q, &p.q, tiles.q_full(), item.head, item.start);
        else
            mbarrier_arrive(tiles.q_full());
        for (int step = 0; step < item.steps; step++, at.advance()) {
            int start = step_of(p.walk, item, step).start;
            mbarrier_wait(tiles.k_empty(at.stage), at.parity ^ 1);
            load_tile<DIM>(tiles.k_tile(at.stage), &p.k, tiles.k_full(at.stage), key_head, start);
            mbarrier_wait(tiles.v_empty(at.stage), at.parity ^ 1);
            load_tile<DIM>(tiles.v_tile(at.stage), &p.v, tiles.v_landed(at.stage), key_head, start);
        }
    }
    if (!leads) return;
    mbarrier_wait(tiles.q_empty(), item_parity);
    item.head = -1;
    publish(tiles, item);
    mbarrier_arrive(tiles.q_full());
}

// Beside each tile of keys: how many of them count, and where they lie, if they must be asked.
template <class T, Mask MASK, int DIM>
DEVICE void tell_places(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles, int num_tiles) {
    int lane = thread_index() % 32;
    Pipeline<SharedTiles<DIM>::kStages> at;
    int turns = count_turns(num_tiles, p.num_heads);
    Item item;
    for (int turn = 0; turn < turns; turn++) {
        if (!take_item(item, p.walk, num_tiles, p.num_heads, turn)) continue;
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
            warp_sync();
            if (lane == 0) mbarrier_arrive(tiles.k_full(at.stage));
        }
    }
}

// Behind the last key of a tile stands another segment, or anything: of weight 0, but 0 times NaN is NaN.
template <class T, int DIM>
DEVICE void mend_values(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles, int num_tiles) {
    using Tiles = SharedTiles<DIM>;
    int lane = thread_index() % 32;
    Pipeline<Tiles::kStages> at;
    int turns = count_turns(num_tiles, p.num_heads);
    Item item;
    for (int turn = 0; turn < turns; turn++) {
        if (!take_item(item, p.walk, num_tiles, p.num_heads, turn)) continue;
        for (int number = 0; number < item.steps; number++, at.advance()) {
            int valid = step_of(p.walk, item, number).valid;
            mbarrier_wait(tiles.v_landed(at.stage), at.parity);
            if (valid < kKeys) {
                int chunks = (kKeys - valid) * 8;  // of 16 bytes, in each half
#pragma unroll
                for (int half = 0; half < Tiles::kHalves; half++)
                    for (int i = lane; i < chunks; i += 32)
                        store_shared(tiles.v_tile(at.stage) + half * Tiles::kHalfBytes + valid * kLine + 16 * i, Chunk{0, 0, 0, 0});
                fence_proxy_async();
                warp_sync();
            }
            if (lane == 0) mbarrier_arrive(tiles.v_full(at.stage));
        }
    }
}

// Rows that belong to no segment: zeros, and -inf.
template <class T>
DEVICE void clear_padding(const AttentionForward<T>& p) {
    int lane = thread_index() % 32, chunks = p.dim / 8;
    int first = load_global(p.walk.own, p.walk.num_tiles);
    for (int row = first + block_index(); row < p.num_tokens; row += num_blocks())
        for (int i = lane; i < p.num_heads * chunks; i += 32) {
            int head = i / chunks, column = i % chunks * 8;
            store_global(p.out.all, row * p.out.token_stride + head * p.out.head_stride + column, Chunk{0, 0, 0, 0});
            if (column == 0) store_global(p.lse, int64_t(head) * p.num_tokens + row, -INFINITY);
        }
}

template <class T, Mask MASK, int DIM>
DEVICE void produce(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles) {
    int num_tiles = count_tiles(p.walk), warp = warp_uniform(thread_index() / 32) % 4;
    if (warp == 0) load_tiles(p, tiles, num_tiles);
    if (warp == 1) tell_places<T, MASK>(p, tiles, num_tiles);
    if (warp == 2) mend_values(p, tiles, num_tiles);
    if (warp == 3) clear_padding(p);
}

}  // namespace hopper
