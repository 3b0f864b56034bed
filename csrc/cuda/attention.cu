// The op of attention on Hopper: what is given is checked here, whoever called, before any launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "launch.h"

// Of a TileSchedule, int32 on the device of the others. own ... tiles, lists: a side of it (tiles: empty for ranges of
// tokens; split: full_end of lists). low ... raster: the packed boxes and places, empty under a full mask.
#define WALK(side) \
    "Tensor " side "begin, Tensor " side "split, Tensor " side "end, Tensor " side "order, Tensor " side "walked, "
#define SCHEDULE "Tensor query_tiles, Tensor key_tiles, Tensor low, Tensor high, Tensor place, Tensor raster, "

// q, out [N, H, D]; k, v [Nk, Hk, D]; lse [H, N] float32. mask: `hopper::Mask`. scale: positive.
#define ATTENTION_FORWARD                                                                                    \
    "attention_forward(Tensor q, Tensor k, Tensor v, " SCHEDULE WALK("") "bool lists, int mask, float scale, " \
    "Tensor(a!) out, Tensor(b!) lse) -> ()"
// grad_out, grad_q: as q; grad_k, grad_v: as k, or empty: not wanted. grad_lse: as lse, or empty: zero. log2_lse, delta:
// scratch, as lse.
#define ATTENTION_BACKWARD                                                                                           \
    "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "      \
    SCHEDULE WALK("query_") WALK("key_") "bool lists, int mask, float scale, Tensor(a!) grad_q, Tensor(b!) grad_k, " \
    "Tensor(c!) grad_v, Tensor(d!) log2_lse, Tensor(e!) delta) -> ()"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_device(const char* name, const Tensor& x, const Tensor& like) {
    STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name, ": must be on the CUDA device of q");
}

// As TMA takes it: 16-byte addresses and strides, columns side by side.
hopper::TensorView view(const char* name, const Tensor& x, const Tensor& like) {
    STD_TORCH_CHECK(x.dim() == 3, name, ": must be [tokens, heads, dim], not of ", x.dim(), " dimensions");
    check_device(name, x, like);
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half),
                    name, ": must be bfloat16 or float16, as q");
    STD_TORCH_CHECK(x.size(2) == like.size(2), name, ": head dim ", x.size(2), ", but that of q is ", like.size(2));
    STD_TORCH_CHECK(x.stride(2) == 1, name, ": columns of a head must lie side by side, not ", x.stride(2), " apart");
    for (int axis = 0; axis < 2; axis++)
        STD_TORCH_CHECK(x.stride(axis) > 0 && x.stride(axis) % 8 == 0, name, ": strides must be positive multiples of 8 elements, not ",
                        x.stride(axis));
    auto* data = const_cast<void*>(x.const_data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, ": must start at a multiple of 16 bytes");
    return {data, x.size(0), x.size(1), x.stride(0), x.stride(1)};
}
hopper::TensorView view_like(const char* name, const Tensor& x, const Tensor& like) {
    hopper::TensorView found = view(name, x, like);
    STD_TORCH_CHECK(x.size(0) == like.size(0) && x.size(1) == like.size(1), name, ": must be of the shape of what it belongs to");
    return found;
}

hopper::Ints ints(const char* name, const Tensor& x, int64_t count, const Tensor& like) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 1 && x.is_contiguous(), name,
                    ": must be int32, one-dimensional, contiguous");
    check_device(name, x, like);
    STD_TORCH_CHECK(count < 0 || x.size(0) == count, name, ": ", x.size(0), " numbers; must be ", count);
    return {static_cast<const int*>(x.const_data_ptr()), x.size(0)};
}

// One number a query and head; null if there is none and none is needed.
float* numbers(const char* name, const Tensor& x, const Tensor& q, bool may_lack = false) {
    if (may_lack && x.size(0) == 0) return nullptr;
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.is_contiguous() && x.size(0) == q.size(1) && x.size(1) == q.size(0),
                    name, ": must be float32 [heads, tokens], contiguous");
    check_device(name, x, q);
    return static_cast<float*>(const_cast<void*>(x.const_data_ptr()));
}

hopper::Walk walk(const Tensor& own, const Tensor& other, const Tensor& begin, const Tensor& split, const Tensor& end, const Tensor& order,
                  const Tensor& tiles, bool lists, const Tensor& q) {
    int64_t count = order.size(0);
    return {ints("tile offsets", own, count + 1, q), ints("tile offsets", other, -1, q), ints("begin", begin, count, q),
            ints("split", split, count, q), ints("end", end, count, q), ints("order", order, count, q),
            ints("tiles", tiles, -1, q), int(count), lists};
}

