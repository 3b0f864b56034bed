// The ops of the compiled libraries, by their schemas, and all checks of what they are given: a kernel sees no bad input.
//
// Every op writes into tensors that its caller has made, and needs nothing of LibTorch but their sizes, strides and
// addresses. sora_fast/ops checks in the user's words first; what fails here came from a caller of torch.ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "patches.h"

// rows: [N, channels·pt·ph·pw], with every token's patch as RowOrder has it. Zeros for padding, and beyond a video's
// edge. flat, rows: of one dtype, any strides.
#define GATHER_PATCHES                                                                                          \
    "gather_patches(Tensor flat, Tensor offsets, Tensor shapes, Tensor segment_ids, Tensor coords, int pt, "    \
    "int ph, int pw, bool channel_last, Tensor(a!) rows) -> ()"
// The inverse. What no token covers, and what lies past the last video, becomes zero.
#define SCATTER_PATCHES                                                                                         \
    "scatter_patches(Tensor rows, Tensor offsets, Tensor shapes, Tensor segment_ids, Tensor coords, int pt, "   \
    "int ph, int pw, bool channel_last, Tensor(a!) flat) -> ()"

namespace sora_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What both ops move, checked.
struct Moved {
    Batch batch;
    RowOrder order;
    int64_t element_bytes;
    int64_t capacity;  // elements of `flat`
    int64_t pixel_stride, row_stride, column_stride;
};

inline void check_table(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes,
                        const Tensor& like) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": must be ",
                    type == ScalarType::Long ? "int64" : "int32");
    bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t axis = 0;
    for (int64_t size : sizes) fits = fits && tensor.size(axis++) == size;
    STD_TORCH_CHECK(fits, name, ": its shape does not fit the other arguments'");
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
    STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                    ": must be on the device of the other arguments");
}

// flat [elements], rows [N, K], and the tables of a layout and its latents, as the schemas name them.
inline Moved checked(const Tensor& flat, const Tensor& rows, const Tensor& offsets, const Tensor& shapes,
                     const Tensor& segment_ids, const Tensor& coords, PatchSize patch, bool channel_last) {
    STD_TORCH_CHECK(flat.dim() == 1, "flat: must be one-dimensional, not of ", flat.dim(), " dimensions");
    STD_TORCH_CHECK(rows.dim() == 2, "rows: must be [tokens, columns], not of ", rows.dim(), " dimensions");
    STD_TORCH_CHECK(flat.scalar_type() == rows.scalar_type(), "flat, rows: must be of one dtype");
    STD_TORCH_CHECK(flat.is_cuda() == rows.is_cuda() && flat.get_device_index() == rows.get_device_index(),
                    "flat, rows: must be on one device");
    const int64_t bytes = flat.element_size();
    STD_TORCH_CHECK(bytes == 2 || bytes == 4 || bytes == 8, "flat: elements of ", bytes, " bytes; must be of 2, 4 or 8");
    STD_TORCH_CHECK(patch.t > 0 && patch.h > 0 && patch.w > 0, "pt, ph, pw: must be ≥ 1");
    const int64_t pixels = patch.t * patch.h * patch.w, channels = rows.size(1) / pixels;
    STD_TORCH_CHECK(channels > 0 && channels * pixels == rows.size(1), "rows: ", rows.size(1),
                    " columns; must be a multiple of the ", pixels, " pixels of a patch");
    const int64_t tokens = rows.size(0), segments = shapes.dim() == 2 ? shapes.size(0) : 0;
    check_table("offsets", offsets, ScalarType::Long, {segments + 1}, flat);
    check_table("shapes", shapes, ScalarType::Int, {segments, 4}, flat);
    check_table("segment_ids", segment_ids, ScalarType::Int, {tokens}, flat);
    check_table("coords", coords, ScalarType::Int, {tokens, 3}, flat);
    const Batch batch{static_cast<const int64_t*>(offsets.const_data_ptr()),
                      static_cast<const int32_t*>(shapes.const_data_ptr()),
                      static_cast<const int32_t*>(segment_ids.const_data_ptr()),
                      static_cast<const int32_t*>(coords.const_data_ptr()),
                      tokens, segments, channels, patch};
    return {batch,          {channels, patch, channel_last}, bytes, flat.size(0), flat.stride(0), rows.stride(0),
            rows.stride(1)};
}

}  // namespace sora_fast
