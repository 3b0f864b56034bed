// Patches of ragged latents to rows and back, on a GPU.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../ops.h"
#include "patches_launch.h"

namespace sora_fast {
namespace {

template <typename T, bool kGather, int kWidth>
__global__ void __launch_bounds__(kThreads) move_patches(const __grid_constant__ BlockOfPatches<T, kGather, kWidth> block) {
    __shared__ Shared shared;
    extern __shared__ __align__(16) uint8_t storage[];
    T* staged = reinterpret_cast<T*>(storage);
    const int thread = threadIdx.x;
    block.prepare(blockIdx.x, thread, shared);
    __syncthreads();
    if (kGather) {
        block.move_pixels(thread, shared, staged);
        __syncthreads();
        block.move_rows(blockIdx.x, thread, staged);
    } else {
        block.move_rows(blockIdx.x, thread, staged);
        __syncthreads();
        block.move_pixels(thread, shared, staged);
    }
}

struct Launch {
    cudaStream_t stream;

    template <typename T, bool kGather, int kWidth>
    void operator()(const BlockOfPatches<T, kGather, kWidth>& block, int64_t blocks, int64_t shared_bytes) const {
        move_patches<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(block);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
};

cudaStream_t stream_of(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

void gather_patches(const Tensor& flat, const Tensor& offsets, const Tensor& shapes, const Tensor& segment_ids,
                    const Tensor& coords, int64_t pt, int64_t ph, int64_t pw, bool channel_last, Tensor& rows) {
    const Moved moved = checked(flat, rows, offsets, shapes, segment_ids, coords, {pt, ph, pw}, channel_last);
    const torch::stable::accelerator::DeviceGuard guard(flat.get_device_index());
    launch_patches<true>(moved, const_cast<void*>(flat.const_data_ptr()), rows.mutable_data_ptr(),
                         Launch{stream_of(flat)});
}

void scatter_patches(const Tensor& rows, const Tensor& offsets, const Tensor& shapes, const Tensor& segment_ids,
                     const Tensor& coords, int64_t pt, int64_t ph, int64_t pw, bool channel_last, Tensor& flat) {
    const Moved moved = checked(flat, rows, offsets, shapes, segment_ids, coords, {pt, ph, pw}, channel_last);
    STD_TORCH_CHECK(flat.is_contiguous(), "flat: must be contiguous where it is written");
    const torch::stable::accelerator::DeviceGuard guard(flat.get_device_index());
    const cudaStream_t stream = stream_of(flat);
    // Whether tokens cover all of it stands in the layout, on the device.
    STD_CUDA_CHECK(cudaMemsetAsync(flat.mutable_data_ptr(), 0, moved.capacity * moved.element_bytes, stream));
    launch_patches<false>(moved, flat.mutable_data_ptr(), const_cast<void*>(rows.const_data_ptr()), Launch{stream});
}

}  // namespace
}  // namespace sora_fast

STABLE_TORCH_LIBRARY_IMPL(sora_fast_native, CUDA, library) {
    library.impl("gather_patches", TORCH_BOX(&sora_fast::gather_patches));
    library.impl("scatter_patches", TORCH_BOX(&sora_fast::scatter_patches));
}
