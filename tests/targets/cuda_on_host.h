// CUDA C compiled for the CPU, to see what kernels compute where there is no GPU.
//
// Threads of a block are fibers that change where they wait for each other, forwards in one block and backwards in the
// next, so that a result that depends on an order without a barrier shows. Shared memory holds NaN when a block begins.
// Nothing is said about speed, and an architecture's own instructions are not known.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))
#define alignas(n) __attribute__((aligned(n)))  // the standard one may not follow what `static` stands for

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx;

// Vectors of two and four, which are read and written as one.
#define VECTORS(type, name) \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)

namespace host {
enum State : char { READY, AT_WARP, AT_BLOCK, DONE };
const int WARP = 32;
const size_t STACK = 1 << 16;
static ucontext_t home;
static std::vector<ucontext_t> fibers;
static std::vector<State> states;
static std::vector<char> stacks;
static std::vector<uint32_t> exchanged;
static std::function<void()> body;
static int current;

static inline void wait(State what) {
    states[current] = what;
    swapcontext(&fibers[current], &home);
}
static void enter() {
    body();
    states[current] = DONE;
}
// Ready again those of some threads that wait, if none of them is elsewhere; whether any was.
static bool release(int first, int last, State what) {
    bool any = false;
    for (int i = first; i < last; ++i) {
        if (states[i] != what && states[i] != DONE)
            return false;
        any = any || states[i] == what;
    }
    for (int i = first; i < last; ++i)
        if (states[i] == what)
            states[i] = READY;
    return any;
}
static inline Index at(int thread, const unsigned *block) {
    return {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]};
}
static bool run_block(const unsigned *block, bool backwards) {
    const int threads = block[0] * block[1] * block[2];
    fibers.assign(threads, ucontext_t());
    states.assign(threads, READY);
    exchanged.assign(threads + WARP, 0);
    stacks.resize(STACK * threads);
    for (int i = 0; i < threads; ++i) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = &stacks[STACK * i];
        fibers[i].uc_stack.ss_size = STACK;
        fibers[i].uc_link = &home;
        makecontext(&fibers[i], enter, 0);
    }
    for (int left = threads; left;) {
        bool moved = false;
        for (int n = 0; n < threads; ++n) {
            current = backwards ? threads - 1 - n : n;
            if (states[current] != READY)
                continue;
            threadIdx = at(current, block);
            swapcontext(&home, &fibers[current]);
            left -= states[current] == DONE;
            moved = true;
        }
        for (int first = 0; first < threads; first += WARP)
            moved = release(first, first + WARP < threads ? first + WARP : threads, AT_WARP) || moved;
        moved = release(0, threads, AT_BLOCK) || moved;
        if (!moved) {
            fprintf(stderr, "threads of a block wait for others that do not come\n");
            return false;
        }
    }
    return true;
}
}  // namespace host

extern char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));

// Run a kernel on a grid of blocks; without `fibers`, no thread of it waits for another. False: some wait for ever.
static inline bool run(const unsigned *grid, const unsigned *block, bool fibers, std::function<void()> kernel) {
    host::body = std::move(kernel);
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) {
                if (__start_shared_memory)
                    memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
                const bool backwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2;
                if (fibers && !host::run_block(block, backwards))
                    return false;
                for (unsigned i = 0; !fibers && i < block[0] * block[1] * block[2]; ++i) {
                    threadIdx = host::at(i, block);
                    host::body();
                }
            }
    return true;
}

// -- what threads of a block know of each other ----------------------------------------------------------------------

static inline void __syncthreads() { host::wait(host::AT_BLOCK); }

template <class T> static T exchange(T value, int lane) {
    static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
    memcpy(&host::exchanged[host::current], &value, 4);
    host::wait(host::AT_WARP);
    T found;
    memcpy(&found, &host::exchanged[host::current / host::WARP * host::WARP + lane], 4);
    host::wait(host::AT_WARP);  // nobody may write again before all have read
    return found;
}
static inline unsigned __activemask() { return ~0u; }
template <class T> static T __shfl_sync(unsigned, T value, int lane, int width) {
    const int own = host::current % host::WARP;
    return exchange(value, own / width * width + lane % width);
}
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask, int) {
    return exchange(value, (host::current % host::WARP) ^ mask);
}
template <class T> static T __shfl_down_sync(unsigned, T value, int delta, int width) {
    const int own = host::current % host::WARP;
    return exchange(value, own % width + delta < width ? own + delta : own);
}
template <class T> static T __shfl_up_sync(unsigned, T value, int delta, int width) {
    const int own = host::current % host::WARP;
    return exchange(value, own % width >= delta ? own - delta : own);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned all = 0;
    const unsigned own = host::current % host::WARP;
    host::exchanged[host::current] = predicate != 0;
    host::wait(host::AT_WARP);
    for (int i = 0; i < host::WARP; ++i)
        all |= host::exchanged[host::current - own + i] << i;
    host::wait(host::AT_WARP);
    return all;
}

// -- functions ---------------------------------------------------------------------------------------------------------

static inline int __popc(unsigned word) { return __builtin_popcount(word); }
#define __expf expf
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int min(int a, int b) { return a < b ? a : b; }
