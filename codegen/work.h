// Threads and memory of one call of a kernel.
#pragma once
#include "prelude.h"

namespace work {

INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A thread of a team. A team of one is not asked of OpenMP: its region may be that of our caller.
struct Member {
    int64_t rank = 0, size = 1;
    explicit Member(int64_t team) {
#ifdef _OPENMP
        if (team > 1) rank = omp_get_thread_num(), size = omp_get_num_threads();
#endif
    }
    op::Share share(int64_t items) const { return {items * rank / size, items * (rank + 1) / size}; }
};

// Memory for the length of a call, aligned to cache lines.
struct Memory {
    char* const start;
    explicit Memory(int64_t bytes) : start((char*)__builtin_malloc(bytes + 64)) {}
    ~Memory() { __builtin_free(start); }
    Memory(const Memory&) = delete;
    char* aligned() const { return start + (64 - (uint64_t)start % 64); }
};

}  // namespace work
