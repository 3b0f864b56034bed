// How the blocks of a persistent grid share the work, and which keys a tile of queries meets, step by step.
#pragma once
#include "parameters.h"

namespace hopper {

constexpr int kQueries = 128, kKeys = 128;  // a tile of each has no more

// A tile of one side and a head, and what it meets of the other side: first all that it meets entirely (as far as it
// exists), `unasked` steps, then what must be asked. Of lists, first and asked_first are places in them.
struct Item {
    int start, stop, head, first, end, asked_first, asked_end, unasked, steps;
};

// The tokens of a step: 128 from `start` on, of which the first `valid` count.
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

// Of a range of tokens: begin ... split are met entirely and split ... end are not, or, from the end, the other way round.
DEVICE void divide_range(Item& item, int begin, int split, int end, bool from_end) {
    int whole = (from_end ? end - split : split - begin) / kKeys;
    bool all = !from_end && split == end;  // the last one, cut as it is, needs not be asked either
    item.unasked = all ? (end - begin + kKeys - 1) / kKeys : whole;
    item.first = from_end ? end - whole * kKeys : begin;
    item.end = end;
    item.asked_first = from_end ? begin : begin + item.unasked * kKeys;
    item.asked_end = from_end ? item.first : end;
    item.steps = item.unasked + max(item.asked_end - item.asked_first + kKeys - 1, 0) / kKeys;
}

// Item number `turn` of this block, of all heads of `tiles` tiles. Longest first, dealt to one block after the other and
// then back, so that each gets about as much. Sixteen tiles of one head come before the same of the next: blocks that run
// side by side then read the keys of few heads, which stay in the L2 cache.
DEVICE bool take_item(Item& item, const Walk& walk, int tiles, int heads, int turn, bool from_end) {
    int number = turn * num_blocks() + (turn % 2 ? num_blocks() - 1 - block_index() : block_index());
    if (number >= tiles * heads) return false;
    int first = number / (16 * heads) * 16, count = min(tiles - first, 16), within = number - first * heads;
    int tile = load_global(walk.order, first + within % count);
    item.head = within / count;
    item.start = load_global(walk.own, tile);
    item.stop = load_global(walk.own, tile + 1);
    int begin = load_global(walk.begin, tile), split = load_global(walk.split, tile), end = load_global(walk.end, tile);
    if (!walk.lists) {
        divide_range(item, begin, split, end, from_end);
    } else {
        item.first = begin, item.asked_first = split;
        item.unasked = split - begin, item.steps = end - begin;
    }
    return true;
}

DEVICE Step step_of(const Walk& walk, const Item& item, int number) {
    bool asked = number >= item.unasked;
    int place = asked ? number - item.unasked : number, first = asked ? item.asked_first : item.first;
    if (!walk.lists) {
        int start = first + place * kKeys;
        return {start, min((asked ? item.asked_end : item.end) - start, kKeys)};
    }
    int tile = load_global(walk.tiles, first + place);
    int start = load_global(walk.other, tile);
    return {start, load_global(walk.other, tile + 1) - start};
}

}  // namespace hopper
