// Masks and the online softmax, on a warpgroup's fragment of scores.
#pragma once
#include "walk.h"

namespace hopper {

// Of the two rows that a thread has a share of. total: of the thread's own columns alone, until the end.
struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, rescale[2];
};

// Of a thread's two rows: the box of keys that each may attend, and its raster place.
struct QueryBoxes {
    int low[2], high[2], raster[2];

    template <Mask MASK>
    DEVICE void load(const Boxes& boxes, int row, int query, bool exists) {
        low[row] = exists ? load_global(boxes.low, query) : 0;
        high[row] = exists ? load_global(boxes.high, query) : 0;
        if (MASK == Mask::causal_boxes) raster[row] = exists ? load_global(boxes.raster, query) : 0;
    }
};

// Keys from `valid` on do not count.
template <int COUNT>
DEVICE void mask_tail(float (&scores)[COUNT], int valid) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (fragment_column(thread_index(), i) >= valid) scores[i] = -INFINITY;
}

constexpr int kGuard = 1 << 9 | 1 << 19 | 1 << 30;  // packing/coordinates.py

DEVICE bool lies_inside(int place, int low, int high) { return (((place | kGuard) - low) & ((high | kGuard) - place) & kGuard) == kGuard; }

// places, rasters: addresses of the keys' in shared memory.
template <bool CAUSAL, int COUNT>
DEVICE void mask_boxes(float (&scores)[COUNT], const QueryBoxes& boxes, uint32_t places, uint32_t rasters) {
    int lane_column = fragment_column(thread_index(), 0);
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {  // two columns of two rows
        uint32_t offset = 4 * (i / 4 * 8 + lane_column);
        Pair place = load_shared<Pair>(places + offset), raster = {0, 0};
        if (CAUSAL) raster = load_shared<Pair>(rasters + offset);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = j / 2, key = j % 2 ? place.y : place.x;
            bool allowed = lies_inside(key, boxes.low[row], boxes.high[row]);
            if (CAUSAL) allowed = allowed && (j % 2 ? raster.y : raster.x) <= boxes.raster[row];
            if (!allowed) scores[i + j] = -INFINITY;
        }
    }
}

// Scores become weights exp2((score - top) scale); `rescale` is what all that came before is to be multiplied by.
template <int COUNT>
DEVICE void advance(Softmax& softmax, float (&scores)[COUNT], float scale) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float top = softmax.top[row];
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (i / 2 % 2 == row) top = fmaxf(top, scores[i]);
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        float finite = top == -INFINITY ? 0.0f : top;  // rows that have met no key yet
        softmax.rescale[row] = exp2_approx((softmax.top[row] - finite) * scale);
        softmax.top[row] = top;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (i / 2 % 2 == row) {
                scores[i] = exp2_approx(scores[i] * scale - finite * scale);
                sum += scores[i];
            }
        softmax.total[row] = softmax.total[row] * softmax.rescale[row] + sum;
    }
}

// Sums over all columns, in `total`; returns the logsumexp of the thread's two rows in `lse`, -inf where no key was met.
DEVICE void finish(Softmax& softmax, float (&lse)[2], float scale) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float& total = softmax.total[row];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        lse[row] = total == 0.0f ? -INFINITY : (softmax.top[row] * scale + log2f(total)) * 0.6931471805599453f;
    }
}

// What came before, in the terms of a top that has moved.
template <int COUNT>
DEVICE void rescale(float (&out)[COUNT], const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] *= softmax.rescale[i / 2 % 2];
}


}  // namespace hopper
