// Launches of the forward kernel; a file for each width includes this, so that they compile side by side.
#pragma once
#include "../hopper/attention/forward.h"
#include "launch.h"

namespace hopper {

template <class T, Mask MASK, int DIM>
__global__ void __launch_bounds__(kThreads, 1) attention_forward_kernel(const __grid_constant__ AttentionForward<T> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // a fat binary has an empty body for others, which is never launched
    attention_forward<T, MASK, DIM>(p);
#endif
}

template <class T, Mask MASK, int DIM>
void launch_form(const ForwardArguments& arguments, const Device& device) {
    constexpr int kShared = SharedTiles<DIM>::kBytes;
    auto kernel = attention_forward_kernel<T, MASK, DIM>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "shared memory");
    auto p = parameters<T>(arguments, map_of<T>);
    kernel<<<num_blocks(arguments.walk.num_tiles * int(arguments.q.heads), device), kThreads, kShared, device.stream>>>(p);
    check(cudaGetLastError(), "launch");
}

template <class T, int DIM>
void launch_width(const ForwardArguments& arguments, const Device& device) {
    if (arguments.mask == Mask::full) return launch_form<T, Mask::full, DIM>(arguments, device);
    if (arguments.mask == Mask::boxes) return launch_form<T, Mask::boxes, DIM>(arguments, device);
    launch_form<T, Mask::causal_boxes, DIM>(arguments, device);
}

template <int DIM>
void launch_forward(const ForwardArguments& arguments, const Device& device) {
    arguments.is_half ? launch_width<fp16, DIM>(arguments, device) : launch_width<bf16, DIM>(arguments, device);
}

}  // namespace hopper
