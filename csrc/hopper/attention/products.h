// Products of a warpgroup's 64 rows with tiles in shared memory, and what becomes of their fragments.
#pragma once
#include "../primitives.h"

namespace hopper {

constexpr int kHalfColumns = 64;  // in a row of 128 bytes: what the 128-byte swizzle can span
constexpr int kLine = 128;        // bytes

// A tile of tokens, as TMA lays it down: halves of [token][64 columns] each, swizzled.
template <int ROWS, int DIM>
struct Tile {
    static constexpr int kHalves = (DIM + kHalfColumns - 1) / kHalfColumns;
    static constexpr int kHalfBytes = ROWS * kLine;
    static constexpr int kBytes = kHalves * kHalfBytes;

    uint32_t address;

    DEVICE Tile from_row(int row) const { return {address + row * kLine}; }
    // Columns are what is summed over.
    DEVICE uint64_t by_row() const { return descriptor(address, 16, 1024); }
    // Rows are what is summed over.
    DEVICE uint64_t by_column() const { return descriptor(address, kHalfBytes, 1024); }
};

// d [64, N] = a bᵀ: 64 rows of a tile with N rows of another.
template <class T, int COUNT, int ROWS_A, int ROWS_B, int DIM>
DEVICE void issue_row_products(float (&d)[COUNT], const Tile<ROWS_A, DIM>& a, const Tile<ROWS_B, DIM>& b) {
    uint64_t from_a = a.by_row(), from_b = b.by_row();
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t within = step % 4 * 32;
        wgmma_ss<T, false>(d, moved(from_a, step / 4 * a.kHalfBytes + within), moved(from_b, step / 4 * b.kHalfBytes + within), step > 0);
    }
    wgmma_commit();
}

// d [64, DIM] += weights [64, n] · the first n rows of a tile.
template <class T, int WEIGHTS, int ROWS, int DIM>
DEVICE void issue_weighted_rows(float (&d)[DIM / 2], const uint32_t (&weights)[WEIGHTS], const Tile<ROWS, DIM>& rows) {
    uint64_t from = rows.by_column();
#pragma unroll
    for (int step = 0; step < WEIGHTS / 4; step++) wgmma_rs<T, true>(d, weights + 4 * step, moved(from, step * 16 * kLine), true);
    wgmma_commit();
}

// A fragment as the A operand of a product, rounded.
template <class T, int COUNT>
DEVICE void pack_weights(uint32_t (&weights)[COUNT / 2], const float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) weights[i] = pack<T>(values[2 * i], values[2 * i + 1]);
}

template <int COUNT>
DEVICE void clear(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = 0;
}

// Rows of a tensor that a warpgroup's fragment becomes: start ... stop, at most 64, and `dim` columns of one head.
struct Place {
    int start, stop, head, dim;
};

// Through 64 rows of shared memory, a warp its own 16, so that whole lines are stored.
template <class T, int ROWS, int DIM>
DEVICE void store_fragment(const Rows<T>& to, const Place& place, const Tile<ROWS, DIM>& staging, const float (&values)[DIM / 2]) {
    int thread = recomputed(thread_index() % 128), lane = thread % 32;
    auto address = [&](int row, int column) {
        return staging.address + column / kHalfColumns * staging.kHalfBytes + swizzled(row, column % kHalfColumns / 8);
    };
#pragma unroll
    for (int i = 0; i < DIM / 2; i += 2) {
        int row = fragment_row(thread, i), column = fragment_column(thread, i);
        store_shared(address(row, column) + column % 8 * 2, pack<T>(values[i], values[i + 1]));
    }
    warp_sync();
    constexpr int kChunks = DIM / 8;
#pragma unroll 4
    for (int i = lane; i < 16 * kChunks; i += 32) {
        int row = thread / 32 * 16 + i / kChunks, column = i % kChunks * 8, token = place.start + row;
        if (token >= place.stop || column >= place.dim) continue;
        store_global(to.all, token * to.token_stride + place.head * to.head_stride + column, load_shared<Chunk>(address(row, column)));
    }
    warp_sync();
}

// One arrival a warp, when all of its lanes have read what they need.
DEVICE void release(uint32_t empty) {
    warp_sync();
    if (thread_index() % 32 == 0) mbarrier_arrive(empty);
}

// Which stage is next, and the parity of its mbarriers' phase: of all steps of a block, whatever item they belong to.
template <int STAGES>
struct Pipeline {
    int stage = 0;
    uint32_t parity = 0;

    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

}  // namespace hopper
