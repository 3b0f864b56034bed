// The CUDA kernels of patches, thread by thread on a host: their steps have no other meeting points than the barriers
// between them. For tests alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cuda/patches_launch.h"

namespace sora_fast {
namespace {

// NaN, whatever the numbers are.
const Vector<16> kPoison = [] {
    Vector<16> vector;
    std::memset(&vector, 0xFF, sizeof vector);
    return vector;
}();

struct Emulation {
    bool backwards;  // whether a block's threads run from the last to the first: nothing may depend on it

    template <typename Step>
    void step(Step&& step) const {
        for (int i = 0; i < kThreads; i++) step(backwards ? kThreads - 1 - i : i);
    }

    template <typename T, bool kGather, int kWidth>
    void operator()(const BlockOfPatches<T, kGather, kWidth>& block, int64_t blocks, int64_t shared_bytes) const {
        // Of vectors, so that it is aligned as a GPU's is. The last one is nobody's.
        std::vector<Vector<16>> storage(shared_bytes / 16 + 1);
        for (int64_t number = 0; number < blocks; number++) {
            std::fill(storage.begin(), storage.end(), kPoison);
            Shared shared;
            T* staged = reinterpret_cast<T*>(storage.data());
            step([&](int thread) { block.prepare(number, thread, shared); });
            if (kGather) {
                step([&](int thread) { block.move_pixels(thread, shared, staged); });
                step([&](int thread) { block.move_rows(number, thread, staged); });
            } else {
                step([&](int thread) { block.move_rows(number, thread, staged); });
                step([&](int thread) { block.move_pixels(thread, shared, staged); });
            }
            STD_TORCH_CHECK(!std::memcmp(&storage.back(), &kPoison, sizeof kPoison), "past the end of shared memory");
        }
    }

};

void gather_patches(const Tensor& flat, const Tensor& offsets, const Tensor& shapes, const Tensor& segment_ids,
                    const Tensor& coords, int64_t pt, int64_t ph, int64_t pw, bool channel_last, bool backwards,
                    Tensor& rows) {
    const Moved moved = checked(flat, rows, offsets, shapes, segment_ids, coords, {pt, ph, pw}, channel_last);
    launch_patches<true>(moved, const_cast<void*>(flat.const_data_ptr()), rows.mutable_data_ptr(),
                         Emulation{backwards});
}

void scatter_patches(const Tensor& rows, const Tensor& offsets, const Tensor& shapes, const Tensor& segment_ids,
                     const Tensor& coords, int64_t pt, int64_t ph, int64_t pw, bool channel_last, bool backwards,
                     Tensor& flat) {
    const Moved moved = checked(flat, rows, offsets, shapes, segment_ids, coords, {pt, ph, pw}, channel_last);
    launch_patches<false>(moved, flat.mutable_data_ptr(), const_cast<void*>(rows.const_data_ptr()),
                          Emulation{backwards});
}

}  // namespace
}  // namespace sora_fast

STABLE_TORCH_LIBRARY_FRAGMENT(sora_fast_test, library) {
    library.def(
        "gather_patches(Tensor flat, Tensor offsets, Tensor shapes, Tensor segment_ids, Tensor coords, int pt, int ph, "
        "int pw, bool channel_last, bool backwards, Tensor(a!) rows) -> ()");
    library.def(
        "scatter_patches(Tensor rows, Tensor offsets, Tensor shapes, Tensor segment_ids, Tensor coords, int pt, int ph, "
        "int pw, bool channel_last, bool backwards, Tensor(a!) flat) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sora_fast_test, CPU, library) {
    library.impl("gather_patches", TORCH_BOX(&sora_fast::gather_patches));
    library.impl("scatter_patches", TORCH_BOX(&sora_fast::scatter_patches));
}
