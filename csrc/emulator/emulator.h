// Runs one block of a Hopper kernel on a CPU: each CUDA thread is a fiber, asynchronous operations finish at random
// moments, and every access to shared memory is checked for races. A seed gives the same interleaving everywhere.
//
// How it works. Barriers block fibers; a block in which nobody can go on is a deadlock, and is told with who waits for what.
// TMA lands in parts, at random moments, in memory that is poisoned until then. A product reads shared memory through its
// descriptors when it happens, not when it is issued; its accumulator belongs to it, and is poisoned, until it is waited
// for. Vector clocks know which access is ordered before which: chance alone would miss a missing fence.
#pragma once
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <source_location>
#include <string>

namespace emulator {

using Where = std::source_location;

enum class Element { f32, bf16, fp16 };

// A tensor in global memory, and the box of it that an operation of TMA moves; rows of a box are 128 bytes, swizzled.
struct TensorMap {
    void* data = nullptr;
    Element element = Element::bf16;
    int64_t size[3] = {1, 1, 1};    // column, head, row
    int64_t stride[3] = {1, 1, 1};  // in elements; stride[0] is 1
    int box[3] = {1, 1, 1};
};

struct Options {
    uint64_t seed = 0;
    int registers_at_launch = 168;
    bool check_races = true;  // by vector clocks, besides poison
    int64_t most_steps = 50'000'000;
};

struct Result {
    bool ok = true;
    std::string message;  // of the first fault
    uint64_t trace = 0;   // hash of the interleaving
    int64_t steps = 0;
};

// Where a block lies in its grid, and what it is launched with.
struct Launch {
    int block = 0, blocks = 1;
    int threads = 128;
    int shared_bytes = 0;
};

Result run_block(const std::function<void()>& kernel, const Launch&, const Options&);

// What the primitives call; only from within a kernel.
int thread_index();
int block_index();
int num_blocks();
uint32_t shared_base();

void mbarrier_init(uint32_t bar, uint32_t arrivals, Where);
void mbarrier_arrive(uint32_t bar, uint32_t expect_bytes, Where);
void mbarrier_wait(uint32_t bar, uint32_t parity, Where);
void barrier_sync(int id, int threads, Where);  // threads 0: all of the block
void barrier_arrive(int id, int threads, Where);
void fence_proxy_async(Where);
void set_registers(int count, bool grow, Where);

void tma_load(uint32_t to, const TensorMap&, uint32_t bar, const int (&at)[3], Where);
void tma_store(const TensorMap&, uint32_t from, const int (&at)[3], bool add, Where);
void tma_commit(Where);
void tma_wait_read(int pending, Where);

struct Span {
    const void* data;
    size_t bytes;
};
void wgmma_fence(std::initializer_list<Span> registers, Where);
// a_registers: null if `a` describes shared memory.
void wgmma(Element, float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool b_rows_are_k, bool accumulate,
           Where);
void wgmma_commit(Where);
void wgmma_wait(int pending, Where);
void wgmma_ready(const void* registers, Where);  // complains if a product still owns them

uint32_t shuffle(uint32_t value, int source_lane, Where);
uint32_t ballot(bool vote, Where);
void warp_sync(Where);

void store_shared(uint32_t address, const void* value, int bytes, Where);
void load_shared(uint32_t address, void* value, int bytes, Where);
void check_global(int64_t first, int64_t elements, int64_t count, Where);
void check_alignment(const void* data, int bytes, Where);

}  // namespace emulator
