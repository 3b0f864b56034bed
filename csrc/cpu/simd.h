// Vectors of W floats, their exponential, and products of small matrices, for any W: W = 16 is AVX-512's, 8 is AVX2's.
//
// Everything is inlined into the function that is compiled for a kind of processor (see attention.cpp), and so takes on
// its instructions. A number's bits never depend on what is computed beside it: sums go one way, over the depth.
#pragma once

#include <cstdint>
#include <cstring>

#define SORA_INLINE inline __attribute__((always_inline))

namespace sora_fast::simd {

template <int W>
struct Of {
    typedef float Floats __attribute__((vector_size(4 * W), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4), may_alias));
};

template <int W>
SORA_INLINE typename Of<W>::Floats& at(float* data) {
    return *reinterpret_cast<typename Of<W>::Floats*>(data);
}

template <int W>
SORA_INLINE const typename Of<W>::Floats& at(const float* data) {
    return *reinterpret_cast<const typename Of<W>::Floats*>(data);
}

// eˣ within 2 units in the last place for x ≤ 88; 0 below −87, where floats begin to lose bits. NaN stays NaN.
// (Cephes' expf: x = n·ln 2 + r with ln 2 in two parts, and a polynomial in r.)
template <int W>
SORA_INLINE typename Of<W>::Floats exponential(typename Of<W>::Floats x) {
    using Floats = typename Of<W>::Floats;
    using Ints = typename Of<W>::Ints;
    const Floats rounding = Floats{} + 12582912.f;  // 1.5 · 2²³: what is added to it is rounded to an integer
    const Floats shifted = x * 1.44269504f + rounding, n = shifted - rounding;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Floats mantissa = p * r * r + r + 1.f;
    // The integer stands in the low bits of `shifted`; 2ⁿ has it as its exponent.
    Ints bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.f ? Floats{} : mantissa * power;
}

// C[i, j] (= or +=) Σₖ A[i, k] · B[k, j] for kRows × kVectors·W numbers; B and C have neighbours j in memory.
template <int W, int kRows, int kVectors, bool kAdd>
SORA_INLINE void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
                      int64_t depth) {
    typename Of<W>::Floats sums[kRows][kVectors];
    for (int i = 0; i < kRows; i++)
        for (int j = 0; j < kVectors; j++)
            sums[i][j] = kAdd ? at<W>(c + i * c_row + j * W) : typename Of<W>::Floats{};
    for (int64_t k = 0; k < depth; k++, a += a_column, b += b_row)
        for (int i = 0; i < kRows; i++)
            for (int j = 0; j < kVectors; j++) sums[i][j] += a[i * a_row] * at<W>(b + j * W);
    for (int i = 0; i < kRows; i++)
        for (int j = 0; j < kVectors; j++) at<W>(c + i * c_row + j * W) = sums[i][j];
}

// The same for all rows: kRows at a time keep the multipliers busy and still fit into registers; those left over together.
template <int W, int kRows, int kVectors, bool kAdd>
SORA_INLINE void columns(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
                         int64_t rows, int64_t depth) {
    for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_row)
        tile<W, kRows, kVectors, kAdd>(a, a_row, a_column, b, b_row, c, c_row, depth);
    if constexpr (kRows > 1)
        if (rows) columns<W, kRows - 1, kVectors, kAdd>(a, a_row, a_column, b, b_row, c, c_row, rows, depth);
}

// C [rows, width] (= or +=) A [rows, depth] · B [depth, width], width a multiple of W.
template <int W, bool kAdd>
SORA_INLINE void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
                         int64_t rows, int64_t width, int64_t depth) {
    constexpr int kRows = W == 16 ? 6 : 4;
    int64_t j = 0;
    for (; j + 2 * W <= width; j += 2 * W)
        columns<W, kRows, 2, kAdd>(a, a_row, a_column, b + j, b_row, c + j, c_row, rows, depth);
    if (j < width) columns<W, kRows, 1, kAdd>(a, a_row, a_column, b + j, b_row, c + j, c_row, rows, depth);
}

}  // namespace sora_fast::simd
