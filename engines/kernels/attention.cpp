// The C interface: checks arguments, chooses the path, and spreads (batch, head, block) over TBB's threads.
#include "attention.h"

#include <tbb/parallel_for.h>

#include <cmath>

#include "isolated.h"
#include "workspace.h"

namespace sdc {
namespace {

/// The best path first.
constexpr const Path* kPaths[] = {&kAmxBf16, &kAvx512Int8, &kAvx512Bf16};

const Path* choose_path(const SdcAttention& attention) {
    for (const Path* path : kPaths) {
        if (path->takes(attention) && path->supported()) return path;
    }
    return nullptr;
}

const char* find_fault(const SdcAttention& attention) {
    if (attention.batch < 1 || attention.heads < 1 || attention.queries < 1 || attention.keys < 1) {
        return "sizes must be at least 1";
    }
    if (attention.head_size < 2 || attention.head_size % 2 != 0) return "the head size must be even";
    if (!std::isfinite(attention.scale) || attention.scale <= 0) return "the scale must be positive and finite";
    return nullptr;
}

void run(const SdcAttention& attention, const Path& path) {
    // The caller packs into its own workspace and must not start another attention while it waits for its threads,
    // which TBB would allow outside of `isolate`.
    thread_local Workspace packed_workspace;
    const size_t head_bytes = path.packed_bytes(attention);
    const int64_t all_heads = attention.batch * attention.heads;
    std::byte* packed = packed_workspace.reserve(head_bytes * static_cast<size_t>(all_heads));

    const int64_t chunks = blocks(attention.keys, kKeysPerChunk);
    tbb::parallel_for(int64_t{0}, all_heads * chunks, [&](int64_t task) {
        const int64_t index = task / chunks;
        path.pack(attention, index / attention.heads, index % attention.heads, task % chunks * kKeysPerChunk,
                  packed + head_bytes * static_cast<size_t>(index));
    });

    const size_t scratch_bytes = path.scratch_bytes(attention);
    const int64_t query_blocks = blocks(attention.queries, path.queries_per_block);
    tbb::parallel_for(int64_t{0}, all_heads * query_blocks, [&](int64_t task) {
        thread_local Workspace scratch_workspace;
        const int64_t index = task / query_blocks;
        path.attend(attention, index / attention.heads, index % attention.heads,
                    task % query_blocks * path.queries_per_block, packed + head_bytes * static_cast<size_t>(index),
                    scratch_workspace.reserve(scratch_bytes));
    });
}

}  // namespace
}  // namespace sdc

const char* sdc_attention_instructions(const SdcAttention* attention) {
    const sdc::Path* const path = sdc::choose_path(*attention);
    return path ? path->instructions : nullptr;
}

const char* sdc_attention(const SdcAttention* attention) {
    const sdc::Path* const path = sdc::choose_path(*attention);
    if (!path) return "the processor has no AVX512_BF16 instructions";
    if (const char* fault = sdc::find_fault(*attention)) return fault;
    return sdc::run_isolated([&] { sdc::run(*attention, *path); });
}
