// Attention with AMX.
//
// A tile is 16 rows of 64 bytes, and one instruction multiplies two of them: 16 × 32 by 32 × 16 bf16. A block of 32
// queries goes through the keys 32 at a time, with queries as rows and keys as columns:
//
//   1. scores[query][key]     = queries · keysᵀ                two tiles by two
//   2. probabilities          = 2^(scores · scale · log2(e) − reference), as bf16
//   3. outputs[query][feature] += probabilities · values       once for each kKeysPerBlock keys
//
// The exponentials of one group of keys are computed between the tiles' instructions of the next one, as both take about as
// long for a head of 40 features. They do not overlap well: while tiles are in use, one of two units for floats is not.
//
// Step 2 makes bf16 without a float on the way. x is rounded to an integer of 16 bits, 128 · (x + 127): its upper half is the
// exponent of 2^x, and the lower seven bits say what its fraction is, from a table. Rounding x has an error of up to
// ln(2) / 256, less than bf16's 1/256. A score far below the reference saturates to 0, one far above it to infinity.
//
// The reference of a query is the largest of its scores with the first 32 keys, for whatever it is, the quotient at the
// end is the same, as long as nothing overflows. Where it did, which the sum of the probabilities tells, the block is
// computed again, with the largest score of all for that query. The sum is one more feature of the values, 1 for each key.
//
// Source: Schraudolph, "A Fast, Compact Approximation of the Exponential Function", 1999 (exponents as integers).
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_amx.h"

namespace sdc::amx {
namespace {

constexpr int64_t kGroupsPerBlock = 64;
constexpr int64_t kLoadedSteps = 2;  ///< for which a block's queries stay in tiles
constexpr int64_t kTilesAtOnce = 3;  ///< of features: with two tiles of queries six sums, and two tiles for operands
constexpr float kLog2E = 1.44269504088896341F;
constexpr float kFractions = 128.0F;      ///< into which x is rounded between two integers, as bf16 has
constexpr float kExponentOfOne = 127.0F;
constexpr uint16_t kInfinity = 0x7f80;    ///< as bf16: all bits of the exponent
constexpr float kLargestSum = 0x1p64F;    ///< that sums of outputs bear for any values below 2^63
constexpr float kLargestLogit = 0x1p22F;  ///< whose 128-fold is an integer of 32 bits

bool takes(const SdcAttention& attention) { return attention.amx && !attention.causal; }

/// What a block of queries works in.
struct Scratch {
    uint32_t* queries;        ///< [steps][2] tiles
    float* scores;            ///< of two groups, each [2 of keys][2 of queries] tiles
    uint32_t* probabilities;  ///< [kGroupsPerBlock][2] tiles
    float* outputs;           ///< [value_tiles][2] tiles
};

constexpr int64_t kScoreWords = 4 * kTileWords;

size_t scratch_bytes(const SdcAttention& attention) {
    const Layout layout = layout_of(attention);
    const int64_t tiles = 2 * layout.steps + 8 + 2 * kGroupsPerBlock + 2 * layout.value_tiles;
    return static_cast<size_t>(tiles * kTileWords) * sizeof(uint32_t);
}

Scratch split_scratch(std::byte* memory, const Layout& layout) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    Scratch scratch{};
    scratch.queries = words;
    scratch.scores = reinterpret_cast<float*>(words + 2 * layout.steps * kTileWords);
    scratch.probabilities = reinterpret_cast<uint32_t*>(scratch.scores + 2 * kScoreWords);
    scratch.outputs = reinterpret_cast<float*>(scratch.probabilities + 2 * kGroupsPerBlock * kTileWords);
    return scratch;
}

/// Step 1 for one group of keys; `meanwhile` is called between the products.
/// Tiles 0 to 3: scores, [2 of queries][2 of keys]; 4 and 5: queries; 6 and 7: keys.
template <typename Meanwhile>
SDC_AMX_INLINE void compute_scores(const uint32_t* queries, const uint32_t* keys, int64_t steps, float* scores,
                                   Meanwhile&& meanwhile) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        const uint32_t* query_tiles = queries + 2 * step * kTileWords;
        const uint32_t* key_tiles = keys + 2 * step * kTileWords;
        _tile_loadd(4, query_tiles, kTileStride);
        _tile_loadd(6, key_tiles, kTileStride);
        _tile_dpbf16ps(0, 4, 6);
        meanwhile();
        _tile_loadd(7, key_tiles + kTileWords, kTileStride);
        _tile_dpbf16ps(1, 4, 7);
        meanwhile();
        _tile_loadd(5, query_tiles + kTileWords, kTileStride);
        _tile_dpbf16ps(2, 5, 6);
        meanwhile();
        _tile_dpbf16ps(3, 5, 7);
        meanwhile();
    }
    _tile_stored(0, scores, kTileStride);
    meanwhile();
    _tile_stored(1, scores + 2 * kTileWords, kTileStride);
    meanwhile();
    _tile_stored(2, scores + kTileWords, kTileStride);
    meanwhile();
    _tile_stored(3, scores + 3 * kTileWords, kTileStride);
    meanwhile();
}

