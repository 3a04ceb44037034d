#include "images.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cstring>

#include "isolated.h"
#include "workspace.h"

namespace sdc {
namespace {

constexpr int64_t kElementsPerTask = 16384;

void copy_pixels(const SdcJoin& join, int64_t image, int64_t first, int64_t last) {
    for (int64_t pixel = first; pixel < last; ++pixel) {
        uint16_t* target = pixel_of_output(join.output, image, pixel);
        const auto left_channels = static_cast<size_t>(join.left_channels);
        std::memcpy(target, pixel_of(join.left, image, pixel), left_channels * sizeof *target);
        std::memcpy(target + left_channels, pixel_of(join.right, image, pixel),
                    static_cast<size_t>(join.right_channels) * sizeof *target);
    }
}

void copy_row(const SdcInterleave& interleave, int64_t image, int64_t row) {
    const SdcImages* phases = interleave.phases + row % 2 * 2;
    const auto bytes = static_cast<size_t>(interleave.channels) * sizeof(uint16_t);
    for (int64_t x = 0; x < 2 * interleave.width; ++x) {
        const uint16_t* source = pixel_of(phases[x % 2], image, row / 2 * interleave.width + x / 2);
        std::memcpy(pixel_of_output(interleave.output, image, row * 2 * interleave.width + x), source, bytes);
    }
}

}  // namespace
}  // namespace sdc

const char* sdc_join_channels(const SdcJoin* join) {
    const int64_t channels = std::max<int64_t>(1, join->left_channels + join->right_channels);
    const int64_t pixels_per_task = std::max<int64_t>(1, sdc::kElementsPerTask / channels);
    const int64_t tasks = sdc::blocks(join->pixels, pixels_per_task);
    return sdc::run_isolated([&] {
        tbb::parallel_for(int64_t{0}, join->batch * tasks, [&](int64_t task) {
            const int64_t first = task % tasks * pixels_per_task;
            sdc::copy_pixels(*join, task / tasks, first, std::min(first + pixels_per_task, join->pixels));
        });
    });
}

const char* sdc_interleave(const SdcInterleave* interleave) {
    const int64_t rows = 2 * interleave->height;
    return sdc::run_isolated([&] {
        tbb::parallel_for(int64_t{0}, interleave->batch * rows, [&](int64_t task) {
            sdc::copy_row(*interleave, task / rows, task % rows);
        });
    });
}
