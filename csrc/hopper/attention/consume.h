// The two warpgroups that compute, 64 queries each, taking turns at the tensor cores: while one computes its softmax, the
// other's products run. Within a warpgroup the scores of a tile are computed together with the output of the tile before.
#pragma once
#include "shared_tiles.h"
#include "softmax.h"

namespace hopper {

constexpr int kTurn = 1;  // named barriers: kTurn + the warpgroup whose turn it is; 0 is that of the whole block

template <class T, Mask MASK, int DIM>
struct Consumer {
    using Tiles = SharedTiles<DIM>;
    const AttentionForward<T>& p;
    const Tiles& tiles;
    int group;
    Pipeline<Tiles::kStages> at;  // of the next step's keys
    Item item;
    int start, stop;    // of the warpgroup's queries
    bool takes_turns;   // with the other, which has queries too

    float scores[kKeys / 2], out[DIM / 2];
    uint32_t weights[kKeys / 4];
    Softmax softmax;
    QueryBoxes boxes;

    DEVICE Consumer(const AttentionForward<T>& parameters, const Tiles& shared, int warpgroup)
        : p(parameters), tiles(shared), group(warpgroup) {}

    DEVICE bool next_item(uint32_t parity) {
        mbarrier_wait(tiles.q_full(), parity);
        Chunk words = load_shared<Chunk>(tiles.item());
        item.head = int(words.z);
        item.unasked = int(words.w);
        item.steps = load_shared<int>(tiles.item() + 16);
        start = int(words.x) + group * 64;
        stop = int(words.y);
        takes_turns = int(words.x) + 64 < stop;
        return item.head >= 0;
    }

    DEVICE void load_boxes() {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            int query = start + fragment_row(thread_index() % 128, 2 * row);
            boxes.template load<MASK>(p.boxes, row, query, query < stop);
        }
    }

    // scores = Q Kᵀ
    DEVICE void issue_scores(int stage) { issue_row_products<T>(scores, tiles.q().from_row(group * 64), tiles.k(stage)); }
    // out += P V
    DEVICE void issue_output(int stage) { issue_weighted_rows<T>(out, weights, tiles.v(stage)); }

    // After the products: the mask, and the tiles that are not needed any more.
    DEVICE void finish_scores(int stage, int step) {
        if (MASK == Mask::full || step < item.unasked) {
            int valid = load_shared<int>(tiles.valid(stage));
            if (valid < kKeys) mask_tail(scores, valid);
        } else {
            mask_boxes<MASK == Mask::causal_boxes>(scores, boxes, tiles.places(stage), tiles.rasters(stage));
        }
        release(tiles.k_empty(stage));
        if (step == item.steps - 1) release(tiles.q_empty());
    }

    DEVICE void attend() {
        Pipeline<Tiles::kStages> values = at;
        clear(out);
        softmax = Softmax{};
        if (MASK != Mask::full && item.unasked < item.steps) load_boxes();

        mbarrier_wait(tiles.k_full(at.stage), at.parity);
        wgmma_fence(scores);
        issue_scores(at.stage);
        wgmma_wait<0>(scores);
        finish_scores(at.stage, 0);
        advance(softmax, scores, p.scale);
        pack_weights<T>(weights, scores);
        at.advance();

        if (takes_turns && group == 1 && item.steps > 1) barrier_arrive(kTurn + 0, 256);  // warpgroup 0 begins
        for (int step = 1; step < item.steps; step++) {
            mbarrier_wait(tiles.k_full(at.stage), at.parity);
            if (takes_turns) barrier_sync(kTurn + group, 256);
            wgmma_fence(scores);
            issue_scores(at.stage);
            mbarrier_wait(tiles.v_full(values.stage), values.parity);
            wgmma_fence(out, weights);
            issue_output(values.stage);
            if (takes_turns && (group == 0 || step < item.steps - 1)) barrier_arrive(kTurn + (group ^ 1), 256);
            wgmma_wait<1>(scores);
            finish_scores(at.stage, step);
            advance(softmax, scores, p.scale);
            wgmma_wait<0>(out, weights);
            release(tiles.v_empty(values.stage));
            rescale(out, softmax);
            pack_weights<T>(weights, scores);
            at.advance();
            values.advance();
        }
        mbarrier_wait(tiles.v_full(values.stage), values.parity);
        wgmma_fence(out, weights);
        issue_output(values.stage);
        wgmma_wait<0>(out, weights);
        release(tiles.v_empty(values.stage));
    }

    // The other warpgroup's item: its tiles are let go as they come.
    DEVICE void stand_by() {
        for (int step = 0; step < item.steps; step++, at.advance()) {
            mbarrier_wait(tiles.k_full(at.stage), at.parity);
            release(tiles.k_empty(at.stage));
            if (step == item.steps - 1) release(tiles.q_empty());
            mbarrier_wait(tiles.v_full(at.stage), at.parity);
            release(tiles.v_empty(at.stage));
        }
    }

    DEVICE void meet_nothing() {
        release(tiles.q_empty());
        clear(out);
        softmax = Softmax{};
    }

    DEVICE void store_output() {
        float lse[2];
        finish(softmax, lse, p.scale);
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float inverse = softmax.total[row] == 0.0f ? 0.0f : 1.0f / softmax.total[row];
#pragma unroll
            for (int i = 0; i < DIM / 2; i++)
                if (i / 2 % 2 == row) out[i] *= inverse;
            int query = start + fragment_row(thread_index() % 128, 2 * row);
            if (thread_index() % 4 == 0 && query < stop) store_global(p.lse, int64_t(item.head) * p.num_tokens + query, lse[row]);
        }
        store_fragment(p.out, {start, stop, item.head, p.dim}, tiles.out().from_row(group * 64), out);
    }
};

template <class T, Mask MASK, int DIM>
DEVICE void consume(const AttentionForward<T>& p, const SharedTiles<DIM>& tiles, int group) {
    Consumer<T, MASK, DIM> consumer(p, tiles, group);
    for (uint32_t parity = 0; consumer.next_item(parity); parity ^= 1) {
        bool has_queries = consumer.start < consumer.stop;
        if (!consumer.item.steps)
            consumer.meet_nothing();
        else if (has_queries)
            consumer.attend();
        else
            consumer.stand_by();
        if (has_queries) consumer.store_output();
    }
}

}  // namespace hopper
