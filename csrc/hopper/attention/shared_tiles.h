// What lies where in the forward kernel's shared memory. What one warp tells others in words lies in lines of its own.
#pragma once
#include "products.h"
#include "walk.h"

namespace hopper {

// Two stages where a tile has 128 columns; narrow ones have room for more.
template <int DIM>
struct SharedTiles {
    using Queries = Tile<kQueries, DIM>;
    using Keys = Tile<kKeys, DIM>;
    static constexpr int kStages = Keys::kHalves == 1 ? 3 : 2;
    static constexpr int kStepBytes = kLine + 2 * kKeys * 4;  // how many keys count; their places and raster places
    static constexpr int kBytes = 1024 + 2 * Queries::kBytes + 2 * kStages * Keys::kBytes + 3 * kLine + kStages * kStepBytes;

    uint32_t first, control;

    DEVICE explicit SharedTiles(uint32_t base) {
        first = (base + 1023) / 1024 * 1024;
        control = first + 2 * Queries::kBytes + 2 * kStages * Keys::kBytes;
    }
    DEVICE Queries q() const { return {first}; }
    DEVICE Queries out() const { return {first + Queries::kBytes}; }
    DEVICE Keys k(int stage) const { return {first + 2 * Queries::kBytes + stage * Keys::kBytes}; }
    DEVICE Keys v(int stage) const { return k(kStages + stage); }
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

}  // namespace hopper