// What both passes take, checked. Shapes of k and v, the head dim, the mask, the scale.
template <class Arguments>
void check_common(Arguments& x, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& low, const Tensor& high,
                  const Tensor& place, const Tensor& raster, int64_t mask, double scale) {
    x.q = view("q", q, q), x.k = view("k", k, q), x.v = view("v", v, q);
    STD_TORCH_CHECK(q.size(2) % 8 == 0 && hopper::width_of(int(q.size(2))), "q: head dim ", q.size(2), "; must be a multiple of 8 up to 128");
    STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0 && v.size(1) == k.size(1) && v.size(0) == k.size(0),
                    "k, v: must be of one shape, whose heads divide those of q");
    STD_TORCH_CHECK(q.size(0) < 1 << 30 && k.size(0) < 1 << 30, "q, k: too many tokens");
    STD_TORCH_CHECK(scale > 0, "scale: ", scale, "; must be positive");
    STD_TORCH_CHECK(mask >= 0 && mask <= 2, "mask: ", mask, "; must be 0, 1 or 2");
    int64_t queries = mask ? q.size(0) : -1, keys = mask ? k.size(0) : -1;
    x.boxes = {ints("low", low, queries, q), ints("high", high, queries, q), ints("place", place, keys, q),
               ints("raster", raster, mask == 2 ? queries : -1, q)};
    x.scale = float(scale), x.dim = int(q.size(2)), x.mask = hopper::Mask(mask);
    x.is_half = q.scalar_type() == ScalarType::Half;
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

template <class Arguments>
void launch(const Arguments& arguments, const Tensor& q) {
    torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    hopper::launch(arguments, device_of(q));
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& query_tiles, const Tensor& key_tiles,
                       const Tensor& low, const Tensor& high, const Tensor& place, const Tensor& raster, const Tensor& begin,
                       const Tensor& split, const Tensor& end, const Tensor& order, const Tensor& tiles, bool lists, int64_t mask,
                       double scale, Tensor& out, Tensor& lse) {
    hopper::ForwardArguments x{};
    check_common(x, q, k, v, low, high, place, raster, mask, scale);
    x.out = view_like("out", out, q);
    x.lse = numbers("lse", lse, q);
    x.walk = walk(query_tiles, key_tiles, begin, split, end, order, tiles, lists, q);
    if (q.size(0)) launch(x, q);
}

void attention_backward(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& query_tiles, const Tensor& key_tiles, const Tensor& low, const Tensor& high,
                        const Tensor& place, const Tensor& raster, const Tensor& query_begin, const Tensor& query_split,
                        const Tensor& query_end, const Tensor& query_order, const Tensor& query_walked, const Tensor& key_begin,
                        const Tensor& key_split, const Tensor& key_end, const Tensor& key_order, const Tensor& key_walked, bool lists,
                        int64_t mask, double scale, Tensor& grad_q, Tensor& grad_k, Tensor& grad_v, Tensor& log2_lse, Tensor& delta) {
    hopper::BackwardArguments x{};
    check_common(x, q, k, v, low, high, place, raster, mask, scale);
    x.out = view_like("out", out, q), x.grad_out = view_like("grad_out", grad_out, q), x.grad_q = view_like("grad_q", grad_q, q);
    if (grad_k.size(0)) x.grad_k = view_like("grad_k", grad_k, k), x.grad_v = view_like("grad_v", grad_v, v);
    x.lse = numbers("lse", lse, q), x.grad_lse = numbers("grad_lse", grad_lse, q, true);
    x.log2_lse = numbers("log2_lse", log2_lse, q), x.delta = numbers("delta", delta, q);
    x.by_query = walk(query_tiles, key_tiles, query_begin, query_split, query_end, query_order, query_walked, lists, q);
    x.by_key = walk(key_tiles, query_tiles, key_begin, key_split, key_end, key_order, key_walked, lists, q);
    if (q.size(0) || k.size(0)) launch(x, q);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sora_fast_native, library) {
    library.def(ATTENTION_FORWARD);
    library.def(ATTENTION_BACKWARD);
}
STABLE_TORCH_LIBRARY_IMPL(sora_fast_native, CUDA, library) {
    library.impl("attention_forward", TORCH_BOX(&attention_forward));
    library.impl("attention_backward", TORCH_BOX(&attention_backward));
}
