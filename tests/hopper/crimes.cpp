// Tiny kernels for the emulator's own tests: each commits one crime (or none), and is told apart by its name.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "hopper/primitives.h"

using namespace hopper;

namespace {

constexpr int kRows = 64, kColumns = 64, kTile = kRows * 128;  // bytes

alignas(128) uint16_t source[2 * kRows * kColumns];
alignas(128) float sums[kRows * 32];
float result[128 * 64];  // what a thread keeps
volatile int64_t far = int64_t(1) << 33, before = -1, past = 9;  // the compiler would see the crime otherwise

TensorMap source_map() { return {source, emulator::Element::bf16, {kColumns, 1, 2 * kRows}, {1, kColumns, kColumns}, {64, 1, kRows}}; }
TensorMap sums_map() { return {sums, emulator::Element::f32, {32, 1, kRows}, {1, 32, 32}, {32, 1, kRows}}; }

bool first() { return thread_index() == 0; }
int warp() { return thread_index() / 32; }
uint32_t bar(int number = 0) { return (shared_base() + 7) / 8 * 8 + 8 * number; }
uint32_t words() { return (shared_base() + 127) / 128 * 128 + 256; }
uint32_t tile(int number = 0) { return (words() + 128 + 1023) / 1024 * 1024 + number * kTile; }
uint64_t rows_of(int number = 0) { return descriptor(tile(number), 16, 1024); }

void init(int arrivals = 1, int count = 1) {
    if (first()) {
        for (int i = 0; i < count; i++) mbarrier_init(bar(i), arrivals);
        fence_proxy_async();
    }
    block_sync();
}
void load(int number = 0, int bytes = kTile, int row = 0, int column = 0) {  // by the first thread
    static const TensorMap map = source_map();
    if (!first()) return;
    mbarrier_arrive_expect_tx(bar(), bytes);
    tma_load(tile(number), &map, bar(), column, 0, row);
}
void loaded(int number = 0, uint32_t parity = 0) {
    load(number);
    mbarrier_wait(bar(), parity);
}
void fill(int number = 0) {  // every thread its half of a row
    for (int chunk = 0; chunk < 4; chunk++) store_shared(tile(number) + thread_index() * 64 + 16 * chunk, Chunk{0, 0, 0, 0});
}
void store(const TensorMap& map, bool add) {
    if (!first()) return;
    add ? tma_reduce_add(&map, tile(), 0, 0, 0) : tma_store(&map, tile(), 0, 0, 0);
}

struct Product {
    float d[32];
    uint32_t a[4];
    void clear() { memset(this, 0, sizeof *this); }
    void issue() { wgmma_ss<bf16, false>(d, rows_of(), rows_of(), true); }
    void issue_rs() { wgmma_rs<bf16, false>(d, a, rows_of(), true); }
};
void multiply(void (*crime)(Product&)) {
    init();
    loaded();
    Product product;
    product.clear();
    crime(product);
}

struct Kernel {
    void (*run)();
    int threads = 128;
};

const std::map<std::string, Kernel> kernels = {
    // shared memory
    {"nothing wrong", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
            memcpy(result + thread_index() * 32, x.d, sizeof x.d);
        });
    }}},
    {"load beside a store", {[] {
        if (first()) store_shared(words(), 1);
        if (warp() == 1) load_shared<int>(words());
    }}},
    {"store beside a store", {[] {
        if (thread_index() % 64 == 0) store_shared(words(), 1);
    }}},
    {"store past a named barrier of others", {[] {
        if (warp() == 0) store_shared(words() + 4 * thread_index(), 1);
        if (warp() < 2) barrier_sync(1, 64);
        if (warp() == 3) load_shared<int>(words());
    }}},
    {"store, barrier, load", {[] {
        if (first()) store_shared(words(), 7);
        block_sync();
        result[thread_index()] = float(load_shared<int>(words()));
    }}},
    {"store misaligned", {[] { store_shared(words() + 4, Chunk{}); }}},
    {"load misaligned", {[] { load_shared<Pair>(words() + 4); }}},
    {"store below shared memory", {[] { store_shared(shared_base() / 16 * 16 - 16, Chunk{}); }}},
    {"store past shared memory", {[] { store_shared((shared_base() + 65536) / 16 * 16, Chunk{}); }}},
    // mbarriers
    {"mbarrier misaligned", {[] { mbarrier_init(bar() + 4, 1); }}},
    {"mbarrier twice", {[] {
        if (first()) mbarrier_init(bar(), 1), mbarrier_init(bar(), 1);
    }}},
    {"no mbarrier there", {[] { mbarrier_wait(bar(), 0); }}},
    {"mbarrier before its init is known", {[] {
        if (first()) mbarrier_init(bar(), 64);
        barrier_sync(1 + warp() / 2, 64);
        if (warp() == 2) mbarrier_arrive(bar());
    }}},
    {"mbarrier not fenced for TMA", {[] {
        if (first()) mbarrier_init(bar(), 1);
        block_sync();
        load();
    }}},
    {"too many arrivals", {[] {
        init();
        if (first()) mbarrier_arrive_expect_tx(bar(), 128), mbarrier_arrive(bar());
    }}},
    {"parity of 2", {[] {
        init();
        mbarrier_wait(bar(), 2);
    }}},
    {"an arrival too few", {[] {
        init(2);
        if (first()) mbarrier_arrive(bar());
        mbarrier_wait(bar(), 0);
    }}},
    // TMA loads
    {"wrong parity", {[] {
        Product x;
        x.clear();
        init();
        load();
        block_sync();
        mbarrier_wait(bar(), 1);  // passes as long as the load is in flight
        wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
    }}},
    {"load where TMA does", {[] {
        init();
        load();
        if (warp() == 1) load_shared<int>(tile());
    }}},
    {"TMA over a tile in use", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d), x.issue(), wgmma_commit();
            load();
            wgmma_wait<0>(x.d);
        });
    }}},
    {"TMA over a tile that others have read", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
            load();  // the first thread knows that its own warp is done
            mbarrier_wait(bar(), 1);
        });
    }}},
    {"TMA over a store that is not fenced", {[] {
        init();
        fill();
        block_sync();
        loaded();
    }}},
    {"TMA misaligned", {[] {
        static const TensorMap map = source_map();
        init();
        if (first()) tma_load(tile() + 512, &map, bar(), 0, 0, 0);
    }}},
    {"tensor misaligned", {[] {
        static const TensorMap map = [] {
            TensorMap odd = source_map();
            odd.data = source + 4;
            return odd;
        }();
        init();
        if (first()) tma_load(tile(), &map, bar(), 0, 0, 0);
    }}},
    {"rows of a tensor misaligned", {[] {
        static const TensorMap map = [] {
            TensorMap odd = source_map();
            odd.stride[2] = 68;
            return odd;
        }();
        init();
        if (first()) tma_load(tile(), &map, bar(), 0, 0, 0);
    }}},
    {"too few bytes expected", {[] {
        init();
        load(0, kTile / 2);
        mbarrier_wait(bar(), 0);
        if (first()) mbarrier_arrive(bar());
        mbarrier_wait(bar(), 1);
    }}},
    {"too many bytes expected", {[] {
        init();
        load(0, kTile + 16);
        mbarrier_wait(bar(), 0);
    }}},
    {"bytes expected at the end", {[] {
        init();
        if (first()) mbarrier_arrive_expect_tx(bar(), 128);
    }}},
    {"past the tensor's end", {[] {
        init();
        load(0, kTile, kRows + 40, 8);
        mbarrier_wait(bar(), 0);
        for (int i = 0; i < 16; i++) {
            uint32_t word = load_shared<int>(tile() + thread_index() * 64 + 4 * i);
            result[thread_index() * 16 + i] = float(word);
        }
    }}},
    // products
    {"wgmma before any fence", {[] { multiply([](Product& x) { x.issue(); }); }}},
    {"accumulator written after the fence", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d);
            x.d[3] = 1;
            x.issue();
        });
    }}},
    {"fence of other registers", {[] {
        multiply([](Product& x) { wgmma_fence(x.a), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d); });
    }}},
    {"fence before the last product", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
            wgmma_fence(x.a), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
        });
    }}},
    {"accumulator written in flight", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d), x.issue(), wgmma_commit();
            x.d[3] = 1;
            wgmma_wait<0>(x.d);
        });
    }}},
    {"accumulator read in flight", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d), x.issue(), wgmma_commit();
            result[thread_index()] = x.d[3];
            wgmma_wait<0>(x.d);
        });
    }}},
    {"operand written in flight", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d, x.a), x.issue_rs(), wgmma_commit();
            x.a[0] = 1;
            wgmma_wait<0>(x.d, x.a);
        });
    }}},
    {"operand written after the fence", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d, x.a), x.issue_rs(), wgmma_commit(), wgmma_wait<0>(x.d, x.a);
            wgmma_fence(x.d, x.a);
            x.a[0] = 1;
            x.issue_rs();
        });
    }}},
    {"wait for one group too few", {[] {
        multiply([](Product& x) { wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<1>(x.d); });
    }}},
    {"not committed", {[] { multiply([](Product& x) { wgmma_fence(x.d), x.issue(), wgmma_wait<0>(x.d); }); }}},
    {"product in flight at the end", {[] { multiply([](Product& x) { wgmma_fence(x.d), x.issue(), wgmma_commit(); }); }}},
    {"product by three warps", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d);
            if (warp() < 3) x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
        });
    }}},
    {"descriptors differ", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d);
            wgmma_ss<bf16, false>(x.d, rows_of(), moved(rows_of(), warp() == 2 ? 32 : 0), true);
            wgmma_commit(), wgmma_wait<0>(x.d);
        });
    }}},
    {"product of a store that is not fenced", {[] {
        Product x;
        x.clear();
        fill();
        block_sync();
        wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
    }}},
    {"product of a store, fenced by one thread", {[] {
        Product x;
        x.clear();
        fill();
        if (thread_index() % 32 == 0 && warp() == 0) fence_proxy_async();
        block_sync();
        wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
    }}},
    {"product past shared memory", {[] {
        multiply([](Product& x) {
            wgmma_fence(x.d);
            wgmma_ss<bf16, false>(x.d, descriptor((shared_base() + 65536) / 1024 * 1024, 16, 1024), rows_of(), true);
            wgmma_commit(), wgmma_wait<0>(x.d);
        });
    }}},
    // bulk stores
    {"bulk store of a store that is not fenced", {[] {
        static const TensorMap map = sums_map();
        fill();
        block_sync();
        store(map, false);
    }}},
    {"bulk store not committed", {[] {
        static const TensorMap map = sums_map();
        fill(), fence_proxy_async(), block_sync(), store(map, false);
    }}},
    {"bulk store not waited for", {[] {
        static const TensorMap map = sums_map();
        fill(), fence_proxy_async(), block_sync(), store(map, false), tma_commit();
    }}},
    {"store over a bulk store", {[] {
        static const TensorMap map = sums_map();
        fill(), fence_proxy_async(), block_sync(), store(map, false), tma_commit();
        if (first()) store_shared(tile(), 1), tma_wait_read<0>();
    }}},
    {"sums", {[] {  // three times thread + column
        static const TensorMap map = sums_map();
        for (int i = 0; i < 16; i++) {
            uint32_t row = thread_index() / 2, column = thread_index() % 2 * 16 + i;
            float x = float(row + column);
            uint32_t bits;
            memcpy(&bits, &x, 4);
            store_shared(tile() + swizzled(row, column / 4) + column % 4 * 4, bits);
        }
        fence_proxy_async();
        block_sync();
        for (int i = 0; i < 3; i++) store(map, true), tma_commit();
        tma_wait_read<0>();
    }}},
    // the rest
    {"global load past the end", {[] { load_global(Global<const float>{sums, 10}, 10); }}},
    {"global load before the start", {[] { load_global(Global<const float>{sums, 10}, before); }}},
    {"global store past the end", {[] { store_global(Global<float>{sums, 10}, far, 1.0f); }}},
    {"global chunk past the end", {[] { store_global(Global<float>{sums, 10}, 8, Chunk{}); }}},
    {"global chunk misaligned", {[] { store_global(Global<float>{sums, 64}, 2, Chunk{}); }}},
    // What only a sanitizer sees: the first says that there is more than there is.
    {"memory that is not there", {[] {
        if (first()) result[0] = load_global(Global<const float>{new float[8], 100}, past);
    }}},
    {"a sum that is too large", {[] {
        int most = 0x7FFFFFFF - int(far >> 40);
        if (first()) result[0] = float(most + thread_index() + 1);
    }}},
    {"named barriers of two sizes", {[] { barrier_sync(1, warp() == 0 ? 64 : 128); }}},
    {"named barrier half full", {[] {
        if (warp() == 0) barrier_arrive(3, 64);
    }}},
    {"named barrier without some lanes", {[] { barrier_arrive(1, 96), barrier_arrive(2 + thread_index() % 2, 64); }}},
    {"no such named barrier", {[] { barrier_sync(16, 128); }}},
    {"registers: more than there are", {[] {
        if (warp() < 4) registers_grow<240>();
    }, 256}},
    {"registers: given and taken", {[] {
        if (warp() < 4) registers_grow<216>();
        else registers_shrink<120>();
    }, 256}},
    {"registers: not a multiple of 8", {[] { registers_grow<236>(); }}},
    {"registers: the wrong way", {[] { registers_shrink<240>(); }}},
    {"a warp apart", {[] {
        if (thread_index() % 32 < 31) warp_sync();
    }}},
    {"no end", {[] {
        for (;;) warp_sync();
    }}},
};

