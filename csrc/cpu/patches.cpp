// Patches of ragged latents to rows and back, on a CPU.
//
// Tokens are taken by the strip: neighbours in w, whose runs of pixels continue each other in memory. Numbers are moved
// as integers of their size, whatever they mean.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "../ops.h"

namespace sora_fast {
namespace {

// Numbers that are worth a thread of their own: some 20 µs of copying.
constexpr int64_t kNumbersPerThread = 32768;
// Longest strip: its rows stay in the first-level cache while they are written column by column.
constexpr int64_t kLongestStrip = 32;

// The tokens from `token` on that lie side by side in one row of a video.
int64_t strip_length(const Batch& batch, int64_t token, int64_t end) {
    const int32_t* place = batch.coords + 3 * token;
    const int32_t segment = batch.segment_ids[token];
    const int64_t longest = std::min(end - token, kLongestStrip);
    int64_t length = 1;
    while (length < longest && batch.segment_ids[token + length] == segment && place[3 * length] == place[0] &&
           place[3 * length + 1] == place[1] && place[3 * length + 2] == place[2] + length)
        length++;
    return length;
}

// T: an integer of a number's size. kGather: from pixels to rows. kWidth: pw, 0 where it is not known beforehand.
// kPixelStride, kStep: distances of pixels in the buffer and of a run's numbers in a row, 0 likewise.
template <typename T, bool kGather, int kWidth, int kPixelStride, int kStep>
struct Mover {
    const Moved& moved;
    T* flat;
    T* rows;

    int64_t width() const { return kWidth ? kWidth : moved.order.patch.w; }
    int64_t pixel_stride() const { return kPixelStride ? kPixelStride : moved.pixel_stride; }
    int64_t step() const { return kStep ? kStep : moved.order.step() * moved.column_stride; }

    // `count` pixels of one run of one token; a gathered run that the video's edge cuts ends in zeros.
    void run(T* pixel, T* cell, int64_t count) const {
        for (int64_t w = 0; w < count; w++) {
            if constexpr (kGather)
                cell[w * step()] = pixel[w * pixel_stride()];
            else
                pixel[w * pixel_stride()] = cell[w * step()];
        }
        if constexpr (kGather)
            for (int64_t w = count; w < width(); w++) cell[w * step()] = 0;
    }

    // One run of each token of a strip. columns_left: of the video, from the strip on.
    void runs(T* pixel, T* cell, int64_t tokens, int64_t columns_left) const {
        const int64_t whole = std::min(tokens, columns_left / width());
        const int64_t row_stride = moved.row_stride, distance = width() * pixel_stride();
        for (int64_t i = 0; i < whole; i++) run(pixel + i * distance, cell + i * row_stride, width());
        for (int64_t i = whole; i < tokens; i++)
            run(pixel + i * distance, cell + i * row_stride, std::max<int64_t>(0, columns_left - i * width()));
    }

    void strip(int64_t token, int64_t tokens) const {
        const RowOrder& order = moved.order;
        const Patch patch = patch_of(moved.batch, token);
        T* row = rows + token * moved.row_stride;
        for (int64_t t = 0; t < order.patch.t; t++)
            for (int64_t h = 0; h < order.patch.h; h++) {
                const bool reached = patch.reaches(t, h);
                if (!reached && !kGather) continue;
                for (int64_t c = 0; c < order.channels; c++) {
                    T* pixel = reached ? flat + patch.element(c, t, h) * pixel_stride() : nullptr;
                    runs(pixel, row + order.column(c, t, h) * moved.column_stride, tokens,
                         reached ? patch.columns_left : 0);
                }
            }
    }

