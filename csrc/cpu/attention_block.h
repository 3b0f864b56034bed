// Attention of one head over some keys that lie together: what a thread does at a time. See attention.cpp.
//
// Queries are taken kQueries at a time against kKeys keys, so that their scores stay in the second-level cache. Keys and
// values are copied into rows of a whole number of vectors, keys also transposed, since a product reads its right side
// along rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "simd.h"

namespace sora_fast {

constexpr int64_t kQueries = 48, kKeys = 256;

// One head of a tensor [N, H, D]; row: floats from token to token.
struct Rows {
    float* data;
    int64_t row;
    SORA_INLINE float* operator[](int64_t token) const { return data + token * row; }
};

// Queries first_query … last_query, each of which meets the keys first_key … last_key (the last ones excluded).
struct Meeting {
    int64_t first_query, last_query, first_key, last_key;
    int64_t queries() const { return last_query - first_query; }
    int64_t keys() const { return last_key - first_key; }
};

struct ForwardHead {
    Rows q, k, v, out;
    float* lse;  // [N]
    int64_t dim;
    float scale;
};

struct BackwardHead {
    Rows grad_out, q, k, v, out, grad_q, grad_k, grad_v;
    const float *lse, *grad_lse;  // grad_lse: null for zero
    int64_t dim;
    float scale;
};

// Memory of a thread, which grows and is never given back before the op ends. Aligned to a line of the cache.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Forget all that was taken, and have room for that many floats, in up to 16 pieces.
    void reset(int64_t floats) {
        const size_t bytes = (static_cast<size_t>(floats) + 16 * 16) * sizeof(float) / 64 * 64 + 64;
        used_ = 0;
        if (bytes <= size_) return;
        std::free(data_);
        data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
        size_ = data_ ? bytes : 0;
        if (!data_) throw std::bad_alloc();
    }
    float* take(int64_t floats) {
        float* taken = data_ + used_;
        used_ += (floats + 15) / 16 * 16;
        return taken;
    }

  private:
    float* data_ = nullptr;
    size_t size_ = 0;
    int64_t used_ = 0;
};

template <int W>
SORA_INLINE int64_t whole(int64_t size) {
    return (size + W - 1) / W * W;
}

// rows [count, dim] → [count, width], zeros after dim.
SORA_INLINE void copy_rows(Rows rows, int64_t first, int64_t count, int64_t dim, float* to, int64_t width) {
    for (int64_t i = 0; i < count; i++) {
        std::memcpy(to + i * width, rows[first + i], dim * sizeof(float));
        std::memset(to + i * width + dim, 0, (width - dim) * sizeof(float));
    }
}

// rows [count, dim] → [dim, kKeys], zeros after count up to a whole number of vectors.
template <int W>
SORA_INLINE void transpose_rows(Rows rows, int64_t first, int64_t count, int64_t dim, float* to) {
    for (int64_t j = 0; j < count; j++) {
        const float* row = rows[first + j];
        for (int64_t d = 0; d < dim; d++) to[d * kKeys + j] = row[d];
    }
    for (int64_t d = 0; d < dim; d++) std::memset(to + d * kKeys + count, 0, (whole<W>(count) - count) * sizeof(float));
}

