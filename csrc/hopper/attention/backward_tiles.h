// What the two passes of the backward have in common: a block owns a tile of one side, of two tensors each (Q and dO, or K
// and V), and walks over those of the other side.
#pragma once
#include "loading.h"

namespace hopper {

constexpr int kRows = 128;       // of a tile
constexpr int kBlockRows = 64;   // that a warpgroup owns, and that it meets at a time: two sets of scores must fit its registers

// What of a step is told beside its tiles: of every token that is met.
enum Word { kPlace, kKeyRaster };                             // of keys
enum QueryWord { kLse, kDelta, kLow, kHigh, kQueryRaster };  // of queries

template <int DIM>
struct BackwardTiles {
    using Side = Tile<kRows, DIM>;
    static constexpr int kStages = 2;
    static constexpr int kStepBytes = kLine + 5 * kRows * 4;
    static constexpr int kBytes = 1024 + (2 + 2 * kStages) * Side::kBytes + 2 * kLine + kStages * kStepBytes;

    uint32_t first, control;

    DEVICE explicit BackwardTiles(uint32_t base) {
        first = (base + 1023) / 1024 * 1024;
        control = first + (2 + 2 * kStages) * Side::kBytes;
    }
    // which: 0 is Q or K, 1 is dO or V.
    DEVICE Side own(int which) const { return {first + which * Side::kBytes}; }
    DEVICE Side met(int which, int stage) const { return {first + (2 + 2 * stage + which) * Side::kBytes}; }
    // mbarriers
    DEVICE uint32_t own_full() const { return control; }
    DEVICE uint32_t own_empty() const { return control + 8; }
    DEVICE uint32_t landed(int stage) const { return control + 16 + 24 * stage; }
    DEVICE uint32_t full(int stage) const { return landed(stage) + 8; }
    DEVICE uint32_t empty(int stage) const { return landed(stage) + 16; }
    // words
    DEVICE uint32_t item() const { return control + kLine; }
    DEVICE uint32_t step(int stage) const { return control + 2 * kLine + stage * kStepBytes; }  // valid, asked
    DEVICE uint32_t words(int stage, int which) const { return step(stage) + kLine + which * kRows * 4; }

    DEVICE void init_mbarriers() const {
        mbarrier_init(own_full(), 1);
        mbarrier_init(own_empty(), 8);  // the computing warps
        for (int stage = 0; stage < kStages; stage++) {
            mbarrier_init(landed(stage), 1);
            mbarrier_init(full(stage), 2);  // the warp that tells, the one that mends
            mbarrier_init(empty(stage), 8);
        }
        fence_proxy_async();
    }
};

// What the computing warps are told of an item and of a step: no registers need to hold it while the products run.
template <int DIM>
DEVICE void publish(const BackwardTiles<DIM>& tiles, const Item& item) {
    uint32_t any_asked = item.unasked < item.steps;
    store_shared(tiles.item(), Chunk{uint32_t(item.start), uint32_t(item.stop), uint32_t(item.head), any_asked});
    store_shared(tiles.item() + 16, item.steps);
}
// Rows of a warpgroup, and their head; -1: there is none left.
struct OwnBlock {
    int start, stop, head, any_asked;
};
template <int DIM>
DEVICE OwnBlock published(const BackwardTiles<DIM>& tiles, int group) {
    Chunk words = load_shared<Chunk>(tiles.item());
    return {int(words.x) + group * kBlockRows, int(words.y), int(words.z), int(words.w)};
}

}  // namespace hopper
