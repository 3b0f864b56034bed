// The state of a block that runs, shared by the emulator's files.
#pragma once
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <queue>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fibers.h"

namespace emulator {

constexpr int kWarps = 16, kMbarriers = 48, kGranule = 128, kSharedLimit = 227 * 1024;
constexpr uint32_t kPoison = 0xFFFFFFFF;  // a NaN as float, as bf16 and as fp16

struct Random {
    uint64_t state;
    uint64_t next() {  // splitmix64
        uint64_t z = state += 0x9E3779B97F4A7C15;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
        z = (z ^ z >> 27) * 0x94D049BB133111EB;
        return z ^ z >> 31;
    }
    int below(int n) { return int(next() % uint64_t(n)); }
    double unit() { return double(next() >> 11) * 0x1p-53; }
};

// What a warp knows: of warps, how many of their releases; of mbarriers, how many of their phases.
struct Clock {
    uint32_t at[kWarps + kMbarriers] = {};
    void join(const Clock& other) {
        for (int i = 0; i < kWarps + kMbarriers; i++) at[i] = std::max(at[i], other.at[i]);
    }
};
// all: everything known. fenced: what is known to be visible to asynchronous operations too.
struct Knowledge {
    Clock all, fenced;
    void join(const Knowledge& other) { all.join(other.all), fenced.join(other.fenced); }
};

struct Mbarrier {
    bool exists = false;
    uint32_t index = 0, arrivals = 0, pending = 0, phase = 0;
    int64_t bytes = 0;
    Knowledge arriving, done[2];
};

struct NamedBarrier {
    int threads = 0, arrived = 0, generation = 0;
    int by_warp[kWarps] = {};
    Knowledge arriving, done;
};

// 128 bytes of shared memory: who wrote them last, and who reads them.
struct Granule {
    enum Kind : uint8_t { nothing, load, store } writer = nothing;
    uint8_t loads_in_flight = 0;
    uint16_t warp = 0;              // of a store
    uint32_t epoch = 0;             // of the warp, or phase of the mbarrier
    uint32_t bar = 0;               // of a load
    uint32_t read[kWarps] = {};     // epoch of the last read that is over
    uint16_t reading[kWarps] = {};  // asynchronous, in flight
};

// Registers that products in flight own, [64][n]: of all threads of a warpgroup.
struct Accumulator {
    int n = 0, taken_back = 0;
    std::vector<float> values;
};

struct Product {
    Element element{};
    int n = 0, given = 0, retired = 0;  // threads
    bool from_registers = false, b_rows_are_k = false, accumulate = false;
    uint64_t a = 0, b = 0;
    int accumulator = -1;
    uint32_t a_registers[128][4];
    std::vector<Granule*> reads;
    Where where;
};

// Products of a warpgroup, numbered in the order of issue; those that all threads have waited for are forgotten.
struct Products {
    std::deque<Product> kept;
    int first = 0, executed = 0;
    std::unordered_map<int, Accumulator> accumulators;