/// Step 1 for one group of keys where queries have kLoadedSteps steps and are in tiles already.
/// Tiles 0 and 1: scores of 16 keys; 2 and 3: keys; 4 and 5: queries of the first step, 6 and 7: of the second one.
template <typename Meanwhile>
SDC_AMX_INLINE void compute_scores_of_loaded(const uint32_t* keys, float* scores, Meanwhile&& meanwhile) {
#pragma GCC unroll 2
    for (int64_t tile = 0; tile < 2; ++tile) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(2, keys + tile * kTileWords, kTileStride);
        _tile_dpbf16ps(0, 4, 2);
        meanwhile();
        _tile_dpbf16ps(1, 5, 2);
        meanwhile();
        _tile_loadd(3, keys + (2 + tile) * kTileWords, kTileStride);
        _tile_dpbf16ps(0, 6, 3);
        meanwhile();
        _tile_dpbf16ps(1, 7, 3);
        meanwhile();
        _tile_stored(0, scores + 2 * tile * kTileWords, kTileStride);
        meanwhile();
        _tile_stored(1, scores + (2 * tile + 1) * kTileWords, kTileStride);
        meanwhile();
    }
}

/// The largest score of each query: of the `exact` ones with all keys, of others with the first group; of NaN anything.
SDC_AMX void find_maxima(const Scratch& scratch, const uint32_t* packed, uint32_t exact, const Layout& layout,
                         float (&maxima)[kQueriesPerBlock]) {
    std::fill_n(maxima, kQueriesPerBlock, -std::numeric_limits<float>::infinity());
    const int64_t groups = exact ? layout.groups : 1;
    for (int64_t group = 0; group < groups; ++group) {
        compute_scores(scratch.queries, packed + group * layout.group_words(), layout.steps, scratch.scores, [] {});
        for (int64_t query = 0; query < kQueriesPerBlock; ++query) {
            if (group > 0 && !(exact >> query & 1U)) continue;
            const float* row = scratch.scores + query * kLanes;
            const __m512 larger = _mm512_max_ps(_mm512_load_ps(row), _mm512_load_ps(row + 2 * kTileWords));
            maxima[query] = std::max(maxima[query], _mm512_reduce_max_ps(larger));
        }
    }
}

/// The fractions of powers of two as bf16 has them: 128 · (2^(i / 128) − 1).
struct Fractions {
    alignas(64) uint8_t table[128];

    Fractions() {
        for (int i = 0; i < 128; ++i) {
            table[i] = static_cast<uint8_t>(std::min(127L, std::lrint((std::exp2(i / 128.0) - 1) * 128)));
        }
    }
};

/// What step 2 needs.
struct Softmax {
    float scale;
    float biases[kQueriesPerBlock];
};

/// Step 2 for one group of keys, a few queries at a time.
class Exponentials {
  public:
    SDC_AMX_INLINE explicit Exponentials(const Softmax& softmax)
        : scale_(_mm512_set1_ps(softmax.scale)), biases_(softmax.biases) {
        static const Fractions fractions;
        low_ = _mm512_load_si512(fractions.table);
        high_ = _mm512_load_si512(fractions.table + 64);
    }

