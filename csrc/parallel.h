// Threads for the length of one call: those of the OpenMP runtime that torch has loaded, where its
// functions were handed over, for its idle threads spin for a while and new ones would have to share
// the processor with them; new threads otherwise, and in a process that was forked. No second runtime
// is loaded beside torch's.
#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace gmm_jepa {

// All threads of a `parallel` call wait here for each other.
class Barrier {
  public:
    explicit Barrier(int n_threads) : n_threads_(n_threads) {}

    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const long round = round_;
        if (++waiting_ == n_threads_) {
            waiting_ = 0;
            ++round_;
            all_here_.notify_all();
        } else {
            all_here_.wait(lock, [&] { return round_ != round; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable all_here_;
    int n_threads_;
    int waiting_ = 0;
    long round_ = 0;
};

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of a runtime with GNU's interface.
struct OpenMP {
    void (*parallel)(void (*function)(void*), void* data, unsigned n_threads, unsigned flags);
    int (*thread_num)();
    int (*num_threads)();
};

// For all calls from now on.
void use_openmp(const OpenMP& runtime);

// Calls work(data, thread) for thread 0 .. n_threads - 1, all at once.
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

}  // namespace gmm_jepa
