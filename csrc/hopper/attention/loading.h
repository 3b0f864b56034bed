// What the warps that bring data share: loading a tile, mending its end, clearing what belongs to no segment.
#pragma once
#include "products.h"
#include "walk.h"

namespace hopper {

// full: told of so many bytes by its one arrival here, or before by another.
template <int ROWS, int DIM>
DEVICE void load_tile(const Tile<ROWS, DIM>& to, const TensorMap* map, uint32_t full, int head, int row) {
#pragma unroll
    for (int half = 0; half < to.kHalves; half++) tma_load(to.address + half * to.kHalfBytes, map, full, half * kHalfColumns, head, row);
}

// Zeros in the rows from `valid` on: behind the last token of a tile stands another segment, or anything; of weight 0, but
// 0 times NaN is NaN. By all lanes of a warp, which must meet before they tell of it.
template <int ROWS, int DIM>
DEVICE void clear_end(const Tile<ROWS, DIM>& tile, int valid) {
    int chunks = (ROWS - valid) * 8;  // of 16 bytes, in each half
#pragma unroll
    for (int half = 0; half < tile.kHalves; half++)
        for (int i = thread_index() % 32; i < chunks; i += 32)
            store_shared(tile.address + half * tile.kHalfBytes + valid * kLine + 16 * i, Chunk{0, 0, 0, 0});
    fence_proxy_async();
}

// Zeros in the rows of a tensor that belong to no segment. By a warp of each block.
template <class T>
DEVICE void clear_padding(const Rows<T>& rows, int first, int num_tokens, int num_heads, int dim) {
    int chunks = dim / 8;
    for (int row = first + block_index(); row < num_tokens; row += num_blocks())
        for (int i = thread_index() % 32; i < num_heads * chunks; i += 32)
            store_global(rows.all, row * rows.token_stride + i / chunks * rows.head_stride + i % chunks * 8, Chunk{0, 0, 0, 0});
}

// Calls use(item) for each item of this block. from_end: see `divide_range`.
template <class Use>
DEVICE void each_item(const Walk& walk, int num_heads, bool from_end, Use use) {
    int num_tiles = count_tiles(walk), turns = (num_tiles * num_heads + num_blocks() - 1) / num_blocks();
    Item item;
    for (int turn = 0; turn < turns; turn++)
        if (take_item(item, walk, num_tiles, num_heads, turn, from_end)) use(item);
}

}  // namespace hopper
