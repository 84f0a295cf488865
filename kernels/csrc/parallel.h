// Splitting independent tasks over threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Calls body(begin, end) on disjoint ranges that cover 0..tasks; the bitwise or of the statuses.
template <typename Body>
inline int parallel_for(int64_t tasks, int64_t threads, const Body &body) {
    if (tasks <= 0) return 0;
#ifdef _OPENMP
    if (threads > tasks) threads = tasks;
    if (threads > 1) {
        int status = 0;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(| : status)
        {
            const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
            const int64_t begin = tasks * me / team, end = tasks * (me + 1) / team;
            if (begin < end) status |= body(begin, end);
        }
        return status;
    }
#else
    (void)threads;
#endif
    return body(0, tasks);
}

// A thread is worth starting for about `grain` units of work; `work` units are to be done.
inline int64_t worthwhile(int64_t threads, int64_t work, int64_t grain) {
    const int64_t most = work / grain + 1;
    return threads < most ? threads : most;
}

}  // namespace
