// The C interface: checks arguments, and spreads the steps of convolution_amx.cpp over TBB's threads.
#include "convolution.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>

#include "isolated.h"
#include "tiles_amx.h"
#include "workspace.h"

namespace sdc {
namespace {

/// Products of a uint8 and an int8, as many as an int32 holds the sum of.
constexpr int64_t kMostProducts = INT32_MAX / (255 * 128);

const char* find_fault(int64_t outputs, int64_t channels, int64_t window, bool bytes) {
    if (outputs < 1 || channels < 1 || window < 1) return "sizes must be at least 1";
    if (bytes && channels * window * window > kMostProducts) return "there are too many products to sum in 32 bits";
    return nullptr;
}

const char* find_fault(const SdcConvolution& convolution) {
    if (convolution.batch < 1 || convolution.height < 1 || convolution.width < 1) return "sizes must be at least 1";
    if (std::min(convolution.top, convolution.left) < 0 ||
        std::max(convolution.top, convolution.left) >= convolution.window) {
        return "margins must be smaller than the window";
    }
    if (convolution.bytes && !(std::isnormal(convolution.scale) && convolution.scale > 0)) {
        return "the scale must be positive and a normal number";
    }
    if (convolution.bytes && !(convolution.zero_point >= 0 && convolution.zero_point <= 255 &&
                               convolution.zero_point == std::nearbyint(convolution.zero_point))) {
        return "the zero point must be an integer from 0 to 255";
    }
    return find_fault(convolution.outputs, convolution.channels, convolution.window, convolution.bytes);
}

void run(const SdcConvolution& convolution) {
    // As in attention.cpp: nothing else of the caller's may run in here while it waits, which `isolate` sees to.
    thread_local Workspace workspace;
    const Planes planes = planes_of(convolution);
    std::byte* packed = planes.are_images ? nullptr : workspace.reserve(planes.bytes());
    const int64_t columns = blocks(planes.columns, kColumnsPerTask);
    const int64_t to_pack = planes.are_images ? 0 : planes.rows * columns;
    tbb::parallel_for(int64_t{0}, to_pack, [&](int64_t task) {
        pack_columns(convolution, planes, task / columns, task % columns * kColumnsPerTask, packed);
    });
    // Neighbours in this order share pixels, which stay in the second cache.
    const int64_t parts = blocks(convolution.outputs, outputs_per_task(convolution.gated));
    tbb::parallel_for(int64_t{0}, blocks(planes.tiles, planes.tiles_per_task) * parts, [&](int64_t task) {
        thread_local Workspace sums_workspace;
        convolve(convolution, planes, task % parts, task / parts * planes.tiles_per_task, packed,
                 sums_workspace.reserve(planes.sums_bytes()));
    });
}

}  // namespace
}  // namespace sdc

int32_t sdc_convolution_supported() { return sdc::tiles_supported(); }

const char* sdc_pack_filter(const SdcFilter* filter) {
    const bool bytes = filter->type == kSdcInt8;
    if (const char* fault = sdc::find_fault(filter->outputs, filter->channels, filter->window, bytes)) return fault;
    const int64_t tasks = sdc::blocks(filter->outputs, sdc::outputs_per_task(filter->gates != nullptr));
    return sdc::run_isolated([&] {
        tbb::parallel_for(int64_t{0}, tasks, [&](int64_t task) { sdc::pack_outputs(*filter, task); });
    });
}

const char* sdc_convolution(const SdcConvolution* convolution) {
    if (!sdc::tiles_supported()) return "the processor has no AMX, or the system does not allow it";
    if (const char* fault = sdc::find_fault(*convolution)) return fault;
    return sdc::run_isolated([&] { sdc::run(*convolution); });
}
