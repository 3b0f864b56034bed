// Memory: what lies where, and whether an access to shared memory is ordered after those that it depends on.
#include <cstring>

#include "run.h"

namespace emulator {

unsigned char* shared_at(uint32_t address, uint32_t bytes, const Where& where) {
    if (address < run->base || address + bytes > run->base + run->shared.size())
        die(where, text("address 0x%x (%u bytes) outside of shared memory", address, bytes));
    return run->shared.data() + (address - run->base);
}

Granule& granule(uint32_t address) { return run->granules[(address - run->base / kGranule * kGranule) / kGranule]; }

// A reader must know the write. by_async: it is an asynchronous operation.
static void check_read(const Granule& g, bool by_async, const char* who, const Where& where) {
    const Knowledge& knows = warp().knows;
    if (g.writer == Granule::load) {
        if (knows.all.at[kWarps + run->mbarriers[g.bar / 8].index] <= g.epoch)
            die(where, text("%s reads a TMA load that was not waited for (%s, phase %u)", who, name_of(g.bar).c_str(), g.epoch));
    } else if (g.writer == Granule::store) {
        if (g.warp != my_warp() && knows.all.at[g.warp] < g.epoch)
            die(where, text("%s reads what warp %d stores, without synchronization", who, g.warp));
        if (by_async && knows.fenced.at[g.warp] < g.epoch)
            die(where, text("%s reads what warp %d stored: no fence.proxy.async between", who, g.warp));
    }
}

void begin_read(Granule& g, const char* who, const Where& where) {
    g.reading[my_warp()]++;
    if (run->options.check_races) check_read(g, true, who, where);
}
void end_read(Granule& g) {
    g.reading[my_warp()]--;
    g.read[my_warp()] = warp().knows.all.at[my_warp()];
}

void begin_write(Granule& g, bool by_tma, const char* who, const Where& where) {
    if (g.loads_in_flight) die(where, text("%s writes where a TMA load is in flight", who));
    const Knowledge& knows = warp().knows;
    for (int w = 0; w < kWarps; w++) {
        if (g.reading[w]) die(where, text("%s overwrites what an operation in flight of warp %d reads", who, w));
        if (run->options.check_races && w != my_warp() && knows.all.at[w] < g.read[w])
            die(where, text("%s overwrites what warp %d has read, without synchronization since", who, w));
    }
    if (!run->options.check_races) return;
    if (g.writer == Granule::load) {
        if (knows.all.at[kWarps + run->mbarriers[g.bar / 8].index] <= g.epoch)
            die(where, text("%s overwrites a TMA load that was not waited for", who));
    } else if (g.writer == Granule::store) {
        const Clock& clock = by_tma ? knows.fenced : knows.all;
        if ((by_tma || g.warp != my_warp()) && clock.at[g.warp] < g.epoch)
            die(where, text("%s overwrites what warp %d stored, without %s", who, g.warp, by_tma ? "proxy fence" : "synchronization"));
    }
}

void mark_stored(Granule& g) {
    g.writer = Granule::store;
    g.warp = uint16_t(my_warp());
    g.epoch = warp().knows.all.at[my_warp()];
}

void store_shared(uint32_t address, const void* value, int bytes, Where where) {
    breathe();
    if (address % bytes) die(where, "shared store not aligned");
    unsigned char* to = shared_at(address, bytes, where);
    Granule& g = granule(address);
    begin_write(g, false, "store", where);
    mark_stored(g);
    memcpy(to, value, bytes);
}

void load_shared(uint32_t address, void* value, int bytes, Where where) {
    breathe();
    if (address % bytes) die(where, "shared load not aligned");
    const unsigned char* from = shared_at(address, bytes, where);
    Granule& g = granule(address);
    if (g.loads_in_flight) die(where, "load reads where a TMA load is in flight");
    if (run->options.check_races) check_read(g, false, "load", where);
    g.read[my_warp()] = warp().knows.all.at[my_warp()];
    memcpy(value, from, bytes);
}

void check_global(int64_t first, int64_t elements, int64_t count, Where where) {
    if (first < 0 || first + elements > count)
        die(where, text("global access to elements %lld ... of %lld", (long long)first, (long long)count));
}

void check_alignment(const void* data, int bytes, Where where) {
    if (reinterpret_cast<uintptr_t>(data) % bytes) die(where, text("global access not aligned to %d bytes", bytes));
}

}  // namespace emulator
