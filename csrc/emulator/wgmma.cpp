// Products of a warpgroup, m64nNk16: asynchronous, in the order of issue, over swizzled tiles that descriptors name.
#include <bit>
#include <cstring>

#include "floats.h"
#include "run.h"

namespace emulator {
namespace {

int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Where an operand's elements lie in shared memory, eight of them (16 bytes) at a time.
struct Operand {
    uint32_t start, leading, stride, swizzle;

    Operand(uint64_t descriptor, const Where& where) {
        start = (descriptor & 0x3FFF) << 4;
        leading = (descriptor >> 16 & 0x3FFF) << 4;
        stride = (descriptor >> 32 & 0x3FFF) << 4;
        swizzle = descriptor >> 62;
        if (descriptor >> 49 & 7) die(where, "matrix descriptor: base offset other than 0 is not emulated");
    }
    uint32_t apply(uint32_t plain) const {
        static const uint32_t mask[] = {0, 7, 3, 1};  // none, 128, 64, 32 bytes
        return plain ^ (plain >> 7 & mask[swizzle]) << 4;
    }
    uint32_t chunks_a_row() const { return swizzle == 0 ? 1 : swizzle == 1 ? 8 : swizzle == 2 ? 4 : 2; }
    // K-major: eight consecutive k of one row. half: which eight of the sixteen.
    uint32_t k_major(int row, int half) const {
        uint32_t along = half * (swizzle == 0 ? leading : 16);
        return apply(start + row / 8 * stride + row % 8 * chunks_a_row() * 16 + along);
    }
    // MN-major: eight consecutive columns of one k.
    uint32_t mn_major(int k, int chunk) const {
        uint32_t wide = chunks_a_row();
        if (swizzle == 0) return start + chunk * stride + k / 8 * leading + k % 8 * 16;
        return apply(start + chunk / wide * leading + k / 8 * stride + k % 8 * wide * 16 + chunk % wide * 16);
    }
};

template <class Use>
void each_chunk(const Product& product, Use use) {  // use(address of 16 bytes)
    if (!product.from_registers) {
        Operand a(product.a, product.where);
        for (int row = 0; row < 64; row++)
            for (int half = 0; half < 2; half++) use(a.k_major(row, half));
    }
    Operand b(product.b, product.where);
    if (product.b_rows_are_k) {
        for (int k = 0; k < 16; k++)
            for (int chunk = 0; chunk < product.n / 8; chunk++) use(b.mn_major(k, chunk));
    } else {
        for (int row = 0; row < product.n; row++)
            for (int half = 0; half < 2; half++) use(b.k_major(row, half));
    }
}

std::vector<Granule*> granules_of(const Product& product) {  // each once
    std::vector<Granule*> list;
    each_chunk(product, [&](uint32_t address) {
        shared_at(address, 16, product.where);
        list.push_back(&granule(address));
    });
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
    return list;
}

float to_float(Element element, uint16_t bits) { return element == Element::bf16 ? from_bf16(bits) : from_fp16(bits); }

void load8(Element element, uint32_t address, float* to) {
    uint16_t bits[8];
    memcpy(bits, run->shared.data() + (address - run->base), 16);
    for (int i = 0; i < 8; i++) to[i] = to_float(element, bits[i]);
}

void load_a(const Product& product, float* a) {  // [64][16]
    if (product.from_registers) {
        for (int thread = 0; thread < 128; thread++)
            for (int i = 0; i < 8; i++)
                a[row_of(thread, i) * 16 + column_of(thread, i)] =
                    to_float(product.element, uint16_t(product.a_registers[thread][i / 2] >> i % 2 * 16));
        return;
    }
    Operand operand(product.a, product.where);
    for (int row = 0; row < 64; row++)
        for (int half = 0; half < 2; half++) load8(product.element, operand.k_major(row, half), a + row * 16 + half * 8);
}

void load_b(const Product& product, float* b) {  // [16][n]
    Operand operand(product.b, product.where);
    int n = product.n;
    if (product.b_rows_are_k) {
        for (int k = 0; k < 16; k++)
            for (int chunk = 0; chunk < n / 8; chunk++) load8(product.element, operand.mn_major(k, chunk), b + k * n + chunk * 8);
        return;
    }
    for (int row = 0; row < n; row++)
        for (int half = 0; half < 2; half++) {
            float values[8];
            load8(product.element, operand.k_major(row, half), values);
            for (int i = 0; i < 8; i++) b[(half * 8 + i) * n + row] = values[i];
        }
}

#if defined(__x86_64__) && !defined(EMULATOR_NO_CLONES)
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3", "no-trapping-math"), noinline))
#else
__attribute__((noinline))
#endif
void multiply(float* __restrict d, const float* __restrict a, const float* __restrict b, int n) {
    for (int row = 0; row < 64; row++)
        for (int k = 0; k < 16; k++) {
            float x = a[row * 16 + k];
            for (int column = 0; column < n; column++) d[row * n + column] += x * b[k * n + column];
        }
}

Registers& registers_at(const void* data, int count, bool is_operand) {
    for (Registers& registers : me().registers)
        if (registers.data == data && registers.count == count) return registers;
    me().registers.push_back({const_cast<void*>(data), count, is_operand, -1, 0, {}});
    return me().registers.back();
}
void see(Registers& registers) {
    registers.seen.resize(registers.count);
    memcpy(registers.seen.data(), registers.data, registers.count * 4);
}
bool is_as_seen(const Registers& registers) { return !memcmp(registers.seen.data(), registers.data, registers.count * 4); }
bool holds(const Fenced& fenced, const Registers& registers) {
    auto first = static_cast<const char*>(registers.data);
    return first >= fenced.begin && first + 4 * registers.count <= fenced.begin + fenced.seen.size();
}
void check_fenced(const Registers& registers, const Where& where) {
    const char* kind = registers.is_operand ? "A" : "accumulator";
    auto& all = me().fenced;
    auto mine = std::find_if(all.begin(), all.end(), [&](const Fenced& fenced) { return holds(fenced, registers); });
    if (mine == all.end()) die(where, text("no wgmma.fence has named the %s registers of a wgmma since one had them last", kind));
    auto first = static_cast<const char*>(registers.data);
    if (memcmp(first, mine->seen.data() + (first - mine->begin), 4 * registers.count))
        die(where, text("%s registers of a wgmma were written after the last wgmma.fence", kind));
}
void check_owned(const float* d, int count, const Where& where) {
    for (int i = 0; i < count; i++)
        if (std::bit_cast<uint32_t>(d[i]) != kPoison) die(where, "accumulator written while a wgmma owns it");
}

// The accumulator becomes the product's, unless an earlier one owns it still.
void give_accumulator(Product& product, int number, float* d) {
    Fiber& fiber = me();
    int thread = run->current % 128, count = product.n / 2;
    Registers& registers = registers_at(d, count, false);
    if (!registers.uses) {
        check_fenced(registers, product.where);
        registers.accumulator = fiber.accumulators++;
        Accumulator& accumulator = run->products[run->current / 128].accumulators[registers.accumulator];
        accumulator.n = product.n;
        accumulator.values.resize(64 * product.n);
        for (int i = 0; i < count; i++) {
            accumulator.values[row_of(thread, i) * product.n + column_of(thread, i)] = d[i];
            memcpy(d + i, &kPoison, 4);
        }
    }
    check_owned(d, count, product.where);
    registers.uses++;
    fiber.uses.push_back({number, int(&registers - fiber.registers.data())});
    if (product.accumulator < 0) product.accumulator = registers.accumulator;
    if (product.accumulator != registers.accumulator) die(product.where, "wgmma: accumulators differ between the threads of a warpgroup");
}

void give_operand(Product& product, int number, const uint32_t* a) {
    Registers& registers = registers_at(a, 4, true);
    if (!registers.uses) check_fenced(registers, product.where);
    registers.uses++;
    me().uses.push_back({number, int(&registers - me().registers.data())});
    see(registers);
    memcpy(product.a_registers[run->current % 128], a, 16);
}

void take_back(Products& products, Registers& registers, const Where& where) {
    if (--registers.uses && !registers.is_operand) return;
    std::erase_if(me().fenced, [&](const Fenced& fenced) { return holds(fenced, registers); });
    if (registers.is_operand) {
        if (!is_as_seen(registers)) die(where, "A registers written while a wgmma reads them");
        return;
    }
    Accumulator& accumulator = products.accumulators.at(registers.accumulator);
    float* d = static_cast<float*>(registers.data);
    int thread = run->current % 128;
    check_owned(d, registers.count, where);
    for (int i = 0; i < registers.count; i++) d[i] = accumulator.values[row_of(thread, i) * accumulator.n + column_of(thread, i)];
    if (++accumulator.taken_back == 128) products.accumulators.erase(registers.accumulator);
}

}  // namespace

void product_happens(int group) {
    static thread_local float a[64 * 16], b[16 * 256];
    Products& products = run->products[group];
    Product& product = products[products.executed];
    std::vector<float>& d = products.accumulators.at(product.accumulator).values;
    load_a(product, a);
    load_b(product, b);
    if (!product.accumulate) std::fill(d.begin(), d.end(), 0.0f);
    multiply(d.data(), a, b, product.n);
    products.executed++;
    wake(Wait::product, group, group * 128, group * 128 + 128);
}

void wgmma_fence(std::initializer_list<Span> registers, Where) {
    breathe();
    for (const Span& span : registers) {
        auto begin = static_cast<const char*>(span.data);
        std::erase_if(me().fenced, [&](const Fenced& fenced) { return fenced.begin == begin; });
        me().fenced.push_back({begin, {begin, begin + span.bytes}});
    }
}

void wgmma(Element element, float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool b_rows_are_k, bool accumulate,
           Where where) {
    breathe();
    Fiber& fiber = me();
    int group = run->current / 128, number = fiber.products++;
    Products& products = run->products[group];
    if (number == products.end()) {
        Product& fresh = products.kept.emplace_back();
        fresh.element = element, fresh.n = n, fresh.from_registers = a_registers, fresh.b_rows_are_k = b_rows_are_k;
        fresh.accumulate = accumulate, fresh.a = a, fresh.b = b, fresh.where = where;
    }
    Product& product = products[number];
    if (product.a != a || product.b != b || product.n != n || product.accumulate != accumulate || product.b_rows_are_k != b_rows_are_k)
        die(where, "wgmma: descriptors or options differ between the threads of a warpgroup");
    give_accumulator(product, number, d);
    if (a_registers) give_operand(product, number, a_registers);
    if (run->current % 32 == 0) {
        if (product.reads.empty()) product.reads = granules_of(product);
        for (Granule* g : product.reads) begin_read(*g, "wgmma", where);
    }
    if (++product.given == 128) post(Happening::product, group, 0, run->delay / 8);
}

void wgmma_commit(Where) {
    breathe();
    me().groups.push_back(me().products);
}

void wgmma_wait(int pending, Where where) {
    breathe();
    Fiber& fiber = me();
    int group = run->current / 128, first = fiber.retired;
    Products& products = run->products[group];
    int committed = int(fiber.groups.size()) - pending;
    int done = std::max(first, committed > 0 ? fiber.groups[committed - 1] : 0);
    meet(where, [] {});
    wait_until(Wait::product, group, where, [&] { return products.executed >= done; });
    for (auto& [number, index] : fiber.uses)
        if (number < done) take_back(products, fiber.registers[index], where);
    std::erase_if(fiber.uses, [&](auto& use) { return use.first < done; });
    if (committed > 1) fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + committed - 1);
    fiber.retired = done;
    meet(where, [&] {
        for (int number = first; number < done; number++)
            for (Granule* g : products[number].reads) end_read(*g);
    });
    for (int number = first; number < done; number++) products[number].retired++;
    while (!products.kept.empty() && products.kept.front().retired == 128) products.kept.pop_front(), products.first++;
}

void wgmma_ready(const void* registers, Where where) {
    for (Registers& mine : me().registers)
        if (mine.data == registers && mine.uses) die(where, "wgmma_wait: a product still owns these registers");
}

}  // namespace emulator