template <int W>
SORA_INLINE float sum(typename simd::Of<W>::Floats x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

// Raw scores [width] of one query → weights e^(scale·score − most) in place, where `most` is the largest so far. Returns
// their sum, and writes down by what all that was summed up before is to be multiplied.
template <int W>
SORA_INLINE float softmax_row(float* scores, int64_t count, float scale, float& most, float& decay) {
    using Floats = typename simd::Of<W>::Floats;
    const int64_t width = whole<W>(count);
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    // What the row's end is filled up with stays out of the maximum, whatever the sign of the scale is.
    for (int64_t j = count; j < width; j++) scores[j] = scale < 0 ? -kNone : kNone;
    Floats largest = Floats{} + kNone;
    for (int64_t j = 0; j < width; j += W) {
        const Floats scaled = simd::at<W>(scores + j) * scale;
        simd::at<W>(scores + j) = scaled;
        largest = scaled > largest ? scaled : largest;
    }
    float found = most;
    for (int i = 0; i < W; i++) found = largest[i] > found ? largest[i] : found;
    for (int64_t j = count; j < width; j++) scores[j] = kNone;  // 0 · ∞ is no number
    const float base = found == kNone ? 0.f : found;  // −∞ − (−∞) is no number, and later keys may have finite scores
    decay = std::exp(most - base);
    most = found;
    Floats total{};
    for (int64_t j = 0; j < width; j += W) {
        const Floats weight = simd::exponential<W>(simd::at<W>(scores + j) - base);
        simd::at<W>(scores + j) = weight;
        total += weight;
    }
    return sum<W>(total);
}

template <int W>
SORA_INLINE void forward_meeting(const ForwardHead& head, const Meeting& meeting, Scratch& scratch) {
    const int64_t dim = head.dim, width = whole<W>(dim), queries = meeting.queries();
    scratch.reset(kKeys * (dim + width + kQueries) + queries * (width + 2));
    float *transposed = scratch.take(kKeys * dim), *values = scratch.take(kKeys * width), *scores = scratch.take(kQueries * kKeys);
    float *sums = scratch.take(queries * width), *most = scratch.take(queries), *total = scratch.take(queries);
    std::fill(sums, sums + queries * width, 0.f);
    std::fill(most, most + queries, -std::numeric_limits<float>::infinity());
    std::fill(total, total + queries, 0.f);
    for (int64_t key = meeting.first_key; key < meeting.last_key; key += kKeys) {
        const int64_t keys = std::min(kKeys, meeting.last_key - key);
        transpose_rows<W>(head.k, key, keys, dim, transposed);
        copy_rows(head.v, key, keys, dim, values, width);
        for (int64_t first = 0; first < queries; first += kQueries) {
            const int64_t count = std::min(kQueries, queries - first);
            simd::product<W, false>(head.q[meeting.first_query + first], head.q.row, 1, transposed, kKeys, scores, kKeys, count,
                                    whole<W>(keys), dim);
            for (int64_t i = 0; i < count; i++) {
                float decay;
                const float added = softmax_row<W>(scores + i * kKeys, keys, head.scale, most[first + i], decay);
                total[first + i] = total[first + i] * decay + added;
                if (key > meeting.first_key)
                    for (int64_t d = 0; d < width; d += W) simd::at<W>(sums + (first + i) * width + d) *= decay;
            }
            simd::product<W, true>(scores, kKeys, 1, values, width, sums + first * width, width, count, width, keys);
        }
    }
    for (int64_t i = 0; i < queries; i++) {
        float* out = head.out[meeting.first_query + i];
        for (int64_t d = 0; d < dim; d++) out[d] = sums[i * width + d] / total[i];
        head.lse[meeting.first_query + i] = most[i] + std::log(total[i]);
    }
}

// Weights and their gradients of kQueries queries: scores → P, slopes (dO·Vᵀ) → P · (dP − delta) · scale, in place.
template <int W>
SORA_INLINE void slopes_row(float* scores, float* slopes, int64_t count, float scale, float lse, float delta) {
    const int64_t width = whole<W>(count);
    for (int64_t j = 0; j < width; j += W) {
        const auto weight = simd::exponential<W>(simd::at<W>(scores + j) * scale - lse);
        simd::at<W>(scores + j) = weight;
        simd::at<W>(slopes + j) = weight * (simd::at<W>(slopes + j) - delta) * scale;
    }
}

// What all meetings of one head with keys from the same first one on add up to. `last_key`: of all of them. The
// gradients of the keys are added to grad_k and grad_v, those of the queries are written.
template <int W>
SORA_INLINE void backward_meetings(const BackwardHead& head, const Meeting* meetings, int64_t count, Scratch& scratch) {
    int64_t last_key = 0;
    for (int64_t m = 0; m < count; m++) last_key = std::max(last_key, meetings[m].last_key);
    const int64_t first_key = meetings[0].first_key, first_query = meetings[0].first_query;
    const int64_t dim = head.dim, width = whole<W>(dim), queries = meetings[count - 1].last_query - first_query;
    scratch.reset(kKeys * (2 * dim + 3 * width + 2 * kQueries) + 2 * kQueries * width + queries * (width + 1));
    float *keys_t = scratch.take(kKeys * dim), *values_t = scratch.take(kKeys * dim), *keys_rows = scratch.take(kKeys * width);
    float *grad_k = scratch.take(kKeys * width), *grad_v = scratch.take(kKeys * width);
    float *scores = scratch.take(kQueries * kKeys), *slopes = scratch.take(kQueries * kKeys);
    float *q = scratch.take(kQueries * width), *grad_out = scratch.take(kQueries * width);
    float *grad_q = scratch.take(queries * width), *delta = scratch.take(queries);
    std::fill(grad_q, grad_q + queries * width, 0.f);
    for (int64_t i = 0; i < queries; i++) {
        const float *grad = head.grad_out[first_query + i], *out = head.out[first_query + i];
        float dot = 0;
        for (int64_t d = 0; d < dim; d++) dot += grad[d] * out[d];
        delta[i] = head.grad_lse ? dot - head.grad_lse[first_query + i] : dot;
    }
    for (int64_t key = first_key; key < last_key; key += kKeys) {
        const int64_t present = std::min(kKeys, last_key - key);
        transpose_rows<W>(head.k, key, present, dim, keys_t);
        transpose_rows<W>(head.v, key, present, dim, values_t);
        copy_rows(head.k, key, present, dim, keys_rows, width);
        std::fill(grad_k, grad_k + present * width, 0.f);
        std::fill(grad_v, grad_v + present * width, 0.f);
        for (int64_t m = 0; m < count; m++) {
            const int64_t keys = std::min(kKeys, meetings[m].last_key - key);
            if (keys <= 0) continue;
            for (int64_t first = meetings[m].first_query; first < meetings[m].last_query; first += kQueries) {
                const int64_t rows = std::min(kQueries, meetings[m].last_query - first);
                copy_rows(head.q, first, rows, dim, q, width);
                copy_rows(head.grad_out, first, rows, dim, grad_out, width);
                simd::product<W, false>(q, width, 1, keys_t, kKeys, scores, kKeys, rows, whole<W>(keys), dim);
                simd::product<W, false>(grad_out, width, 1, values_t, kKeys, slopes, kKeys, rows, whole<W>(keys), dim);
                for (int64_t i = 0; i < rows; i++)
                    slopes_row<W>(scores + i * kKeys, slopes + i * kKeys, keys, head.scale, head.lse[first + i],
                                  delta[first + i - first_query]);
                simd::product<W, true>(scores, 1, kKeys, grad_out, width, grad_v, width, keys, width, rows);
                simd::product<W, true>(slopes, 1, kKeys, q, width, grad_k, width, keys, width, rows);
                simd::product<W, true>(slopes, kKeys, 1, keys_rows, width, grad_q + (first - first_query) * width, width, rows, width,
                                       keys);
            }
        }
        for (int64_t j = 0; j < present; j++)
            for (int64_t d = 0; d < dim; d++) {
                head.grad_k[key + j][d] += grad_k[j * width + d];
                head.grad_v[key + j][d] += grad_v[j * width + d];
            }
    }
    for (int64_t i = 0; i < queries; i++) std::memcpy(head.grad_q[first_query + i], grad_q + i * width, dim * sizeof(float));
}

}  // namespace sora_fast
