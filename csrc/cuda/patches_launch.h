// Which kernel moves some patches, in how many blocks: for a GPU, and for the host that stands in for one in tests.
#pragma once

#include "../ops.h"
#include "patches_block.h"

namespace sora_fast {

// Blocks that one launch may have, of its only axis that is longer than 65,535.
constexpr int64_t kMostBlocks = 2147483647;

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <typename T, bool kGather, int kWidth, typename Launch>
void launch_block(const Moved& moved, void* flat, void* rows, const Launch& launch) {
    const RowOrder& order = moved.order;
    const int64_t bytes = sizeof(T), tokens = moved.batch.num_tokens;
    const int64_t columns = order.channels * order.patch.t * order.patch.h * order.patch.w;
    // What cannot be parted: a run, or with the channels last the runs of all channels, whose numbers alternate.
    const int64_t runs = order.channel_last ? order.channels : 1;
    const Tile tile = tile_of(columns, runs * order.patch.w, runs, bytes);
    STD_TORCH_CHECK(tile.tokens, "rows: ", order.patch.w, " pixels of ", order.channels, " channels of ", bytes,
                    " bytes, which are more than shared memory takes; use the backend triton or torch");
    const int64_t blocks = (tokens + tile.tokens - 1) / tile.tokens * tile.chunks;
    STD_TORCH_CHECK(blocks <= kMostBlocks, "rows: ", tokens, " tokens of ", columns, " columns are too many");
    if (blocks == 0) return;
    const bool dense = moved.column_stride == 1 && moved.row_stride * bytes % 16 == 0 && is_aligned(rows);
    launch(BlockOfPatches<T, kGather, kWidth>{moved.batch, order, tile, static_cast<T*>(flat), static_cast<T*>(rows),
                                              moved.capacity, moved.pixel_stride, moved.row_stride, moved.column_stride,
                                              moved.pixel_stride == 1 && is_aligned(flat), dense},
           blocks, static_cast<int64_t>(tile.tokens) * tile.pitch * bytes);
}

template <typename T, bool kGather, typename Launch>
void launch_by_width(const Moved& moved, void* flat, void* rows, const Launch& launch) {
    switch (moved.order.patch.w) {
        case 1: return launch_block<T, kGather, 1>(moved, flat, rows, launch);
        case 2: return launch_block<T, kGather, 2>(moved, flat, rows, launch);
        case 4: return launch_block<T, kGather, 4>(moved, flat, rows, launch);
        case 8: return launch_block<T, kGather, 8>(moved, flat, rows, launch);
        case 16: return launch_block<T, kGather, 16>(moved, flat, rows, launch);
        default: return launch_block<T, kGather, 0>(moved, flat, rows, launch);
    }
}

// launch: called with a block's work, the number of blocks, and the bytes of shared memory for rows.
template <bool kGather, typename Launch>
void launch_patches(const Moved& moved, void* flat, void* rows, const Launch& launch) {
    switch (moved.element_bytes) {
        case 2: return launch_by_width<uint16_t, kGather>(moved, flat, rows, launch);
        case 4: return launch_by_width<uint32_t, kGather>(moved, flat, rows, launch);
        default: return launch_by_width<uint64_t, kGather>(moved, flat, rows, launch);
    }
}

}  // namespace sora_fast
