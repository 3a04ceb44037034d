// Attention on the CPU: the C interface, and what a path for one instruction set has to provide.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

/// A tensor of bf16, [batch, rows, heads, head_size]; strides in elements, the innermost one is 1.
struct SdcTensor {
    void* data;
    int64_t batch_stride;
    int64_t row_stride;
    int64_t head_stride;
};

/// output = softmax(scale · query · keyᵀ) · value, for each batch and head; causal: query i sees the keys 0 to i.
struct SdcAttention {
    SdcTensor query;
    SdcTensor key;
    SdcTensor value;
    SdcTensor output;
    int64_t batch;
    int64_t heads;
    int64_t queries;
    int64_t keys;
    int64_t head_size;
    float scale;
    int32_t causal;
    int32_t eight_bits;  ///< whether products may be of 8-bit integers; they are of bf16 where no path has them
    int32_t amx;         ///< whether AMX may be used
};

/// The instruction set that such an attention is computed with, whatever its sizes; null if this processor has none.
const char* sdc_attention_instructions(const SdcAttention* attention);

/// Computes one attention on the threads of the caller's TBB arena. Null, or what is wrong with the arguments.
const char* sdc_attention(const SdcAttention* attention);

}  // extern "C"

namespace sdc {

/// Keys are packed in chunks of this many, each by one thread. Even, so that no pair of keys lies in two of them.
constexpr int64_t kKeysPerChunk = 256;
static_assert(kKeysPerChunk % 2 == 0);

/// One instruction set. A head's keys and values are packed once, then used by all of its query blocks.
struct Path {
    const char* instructions;
    /// Whether it is for such an attention.
    bool (*takes)(const SdcAttention&);
    /// Whether the processor has its instructions.
    bool (*supported)();
    /// Queries that `attend` takes at a time; the last block of a head may have fewer.
    int64_t queries_per_block;
    /// Bytes of one head's packed keys and values, a multiple of 64.
    size_t (*packed_bytes)(const SdcAttention&);
    /// Bytes that `attend` needs beside them.
    size_t (*scratch_bytes)(const SdcAttention&);
    /// Packs the chunk of keys and values from `first_key` on.
    void (*pack)(const SdcAttention&, int64_t batch, int64_t head, int64_t first_key, std::byte* packed);
    /// Writes the outputs of the block of queries from `first_query` on.
    void (*attend)(const SdcAttention&, int64_t batch, int64_t head, int64_t first_query, const std::byte* packed,
                   std::byte* scratch);
};

extern const Path kAvx512Bf16;
extern const Path kAvx512Int8;
extern const Path kAmxBf16;

/// Where a row of one head begins.
inline uint16_t* row_of(const SdcTensor& tensor, int64_t batch, int64_t head, int64_t row) {
    return static_cast<uint16_t*>(tensor.data) + batch * tensor.batch_stride + row * tensor.row_stride +
           head * tensor.head_stride;
}

}  // namespace sdc