void many_tiles(int count) {
    init();
    Product x;
    x.clear();
    for (int i = 0; i < count; i++) {
        load(i % 2);
        mbarrier_wait(bar(), i % 2);
        wgmma_fence(x.d), x.issue(), wgmma_commit(), wgmma_wait<0>(x.d);
        block_sync();
    }
}

// Of a product by descriptors, the difference from one by indices: A [64, 16] and B of bf16, in the ways that kernels use.
template <int N, bool B_ROWS_ARE_K>
float product_error() {
    static float worst;
    worst = 0;
    auto element = [](int i) { return uint16_t(emulator::to_bf16(float((i * 7919 + 13) % 61 - 30))); };
    auto kernel = [&] {
        int thread = thread_index();
        uint32_t b = tile(1);
        auto store16 = [&](uint32_t place, auto value) {  // two neighbours
            store_shared(place, uint32_t(element(value(0)) | uint32_t(element(value(1))) << 16));
        };
        for (int i = 0; i < 64 * 8 && first(); i++) {  // A: rows of 16 k
            int row = i / 8, k = i % 8 * 2;
            store16(tile() + swizzled(row, k / 8) + k % 8 * 2, [&](int j) { return row * 16 + k + j; });
        }
        for (int i = 0; i < N * 8 && first(); i++) {
            int n = B_ROWS_ARE_K ? i % (N / 2) * 2 : i / 8, k = B_ROWS_ARE_K ? i / (N / 2) : i % 8 * 2;
            uint32_t place = B_ROWS_ARE_K ? b + n / 64 * 16 * 128 + swizzled(k, n % 64 / 8) + n % 8 * 2 : b + swizzled(n, k / 8) + k % 8 * 2;
            store16(place, [&](int j) { return B_ROWS_ARE_K ? 5000 + k * N + n + j : 5000 + (k + j) * N + n; });
        }
        fence_proxy_async();
        block_sync();
        float d[2][N / 2] = {};
        uint32_t a[4];
        for (int i = 0; i < 4; i++) {
            auto value = [&](int j) { return element(fragment_row(thread % 128, 2 * i + j) * 16 + fragment_column(thread, 2 * i + j)); };
            a[i] = value(0) | uint32_t(value(1)) << 16;
        }
        uint64_t of_b = descriptor(b, B_ROWS_ARE_K ? 16 * 128 : 16, 1024);
        wgmma_fence(d[0], d[1]);
        wgmma_fence(a);
        wgmma_ss<bf16, B_ROWS_ARE_K>(d[0], rows_of(), of_b, false);
        wgmma_rs<bf16, B_ROWS_ARE_K>(d[1], a, of_b, true);
        wgmma_commit();
        wgmma_wait<0>(d[0], d[1]);
        for (int i = 0; i < N / 2; i++) {
            int row = fragment_row(thread, i), column = fragment_column(thread, i);
            float right = 0;
            for (int k = 0; k < 16; k++)
                right += emulator::from_bf16(element(row * 16 + k)) * emulator::from_bf16(element(5000 + k * N + column));
            for (auto& mine : d) worst = max(worst, std::fabs(mine[i] - right));
        }
    };
    auto outcome = emulator::run_block(kernel, {0, 1, 128, 65536}, {});
    if (!outcome.ok) fprintf(stderr, "%s\n", outcome.message.c_str());
    return outcome.ok ? worst : -1;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The emulator's message, empty if there is none; null: no such kernel.
EXPORTED const char* run_kernel(const char* name, uint64_t seed) {
    static std::string message;
    auto found = kernels.find(name);
    if (found == kernels.end()) return nullptr;
    for (int i = 0; i < 2 * kRows * kColumns; i++) source[i] = emulator::to_bf16(float(i % 5));
    emulator::Options options;
    options.seed = seed, options.most_steps = 20'000;
    message = emulator::run_block(found->second.run, {0, 1, found->second.threads, 65536}, options).message;
    return message.c_str();
}
EXPORTED const float* results() { return result; }
EXPORTED float* global_sums() { return sums; }
EXPORTED int run_many_tiles(int count) { return emulator::run_block([&] { many_tiles(count); }, {0, 1, 128, 65536}, {}).ok; }
EXPORTED float error_of_product(int n, int b_rows_are_k) {
    switch (n) {
        case 64: return b_rows_are_k ? product_error<64, true>() : product_error<64, false>();
        case 80: return b_rows_are_k ? product_error<80, true>() : product_error<80, false>();
        case 96: return b_rows_are_k ? product_error<96, true>() : product_error<96, false>();
        default: return b_rows_are_k ? product_error<128, true>() : product_error<128, false>();
    }
}
