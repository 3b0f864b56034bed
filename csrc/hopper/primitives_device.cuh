// Hopper's primitives as inline PTX (sm_90a). The emulation (primitives_emulated.h) has the same functions.
#pragma once
#include <cuda.h>

#include "global.h"
#include "layout.h"
#include "wgmma_device.cuh"

#define DEVICE __device__ __forceinline__

namespace hopper {

using TensorMap = CUtensorMap;
using bf16 = __nv_bfloat16;
using fp16 = __half;

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int num_blocks() { return gridDim.x; }
DEVICE uint32_t shared_base() {
    extern __shared__ unsigned char dynamic_shared[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

// --- mbarriers, TMA ---
DEVICE void mbarrier_init(uint32_t bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
DEVICE void mbarrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(bar), "r"(parity) : "memory");
}
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Tensor maps of rank 3: (column, head, row).
DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t bar, int column, int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(map), "r"(bar), "r"(column), "r"(head), "r"(row) : "memory");
}
DEVICE void tma_store(const TensorMap* map, uint32_t from, int column, int head, int row) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from),
                 "r"(column), "r"(head), "r"(row) : "memory");
}
DEVICE void tma_reduce_add(const TensorMap* map, uint32_t from, int column, int head, int row) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(from), "r"(column), "r"(head), "r"(row) : "memory");
}
DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void tma_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// --- wgmma ---
// Keeps the compiler from moving accesses to registers that an asynchronous product owns.
template <int COUNT>
DEVICE void pin(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int COUNT>
DEVICE void pin(uint32_t (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(registers[i])::"memory");
}
template <class... Registers>
DEVICE void wgmma_fence(Registers&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// registers: those that are complete after it.
template <int PENDING, class... Registers>
DEVICE void wgmma_wait(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    (pin(registers), ...);
}
// d = a b (+ d): a, b describe shared memory; B_ROWS_ARE_K: b is stored as rows of k (N-major), else as rows of n.
template <class T, bool B_ROWS_ARE_K, int COUNT>
DEVICE void wgmma_ss(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {
    Wgmma<T, COUNT>::template ss<B_ROWS_ARE_K>(d, a, b, accumulate);
}
template <class T, bool B_ROWS_ARE_K, int COUNT>
DEVICE void wgmma_rs(float (&d)[COUNT], const uint32_t* a, uint64_t b, bool accumulate) {
    Wgmma<T, COUNT>::template rs<B_ROWS_ARE_K>(d, a, b, accumulate);
}

// --- barriers of some of the threads, registers, warps ---
DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void block_sync() { __syncthreads(); }
DEVICE void warp_sync() { __syncwarp(); }
template <int COUNT>
DEVICE void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFF, x, mask); }
DEVICE int count_votes(bool vote) { return __popc(__ballot_sync(0xFFFFFFFF, vote)); }
DEVICE int warp_uniform(int x) { return __shfl_sync(0xFFFFFFFF, x, 0); }
// What depends on it is computed where it is used: kept over a loop, it would take registers that the loop needs.
DEVICE int recomputed(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// --- arithmetic ---
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
DEVICE uint32_t pack<fp16>(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

template <class T>
DEVICE float unpack(uint32_t pair, int which);
template <>
DEVICE float unpack<bf16>(uint32_t pair, int which) {
    return __uint_as_float(which ? pair & 0xFFFF0000 : pair << 16);
}
template <>
DEVICE float unpack<fp16>(uint32_t pair, int which) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16 * which)));
}
DEVICE float as_float(int bits) { return __int_as_float(bits); }
DEVICE int as_int(float x) { return __float_as_int(x); }

// --- memory: values of 4, 8 and 16 bytes ---
DEVICE void store_shared(uint32_t address, int value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void store_shared(uint32_t address, uint32_t value) { store_shared(address, int(value)); }
DEVICE void store_shared(uint32_t address, Pair value) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}
DEVICE void store_shared(uint32_t address, Chunk value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}
template <class V>
DEVICE V load_shared(uint32_t address);
template <>
DEVICE int load_shared<int>(uint32_t address) {
    int value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
template <>
DEVICE Pair load_shared<Pair>(uint32_t address) {
    Pair value;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
    return value;
}
template <>
DEVICE Chunk load_shared<Chunk>(uint32_t address) {
    Chunk value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}
template <class T>
DEVICE T load_global(const Global<const T>& from, int64_t place) {
    return __ldg(from.data + place);
}
template <class T>
DEVICE Chunk load_chunk(const Global<const T>& from, int64_t place) {
    uint4 value = __ldg(reinterpret_cast<const uint4*>(from.data + place));
    return {value.x, value.y, value.z, value.w};
}
template <class T>
DEVICE void store_global(const Global<T>& to, int64_t place, T value) {
    to.data[place] = value;
}
template <class T>
DEVICE void store_global(const Global<T>& to, int64_t place, Chunk value) {
    // As text: the compiler breaks some stores of a uint4 up.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to.data + place), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

}  // namespace hopper
