// What lies where in a block's shared memory. Tiles are halves of [token][64 columns] each, swizzled; what one warp tells
// others in words lies in lines of 128 bytes of its own.
#pragma once
#include "walk.h"

namespace hopper {

constexpr int kHalfColumns = 64;  // in a row of 128 bytes: what the 128-byte swizzle can span
constexpr int kLine = 128;

// Two stages where a tile has 128 columns; narrow ones have room for more.
template <int DIM>
struct SharedTiles {
    static constexpr int kHalves = (DIM + kHalfColumns - 1) / kHalfColumns;
    static constexpr int kStages = kHalves == 1 ? 3 : 2;
    static constexpr int kHalfBytes = kKeys * kLine;
    static constexpr int kTileBytes = kHalves * kHalfBytes;
    static constexpr int kStepBytes = kLine + 2 * kKeys * 4;  // how many keys count; their places and raster places
    static constexpr int kBytes = 1024 + (2 + 2 * kStages) * kTileBytes + 3 * kLine + kStages * kStepBytes;

    uint32_t q, out, k, v, control;

    DEVICE explicit SharedTiles(uint32_t base) {
        q = (base + 1023) / 1024 * 1024;
        out = q + kTileBytes;
        k = out + kTileBytes;
        v = k + kStages * kTileBytes;
        control = v + kStages * kTileBytes;
    }
    DEVICE uint32_t k_tile(int stage) const { return k + stage * kTileBytes; }
    DEVICE uint32_t v_tile(int stage) const { return v + stage * kTileBytes; }
    // mbarriers
    DEVICE uint32_t q_full() const { return control; }
    DEVICE uint32_t q_empty() const { return control + 8; }
    DEVICE uint32_t k_full(int stage) const { return control + 16 + 40 * stage; }
    DEVICE uint32_t k_empty(int stage) const { return k_full(stage) + 8; }
    DEVICE uint32_t v_landed(int stage) const { return k_full(stage) + 16; }
    DEVICE uint32_t v_full(int stage) const { return k_full(stage) + 24; }
    DEVICE uint32_t v_empty(int stage) const { return k_full(stage) + 32; }
    // words
    DEVICE uint32_t item() const { return control + 2 * kLine; }
    DEVICE uint32_t valid(int stage) const { return control + 3 * kLine + stage * kStepBytes; }
    DEVICE uint32_t places(int stage) const { return valid(stage) + kLine; }
    DEVICE uint32_t rasters(int stage) const { return places(stage) + kKeys * 4; }
};

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
