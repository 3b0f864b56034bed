// The emulated forward as a plain C function, for the tests (ctypes).
#include "../hopper/attention/forward.h"

#include "running.h"

template <class T, Mask MASK, int DIM>
struct Forward {
    static int run(const ForwardArguments& arguments, const Manner& manner, Outcome& outcome) {
        auto p = parameters<T>(arguments, map_of<T>);
        return ::run([&] { attention_forward<T, MASK, DIM>(p); }, kThreads, SharedTiles<DIM>::kBytes, manner, outcome);
    }
};

EXPORTED int emulated_attention_forward(const ForwardArguments* arguments, const Manner* manner, Outcome* outcome) {
    return run_form<Forward>(*arguments, *manner, *outcome);
}