    /// The group, with its scores and the place of its probabilities.
    SDC_AMX_INLINE void begin(const float* scores, uint32_t* probabilities) {
        scores_ = scores;
        probabilities_ = probabilities;
        query_ = 0;
    }

    /// The next queries, as long as there are any.
    template <int queries>
    SDC_AMX_INLINE void compute() {
        if (query_ > kQueriesPerBlock - queries) return;
#pragma GCC unroll 8
        for (int i = 0; i < queries; ++i) compute_one(query_ + i);
        query_ += queries;
    }

    /// All that are left.
    SDC_AMX_INLINE void compute_rest() {
        for (; query_ < kQueriesPerBlock; ++query_) compute_one(query_);
    }

  private:
    SDC_AMX_INLINE void compute_one(int64_t query) {
        const float* row = scores_ + query * kLanes;
        const __m512 bias = _mm512_set1_ps(biases_[query]);
        const __m512 low = _mm512_fmadd_ps(_mm512_load_ps(row), scale_, bias);
        const __m512 high = _mm512_fmadd_ps(_mm512_load_ps(row + 2 * kTileWords), scale_, bias);
        const __m512i unlimited = _mm512_packus_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
        const __m512i whole = _mm512_min_epu16(unlimited, _mm512_set1_epi16(kInfinity));
        // The lower seven bits of each byte choose a fraction; that for the upper byte is not used.
        const __m512i fractions = _mm512_permutex2var_epi8(low_, whole, high_);
        constexpr int kSelect = 0xca;  // first operand ? second : third, bit by bit
        _mm512_store_si512(
            probabilities_ + query * kLanes,
            _mm512_ternarylogic_epi32(_mm512_set1_epi16(kInfinity), whole, fractions, kSelect));
    }

    __m512 scale_;
    const float* biases_;
    __m512i low_, high_;  ///< halves of the table
    const float* scores_ = nullptr;
    uint32_t* probabilities_ = nullptr;
    int64_t query_ = kQueriesPerBlock;
};

/// Steps 1 and 2 for a block of keys, `queries_at_once` exponentials' rows between two of the tiles' instructions.
template <bool loaded, int queries_at_once>
SDC_AMX void compute_probabilities(const Scratch& memory, const uint32_t* packed, int64_t groups, const Layout& layout,
                                   const Softmax& softmax) {
    const int64_t group_words = layout.group_words();
    const int64_t steps = layout.steps;
    float* scores[] = {memory.scores, memory.scores + kScoreWords};
    Exponentials exponentials(softmax);
    const auto meanwhile = [&]() SDC_AMX { exponentials.compute<queries_at_once>(); };
    if (loaded) {
        _tile_loadd(4, memory.queries, kTileStride);
        _tile_loadd(5, memory.queries + kTileWords, kTileStride);
        _tile_loadd(6, memory.queries + 2 * kTileWords, kTileStride);
        _tile_loadd(7, memory.queries + 3 * kTileWords, kTileStride);
    }
    for (int64_t group = 0; group < groups; ++group) {
        const uint32_t* keys = packed + group * group_words;
        if (loaded) {
            compute_scores_of_loaded(keys, scores[group % 2], meanwhile);
        } else {
            compute_scores(memory.queries, keys, steps, scores[group % 2], meanwhile);
        }
        exponentials.compute_rest();
        exponentials.begin(scores[group % 2], memory.probabilities + group * 2 * kTileWords);
    }
    exponentials.compute_rest();
}

/// Steps 1 and 2 for a block of keys.
SDC_AMX void compute_probabilities(const Scratch& scratch, const uint32_t* packed, int64_t groups, const Layout& layout,
                                   const Softmax& softmax) {
    const auto compute = layout.steps == 1             ? compute_probabilities<false, 4>
                         : layout.steps == kLoadedSteps ? compute_probabilities<true, 3>
                         : layout.steps <= 6            ? compute_probabilities<false, 2>
                                                        : compute_probabilities<false, 1>;
    compute(scratch, packed, groups, layout, softmax);
}

