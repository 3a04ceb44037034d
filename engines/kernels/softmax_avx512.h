// What the paths of AVX-512 have in common: blocks of queries in the lanes, and the online softmax that
// attention_avx512.cpp explains.
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"
#include "avx512.h"

namespace sdc {

constexpr int kMaxVectors = 4;
constexpr int64_t kQueriesPerBlock = kMaxVectors * kLanes;
constexpr int64_t kKeysPerBlock = 128;
constexpr int kRows = 4;           ///< keys or features at a time; with 4 vectors, 16 independent sums in registers
constexpr int64_t kRowsAhead = 16;    ///< that rows are prefetched before they are read
constexpr float kHeadroom = 16.0F;  ///< binades that a reference may lag behind
constexpr float kLog2E = 1.44269504088896341F;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// The feature pairs `pair` to `pair` + 15 of 16 queries, [pair][query]; rows behind the last query are zero.
SDC_AVX512_INLINE void load_query_pairs(const SdcTensor& query, const uint16_t* first, int64_t first_row, int64_t count,
                                        int64_t pair, int64_t pairs, __m512i (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = first_row + lane;
        const __mmask16 mask = row < count ? first_lanes(pairs - pair) : __mmask16{0};
        const uint16_t* source = row < count ? first + row * query.row_stride + 2 * pair : first;
        rows[lane] = _mm512_maskz_loadu_epi32(mask, source);
    }
    transpose(rows);
}

/// What a block of queries works in, each [rows][16 · vectors]. A word holds `per_word` features or keys: 2 of bf16, or 4
/// bytes; `features` is the head size, padded to whole words.
struct Scratch {
    uint32_t* queries;        ///< features / per_word rows
    float* scores;            ///< kKeysPerBlock rows
    uint32_t* probabilities;  ///< kKeysPerBlock / per_word rows
    float* outputs;           ///< `features` rows
};

inline size_t bytes_of_scratch(int64_t features, int64_t per_word) {
    const int64_t rows = features / per_word + kKeysPerBlock + kKeysPerBlock / per_word + features;
    return static_cast<size_t>(rows * kQueriesPerBlock) * sizeof(float);
}

inline Scratch split_scratch(std::byte* memory, int64_t features, int64_t per_word) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    Scratch scratch{};
    scratch.queries = words;
    words += features / per_word * kQueriesPerBlock;
    scratch.scores = reinterpret_cast<float*>(words);
    words += kKeysPerBlock * kQueriesPerBlock;
    scratch.probabilities = words;
    words += kKeysPerBlock / per_word * kQueriesPerBlock;
    scratch.outputs = reinterpret_cast<float*>(words);
    return scratch;
}

/// What is kept of each query between blocks of keys, in lanes.
template <int vectors>
struct Softmax {
    __m512 references[vectors];  ///< in units of log2
    __m512 sums[vectors];
};

/// Raises references where a block of keys needs it; sums and outputs so far are scaled down.
/// maxima: of the block's logits, in units of log2. outputs: `rows` rows of 16 · vectors.
template <int vectors>
SDC_AVX512_INLINE void raise_references(const __m512 (&maxima)[vectors], bool first, int64_t rows, float* outputs,
                                        Softmax<vectors>& softmax) {
    __mmask16 exceeding = 0;
#pragma GCC unroll 4
    for (int vector = 0; vector < vectors; ++vector) {
        if (first) softmax.references[vector] = maxima[vector];
        const __m512 limit = _mm512_add_ps(softmax.references[vector], _mm512_set1_ps(kHeadroom));
        exceeding |= _mm512_cmp_ps_mask(maxima[vector], limit, _CMP_GT_OQ);
    }
    if (!exceeding) return;
    for (int vector = 0; vector < vectors; ++vector) {
        const __m512 raised = _mm512_max_ps(maxima[vector], softmax.references[vector]);
        const __m512 factor = exp2(_mm512_sub_ps(softmax.references[vector], raised));
        softmax.references[vector] = raised;
        softmax.sums[vector] = _mm512_mul_ps(softmax.sums[vector], factor);
        for (int64_t row = 0; row < rows; ++row) {
            float* output = outputs + (row * vectors + vector) * kLanes;
            _mm512_store_ps(output, _mm512_mul_ps(_mm512_load_ps(output), factor));
        }
    }
}

/// outputs / sums → bf16 rows.
template <int vectors>
SDC_AVX512_INLINE void write_outputs(const SdcTensor& output, uint16_t* first, int64_t count, int64_t head_size,
                                     const float* outputs, const Softmax<vectors>& softmax) {
    const int64_t pairs = head_size / 2;
    for (int vector = 0; vector < vectors; ++vector) {
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0F), softmax.sums[vector]);
        const int64_t used = std::min<int64_t>(kLanes, count - vector * kLanes);
        for (int64_t pair = 0; pair < pairs; pair += kLanes) {
            __m512i rows[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                const float* low = outputs + (2 * std::min(pair + i, pairs - 1) * vectors + vector) * kLanes;
                rows[i] = join_pairs(_mm512_mul_ps(_mm512_load_ps(low), factor),
                                     _mm512_mul_ps(_mm512_load_ps(low + vectors * kLanes), factor));
            }
            transpose(rows);
            const __mmask16 mask = first_lanes(pairs - pair);
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane) {
                uint16_t* target = first + (vector * kLanes + std::min<int64_t>(lane, used - 1)) * output.row_stride;
                if (lane < used) _mm512_mask_storeu_epi32(target + 2 * pair, mask, rows[lane]);
            }
        }
    }
}

}  // namespace sdc
