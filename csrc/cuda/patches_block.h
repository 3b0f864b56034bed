// What one block of threads does to move patches: read the pixels of some tokens side by side, turn them in shared
// memory, and write rows side by side; or the other way round.
//
// A kernel is three steps with barriers in between, and each step is a function of the thread's number. So a host runs
// the same source, thread by thread (csrc/emulated/patches.cpp), and tests compare it with the loops of csrc/cpu.
#pragma once

#include <stdexcept>

#include "../patches.h"

namespace sora_fast {

constexpr int kThreads = 256;
constexpr int kMostTokens = 64;
// As many as there are threads: each writes one down where it leads.
constexpr int kMostRuns = kThreads;
// Of a block's rows; four blocks fit on a multiprocessor of any chip since Ampere.
constexpr int kMostBytes = 32768;

// The part of the rows that a block moves: `tokens` rows, of each the columns of `runs` runs, which lie side by side.
struct Tile {
    int tokens, runs, columns;
    int pitch;   // elements from one row to the next in shared memory: a multiple of 16 bytes, and 16 more, so that the
                 // same column of neighbouring rows is in other banks
    int chunks;  // tiles side by side
};

// Of rows of so many columns; the runs of one group, which cannot be parted, cover `group` columns. No tokens: a group
// is too large for shared memory.
inline Tile tile_of(int64_t columns, int64_t group, int64_t runs_of_group, int64_t bytes) {
    const int64_t most = kMostRuns / runs_of_group;
    int64_t groups = columns / group;
    if (groups > most) groups = most;
    // Eight tokens at least where that is possible: what they read is a sector or more.
    while (groups > 1 && groups * group * bytes + 32 > kMostBytes / 8) groups--;
    if (groups == 0) return {};
    const int64_t unit = 16 / bytes;
    const int64_t pitch = ((groups * group + unit - 1) / unit + 1) * unit;
    int tokens = kMostTokens;
    while (tokens && tokens * pitch * bytes > kMostBytes) tokens /= 2;
    return {tokens, static_cast<int>(groups * runs_of_group), static_cast<int>(groups * group), static_cast<int>(pitch),
            static_cast<int>((columns + groups * group - 1) / (groups * group))};
}

// Where a run begins: in the patch, and in the tile's rows.
struct Run {
    int32_t c, t, h, column;
};

// What the threads of a block share beside the rows.
struct Shared {
    Patch patches[kMostTokens];
    Run runs[kMostRuns];
};

// So many bytes that are read and written at once.
template <int kBytes>
struct alignas(kBytes) Vector {
    uint8_t bytes[kBytes];
};

// A GPU stops at an address that is no multiple of what is moved. A host would not, and so it looks.
template <typename V>
HOST_DEVICE void check_aligned([[maybe_unused]] const void* address) {
#ifndef __CUDA_ARCH__
    if (reinterpret_cast<uintptr_t>(address) % alignof(V)) throw std::logic_error("an address that is not aligned");
#endif
}

// T: an integer of a number's size. kGather: from pixels to rows. kWidth: pw, 0 where it is not known beforehand.
// flat_is_dense: pixels lie side by side from a multiple of 16 bytes on; rows_are_dense: and so do the columns of rows,
// each of which begins at such a multiple.
template <typename T, bool kGather, int kWidth>
struct BlockOfPatches {
    Batch batch;
    RowOrder order;
    Tile tile;
    T* flat;
    T* rows;
    int64_t capacity, pixel_stride, row_stride, column_stride;
    bool flat_is_dense, rows_are_dense;

    // The first step: what the others look up.
    HOST_DEVICE void prepare(int64_t block, int thread, Shared& shared) const {
        if (thread < tile.tokens) {
            const int64_t token = first_token(block) + thread;
            shared.patches[thread] = token < batch.num_tokens ? patch_within(batch, token, capacity) : Patch{};
        }
        if (thread < tile.runs) shared.runs[thread] = run(block, thread);
    }

    // Between pixels and the tile.
    HOST_DEVICE void move_pixels(int thread, const Shared& shared, T* staged) const {
        const int token = thread % tile.tokens;  // neighbouring lanes take neighbouring tokens
        const Patch patch = shared.patches[token];
        const bool whole = kWidth > 0 && flat_is_dense && patch.first % width() == 0 && patch.row % width() == 0;
        T* row = staged + token * tile.pitch;
        for (int i = thread / tile.tokens; i < tile.runs; i += kThreads / tile.tokens) {
            const Run run = shared.runs[i];
            if (run.column < 0) break;
            const bool reached = patch.reaches(run.t, run.h);
            if (!kGather && !reached) continue;
            const int64_t element = reached ? patch.element(run.c, run.t, run.h) : 0;
            const int64_t count = reached ? patch.columns_left : 0;
            if (whole && reached)
                move_vectors(flat + element, row + run.column);
            else
                move_numbers(flat + element * pixel_stride, row + run.column, count);
        }
    }