/// Step 3 for up to kTilesAtOnce tiles of features.
/// Tiles 0 to 2: sums of the first 16 queries; 3 to 5: of the others; 6: probabilities; 7: values.
template <int tiles>
SDC_AMX_INLINE void add_tiles(const uint32_t* probabilities, const uint32_t* values, int64_t groups,
                              int64_t group_words, bool first, float* outputs) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
    } else {
        _tile_loadd(0, outputs, kTileStride);
        _tile_loadd(3, outputs + kTileWords, kTileStride);
        if (tiles > 1) _tile_loadd(1, outputs + 2 * kTileWords, kTileStride);
        if (tiles > 1) _tile_loadd(4, outputs + 3 * kTileWords, kTileStride);
        if (tiles > 2) _tile_loadd(2, outputs + 4 * kTileWords, kTileStride);
        if (tiles > 2) _tile_loadd(5, outputs + 5 * kTileWords, kTileStride);
    }
    for (int64_t group = 0; group < groups; ++group) {
        _tile_loadd(6, probabilities, kTileStride);
        _tile_loadd(7, values, kTileStride);
        _tile_dpbf16ps(0, 6, 7);
        if (tiles > 1) {
            _tile_loadd(7, values + kTileWords, kTileStride);
            _tile_dpbf16ps(1, 6, 7);
        }
        if (tiles > 2) {
            _tile_loadd(7, values + 2 * kTileWords, kTileStride);
            _tile_dpbf16ps(2, 6, 7);
        }
        _tile_loadd(6, probabilities + kTileWords, kTileStride);  // the last tile of values is still there
        if (tiles > 2) {
            _tile_dpbf16ps(5, 6, 7);
            _tile_loadd(7, values + kTileWords, kTileStride);
        }
        if (tiles > 1) {
            _tile_dpbf16ps(4, 6, 7);
            _tile_loadd(7, values, kTileStride);
        }
        _tile_dpbf16ps(3, 6, 7);
        probabilities += 2 * kTileWords;
        values += group_words;
    }
    _tile_stored(0, outputs, kTileStride);
    _tile_stored(3, outputs + kTileWords, kTileStride);
    if (tiles > 1) _tile_stored(1, outputs + 2 * kTileWords, kTileStride);
    if (tiles > 1) _tile_stored(4, outputs + 3 * kTileWords, kTileStride);
    if (tiles > 2) _tile_stored(2, outputs + 4 * kTileWords, kTileStride);
    if (tiles > 2) _tile_stored(5, outputs + 5 * kTileWords, kTileStride);
}

/// Step 3 for a block of keys.
SDC_AMX_INLINE void add_values(const Scratch& scratch, const uint32_t* values, int64_t groups, const Layout& layout,
                               bool first) {
    for (int64_t tile = 0; tile < layout.value_tiles; tile += kTilesAtOnce) {
        const int64_t tiles = std::min(kTilesAtOnce, layout.value_tiles - tile);
        const uint32_t* source = values + tile * kTileWords;
        float* target = scratch.outputs + 2 * tile * kTileWords;
        if (tiles == 1) add_tiles<1>(scratch.probabilities, source, groups, layout.group_words(), first, target);
        if (tiles == 2) add_tiles<2>(scratch.probabilities, source, groups, layout.group_words(), first, target);
        if (tiles == 3) add_tiles<3>(scratch.probabilities, source, groups, layout.group_words(), first, target);
    }
}

/// Where the output of a feature of a query lies.
SDC_AMX_INLINE const float* output_of(const Scratch& scratch, int64_t query, int64_t feature) {
    const int64_t tile = feature / kLanes * 2 + query / kTileRows;
    return scratch.outputs + tile * kTileWords + query % kTileRows * kLanes + feature % kLanes;
}

