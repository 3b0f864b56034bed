// The emulated backward, both of its passes, as a plain C function, for the tests (ctypes).
#include "../hopper/attention/backward_key_value.h"
#include "../hopper/attention/forward.h"
#include "running.h"

template <class T, Mask MASK, int DIM>
struct Backward {
    static int run(const BackwardArguments& arguments, const Manner& manner, Outcome& outcome) {
        auto by_query = parameters<T>(arguments, arguments.by_query, map_of<T>);
        auto by_key = parameters<T>(arguments, arguments.by_key, map_of<T>);
        constexpr int kBytes = BackwardTiles<DIM>::kBytes;
        return ::run([&] { attention_backward_query<T, MASK, DIM>(by_query); }, kThreads, kBytes, manner, outcome) ||
               (arguments.grad_k.data &&
                ::run([&] { attention_backward_key_value<T, MASK, DIM>(by_key); }, kThreads, kBytes, manner, outcome));
    }
};

EXPORTED int emulated_attention_backward(const BackwardArguments* arguments, const Manner* manner, Outcome* outcome) {
    return run_form<Backward>(*arguments, *manner, *outcome);
}
