// The op of attention on Hopper: what is given is checked here, whoever called, before any launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "launch.h"

// q, out [N, H, D]; k, v [Nk, Hk, D]; lse [H, N] float32. own ... raster: of a TileSchedule, int32 (tiles: empty for ranges
// of tokens). mask: `hopper::Mask`. scale: positive.
#define ATTENTION_FORWARD                                                                                              \
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor own, Tensor other, Tensor begin, Tensor split, Tensor end, " \
    "Tensor order, Tensor tiles, Tensor low, Tensor high, Tensor place, Tensor raster, bool lists, int mask, "          \
    "float scale, Tensor(a!) out, Tensor(b!) lse) -> ()"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As TMA takes it: 16-byte addresses and strides, columns side by side.
hopper::TensorView view(const char* name, const Tensor& x, const Tensor& like) {
    STD_TORCH_CHECK(x.dim() == 3, name, ": must be [tokens, heads, dim], not of ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name, ": must be on the CUDA device of q");
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.element_size() == 2, name, ": must be bfloat16 or float16, as q");
    STD_TORCH_CHECK(x.size(2) == like.size(2), name, ": head dim ", x.size(2), ", but that of q is ", like.size(2));
    STD_TORCH_CHECK(x.stride(2) == 1, name, ": columns of a head must lie side by side, not ", x.stride(2), " apart");
    for (int axis = 0; axis < 2; axis++)
        STD_TORCH_CHECK(x.stride(axis) > 0 && x.stride(axis) % 8 == 0, name, ": strides must be positive multiples of 8 elements, not ",
                        x.stride(axis));
    auto* data = const_cast<void*>(x.const_data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, ": must start at a multiple of 16 bytes");
    return {data, x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

hopper::Ints ints(const char* name, const Tensor& x, int64_t count, const Tensor& like) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 1 && x.is_contiguous(), name, ": must be int32, one-dimensional, contiguous");
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name, ": must be on the CUDA device of q");
    STD_TORCH_CHECK(count < 0 || x.size(0) == count, name, ": ", x.size(0), " numbers; must be ", count);
    return {static_cast<const int*>(x.const_data_ptr()), x.size(0)};
}

hopper::Device device_of(const Tensor& x) {
    hopper::Device device;
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    device.stream = static_cast<cudaStream_t>(stream);
    int major;
    hopper::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()), "device");
    STD_TORCH_CHECK(major == 9, "q: on a device of compute capability ", major, ".x; these kernels are for 9.0 (Hopper)");
    hopper::check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()), "device");
    return device;
}

void launch(const hopper::ForwardArguments& arguments, const hopper::Device& device) {
    switch (hopper::width_of(arguments.dim)) {
        case 64: return hopper::launch_forward<64>(arguments, device);
        case 80: return hopper::launch_forward<80>(arguments, device);
        case 96: return hopper::launch_forward<96>(arguments, device);
        default: return hopper::launch_forward<128>(arguments, device);
    }
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& own, const Tensor& other, const Tensor& begin,
                       const Tensor& split, const Tensor& end, const Tensor& order, const Tensor& tiles, const Tensor& low,
                       const Tensor& high, const Tensor& place, const Tensor& raster, bool lists, int64_t mask, double scale,
                       Tensor& out, Tensor& lse) {
    using namespace hopper;
    ForwardArguments arguments{};
    arguments.q = view("q", q, q), arguments.k = view("k", k, q), arguments.v = view("v", v, q), arguments.out = view("out", out, q);
    STD_TORCH_CHECK(q.size(2) % 8 == 0 && width_of(int(q.size(2))), "q: head dim ", q.size(2), "; must be a multiple of 8 up to 128");
    STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0 && v.size(1) == k.size(1) && v.size(0) == k.size(0),
                    "k, v: must be of one shape, whose heads divide those of q");
    STD_TORCH_CHECK(out.size(0) == q.size(0) && out.size(1) == q.size(1), "out: must be of q's shape");
    STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.dim() == 2 && lse.size(0) == q.size(1) &&
                        lse.size(1) == q.size(0), "lse: must be float32 [heads, tokens], contiguous");
    STD_TORCH_CHECK(scale > 0, "scale: ", scale, "; must be positive");
    STD_TORCH_CHECK(mask >= 0 && mask <= 2, "mask: ", mask, "; must be 0, 1 or 2");
    STD_TORCH_CHECK(q.size(0) < 1 << 30 && k.size(0) < 1 << 30, "q, k: too many tokens");
    int64_t count = order.size(0), queries = mask ? q.size(0) : -1, keys = mask ? k.size(0) : -1;
    arguments.lse = static_cast<float*>(lse.mutable_data_ptr());
    arguments.walk = {ints("own", own, count + 1, q), ints("other", other, -1, q), ints("begin", begin, count, q),
                      ints("split", split, count, q), ints("end", end, count, q), ints("order", order, count, q),
                      ints("tiles", tiles, -1, q), int(count), lists};
    arguments.boxes = {ints("low", low, queries, q), ints("high", high, queries, q), ints("place", place, keys, q),
                       ints("raster", raster, queries, q)};
    arguments.scale = float(scale), arguments.dim = int(q.size(2)), arguments.mask = Mask(mask);
    arguments.is_half = q.scalar_type() == ScalarType::Half;
    if (q.size(0) == 0) return;
    torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    launch(arguments, device_of(q));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sora_fast_native, library) { library.def(ATTENTION_FORWARD); }
STABLE_TORCH_LIBRARY_IMPL(sora_fast_native, CUDA, library) { library.impl("attention_forward", TORCH_BOX(&attention_forward)); }