/// All three steps; `exact`: the queries whose reference is their largest score. Returns those whose sums overflowed.
SDC_AMX uint32_t compute_outputs(const Scratch& scratch, const uint32_t* packed, uint32_t exact,
                                 const SdcAttention& attention, const Layout& layout) {
    Softmax softmax{};
    softmax.scale = attention.scale * kLog2E * kFractions;
    find_maxima(scratch, packed, exact, layout, softmax.biases);
    for (float& bias : softmax.biases) bias = kExponentOfOne * kFractions - bias * softmax.scale;
    for (int64_t group = 0; group < layout.groups; group += kGroupsPerBlock) {
        const int64_t groups = std::min(kGroupsPerBlock, layout.groups - group);
        const uint32_t* block = packed + group * layout.group_words();
        compute_probabilities(scratch, block, groups, layout, softmax);
        settle_memory();
        add_values(scratch, block + layout.values(), groups, layout, group == 0);
    }
    uint32_t overflowed = 0;
    for (int64_t query = 0; query < kQueriesPerBlock; ++query) {
        const float sum = *output_of(scratch, query, attention.head_size);
        if (!(sum > 0.0F && sum < kLargestSum)) overflowed |= 1U << query;
    }
    return overflowed;
}

/// outputs / sums → bf16 rows. `poison` is added to what outputs are multiplied with.
SDC_AMX void write_outputs(const SdcAttention& attention, const Scratch& scratch, int64_t count, float poison,
                           uint16_t* first) {
    for (int64_t query = 0; query < count; ++query) {
        const float sum = *output_of(scratch, query, attention.head_size);
        const __m512 factor = _mm512_set1_ps(1.0F / sum + poison);
        uint16_t* row = first + query * attention.output.row_stride;
        for (int64_t feature = 0; feature < attention.head_size; feature += kLanes) {
            const __m512 output = _mm512_mul_ps(_mm512_load_ps(output_of(scratch, query, feature)), factor);
            const auto halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(output));
            _mm256_mask_storeu_epi16(row + feature, first_lanes(attention.head_size - feature), halves);
        }
    }
}

SDC_AMX void attend(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_query,
                    const std::byte* packed, std::byte* memory) {
    const Tiles tiles;
    const Layout layout = layout_of(attention);
    const auto* words = reinterpret_cast<const uint32_t*>(packed);
    const auto* key_magnitudes = reinterpret_cast<const float*>(packed) + layout.magnitudes();
    const int64_t count = std::min(kQueriesPerBlock, attention.queries - first_query);
    const Scratch scratch = split_scratch(memory, layout);
    const uint16_t* first = row_of(attention.query, batch, head, first_query);
    for (int64_t query = 0; query < count; ++query) {
        prefetch_row(first + query * attention.query.row_stride, attention.head_size);
    }
    float query_magnitudes[kQueriesPerBlock];
    pack_queries(attention, first, count, layout, scratch.queries, query_magnitudes);
    settle_memory();
    float poison = 0.0F;  // NaN if a key is not finite, as integers cannot tell
    float largest_key = 0.0F;
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
        poison += 0.0F * key_magnitudes[chunk];
        largest_key = std::max(largest_key, key_magnitudes[chunk]);
    }
    const float largest_sum = largest_key * static_cast<float>(attention.head_size) * attention.scale * kLog2E;
    uint32_t exact = 0;
    for (int64_t query = 0; query < kQueriesPerBlock; ++query) {
        if (!(query_magnitudes[query] * largest_sum < kLargestLogit)) exact |= 1U << query;
    }
    const uint32_t overflowed = compute_outputs(scratch, words, exact, attention, layout) & ~exact;
    if (overflowed) compute_outputs(scratch, words, exact | overflowed, attention, layout);
    write_outputs(attention, scratch, count, poison, row_of(attention.output, batch, head, first_query));
}

}  // namespace
}  // namespace sdc::amx

const sdc::Path sdc::kAmxBf16 = {"AMX_BF16",        amx::takes,         tiles_supported, amx::kQueriesPerBlock,
                                 amx::packed_bytes, amx::scratch_bytes, amx::pack_chunk, amx::attend};
