// How the C interfaces run their tasks.
#pragma once

#include <tbb/task_arena.h>

#include <new>
#include <utility>

namespace sdc {

/// Runs tasks so that nothing else of the caller's runs in here while it waits for them. Null, or what went wrong.
template <typename Run>
const char* run_isolated(Run&& run) {
    try {
        tbb::this_task_arena::isolate(std::forward<Run>(run));
    } catch (const std::bad_alloc&) {
        return "not enough memory";
    }
    return nullptr;
}

}  // namespace sdc
