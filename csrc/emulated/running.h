// How a test runs a kernel: its blocks one after the other or, of odd seeds, from the last to the first, each in an
// interleaving that the seed names.
#pragma once
#include <cstdio>
#include <type_traits>

#include "../hopper/attention/arguments.h"

using namespace hopper;

// Everything else stays inside a library, of which a test loads many that differ in a line.
#define EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" {
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

template <class T>
TensorMap map_of(const TensorView& x, int dim, int rows) {
    return {x.data, T::element, {dim, x.heads, x.tokens}, {1, x.head_stride, x.token_stride}, {kHalfColumns, 1, rows}};
}

// 0, or 1 with a message.
template <class Kernel>
int run(Kernel kernel, int threads, int shared_bytes, const Manner& manner, Outcome& outcome) {
    for (int turn = 0; turn < manner.blocks; turn++) {
        int block = manner.seed % 2 ? manner.blocks - 1 - turn : turn;
        emulator::Options options;
        options.seed = manner.seed * 1000003 + block;
        options.check_races = manner.check_races;
        auto result = emulator::run_block(kernel, {block, manner.blocks, threads, shared_bytes}, options);
        outcome.trace = outcome.trace * 31 + result.trace;
        outcome.steps += result.steps;
        if (!result.ok) {
            snprintf(outcome.message, sizeof outcome.message, "block %d: %s", block, result.message.c_str());
            return 1;
        }
    }
    return 0;
}

// Form<T, MASK, DIM>::run(arguments, manner, outcome) of the form that the arguments ask for. EMULATED_FORMS: a list of
// FORM(type, mask, width), for tests that compile often; others are not compiled then.
#ifdef EMULATED_FORMS
template <template <class, Mask, int> class Form, class Arguments>
int run_form(const Arguments& x, const Manner& manner, Outcome& outcome) {
#define FORM(T, MASK, DIM)                                                                    \
    if (x.is_half == std::is_same_v<T, fp16> && x.mask == Mask::MASK && width_of(x.dim) == DIM) \
        return Form<T, Mask::MASK, DIM>::run(x, manner, outcome);
    EMULATED_FORMS
    snprintf(outcome.message, sizeof outcome.message, "a form that is not compiled");
    return 1;
}
#else
template <template <class, Mask, int> class Form, class T, Mask MASK, class Arguments>
int run_width(const Arguments& x, const Manner& manner, Outcome& outcome) {
    switch (width_of(x.dim)) {
        case 64: return Form<T, MASK, 64>::run(x, manner, outcome);
        case 80: return Form<T, MASK, 80>::run(x, manner, outcome);
        case 96: return Form<T, MASK, 96>::run(x, manner, outcome);
        default: return Form<T, MASK, 128>::run(x, manner, outcome);
    }
}

template <template <class, Mask, int> class Form, class T, class Arguments>
int run_mask(const Arguments& x, const Manner& manner, Outcome& outcome) {
    switch (x.mask) {
        case Mask::full: return run_width<Form, T, Mask::full>(x, manner, outcome);
        case Mask::boxes: return run_width<Form, T, Mask::boxes>(x, manner, outcome);
        default: return run_width<Form, T, Mask::causal_boxes>(x, manner, outcome);
    }
}

template <template <class, Mask, int> class Form, class Arguments>
int run_form(const Arguments& x, const Manner& manner, Outcome& outcome) {
    return x.is_half ? run_mask<Form, fp16>(x, manner, outcome) : run_mask<Form, bf16>(x, manner, outcome);
}
#endif
