// How the blocks of a persistent grid share the work, and which keys a tile of queries meets, step by step.
#pragma once
#include "parameters.h"

namespace hopper {

constexpr int kQueries = 128, kKeys = 128;  // a tile of each has no more

// A tile of queries and a head. Keys of the first `unasked` of its steps may all be met, as far as they exist.
struct Item {
    int start, stop, head, first, end, unasked, steps;
};

// The keys of a step: kKeys from token `start` on, of which the first `valid` count.
struct Step {
    int start, valid;
};

// Tiles that hold a token are the first ones; offsets rise up to there. All lanes of the warp search together.
DEVICE int count_tiles(const Walk& walk) {
    int lane = thread_index() % 32, low = 0, high = walk.num_tiles;
    int end = load_global(walk.own, walk.num_tiles);
    while (low < high) {
        int stride = (high - low + 31) / 32, place = low + lane * stride;
        int below = count_votes(place < high && load_global(walk.own, place < high ? place : 0) < end);
        if (stride == 1 || below == 0) return low + below;
        high = min(high, low + below * stride);
        low += (below - 1) * stride + 1;
    }
    return low;
}

// Item number `turn` of this block, of all heads of `tiles` tiles. Longest first, dealt to one block after the other and
// then back, so that each gets about as much. Sixteen tiles of one head come before the same of the next: blocks that run
// side by side then read the keys of few heads, which stay in the L2 cache.
DEVICE bool take_item(Item& item, const Walk& walk, int tiles, int heads, int turn) {
    int number = turn * num_blocks() + (turn % 2 ? num_blocks() - 1 - block_index() : block_index());
    if (number >= tiles * heads) return false;
    int first = number / (16 * heads) * 16, count = min(tiles - first, 16), within = number - first * heads;
    int tile = load_global(walk.order, first + within % count);
    item.head = within / count;
    item.start = load_global(walk.own, tile);
    item.stop = load_global(walk.own, tile + 1);
    item.first = load_global(walk.begin, tile);
    item.end = load_global(walk.end, tile);
    int met_entirely = load_global(walk.split, tile) - item.first, met = item.end - item.first;
    item.steps = walk.lists ? met : (met + kKeys - 1) / kKeys;
    item.unasked = walk.lists ? met_entirely : met_entirely == met ? item.steps : met_entirely / kKeys;
    return true;
}

DEVICE Step step_of(const Walk& walk, const Item& item, int number) {
    if (!walk.lists) {
        int start = item.first + number * kKeys;
        return {start, min(item.end - start, kKeys)};
    }
    int tile = load_global(walk.tiles, item.first + number);
    int start = load_global(walk.other, tile);
    return {start, load_global(walk.other, tile + 1) - start};
}

}  // namespace hopper
