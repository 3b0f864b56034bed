// Attention inside the segments of a pack on a CPU, in fp32: no call, no copy and no padding a segment.
//
// A task is one head over queries and keys that lie together. Tasks are given to threads as these become free; what a
// task computes does not depend on which does it, nor on the other segments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "../ops.h"
#include "attention_block.h"

namespace sora_fast {
namespace {

// Longest part of a segment's queries in one task of the forward pass: a long segment is work for several threads.
constexpr int64_t kPart = 4 * kQueries;
// Pairs of tokens, over all channels, that are worth a thread of their own: some 20 µs.
constexpr int64_t kWorkPerThread = 1 << 18;

using Forward = void (*)(const ForwardHead&, const Meeting&, Scratch&);
using Backward = void (*)(const BackwardHead&, const Meeting*, int64_t, Scratch&);
struct Kernels {
    Forward forward;
    Backward backward;
};

#if defined(__x86_64__)
#define SORA_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define SORA_AVX2 __attribute__((target("avx2,fma")))
SORA_AVX512 void forward_16(const ForwardHead& head, const Meeting& meeting, Scratch& scratch) {
    forward_meeting<16>(head, meeting, scratch);
}
SORA_AVX512 void backward_16(const BackwardHead& head, const Meeting* meetings, int64_t count, Scratch& scratch) {
    backward_meetings<16>(head, meetings, count, scratch);
}
SORA_AVX2 void forward_8(const ForwardHead& head, const Meeting& meeting, Scratch& scratch) {
    forward_meeting<8>(head, meeting, scratch);
}
SORA_AVX2 void backward_8(const BackwardHead& head, const Meeting* meetings, int64_t count, Scratch& scratch) {
    backward_meetings<8>(head, meetings, count, scratch);
}
#endif
void forward_4(const ForwardHead& head, const Meeting& meeting, Scratch& scratch) {
    forward_meeting<4>(head, meeting, scratch);
}
void backward_4(const BackwardHead& head, const Meeting* meetings, int64_t count, Scratch& scratch) {
    backward_meetings<4>(head, meetings, count, scratch);
}

// The widest vectors that the processor has. lanes: 0, or at most so many.
Kernels kernels(int64_t lanes) {
#if defined(__x86_64__)
    const bool has_16 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    const bool has_8 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_16 && (lanes == 0 || lanes >= 16)) return {forward_16, backward_16};
    if (has_8 && (lanes == 0 || lanes >= 8)) return {forward_8, backward_8};
#endif
    (void)lanes;
    return {forward_4, backward_4};
}

// One after the other to whichever thread is free, the longest first.
template <class Task>
void share(const std::vector<int64_t>& costs, const Task& task) {
    std::vector<int64_t> order(costs.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
    const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
    const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), 1 + total / kWorkPerThread,
                                               std::max<int64_t>(1, static_cast<int64_t>(costs.size()))});
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        Scratch scratch;
        for (size_t place; (place = next.fetch_add(1)) < order.size();) task(order[place], scratch);
    });
}

Rows head_of(const Tensor& x, int64_t head) {
    return {static_cast<float*>(const_cast<void*>(x.const_data_ptr())) + head * x.stride(1), x.stride(0)};
}

void check_heads(const char* name, const Tensor& x, const Tensor& like, int64_t heads) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(1) == heads && x.size(2) == like.size(2), name,
                    ": its shape does not fit the other arguments'");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && !x.is_cuda(), name, ": must be float32, on a CPU");
    STD_TORCH_CHECK(x.size(2) == 1 || x.size(0) == 0 || x.stride(2) == 1, name, ": its channels must lie side by side");
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q, k: must be [tokens, heads, channels]");
    STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0 && q.size(2) == k.size(2), "k: its heads or channels do not fit q's");
    check_heads("q", q, q, q.size(1));
    check_heads("k", k, k, k.size(1));
    check_heads("v", v, k, k.size(1));
    STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == q.size(1) && lse.size(1) == q.size(0) && lse.is_contiguous() &&
                        lse.scalar_type() == ScalarType::Float,
                    "lse: must be [heads, tokens] float32, contiguous");
}