    void operator()(int64_t begin, int64_t end) const {
        for (int64_t token = begin; token < end;) {
            const int64_t tokens = strip_length(moved.batch, token, end);
            strip(token, tokens);
            token += tokens;
        }
    }
};

template <typename T, bool kGather, int kWidth, int kPixelStride, int kStep>
void move_all(const Moved& moved, void* flat, void* rows) {
    const Mover<T, kGather, kWidth, kPixelStride, kStep> mover{moved, static_cast<T*>(flat), static_cast<T*>(rows)};
    const int64_t columns = moved.order.channels * moved.order.patch.t * moved.order.patch.h * moved.order.patch.w;
    const int64_t grain = std::max<int64_t>(kLongestStrip, kNumbersPerThread / columns);
    torch::stable::parallel_for(0, moved.batch.num_tokens, grain, mover);
}

template <typename T, bool kGather, int kWidth>
void move_by_width(const Moved& moved, void* flat, void* rows) {
    if (moved.order.step() * moved.column_stride == 1)
        move_all<T, kGather, kWidth, 1, 1>(moved, flat, rows);
    else
        move_all<T, kGather, kWidth, 1, 0>(moved, flat, rows);
}

template <typename T, bool kGather>
void move_by_type(const Moved& moved, void* flat, void* rows) {
    if (moved.pixel_stride != 1) return move_all<T, kGather, 0, 0, 0>(moved, flat, rows);
    switch (moved.order.patch.w) {
        case 1: return move_by_width<T, kGather, 1>(moved, flat, rows);
        case 2: return move_by_width<T, kGather, 2>(moved, flat, rows);
        case 4: return move_by_width<T, kGather, 4>(moved, flat, rows);
        case 8: return move_by_width<T, kGather, 8>(moved, flat, rows);
        case 16: return move_by_width<T, kGather, 16>(moved, flat, rows);
        default: return move_by_width<T, kGather, 0>(moved, flat, rows);
    }
}

template <bool kGather>
void move(const Moved& moved, void* flat, void* rows) {
    switch (moved.element_bytes) {
        case 2: return move_by_type<uint16_t, kGather>(moved, flat, rows);
        case 4: return move_by_type<uint32_t, kGather>(moved, flat, rows);
        default: return move_by_type<uint64_t, kGather>(moved, flat, rows);
    }
}

// (On a GPU that would wait for the device: the kernels look themselves.)
void check_videos(const Moved& moved) {
    for (int64_t segment = 0; segment < moved.batch.num_segments; segment++) {
        const int32_t* sizes = moved.batch.shapes + 4 * segment + 1;
        const int64_t first = moved.batch.offsets[segment];
        STD_TORCH_CHECK(fits(moved.batch, segment, moved.capacity), "flat: ", moved.capacity,
                        " elements; video ", segment, " (", moved.order.channels, ", ", sizes[0], ", ", sizes[1], ", ",
                        sizes[2], ") from ", first, " on does not fit");
    }
}

// Whether the patches of the tokens, which are distinct, make up the whole buffer.
bool cover_everything(const Moved& moved) {
    const PatchSize& patch = moved.order.patch;
    int64_t patches = 0, elements = 0, tokens = 0;
    for (int64_t segment = 0; segment < moved.batch.num_segments; segment++) {
        const int32_t* sizes = moved.batch.shapes + 4 * segment;
        const int64_t t = (sizes[1] + patch.t - 1) / patch.t, h = (sizes[2] + patch.h - 1) / patch.h;
        patches += t * h * ((sizes[3] + patch.w - 1) / patch.w);
        elements += moved.order.channels * sizes[1] * sizes[2] * sizes[3];
    }
    for (int64_t token = 0; token < moved.batch.num_tokens; token++) tokens += patch_of(moved.batch, token).frames_left > 0;
    return tokens == patches && elements == moved.capacity;
}

void gather_patches(const Tensor& flat, const Tensor& offsets, const Tensor& shapes, const Tensor& segment_ids,
                    const Tensor& coords, int64_t pt, int64_t ph, int64_t pw, bool channel_last, Tensor& rows) {
    const Moved moved = checked(flat, rows, offsets, shapes, segment_ids, coords, {pt, ph, pw}, channel_last);
    check_videos(moved);
    move<true>(moved, const_cast<void*>(flat.const_data_ptr()), rows.mutable_data_ptr());
}

void scatter_patches(const Tensor& rows, const Tensor& offsets, const Tensor& shapes, const Tensor& segment_ids,
                     const Tensor& coords, int64_t pt, int64_t ph, int64_t pw, bool channel_last, Tensor& flat) {
    const Moved moved = checked(flat, rows, offsets, shapes, segment_ids, coords, {pt, ph, pw}, channel_last);
    STD_TORCH_CHECK(flat.is_contiguous(), "flat: must be contiguous where it is written");
    check_videos(moved);
    void* pixels = flat.mutable_data_ptr();
    if (!cover_everything(moved)) std::memset(pixels, 0, moved.capacity * moved.element_bytes);
    move<false>(moved, pixels, const_cast<void*>(rows.const_data_ptr()));
}

}  // namespace
}  // namespace sora_fast

// Both libraries have these ops; whoever loads the CUDA one has loaded this one before.
STABLE_TORCH_LIBRARY(sora_fast_native, library) {
    library.def(GATHER_PATCHES);
    library.def(SCATTER_PATCHES);
}

STABLE_TORCH_LIBRARY_IMPL(sora_fast_native, CPU, library) {
    library.impl("gather_patches", TORCH_BOX(&sora_fast::gather_patches));
    library.impl("scatter_patches", TORCH_BOX(&sora_fast::scatter_patches));
}
