// Threads for the length of one call: those of the OpenMP runtime that torch has loaded, where its
// functions were handed over, for its idle threads spin for a while and new ones would have to share
// the processor with them; new threads otherwise, and in a process that was forked. No second runtime
// is loaded beside torch's.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace gmm_jepa {

// All threads of a `parallel` call wait here for each other. A thread looks on for a while before it
// sleeps: to be woken takes about as long as what stands between two barriers, on a virtual machine
// a tenth of a millisecond and more. It does not look on for long, in case the thread it waits for
// needs its processor.
class Barrier {
  public:
    explicit Barrier(int n_threads) : n_threads_(n_threads) {}

    void wait() {
        const long round = round_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads_) {
            waiting_.store(0, std::memory_order_relaxed);
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                round_.store(round + 1, std::memory_order_release);
            }
            all_here_.notify_all();
            return;
        }
        const auto patience = std::chrono::steady_clock::now() + kPatience;
        while (std::chrono::steady_clock::now() < patience) {
            for (int i = 0; i < 64; ++i) {
                if (round_.load(std::memory_order_acquire) != round) return;
                pause();
            }
        }
        std::unique_lock<std::mutex> lock(mutex_);
        all_here_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != round; });
    }

  private:
    static constexpr std::chrono::microseconds kPatience{50};

    // Tells the processor that this is a loop that waits.
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    std::mutex mutex_;
    std::condition_variable all_here_;
    int n_threads_;
    std::atomic<int> waiting_{0};
    std::atomic<long> round_{0};
};

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of a runtime with GNU's interface.
struct OpenMP {
    void (*parallel)(void (*function)(void*), void* data, unsigned n_threads, unsigned flags);
    int (*thread_num)();
    int (*num_threads)();
};

// For all calls from now on.
void use_openmp(const OpenMP& runtime);

// Calls work(data, thread) for thread 0 .. n_threads - 1, all at once; `work` must not throw. Where a
// new thread cannot be made it throws std::system_error and calls nothing; where the OpenMP runtime
// cannot make one, GNU's ends the process.
void run_together(int n_threads, void (*work)(const void*, int), const void* data);

// Runs work(thread) for thread 0 .. n_threads - 1, all at once, one of them on the caller's thread.
// `work` must not throw between barriers; what it throws otherwise is thrown again here.
template <typename Work>
void parallel(int n_threads, const Work& work) {
    std::vector<std::exception_ptr> errors(n_threads);
    const auto guarded = [&](int thread) {
        try {
            work(thread);
        } catch (...) {
            errors[thread] = std::current_exception();
        }
    };
    if (n_threads == 1) {
        guarded(0);
    } else {
        run_together(n_threads, [](const void* self, int thread) {
            (*static_cast<const decltype(guarded)*>(self))(thread);
        }, &guarded);
    }
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

// The share of `n` items, from `first` to `last`, that falls to one thread.
struct Share {
    Share(int64_t n, int thread, int n_threads)
        : first(n * thread / n_threads), last(n * (thread + 1) / n_threads) {}
    int64_t first, last;
};

// Calls run(i, scratch) for n items, on `most_threads` at most: each thread takes a share of them, in
// order, with a scratch of its own from make().
template <typename Make, typename Run>
void over_shares(int64_t n, int64_t most_threads, int n_threads, const Make& make, const Run& run) {
    const int64_t most = std::max<int64_t>(1, most_threads);
    n_threads = static_cast<int>(std::clamp<int64_t>(n_threads, 1, most));
    parallel(n_threads, [&](int thread) {
        auto scratch = make();
        const Share share(n, thread, n_threads);
        for (int64_t i = share.first; i < share.last; ++i) run(i, scratch);
    });
}
template <typename Run>
void over_shares(int64_t n, int64_t most_threads, int n_threads, const Run& run) {
    over_shares(n, most_threads, n_threads, [] { return 0; }, [&](int64_t i, int) { run(i); });
}

// Calls run(block, first, n, scratch) for blocks of items, each thread with a scratch of its own from
// make(). Threads take the next block when they are done: results must not depend on whose.
template <typename Make, typename Run>
void over_blocks(int64_t n, int64_t block, int n_threads, const Make& make, const Run& run) {
    const int64_t n_blocks = (n + block - 1) / block;
    std::atomic<int64_t> next{0};
    const int64_t most = std::clamp<int64_t>(n_threads, 1, std::max<int64_t>(1, n_blocks));
    parallel(static_cast<int>(most), [&](int) {
        auto scratch = make();
        for (int64_t i = next++; i < n_blocks; i = next++) {
            run(i, i * block, static_cast<int>(std::min(block, n - i * block)), scratch);
        }
    });
}

// Blocks of the frames of one row each, numbered over all rows: run(block, row, first, n, scratch).
template <typename Make, typename Run>
void over_row_blocks(int64_t n_rows, int64_t n_frames, int64_t block, int n_threads,
                     const Make& make, const Run& run) {
    const int64_t in_row = (n_frames + block - 1) / block;
    over_blocks(n_rows * in_row, 1, n_threads, make,
                [&](int64_t i, int64_t, int, auto& scratch) {
        const int64_t row = i / in_row, first = i % in_row * block;
        run(i, row, first, static_cast<int>(std::min(block, n_frames - first)), scratch);
    });
}

}  // namespace gmm_jepa