// The table's rows that have both queries and keys.
std::vector<Meeting> read(const Tensor& meetings, int64_t queries, int64_t keys) {
    STD_TORCH_CHECK(meetings.dim() == 2 && meetings.size(1) == 4 && meetings.scalar_type() == ScalarType::Long &&
                        meetings.is_contiguous() && !meetings.is_cuda(),
                    "meetings: must be [count, 4] int64, contiguous, on a CPU");
    const auto* rows = static_cast<const Meeting*>(meetings.const_data_ptr());
    std::vector<Meeting> found;
    int64_t last = 0;
    for (int64_t i = 0; i < meetings.size(0); i++) {
        const Meeting& m = rows[i];
        if (m.first_query >= m.last_query || m.first_key >= m.last_key) continue;
        STD_TORCH_CHECK(m.first_query >= last && m.last_query <= queries && m.first_key >= 0 && m.last_key <= keys, "meetings: row ", i,
                        " does not fit");
        last = m.last_query;
        found.push_back(m);
    }
    return found;
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& meetings, double scale, int64_t lanes, Tensor& out,
                       Tensor& lse) {
    check_inputs(q, k, v, lse);
    check_heads("out", out, q, q.size(1));
    std::vector<Meeting> parts;
    for (const Meeting& m : read(meetings, q.size(0), k.size(0)))
        for (int64_t first = m.first_query; first < m.last_query; first += kPart)
            parts.push_back({first, std::min(first + kPart, m.last_query), m.first_key, m.last_key});
    const int64_t heads = q.size(1), group = heads / k.size(1), dim = q.size(2);
    std::vector<int64_t> costs;
    for (const Meeting& part : parts) costs.insert(costs.end(), heads, part.queries() * part.keys() * dim);
    float* sums = static_cast<float*>(lse.mutable_data_ptr());
    const Forward forward = kernels(lanes).forward;
    share(costs, [&](int64_t task, Scratch& scratch) {
        const int64_t head = task % heads;
        const ForwardHead here{head_of(q, head), head_of(k, head / group), head_of(v, head / group), head_of(out, head),
                               sums + head * q.size(0), dim, static_cast<float>(scale)};
        forward(here, parts[task / heads], scratch);
    });
}

// Where meetings begin that start at another key than the one before: nobody else writes to their keys.
std::vector<size_t> groups(const std::vector<Meeting>& meetings) {
    std::vector<size_t> begins;
    for (size_t i = 0; i < meetings.size(); i++)
        if (i == 0 || meetings[i].first_key != meetings[i - 1].first_key) begins.push_back(i);
    begins.push_back(meetings.size());
    return begins;
}

void attention_backward(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& meetings, double scale, int64_t lanes, Tensor& grad_q, Tensor& grad_k,
                        Tensor& grad_v) {
    check_inputs(q, k, v, lse);
    for (const auto& [name, x] : {std::pair{"grad_out", &grad_out}, {"out", &out}, {"grad_q", &grad_q}}) check_heads(name, *x, q, q.size(1));
    for (const auto& [name, x] : {std::pair{"grad_k", &grad_k}, {"grad_v", &grad_v}}) check_heads(name, *x, k, k.size(1));
    const bool with_lse = grad_lse.numel() > 0;
    if (with_lse) check_inputs(q, k, v, grad_lse);
    const std::vector<Meeting> all = read(meetings, q.size(0), k.size(0));
    const std::vector<size_t> begins = groups(all);
    const int64_t key_heads = k.size(1), group = q.size(1) / key_heads, dim = q.size(2), tokens = q.size(0);
    std::vector<int64_t> costs;
    for (size_t i = 0; i + 1 < begins.size(); i++) {
        int64_t cost = 0;
        for (size_t m = begins[i]; m < begins[i + 1]; m++) cost += all[m].queries() * all[m].keys() * dim * group;
        costs.insert(costs.end(), key_heads, cost);
    }
    const float* sums = static_cast<const float*>(lse.const_data_ptr());
    const float* grad_sums = with_lse ? static_cast<const float*>(grad_lse.const_data_ptr()) : nullptr;
    const Backward backward = kernels(lanes).backward;
    share(costs, [&](int64_t task, Scratch& scratch) {
        const int64_t key_head = task % key_heads;
        const size_t begin = begins[task / key_heads], end = begins[task / key_heads + 1];
        for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
            const BackwardHead here{head_of(grad_out, head), head_of(q, head), head_of(k, key_head), head_of(v, key_head),
                                    head_of(out, head), head_of(grad_q, head), head_of(grad_k, key_head), head_of(grad_v, key_head),
                                    sums + head * tokens, grad_sums ? grad_sums + head * tokens : nullptr, dim,
                                    static_cast<float>(scale)};
            backward(here, all.data() + begin, static_cast<int64_t>(end - begin), scratch);
        }
    });
}

}  // namespace
}  // namespace sora_fast

// meetings [count, 4] int64: queries from … to, keys from … to (excluded), in the order of the queries; of keys, those of
// two meetings are either apart, or begin at the same one and stand in neighbouring rows. What meets nothing is left as it
// was, but gradients of keys, which are added to. lanes: 0, or at most so many numbers a vector, for tests. grad_lse:
// without elements for zero.
STABLE_TORCH_LIBRARY_FRAGMENT(sora_fast_native, library) {
    library.def(
        "attention_cpu_forward(Tensor q, Tensor k, Tensor v, Tensor meetings, float scale, int lanes, Tensor(a!) out, "
        "Tensor(b!) lse) -> ()");
    library.def(
        "attention_cpu_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor meetings, float scale, int lanes, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sora_fast_native, CPU, library) {
    library.impl("attention_cpu_forward", TORCH_BOX(&sora_fast::attention_forward));
    library.impl("attention_cpu_backward", TORCH_BOX(&sora_fast::attention_backward));
}
