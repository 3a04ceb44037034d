// The C interface: checks arguments, and spreads the steps of group_norm_avx512.cpp over TBB's threads.
#include "group_norm.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>

#include "isolated.h"
#include "workspace.h"

namespace sdc {
namespace {

/// Elements that one task of step 3 writes: enough to outweigh its start, and few enough to keep all threads busy.
constexpr int64_t kElementsPerTask = 16384;

const char* find_fault(const SdcGroupNorm& norm) {
    if (norm.batch < 1 || norm.pixels < 1 || norm.channels < 1 || norm.groups < 1) return "sizes must be at least 1";
    if (norm.channels % norm.groups != 0) return "the number of groups must divide that of channels";
    if (!std::isfinite(norm.epsilon) || norm.epsilon < 0) return "epsilon must be finite and not negative";
    return nullptr;
}

void run(const SdcGroupNorm& norm) {
    // As in attention.cpp: nothing else of the caller's may run in here while it waits, which `isolate` sees to.
    thread_local Workspace workspace;
    const int64_t chunks = blocks(norm.pixels, kPixelsPerChunk);
    const int64_t rows = norm.batch * chunks;
    const auto floats = static_cast<size_t>(2 * (rows + norm.batch) * norm.channels);
    auto* memory = reinterpret_cast<float*>(workspace.reserve(floats * sizeof(float)));
    const Moments moments = {memory, memory + rows * norm.channels};
    const Affine affine = {moments.squares + rows * norm.channels,
                           moments.squares + (rows + norm.batch) * norm.channels};
    const auto moments_of = [&](int64_t batch, int64_t chunk) {
        const int64_t row = (batch * chunks + chunk) * norm.channels;
        return Moments{moments.means + row, moments.squares + row};
    };
    const auto affine_of = [&](int64_t batch) {
        return Affine{affine.factors + batch * norm.channels, affine.offsets + batch * norm.channels};
    };

    tbb::parallel_for(int64_t{0}, rows, [&](int64_t task) {
        const int64_t batch = task / chunks;
        const int64_t chunk = task % chunks;
        take_moments(norm, batch, chunk * kPixelsPerChunk, moments_of(batch, chunk));
    });
    tbb::parallel_for(int64_t{0}, norm.batch * norm.groups, [&](int64_t task) {
        const int64_t batch = task / norm.groups;
        join_moments(norm, batch, task % norm.groups, moments_of(batch, 0), affine_of(batch));
    });
    const int64_t pixels_per_task = std::max<int64_t>(1, kElementsPerTask / norm.channels);
    const int64_t tasks = blocks(norm.pixels, pixels_per_task);
    tbb::parallel_for(int64_t{0}, norm.batch * tasks, [&](int64_t task) {
        const int64_t batch = task / tasks;
        const int64_t first_pixel = task % tasks * pixels_per_task;
        normalise(norm, batch, first_pixel, std::min(pixels_per_task, norm.pixels - first_pixel), affine_of(batch));
    });
}

}  // namespace
}  // namespace sdc

const char* sdc_group_norm(const SdcGroupNorm* norm) {
    if (!sdc::group_norm_supported()) return "the processor has no AVX512_BF16 instructions";
    if (const char* fault = sdc::find_fault(*norm)) return fault;
    return sdc::run_isolated([&] { sdc::run(*norm); });
}
