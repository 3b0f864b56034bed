// Launches of the kernels of attention; a file for each pass and width includes this, so that they compile side by side.
#pragma once
#include "../hopper/attention/backward_key_value.h"
#include "../hopper/attention/forward.h"
#include "launch.h"

namespace hopper {

// A fat binary has empty bodies for other chips, which are never launched.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ON_HOPPER(...) __VA_ARGS__
#else
#define ON_HOPPER(...)
#endif

template <class T, Mask MASK, int DIM>
__global__ void __launch_bounds__(kThreads, 1) attention_forward_kernel(const __grid_constant__ AttentionForward<T> p) {
    ON_HOPPER(attention_forward<T, MASK, DIM>(p);)
}
template <class T, Mask MASK, int DIM>
__global__ void __launch_bounds__(kThreads, 1) attention_backward_query_kernel(const __grid_constant__ AttentionBackward<T> p) {
    ON_HOPPER(attention_backward_query<T, MASK, DIM>(p);)
}
template <class T, Mask MASK, int DIM>
__global__ void __launch_bounds__(kThreads, 1) attention_backward_key_value_kernel(const __grid_constant__ AttentionBackward<T> p) {
    ON_HOPPER(attention_backward_key_value<T, MASK, DIM>(p);)
}

template <class Parameters>
void launch_kernel(void (*kernel)(Parameters), int shared_bytes, const Walk& walk, int64_t heads, const Device& device, Parameters p) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
    kernel<<<num_blocks(walk.num_tiles * int(heads), device), kThreads, shared_bytes, device.stream>>>(p);
    check(cudaGetLastError(), "launch");
}

template <class T, Mask MASK, int DIM>
void launch_form(const ForwardArguments& x, const Device& device) {
    launch_kernel(attention_forward_kernel<T, MASK, DIM>, SharedTiles<DIM>::kBytes, x.walk, x.q.heads, device,
                  parameters<T>(x, map_of<T>));
}
template <class T, Mask MASK, int DIM>
void launch_form(const BackwardArguments& x, const Device& device) {
    constexpr int kBytes = BackwardTiles<DIM>::kBytes;
    launch_kernel(attention_backward_query_kernel<T, MASK, DIM>, kBytes, x.by_query, x.q.heads, device,
                  parameters<T>(x, x.by_query, map_of<T>));
    if (!x.grad_k.data) return;
    launch_kernel(attention_backward_key_value_kernel<T, MASK, DIM>, kBytes, x.by_key, x.k.heads, device,
                  parameters<T>(x, x.by_key, map_of<T>));
}

template <class T, int DIM, class Arguments>
void launch_type(const Arguments& arguments, const Device& device) {
    if (arguments.mask == Mask::full) return launch_form<T, Mask::full, DIM>(arguments, device);
    if (arguments.mask == Mask::boxes) return launch_form<T, Mask::boxes, DIM>(arguments, device);
    launch_form<T, Mask::causal_boxes, DIM>(arguments, device);
}

template <int DIM, class Arguments>
void launch_width(const Arguments& arguments, const Device& device) {
    arguments.is_half ? launch_type<fp16, DIM>(arguments, device) : launch_type<bf16, DIM>(arguments, device);
}

}  // namespace hopper