    // Between the tile and rows.
    HOST_DEVICE void move_rows(int64_t block, int thread, T* staged) const {
        constexpr int kUnit = 16 / sizeof(T);
        const int64_t first = first_token(block), column = chunk(block) * tile.columns;
        const int64_t left = width_of_rows() - column;
        const int columns = static_cast<int>(left < tile.columns ? left : tile.columns);
        const bool vectors = rows_are_dense && columns % kUnit == 0 && column % kUnit == 0;
        const int step = vectors ? kUnit : 1, units = columns / step;
        for (int i = thread; i < tile.tokens * units; i += kThreads) {
            const int token = i / units, place = i % units * step;
            if (first + token >= batch.num_tokens) break;
            T* cell = rows + (first + token) * row_stride + (column + place) * column_stride;
            T* own = staged + token * tile.pitch + place;
            if (vectors)
                copy<Vector<16>>(kGather ? own : cell, kGather ? cell : own);
            else
                copy<T>(kGather ? own : cell, kGather ? cell : own);
        }
    }

  private:
    HOST_DEVICE int64_t width() const { return kWidth ? kWidth : order.patch.w; }
    HOST_DEVICE int64_t width_of_rows() const { return order.channels * order.patch.t * order.patch.h * order.patch.w; }
    HOST_DEVICE int64_t first_token(int64_t block) const { return block / tile.chunks * tile.tokens; }
    HOST_DEVICE int64_t chunk(int64_t block) const { return block % tile.chunks; }

    // Run i of a tile; its column is -1 past the end of the rows.
    HOST_DEVICE Run run(int64_t block, int i) const {
        const PatchSize& patch = order.patch;
        const int64_t number = chunk(block) * tile.runs + i, pictures = patch.t * patch.h;
        const int64_t c = order.channel_last ? number % order.channels : number / pictures;
        const int64_t q = order.channel_last ? number / order.channels : number % pictures;
        const bool exists = c < order.channels && q < pictures;
        const int64_t t = q / patch.h, h = q % patch.h;
        const int64_t column = exists ? order.column(c, t, h) - chunk(block) * tile.columns : -1;
        return {static_cast<int32_t>(c), static_cast<int32_t>(t), static_cast<int32_t>(h), static_cast<int32_t>(column)};
    }

    // A whole run, which begins at a multiple of its own length, as one vector or as several of 16 bytes.
    HOST_DEVICE void move_vectors(T* pixels, T* cells) const {
        constexpr int kWhole = kWidth ? kWidth : 1;
        constexpr int kVector = kWhole * sizeof(T) < 16 ? kWhole * sizeof(T) : 16;
        constexpr int kNumbers = kVector / sizeof(T);
        for (int w = 0; w < kWhole; w += kNumbers) {
            if (order.step() == 1) {
                copy_pixels<Vector<kVector>>(pixels + w, cells + w);
                continue;
            }
            alignas(kVector) T numbers[kNumbers];
            if (kGather) copy<Vector<kVector>>(pixels + w, numbers);
            for (int i = 0; i < kNumbers; i++) copy_pixels<T>(numbers + i, cells + (w + i) * order.step());
            if (!kGather) copy<Vector<kVector>>(numbers, pixels + w);
        }
    }

    // The first `count` pixels of a run; a gathered one ends in zeros.
    HOST_DEVICE void move_numbers(T* pixels, T* cells, int64_t count) const {
        for (int64_t w = 0; w < width(); w++) {
            if (w < count)
                copy_pixels<T>(pixels + w * pixel_stride, cells + w * order.step());
            else if (kGather)
                cells[w * order.step()] = 0;
        }
    }

    template <typename V>
    HOST_DEVICE static void copy_pixels(T* pixel, T* cell) {
        copy<V>(kGather ? pixel : cell, kGather ? cell : pixel);
    }

    template <typename V>
    HOST_DEVICE static void copy(const T* from, T* to) {
        check_aligned<V>(from);
        check_aligned<V>(to);
        *reinterpret_cast<V*>(to) = *reinterpret_cast<const V*>(from);
    }
};

}  // namespace sora_fast
