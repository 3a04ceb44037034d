// What kernels for AVX-512 are written with. Functions carry the instruction sets that they need, so that a library
// built for any x86-64 processor may hold them; they are called only where `supported` said yes.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#define SDC_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define SDC_AVX512_INLINE SDC_AVX512 __attribute__((always_inline)) inline

namespace sdc {

constexpr int kLanes = 16;

/// A row of one head. Rows lie apart, which the processor does not foresee.
SDC_AVX512_INLINE void prefetch_row(const uint16_t* row, int64_t head_size) {
    for (int64_t i = 0; i < head_size; i += 32) _mm_prefetch(row + i, _MM_HINT_T0);
}

/// The lowest `count` lanes; none for a count below 1, all for one above 15.
SDC_AVX512_INLINE __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>((1U << std::clamp<int64_t>(count, 0, kLanes)) - 1U);
}

/// Lane i of row j ↔ lane j of row i.
SDC_AVX512_INLINE void transpose(__m512i (&rows)[kLanes]) {
    __m512i other[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        other[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        other[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        rows[4 * i] = _mm512_unpacklo_epi64(other[4 * i], other[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(other[4 * i], other[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(other[4 * i + 1], other[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(other[4 * i + 1], other[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
    }
}

/// The bf16 of `low` and `high` as pairs in each lane.
SDC_AVX512_INLINE __m512i join_pairs(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

/// The bf16 in the lower half of each lane, and in the upper one.
SDC_AVX512_INLINE __m512 float_from_low(__m512i pairs) {
    return reinterpret_cast<__m512>(_mm512_slli_epi32(pairs, 16));
}
SDC_AVX512_INLINE __m512 float_from_high(__m512i pairs) {
    return reinterpret_cast<__m512>(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000U))));
}

SDC_AVX512_INLINE __m512i low_byte(__m512i lanes) { return _mm512_and_si512(lanes, _mm512_set1_epi32(0xff)); }

/// Four integers as bytes of each lane, the first one lowest; what is no u8 saturates.
SDC_AVX512_INLINE __m512i join_bytes(const __m512i (&lanes)[4]) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i low = _mm512_packus_epi32(lanes[0], lanes[1]);
    const __m512i high = _mm512_packus_epi32(lanes[2], lanes[3]);
    return _mm512_shuffle_epi8(_mm512_packus_epi16(low, high), order);
}

/// 2^x for x up to 127, with a relative error of 1.1e-4 at most; 0 for −∞, NaN for NaN.
/// Coefficients: the cubic of the least maximal relative error on [0, 1] that is exact at both ends.
SDC_AVX512_INLINE __m512 exp2(__m512 x) {
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 power = _mm512_fmadd_ps(_mm512_set1_ps(0.07826797F), fraction, _mm512_set1_ps(0.22630768F));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(0.6954244F));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0F));
    return _mm512_scalef_ps(power, x);
}

/// sum + Σ of the products of a lane's pairs of bf16.
SDC_AVX512_INLINE __m512 add_products(__m512 sum, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
}

/// sum + Σ of the products of a lane's four s8 of `left` and u8 of `right`. Needs AVX512_VNNI.
/// Not the intrinsic: with it GCC 12 copies and spills the sums of `multiply`, which takes 1.3 times as long.
SDC_AVX512_INLINE __m512i add_products(__m512i sum, __m512i left, __m512i right) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(right), "v"(left));
    return sum;
}

/// sums[row][vector] += Σ over steps of left[row · row_stride + step · step_stride] · right[step][vector],
/// where a product is that of two pairs of bf16, or of four s8 and four u8, by the type of the sums.
template <int rows, int vectors, typename Sum>
SDC_AVX512_INLINE void multiply(const uint32_t* left, int64_t row_stride, int64_t step_stride, const uint32_t* right,
                                int64_t steps, Sum (&sums)[rows][vectors]) {
    for (int64_t step = 0; step < steps; ++step) {
        __m512i operands[vectors];
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; ++vector) {
            operands[vector] = _mm512_load_si512(right + vector * kLanes);
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
            const __m512i factor = _mm512_set1_epi32(static_cast<int>(left[row * row_stride]));
#pragma GCC unroll 4
            for (int vector = 0; vector < vectors; ++vector) {
                sums[row][vector] = add_products(sums[row][vector], factor, operands[vector]);
            }
        }
        left += step_stride;
        right += vectors * kLanes;
    }
}

}  // namespace sdc
