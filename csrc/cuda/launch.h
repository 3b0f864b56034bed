// What every launch on a GPU needs: tensor maps, errors as exceptions, as many blocks as run at once.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../hopper/attention/arguments.h"

namespace hopper {

struct Device {
    int multiprocessors;
    cudaStream_t stream;
};

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int num_blocks(int items, const Device& device) { return std::max(1, std::min(device.multiprocessors, items)); }

// Of the driver, which is not linked: the library loads where there is none.
inline auto tensor_map_encoder() {
    static const auto encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found), "driver");
#else
        check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found), "driver");
#endif
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no tensor maps; it is older than CUDA 12.0");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    }();
    return encode;
}

// Boxes of 64 columns and so many tokens of one head, under the 128-byte swizzle.
template <class T>
CUtensorMap map_of(const TensorView& x, int dim, int rows) {
    CUtensorMap map;
    // Of a tensor without a token nothing is ever loaded, but its map must be one.
    void* data = x.tokens ? x.data : reinterpret_cast<void*>(16);
    cuuint64_t sizes[] = {cuuint64_t(dim), cuuint64_t(x.heads), cuuint64_t(std::max<int64_t>(x.tokens, 1))};
    cuuint64_t strides[] = {cuuint64_t(x.head_stride) * sizeof(T), cuuint64_t(x.token_stride) * sizeof(T)};  // bytes
    cuuint32_t box[] = {kHalfColumns, 1, cuuint32_t(rows)}, steps[] = {1, 1, 1};
    auto type = std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult error = tensor_map_encoder()(&map, type, 3, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error));
    return map;
}

// By the narrowest form that takes the head dim; each is compiled in a file of its own.
template <int DIM, class Arguments>
void launch_width(const Arguments&, const Device&);
template <class Arguments>
void launch(const Arguments& arguments, const Device& device) {
    switch (width_of(arguments.dim)) {
        case 64: return launch_width<64>(arguments, device);
        case 80: return launch_width<80>(arguments, device);
        case 96: return launch_width<96>(arguments, device);
        default: return launch_width<128>(arguments, device);
    }
}

}  // namespace hopper
