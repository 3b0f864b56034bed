// Where the pixels of a token's patch lie in the flat buffer of ragged latents. The CPU loops and the CUDA kernels both
// compute it here, so that what a CPU tests is what a GPU runs.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace sora_fast {

struct PatchSize {
    int64_t t, h, w;
};

// A packed batch: the videos of RaggedLatents, and the tokens of a PackedLayout that are their patches.
struct Batch {
    const int64_t* offsets;      // [S+1]: first element of every video
    const int32_t* shapes;       // [S, 4]: (C, T, H, W); C is not read
    const int32_t* segment_ids;  // [N]: -1 for padding
    const int32_t* coords;       // [N, 3]
    int64_t num_tokens;
    int64_t num_segments;
    int64_t channels;
    PatchSize patch;
};

// A token's patch in the flat buffer. Nothing is left of a padding token's, nor of one whose segment or place cannot be:
// no numbers in a layout lead outside the buffer.
struct Patch {
    int64_t first;    // element of its first pixel
    int64_t channel;  // elements from one channel to the next
    int64_t frame;    // and from one frame to the next
    int64_t row;
    int64_t frames_left, rows_left, columns_left;  // of the video, from the first pixel on

    // Whether the video has frame t and row h of the patch.
    HOST_DEVICE bool reaches(int64_t t, int64_t h) const { return t < frames_left && h < rows_left; }

    // The element of the first pixel of frame t and row h in channel c.
    HOST_DEVICE int64_t element(int64_t c, int64_t t, int64_t h) const {
        return first + c * channel + t * frame + h * row;
    }
};

HOST_DEVICE Patch patch_of(const Batch& batch, int64_t token) {
    const int64_t segment = batch.segment_ids[token];
    if (segment < 0 || segment >= batch.num_segments) return {};
    const int32_t* sizes = batch.shapes + 4 * segment;
    const int64_t frames = sizes[1], rows = sizes[2], columns = sizes[3];
    const int32_t* place = batch.coords + 3 * token;
    const int64_t t = place[0] * batch.patch.t, h = place[1] * batch.patch.h, w = place[2] * batch.patch.w;
    if (t < 0 || h < 0 || w < 0 || t >= frames || h >= rows || w >= columns) return {};
    return {batch.offsets[segment] + (t * rows + h) * columns + w,
            frames * rows * columns,
            rows * columns,
            columns,
            frames - t,
            rows - h,
            columns - w};
}

// Whether a video lies within `capacity` elements.
HOST_DEVICE bool fits(const Batch& batch, int64_t segment, int64_t capacity) {
    const int32_t* sizes = batch.shapes + 4 * segment + 1;
    if (sizes[0] < 0 || sizes[1] < 0 || sizes[2] < 0) return false;
    if (sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0) return true;
    int64_t elements = batch.channels;
    for (int axis = 0; axis < 3; axis++) {
        if (elements > capacity / sizes[axis]) return false;  // before the product overflows
        elements *= sizes[axis];
    }
    const int64_t first = batch.offsets[segment];
    return first >= 0 && first <= capacity - elements;
}

// `patch_of`, and nothing is left of one whose video does not fit.
HOST_DEVICE Patch patch_within(const Batch& batch, int64_t token, int64_t capacity) {
    const Patch patch = patch_of(batch, token);
    return patch.frames_left > 0 && fits(batch, batch.segment_ids[token], capacity) ? patch : Patch{};
}

// How the numbers of a patch stand in its row: (C, pt, ph, pw), or with the channels last.
struct RowOrder {
    int64_t channels;
    PatchSize patch;
    bool channel_last;

    // The column of pixel (t, h, 0) of channel c; its neighbours in w follow at distances of `step()`.
    HOST_DEVICE int64_t column(int64_t c, int64_t t, int64_t h) const {
        return channel_last ? (t * patch.h + h) * patch.w * channels + c
                            : ((c * patch.t + t) * patch.h + h) * patch.w;
    }

    HOST_DEVICE int64_t step() const { return channel_last ? channels : 1; }
};

}  // namespace sora_fast
