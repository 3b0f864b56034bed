// The emulated kernels as plain C functions, for the tests (ctypes).
#include <cstdio>

#include "../hopper/attention/arguments.h"
#include "../hopper/attention/backward_key_value.h"
#include "../hopper/attention/forward.h"

using namespace hopper;

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
static TensorMap map_of(const TensorView& x, int dim, int rows) {
    return {x.data, T::element, {dim, x.heads, x.tokens}, {1, x.head_stride, x.token_stride}, {kHalfColumns, 1, rows}};
}

// 0, or 1 with a message.
template <class Kernel>
static int run(Kernel kernel, int threads, int shared_bytes, const Manner& manner, Outcome& outcome) {
    for (int block = 0; block < manner.blocks; block++) {
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

template <class T, Mask MASK, int DIM>
struct Forms {
    static int run(const ForwardArguments& arguments, const Manner& manner, Outcome& outcome) {
        auto p = parameters<T>(arguments, map_of<T>);
        return ::run([&] { attention_forward<T, MASK, DIM>(p); }, kThreads, SharedTiles<DIM>::kBytes, manner, outcome);
    }
    static int run(const BackwardArguments& arguments, const Manner& manner, Outcome& outcome) {
        auto by_query = parameters<T>(arguments, arguments.by_query, map_of<T>), by_key = parameters<T>(arguments, arguments.by_key, map_of<T>);
        int bytes = BackwardTiles<DIM>::kBytes;
        return ::run([&] { attention_backward_query<T, MASK, DIM>(by_query); }, kThreads, bytes, manner, outcome) ||
               (arguments.grad_k.data &&
                ::run([&] { attention_backward_key_value<T, MASK, DIM>(by_key); }, kThreads, bytes, manner, outcome));
    }
};

template <class T, Mask MASK, class Arguments>
static int run_width(const Arguments& arguments, const Manner& manner, Outcome& outcome) {
    switch (width_of(arguments.dim)) {
        case 64: return Forms<T, MASK, 64>::run(arguments, manner, outcome);
        case 80: return Forms<T, MASK, 80>::run(arguments, manner, outcome);
        case 96: return Forms<T, MASK, 96>::run(arguments, manner, outcome);
        default: return Forms<T, MASK, 128>::run(arguments, manner, outcome);
    }
}

template <class T, class Arguments>
static int run_mask(const Arguments& arguments, const Manner& manner, Outcome& outcome) {
    switch (arguments.mask) {
        case Mask::full: return run_width<T, Mask::full>(arguments, manner, outcome);
        case Mask::boxes: return run_width<T, Mask::boxes>(arguments, manner, outcome);
        default: return run_width<T, Mask::causal_boxes>(arguments, manner, outcome);
    }
}

template <class Arguments>
static int run_type(const Arguments& arguments, const Manner& manner, Outcome& outcome) {
    return arguments.is_half ? run_mask<fp16>(arguments, manner, outcome) : run_mask<bf16>(arguments, manner, outcome);
}

extern "C" int emulated_attention_forward(const ForwardArguments* arguments, const Manner* manner, Outcome* outcome) {
    return run_type(*arguments, *manner, *outcome);
}
extern "C" int emulated_attention_backward(const BackwardArguments* arguments, const Manner* manner, Outcome* outcome) {
    return run_type(*arguments, *manner, *outcome);
}
