// Packed attention forward for Hopper: FlashAttention-3's plan (Shah et al. 2024) on a tile schedule. A persistent block
// takes tiles of 128 queries of a head, and walks over the tiles of keys that each meets.
#pragma once
#include "consume.h"
#include "produce.h"

namespace hopper {

constexpr int kThreads = 3 * 128;  // two warpgroups compute, one brings data

template <class T, Mask MASK, int DIM>
DEVICE void attention_forward(const AttentionForward<T>& p) {
    using Tiles = SharedTiles<DIM>;
    Tiles tiles(shared_base());
    int group = warp_uniform(thread_index() / 128);
    if (thread_index() == 0) {
        mbarrier_init(tiles.q_full(), 1);
        mbarrier_init(tiles.q_empty(), 8);  // the computing warps
        for (int stage = 0; stage < Tiles::kStages; stage++) {
            mbarrier_init(tiles.k_full(stage), 2);  // the warp that loads, the one that tells of places
            mbarrier_init(tiles.k_empty(stage), 8);
            mbarrier_init(tiles.v_landed(stage), 1);
            mbarrier_init(tiles.v_full(stage), 1);  // the warp that mends
            mbarrier_init(tiles.v_empty(stage), 8);
        }
        fence_proxy_async();
    }
    block_sync();
    if (group == 2) {
        registers_shrink<40>();
        produce<T, MASK>(p, tiles);
    } else {
        registers_grow<232>();
        consume<T, MASK>(p, tiles, group);
    }
}

}  // namespace hopper
