// Which thread goes on next: warps by random priorities that change now and then, so that some run far ahead of others.
#include <sys/mman.h>

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

#include "run.h"

#ifndef EMULATOR_C_CONTEXTS
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {

thread_local Run* run = nullptr;

std::string text(const char* format, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

std::string place(const Where& where) {
    const char* file = strrchr(where.file_name(), '/');
    return text("%s:%u", file ? file + 1 : where.file_name(), where.line());
}

void fail(const Where& where, const std::string& what) {
    if (failed()) return;
    run->result.ok = false;
    run->result.message = text("%s: warp %d lane %d: ", place(where).c_str(), my_warp(), run->current % 32) + what;
}
void stop() {
    switch_to(me().context, run->scheduler);
    __builtin_unreachable();
}
void die(const Where& where, const std::string& what) {
    fail(where, what);
    stop();
}

void mix(uint64_t value) { run->result.trace = (run->result.trace ^ value) * 0x100000001B3; }

void post(Happening kind, int number, int part, double most_delay) {
    int64_t delay = int64_t(run->random.unit() * most_delay);
    run->events.push({run->time + delay, run->order++, kind, number, part});
}

static void make_ready(int fiber) {
    run->fibers[fiber].ready = true;
    run->warps[fiber / 32].ready |= 1u << fiber % 32;
}
static void make_unready() {
    me().ready = false;
    warp().ready &= ~(1u << run->current % 32);
}

void wake(Wait kind, uint64_t key, int first, int last) {
    for (int i = first; i < last; i++) {
        Fiber& fiber = run->fibers[i];
        if (!fiber.ready && !fiber.finished && fiber.wait == kind && fiber.wait_key == key) make_ready(i);
    }
}

void sleep(Wait kind, uint64_t key, const Where& where) {
    Fiber& fiber = me();
    fiber.wait = kind, fiber.wait_key = key, fiber.where = where;
    make_unready();
    switch_to(fiber.context, run->scheduler);
    if (failed()) stop();
}

void breathe() {
    if (run->random.unit() < run->preempt_chance) switch_to(me().context, run->scheduler);
    if (failed()) stop();
}

int thread_index() { return run->current; }
int block_index() { return run->launch.block; }
int num_blocks() { return run->launch.blocks; }
uint32_t shared_base() { return run->base; }

static void entry() {
    run->scheduler.stack = arrive(nullptr);
    (*run->kernel)();
    Fiber& fiber = me();
    if (fiber.retired < fiber.products) die(fiber.where, "thread ends with wgmma in flight");
    if (!fiber.open_stores.empty()) die(fiber.where, "thread ends with a bulk store not committed");
    for (auto& group : fiber.store_groups)
        if (!group.empty()) die(fiber.where, "thread ends without a wait for its bulk stores");
    fiber.finished = true;
    make_unready();
    run->live--;
    stop();
}

static std::string what_is_missing(const Fiber& fiber) {
    switch (fiber.wait) {
        case Wait::mbarrier: {
            const Mbarrier& bar = run->mbarriers[fiber.wait_key / 8];
            return name_of(uint32_t(fiber.wait_key)) + text(" [phase %u, %u of %u arrivals and %lld bytes missing]", bar.phase, bar.pending,
                                                           bar.arrivals, (long long)bar.bytes);
        }
        case Wait::named: {
            const NamedBarrier& bar = run->named[fiber.wait_key];
            return text("named barrier %d [%d of %d threads]", int(fiber.wait_key), bar.arrived, bar.threads);
        }
        case Wait::warp: return "its warp";
        case Wait::product: return "wgmma";
        case Wait::registers: return "registers";
        case Wait::store: return "bulk store";
        default: return "nothing";
    }
}

static std::string deadlock() {
    std::map<std::string, std::vector<int>> waiting;
    for (int i = 0; i < run->launch.threads; i++) {
        const Fiber& fiber = run->fibers[i];
        if (!fiber.finished) waiting[what_is_missing(fiber) + " at " + place(fiber.where)].push_back(i);
    }
    std::string message = "deadlock:";
    for (auto& [what, threads] : waiting)
        message += text(" %d threads (%d ... %d) wait for %s;", int(threads.size()), threads.front(), threads.back(), what.c_str());
    return message;
}

static void happen(const Event& event) {
    mix(int(event.kind) * 1000003 + event.number * 1009 + event.part);
    if (event.kind == Happening::load) load_lands(event.number, event.part);
    if (event.kind == Happening::product) product_happens(event.number);
    if (event.kind == Happening::store) store_happens(event.number);
}
static void happen_until(int64_t time) {
    while (!run->events.empty() && run->events.top().time <= time && !failed()) {
        Event event = run->events.top();
        run->events.pop();
        happen(event);
    }
}

static int next_warp(int num_warps) {  // -1: none can go on
    int ready[kWarps], count = 0, best = -1;
    for (int w = 0; w < num_warps; w++)
        if (run->warps[w].ready) {
            ready[count++] = w;
            if (best < 0 || run->warps[w].priority > run->warps[best].priority) best = w;
        }
    if (!count) return -1;
    Random& random = run->random;
    if (random.unit() < run->random_chance) best = ready[random.below(count)];
    if (random.unit() < run->shuffle_chance) run->warps[random.below(num_warps)].priority = random.unit();
    return best;
}

static void run_warp(int w) {
    mix(w);
    int turn = run->random.below(32);
    uint32_t lanes = std::rotr(run->warps[w].ready, turn);
    while (lanes && !failed()) {
        int lane = (std::countr_zero(lanes) + turn) % 32;
        lanes &= lanes - 1;
        run->current = w * 32 + lane;
        if (me().ready) switch_to(run->scheduler, me().context);
    }
}

static void schedule() {
    while (run->live && !failed()) {
        if (++run->result.steps > run->options.most_steps) return fail({}, "too many steps");
        happen_until(run->time);
        if (failed()) return;
        run->time++;
        int w = next_warp(run->launch.threads / 32);
        if (w >= 0) {
            run_warp(w);
        } else if (!run->events.empty()) {
            run->time = std::max(run->time, run->events.top().time);
        } else {
            run->result.ok = false;
            run->result.message = deadlock();
        }
    }
    happen_until(INT64_MAX);  // stores in flight
}

static void check_end() {
    for (int id = 0; id < 16; id++)
        if (run->named[id].arrived) fail({}, text("block ends with named barrier %d half full", id));
    for (uint32_t address : run->mbarrier_addresses)
        if (run->mbarriers[address / 8].bytes) fail({}, "block ends with bytes expected at " + name_of(address));
}

// Some seeds let asynchronous operations take long, some let warps run far ahead, some mix everything.
static void choose_manners() {
    static const double delays[] = {4, 40, 400, 4000};
    Random& random = run->random;
    random.state = run->options.seed * 0x2545F4914F6CDD1D + 1;
    random.next();
    run->delay = delays[random.below(4)];
    run->shuffle_chance = random.unit() < 0.5 ? 0.002 : 0.05;
    run->random_chance = random.unit() < 0.5 ? 0.02 : 0.5;
    run->preempt_chance = random.unit() < 0.5 ? 0.002 : 0.02;
    run->base = 1024 + 16 * random.below(64);  // as little alignment as CUDA promises
}

static char* stacks() {  // kept: mapping them costs more than running
    static thread_local char* memory = nullptr;
    if (memory) return memory;
    void* mapped = mmap(nullptr, size_t(kStack) * kWarps * 32, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory = mapped == MAP_FAILED ? nullptr : static_cast<char*>(mapped);
}

static void begin(char* stack) {
    Run& r = *run;
    int threads = r.launch.threads;
    r.live = threads;
    choose_manners();
    r.shared.assign(r.launch.shared_bytes, 0xFF);
    r.mbarriers.resize((r.base + r.launch.shared_bytes) / 8 + 1);
    r.granules.resize(r.launch.shared_bytes / kGranule + 2);
    r.fibers.resize(threads);
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = r.fibers[i];
        fiber.stack = stack + size_t(kStack) * i;
        forget_frames({fiber.stack, kStack});
        memset(fiber.stack + kStack - 4096, 0xFF, 4096);
        fiber.registers.reserve(64);
        prepare(fiber.context, fiber.stack, entry);
        make_ready(i);
    }
    for (int w = 0; w < threads / 32; w++) {
        r.warps[w].priority = r.random.unit();
        r.warps[w].registers = r.options.registers_at_launch;
        r.warps[w].knows.all.at[w] = 1;
    }
}

Result run_block(const std::function<void()>& kernel, const Launch& launch, const Options& options) {
    if (launch.threads % 128 || launch.threads / 32 > kWarps) return {false, "threads: a multiple of 128, at most 512"};
    if (launch.shared_bytes > kSharedLimit) return {false, "more shared memory than a block has"};
    if (options.registers_at_launch * launch.threads > 65536) return {false, "more registers than a block has"};
    char* stack = stacks();
    if (!stack) return {false, "no memory for stacks"};
    auto owner = std::make_unique<Run>();
    run = owner.get();
    run->options = options, run->launch = launch, run->kernel = &kernel;
    begin(stack);
    schedule();
    if (!failed()) check_end();
    Result result = run->result;
    run = nullptr;
    return result;
}

}  // namespace emulator
