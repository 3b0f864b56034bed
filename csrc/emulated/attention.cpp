// The emulated kernels as plain C functions, for the tests (ctypes).
#include <cstdio>

#include "../hopper/attention/forward.h"

using namespace hopper;

extern "C" {

// Shapes in tokens, heads and columns, strides in elements; see `AttentionForward`.
struct Tensor {
    void* data;
    int64_t tokens, heads, token_stride, head_stride;
};
struct Numbers {
    const int* data;
    int64_t count;
};
struct Problem {
    Tensor q, k, v, out;
    float* lse;
    Numbers own, other, begin, split, end, order, tiles, low, high, place, raster;
    int lists, mask, fp16, dim;
    float scale;  // of the scores, as users give it
};
struct Manner {
    uint64_t seed;
    int blocks, check_races;
};
struct Outcome {
    uint64_t trace;
    int64_t steps;
    char message[1000];
};
}

static int64_t extent(const Tensor& x, int dim) {
    return x.tokens && x.heads ? (x.tokens - 1) * x.token_stride + (x.heads - 1) * x.head_stride + dim : 0;
}

template <class T>
static TensorMap map_of(const Tensor& x, int dim) {
    return {x.data, T::element, {dim, x.heads, x.tokens}, {1, x.head_stride, x.token_stride}, {kHalfColumns, 1, kKeys}};
}

static Ints ints(const Numbers& x) { return {x.data, x.count}; }

template <class T>
static AttentionForward<T> parameters(const Problem& x) {
    const Tensor &q = x.q, &out = x.out;
    return {
        map_of<T>(q, x.dim), map_of<T>(x.k, x.dim), map_of<T>(x.v, x.dim),
        {{static_cast<T*>(out.data), extent(out, x.dim)}, out.token_stride, out.head_stride},
        {x.lse, q.heads * q.tokens},
        {ints(x.own), ints(x.other), ints(x.begin), ints(x.split), ints(x.end), ints(x.order), ints(x.tiles), int(x.order.count), bool(x.lists)},
        {ints(x.low), ints(x.high), ints(x.place), ints(x.raster)},
        x.scale * 1.4426950408889634f, int(q.tokens), int(q.heads), int(q.heads / x.k.heads), x.dim,
    };
}

template <class T, Mask MASK, int DIM>
static int run(const Problem& problem, const Manner& manner, Outcome& outcome) {
    auto p = parameters<T>(problem);
    for (int block = 0; block < manner.blocks; block++) {
        emulator::Launch launch{block, manner.blocks, kThreads, SharedTiles<DIM>::kBytes};
        emulator::Options options;
        options.seed = manner.seed * 1000003 + block;
        options.check_races = manner.check_races;
        auto result = emulator::run_block([&] { attention_forward<T, MASK, DIM>(p); }, launch, options);
        outcome.trace = outcome.trace * 31 + result.trace;
        outcome.steps += result.steps;
        if (!result.ok) {
            snprintf(outcome.message, sizeof outcome.message, "block %d: %s", block, result.message.c_str());
            return 1;
        }
    }
    return 0;
}

template <class T, Mask MASK>
static int run_dim(const Problem& problem, const Manner& manner, Outcome& outcome) {
    if (problem.dim <= 64) return run<T, MASK, 64>(problem, manner, outcome);
    if (problem.dim <= 80) return run<T, MASK, 80>(problem, manner, outcome);
    if (problem.dim <= 96) return run<T, MASK, 96>(problem, manner, outcome);
    return run<T, MASK, 128>(problem, manner, outcome);
}

template <class T>
static int run_mask(const Problem& problem, const Manner& manner, Outcome& outcome) {
    if (problem.mask == int(Mask::full)) return run_dim<T, Mask::full>(problem, manner, outcome);
    if (problem.mask == int(Mask::boxes)) return run_dim<T, Mask::boxes>(problem, manner, outcome);
    return run_dim<T, Mask::causal_boxes>(problem, manner, outcome);
}

// 0, or 1 with a message.
extern "C" int emulated_attention_forward(const Problem* problem, const Manner* manner, Outcome* outcome) {
    return problem->fp16 ? run_mask<fp16>(*problem, *manner, *outcome) : run_mask<bf16>(*problem, *manner, *outcome);
}
