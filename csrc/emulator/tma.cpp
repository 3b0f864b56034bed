// The tensor memory accelerator: boxes with rows of 128 bytes under the 128-byte swizzle, in both directions.
#include <cstring>

#include "run.h"

namespace emulator {

int bytes_of(Element element) { return element == Element::f32 ? 4 : 2; }

static int box_bytes(const TensorMap& map) { return map.box[2] * map.box[1] * map.box[0] * bytes_of(map.element); }

// Calls use(place in shared memory, element in global memory, or null outside of the tensor).
template <class Use>
static void each_element(const TensorMap& map, uint32_t address, const int (&at)[3], int first, int last, Use use) {
    int size = bytes_of(map.element);
    for (int row = first; row < last; row++)
        for (int head = 0; head < map.box[1]; head++)
            for (int column = 0; column < map.box[0]; column++) {
                uint32_t inside = address + (row * map.box[1] + head) * 128 + column * size;
                inside ^= (inside >> 7 & 7) << 4;
                int64_t place[3] = {at[0] + column, at[1] + head, at[2] + row}, offset = 0;
                bool exists = true;
                for (int axis = 0; axis < 3; axis++) {
                    exists &= place[axis] >= 0 && place[axis] < map.size[axis];
                    offset += place[axis] * map.stride[axis];
                }
                use(run->shared.data() + (inside - run->base), exists ? static_cast<char*>(map.data) + offset * size : nullptr);
            }
}

static void check_box(const TensorMap& map, uint32_t address, const Where& where) {
    if (map.box[0] * bytes_of(map.element) != 128) die(where, "only boxes with rows of 128 bytes are emulated");
    if (reinterpret_cast<uintptr_t>(map.data) % 16) die(where, "tensor map: an address that is not a multiple of 16 bytes");
    for (int axis = 1; axis < 3; axis++)
        if (map.stride[axis] * bytes_of(map.element) % 16) die(where, "tensor map: a stride that is not a multiple of 16 bytes");
    if (map.box[2] > 256) die(where, "a box has more than 256 rows");
    if (address % 1024) die(where, text("TMA with 128-byte swizzle at 0x%x, not a multiple of 1,024", address));
    shared_at(address, box_bytes(map), where);
}

void tma_load(uint32_t to, const TensorMap& map, uint32_t bar_address, const int (&at)[3], Where where) {
    breathe();
    check_box(map, to, where);
    Mbarrier& bar = mbarrier(bar_address, where);
    check_init(bar_address, true, where);
    int bytes = box_bytes(map);
    for (int offset = 0; offset < bytes; offset += kGranule) {
        Granule& g = granule(to + offset);
        begin_write(g, true, "TMA load", where);
        g.writer = Granule::load, g.bar = bar_address, g.epoch = bar.phase, g.loads_in_flight++;
        std::fill(std::begin(g.read), std::end(g.read), 0);
    }
    memset(shared_at(to, bytes, where), 0xFF, bytes);
    Load load{to, bar_address, bar.phase, map, {at[0], at[1], at[2]}, {0}, 0, where};
    while (load.rows.back() < map.box[2]) load.rows.push_back(load.rows.back() + 1 + run->random.below(map.box[2] - load.rows.back()));
    load.parts_missing = int(load.rows.size()) - 1;
    int number = run->num_loads++;
    run->loads.emplace(number, load);
    for (int part = 0; part < load.parts_missing; part++) post(Happening::load, number, part, run->delay);
}

void load_lands(int number, int part) {
    Load& load = run->loads.at(number);
    int first = load.rows[part], last = load.rows[part + 1], size = bytes_of(load.map.element);
    each_element(load.map, load.to, load.at, first, last, [&](unsigned char* inside, const char* outside) {
        outside ? memcpy(inside, outside, size) : memset(inside, 0, size);
    });
    int row_bytes = load.map.box[1] * 128;
    for (int offset = first * row_bytes; offset < last * row_bytes; offset += kGranule) granule(load.to + offset).loads_in_flight--;
    Mbarrier& bar = run->mbarriers[load.bar / 8];
    if (bar.phase != load.phase && run->options.check_races)
        return fail(load.where, text("TMA load arrives in phase %u of %s, issued in phase %u: too few bytes expected", bar.phase,
                                     name_of(load.bar).c_str(), load.phase));
    bar.bytes -= (last - first) * row_bytes;
    if (bar.bytes < -(1 << 20)) return fail(load.where, "tx-count of an mbarrier out of range");
    complete_phase(bar, load.bar);
    if (!--load.parts_missing) run->loads.erase(number);
}

void tma_store(const TensorMap& map, uint32_t from, const int (&at)[3], bool add, Where where) {
    breathe();
    check_box(map, from, where);
    for (int offset = 0; offset < box_bytes(map); offset += kGranule) begin_read(granule(from + offset), "TMA store", where);
    int number = run->num_stores++;
    run->stores.emplace(number, Store{from, map, {at[0], at[1], at[2]}, run->current, add, false, where});
    me().open_stores.push_back(number);
    post(Happening::store, number, 0, run->delay);
}

void store_happens(int number) {
    Store& store = run->stores.at(number);
    int size = bytes_of(store.map.element);
    each_element(store.map, store.from, store.at, 0, store.map.box[2], [&](const unsigned char* inside, char* outside) {
        if (!outside) return;
        if (!store.add) return (void)memcpy(outside, inside, size);
        float mine, sum;
        memcpy(&mine, inside, 4), memcpy(&sum, outside, 4), sum += mine, memcpy(outside, &sum, 4);
    });
    store.happened = true;
    wake(Wait::store, 0, store.thread, store.thread + 1);
}

void tma_commit(Where) {
    breathe();
    me().store_groups.push_back(std::move(me().open_stores));
    me().open_stores.clear();
}

void tma_wait_read(int pending, Where where) {
    breathe();
    auto& groups = me().store_groups;
    while (int(groups.size()) > pending) {
        for (int number : groups.front()) {
            Store& store = run->stores.at(number);
            wait_until(Wait::store, 0, where, [&] { return store.happened; });
            for (int offset = 0; offset < box_bytes(store.map); offset += kGranule) end_read(granule(store.from + offset));
            run->stores.erase(number);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace emulator
