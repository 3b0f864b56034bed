// What threads wait at: mbarriers, named barriers, the other lanes of a warp, the pool of registers.
#include "run.h"

namespace emulator {

std::string name_of(uint32_t bar) {
    return text("mbarrier at +0x%x (number %u)", bar - run->base, run->mbarriers[bar / 8].index);
}

// A release: others get to know what this warp knows.
static void release_to(Knowledge& target) {
    target.join(warp().knows);
    warp().knows.all.at[my_warp()]++;
}

void complete_phase(Mbarrier& bar, uint32_t address) {
    if (bar.pending || bar.bytes) return;
    bar.done[bar.phase % 2] = bar.arriving;
    bar.arriving = {};
    bar.phase++;
    bar.pending = bar.arrivals;
    wake_all(Wait::mbarrier, address);
}

Mbarrier& mbarrier(uint32_t address, const Where& where) {
    bool inside = address >= run->base && address + 8 <= run->base + run->shared.size();
    if (address % 8 || !inside || !run->mbarriers[address / 8].exists) die(where, text("no mbarrier at 0x%x", address));
    return run->mbarriers[address / 8];
}

void check_init(uint32_t address, bool by_tma, const Where& where) {
    if (!run->options.check_races) return;
    const Granule& g = granule(address);
    const Knowledge& knows = warp().knows;
    if (g.warp != my_warp() && knows.all.at[g.warp] < g.epoch) die(where, "mbarrier used without synchronization after its init");
    if (by_tma && knows.fenced.at[g.warp] < g.epoch) die(where, "mbarrier given to TMA: no fence.proxy.async since its init");
}

void mbarrier_init(uint32_t address, uint32_t arrivals, Where where) {
    breathe();
    if (address % 8) die(where, "mbarrier not aligned");
    shared_at(address, 8, where);
    Mbarrier& bar = run->mbarriers[address / 8];
    if (bar.exists) die(where, "mbarrier initialized twice (two names at one address?)");
    if (run->mbarrier_addresses.size() == kMbarriers) die(where, "too many mbarriers for the emulator");
    bar.exists = true;
    bar.index = uint32_t(run->mbarrier_addresses.size());
    bar.arrivals = bar.pending = arrivals;
    run->mbarrier_addresses.push_back(address);
    mark_stored(granule(address));
}

void mbarrier_arrive(uint32_t address, uint32_t expect_bytes, Where where) {
    breathe();
    Mbarrier& bar = mbarrier(address, where);
    check_init(address, false, where);
    bar.bytes += expect_bytes;
    if (!bar.pending) die(where, text("more arrivals than %u in a phase of %s", bar.arrivals, name_of(address).c_str()));
    release_to(bar.arriving);
    bar.pending--;
    complete_phase(bar, address);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Where where) {
    breathe();
    Mbarrier& bar = mbarrier(address, where);
    check_init(address, false, where);
    if (parity > 1) die(where, "parity is neither 0 nor 1");
    wait_until(Wait::mbarrier, address, where, [&] { return bar.phase % 2 != parity; });
    if (!bar.phase) return;  // the phase before the first
    warp().knows.join(bar.done[parity]);
    uint32_t& known = warp().knows.all.at[kWarps + bar.index];
    known = std::max(known, bar.phase);
}

void fence_proxy_async(Where) {
    breathe();
    warp().knows.fenced.join(warp().knows.all);
    warp().knows.all.at[my_warp()]++;  // what is stored from now on is not fenced
}

static void arrive_named(int id, int threads, const Where& where) {
    if (id < 0 || id > 15) die(where, "no such named barrier");
    NamedBarrier& bar = run->named[id];
    if (threads % 32 || threads <= 0) die(where, "named barrier: threads not a multiple of 32");
    if (bar.arrived && bar.threads != threads)
        die(where, text("named barrier %d: %d threads expected, %d by others", id, threads, bar.threads));
    bar.threads = threads;
    bar.by_warp[my_warp()]++;
    release_to(bar.arriving);
    if (++bar.arrived < threads) return;
    for (int& count : bar.by_warp) {
        if (count % 32) die(where, text("named barrier %d: not all lanes of a warp take part", id));
        count = 0;
    }
    bar.arrived = 0;
    bar.generation++;
    bar.done = bar.arriving;
    bar.arriving = {};
    wake_all(Wait::named, id);
}

void barrier_arrive(int id, int threads, Where where) {
    breathe();
    arrive_named(id, threads, where);
}

void barrier_sync(int id, int threads, Where where) {
    breathe();
    NamedBarrier& bar = run->named[id];
    int generation = bar.generation;
    arrive_named(id, threads ? threads : run->launch.threads, where);
    wait_until(Wait::named, id, where, [&] { return bar.generation != generation; });
    warp().knows.join(bar.done);
}

void set_registers(int count, bool grow, Where where) {
    breathe();
    if (count % 8 || count < 24 || count > 256) die(where, "setmaxnreg: not a multiple of 8 in 24 ... 256");
    meet(where, [&] {
        Warp& w = warp();
        if (grow ? count < w.registers : count > w.registers)
            return fail(where, text("setmaxnreg: from %d to %d is the wrong way", w.registers, count));
        if (grow) return;
        run->pool += (w.registers - count) * 32;
        w.registers = count;
        wake_all(Wait::registers, 0);
    });
    if (failed()) stop();
    if (!grow) return;
    wait_until(Wait::registers, 0, where, [&] {
        Warp& w = warp();
        int more = (count - w.registers) * 32;
        if (more > run->pool) return false;
        run->pool -= more;
        w.registers = count;
        return true;
    });
}

// Values that all lanes give, each by its lane.
static const uint32_t* exchange(uint32_t value, const Where& where) {
    breathe();
    Warp& w = warp();
    int parity = w.meeting % 2;
    w.exchange[parity][run->current % 32] = value;
    meet(where, [] {});
    return w.exchange[parity];
}

uint32_t shuffle(uint32_t value, int source_lane, Where where) { return exchange(value, where)[source_lane % 32]; }

uint32_t ballot(bool vote, Where where) {
    const uint32_t* votes = exchange(vote, where);
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= votes[lane] << lane;
    return bits;
}

void warp_sync(Where where) {
    breathe();
    meet(where, [] {});
}

}  // namespace emulator
