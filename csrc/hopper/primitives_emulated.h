// Hopper's primitives on a CPU, for tests without a GPU; the functions of primitives_device.cuh.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../emulator/emulator.h"
#include "../emulator/floats.h"
#include "global.h"
#include "layout.h"

#define DEVICE inline
#define WHERE emulator::Where where = emulator::Where::current()

namespace hopper {

using emulator::TensorMap;
struct bf16 {
    static constexpr auto element = emulator::Element::bf16;
    uint16_t bits;
};
struct fp16 {
    static constexpr auto element = emulator::Element::fp16;
    uint16_t bits;
};
using std::log2f;
using std::max;
using std::min;

DEVICE int thread_index() { return emulator::thread_index(); }
DEVICE int block_index() { return emulator::block_index(); }
DEVICE int num_blocks() { return emulator::num_blocks(); }
DEVICE uint32_t shared_base() { return emulator::shared_base(); }

// --- mbarriers, TMA ---
DEVICE void mbarrier_init(uint32_t bar, uint32_t arrivals, WHERE) { emulator::mbarrier_init(bar, arrivals, where); }
DEVICE void mbarrier_arrive(uint32_t bar, WHERE) { emulator::mbarrier_arrive(bar, 0, where); }
DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes, WHERE) { emulator::mbarrier_arrive(bar, bytes, where); }
DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity, WHERE) { emulator::mbarrier_wait(bar, parity, where); }
DEVICE void fence_proxy_async(WHERE) { emulator::fence_proxy_async(where); }

DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t bar, int column, int head, int row, WHERE) {
    emulator::tma_load(to, *map, bar, {column, head, row}, where);
}
DEVICE void tma_store(const TensorMap* map, uint32_t from, int column, int head, int row, WHERE) {
    emulator::tma_store(*map, from, {column, head, row}, false, where);
}
DEVICE void tma_reduce_add(const TensorMap* map, uint32_t from, int column, int head, int row, WHERE) {
    emulator::tma_store(*map, from, {column, head, row}, true, where);
}
DEVICE void tma_commit(WHERE) { emulator::tma_commit(where); }
template <int PENDING>
DEVICE void tma_wait_read(WHERE) {
    emulator::tma_wait_read(PENDING, where);
}

// --- wgmma ---
template <class A>
DEVICE void wgmma_fence(A& a, WHERE) {
    emulator::wgmma_fence({{&a, sizeof a}}, where);
}
template <class A, class B>
DEVICE void wgmma_fence(A& a, B& b, WHERE) {
    emulator::wgmma_fence({{&a, sizeof a}, {&b, sizeof b}}, where);
}
DEVICE void wgmma_commit(WHERE) { emulator::wgmma_commit(where); }
template <int PENDING, class A>
DEVICE void wgmma_wait(A& a, WHERE) {
    emulator::wgmma_wait(PENDING, where);
    emulator::wgmma_ready(a, where);
}
template <int PENDING, class A, class B>
DEVICE void wgmma_wait(A& a, B& b, WHERE) {
    wgmma_wait<PENDING>(a, where);
    emulator::wgmma_ready(b, where);
}
template <class T, bool B_ROWS_ARE_K, int COUNT>
DEVICE void wgmma_ss(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate, WHERE) {
    emulator::wgmma(T::element, d, 2 * COUNT, nullptr, a, b, B_ROWS_ARE_K, accumulate, where);
}
template <class T, bool B_ROWS_ARE_K, int COUNT>
DEVICE void wgmma_rs(float (&d)[COUNT], const uint32_t* a, uint64_t b, bool accumulate, WHERE) {
    emulator::wgmma(T::element, d, 2 * COUNT, a, 0, b, B_ROWS_ARE_K, accumulate, where);
}

// --- barriers of some of the threads, registers, warps ---
DEVICE void barrier_sync(int id, int threads, WHERE) { emulator::barrier_sync(id, threads, where); }
DEVICE void barrier_arrive(int id, int threads, WHERE) { emulator::barrier_arrive(id, threads, where); }
DEVICE void block_sync(WHERE) { emulator::barrier_sync(0, 0, where); }
DEVICE void warp_sync(WHERE) { emulator::warp_sync(where); }
template <int COUNT>
DEVICE void registers_shrink(WHERE) {
    emulator::set_registers(COUNT, false, where);
}
template <int COUNT>
DEVICE void registers_grow(WHERE) {
    emulator::set_registers(COUNT, true, where);
}
DEVICE float shuffle_xor(float x, int mask, WHERE) {
    return std::bit_cast<float>(emulator::shuffle(std::bit_cast<uint32_t>(x), thread_index() ^ mask, where));
}
DEVICE int count_votes(bool vote, WHERE) { return std::popcount(emulator::ballot(vote, where)); }
DEVICE int warp_uniform(int x) { return x; }
DEVICE int recomputed(int x) { return x; }

// --- arithmetic ---
DEVICE float exp2_approx(float x) { return exp2f(x); }
template <class T>
DEVICE uint32_t pack(float low, float high) {
    auto round = T::element == emulator::Element::bf16 ? emulator::to_bf16 : emulator::to_fp16;
    return round(low) | uint32_t(round(high)) << 16;
}

template <class T>
DEVICE float unpack(uint32_t pair, int which) {
    auto bits = uint16_t(pair >> 16 * which);
    return T::element == emulator::Element::bf16 ? emulator::from_bf16(bits) : emulator::from_fp16(bits);
}
DEVICE float as_float(int bits) { return std::bit_cast<float>(bits); }
DEVICE int as_int(float x) { return std::bit_cast<int>(x); }

// --- memory ---
template <class V>
DEVICE void store_shared(uint32_t address, V value, WHERE) {
    emulator::store_shared(address, &value, sizeof value, where);
}
template <class V>
DEVICE V load_shared(uint32_t address, WHERE) {
    V value;
    emulator::load_shared(address, &value, sizeof value, where);
    return value;
}
template <class T>
DEVICE T load_global(const Global<const T>& from, int64_t place, WHERE) {
    emulator::check_global(place, 1, from.count, where);
    return from.data[place];
}
template <class T>
DEVICE Chunk load_chunk(const Global<const T>& from, int64_t place, WHERE) {
    Chunk value;
    emulator::check_global(place, sizeof value / sizeof(T), from.count, where);
    emulator::check_alignment(from.data + place, sizeof value, where);
    __builtin_memcpy(&value, from.data + place, sizeof value);
    return value;
}
template <class T>
DEVICE void store_global(const Global<T>& to, int64_t place, T value, WHERE) {
    emulator::check_global(place, 1, to.count, where);
    to.data[place] = value;
}
template <class T>
DEVICE void store_global(const Global<T>& to, int64_t place, Chunk value, WHERE) {
    emulator::check_global(place, sizeof value / sizeof(T), to.count, where);
    emulator::check_alignment(to.data + place, sizeof value, where);
    __builtin_memcpy(to.data + place, &value, sizeof value);
}

}  // namespace hopper
