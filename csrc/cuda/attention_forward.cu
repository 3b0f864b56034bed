#include "../hopper/attention/forward.h"

namespace hopper {

template <class T, Mask MASK, int DIM>
__global__ void __launch_bounds__(kThreads, 1) attention_forward_kernel(const __grid_constant__ AttentionForward<T> p) {
    attention_forward<T, MASK, DIM>(p);
}

template __global__ void attention_forward_kernel<bf16, Mask::full, 128>(const __grid_constant__ AttentionForward<bf16>);
template __global__ void attention_forward_kernel<bf16, Mask::boxes, 128>(const __grid_constant__ AttentionForward<bf16>);

}  // namespace hopper