    int end() const { return first + int(kept.size()); }
    Product& operator[](int number) { return kept[number - first]; }
};

// Registers of a thread that a product reads or writes.
struct Registers {
    void* data;
    int count;
    bool is_operand;
    int accumulator = -1, uses = 0;  // in flight
    std::vector<uint32_t> seen;      // of an operand, when it was given
};

// What a wgmma.fence has named since a product had it last, as it was then.
struct Fenced {
    const char* begin;
    std::vector<char> seen;
};

enum class Wait { none, mbarrier, named, warp, product, registers, store };

struct Fiber {
    Context context;
    char* stack = nullptr;
    bool ready = true, finished = false;
    Wait wait = Wait::none;
    uint64_t wait_key = 0;
    Where where;
    int products = 0, accumulators = 0, retired = 0;
    std::vector<int> groups;  // of products: how many there were at each commit
    std::vector<Registers> registers;
    std::vector<Fenced> fenced;
    std::vector<std::pair<int, int>> uses;  // (product, place in registers) in flight
    std::vector<int> open_stores;
    std::vector<std::vector<int>> store_groups;
};

struct Warp {
    uint32_t ready = 0, in_meeting = 0;
    int meeting = 0;
    uint32_t exchange[2][32];
    double priority = 0;
    Knowledge knows;
    int registers = 0;
};

enum class Happening { load, product, store };
struct Event {
    int64_t time, order;
    Happening kind;
    int number, part;
    bool operator<(const Event& other) const { return std::pair(time, order) > std::pair(other.time, other.order); }
};

struct Load {
    uint32_t to, bar, phase;
    TensorMap map;
    int at[3];
    std::vector<int> rows;  // first row of each part, and the end
    int parts_missing;
    Where where;
};
struct Store {
    uint32_t from;
    TensorMap map;
    int at[3], thread;
    bool add, happened = false;
    Where where;
};

struct Run {
    Options options;
    Launch launch;
    Result result;
    Random random;
    const std::function<void()>* kernel;
    std::vector<unsigned char> shared;
    uint32_t base;  // of dynamic shared memory
    std::vector<Fiber> fibers;
    std::array<Warp, kWarps> warps;
    std::vector<Mbarrier> mbarriers;  // by address / 8
    std::vector<uint32_t> mbarrier_addresses;
    std::array<NamedBarrier, 16> named;
    std::vector<Granule> granules;
    std::priority_queue<Event> events;
    std::map<int, Load> loads;  // references stay valid while others come and go
    std::map<int, Store> stores;
    int num_loads = 0, num_stores = 0;
    Products products[kWarps / 4];
    int pool = 0;  // of registers
    int current = 0, live;
    int64_t time = 0, order = 0;
    double delay, shuffle_chance, random_chance, preempt_chance;
    Context scheduler;
};

extern thread_local Run* run;

inline Fiber& me() { return run->fibers[run->current]; }
inline int my_warp() { return run->current / 32; }
inline Warp& warp() { return run->warps[my_warp()]; }
inline bool failed() { return !run->result.ok; }

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string place(const Where&);
void fail(const Where&, const std::string& what);
[[noreturn]] void stop();  // leaves the fiber for good
[[noreturn]] void die(const Where&, const std::string& what);

// --- scheduler.cpp ---
void breathe();  // at each primitive a thread may be delayed
void wake(Wait, uint64_t key, int first, int last);
inline void wake_all(Wait kind, uint64_t key) { wake(kind, key, 0, run->launch.threads); }
void sleep(Wait, uint64_t key, const Where&);
template <class Condition>
void wait_until(Wait kind, uint64_t key, const Where& where, Condition condition) {
    while (!condition()) sleep(kind, key, where);
}
void post(Happening, int number, int part, double most_delay);
void mix(uint64_t value);  // into the trace

// --- shared_memory.cpp ---
unsigned char* shared_at(uint32_t address, uint32_t bytes, const Where&);
Granule& granule(uint32_t address);
// Of asynchronous operations: begin when they are issued, end when they are waited for.
void begin_read(Granule&, const char* who, const Where&);
void end_read(Granule&);
void begin_write(Granule&, bool by_tma, const char* who, const Where&);
void mark_stored(Granule&);

// --- barriers.cpp ---
std::string name_of(uint32_t bar);
Mbarrier& mbarrier(uint32_t address, const Where&);
void check_init(uint32_t bar, bool by_tma, const Where&);
void complete_phase(Mbarrier&, uint32_t address);
template <class Last>
void meet(const Where& where, Last last) {  // all lanes of the warp; `last` runs once, in the last lane that comes
    Warp& w = warp();
    int meeting = w.meeting;
    w.in_meeting |= 1u << run->current % 32;
    if (w.in_meeting != 0xFFFFFFFF) return wait_until(Wait::warp, my_warp(), where, [&] { return w.meeting != meeting; });
    w.in_meeting = 0;
    w.meeting++;
    last();
    wake(Wait::warp, my_warp(), my_warp() * 32, my_warp() * 32 + 32);
}

// --- tma.cpp, wgmma.cpp ---
int bytes_of(Element);
void load_lands(int number, int part);
void store_happens(int number);
void product_happens(int group);

}  // namespace emulator
