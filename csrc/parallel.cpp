#include "parallel.h"

#include <pthread.h>

#include <future>

namespace gmm_jepa {
namespace {

OpenMP openmp{};

// The runtime's threads do not live on in a child; new ones may be made there.
void forget() { openmp = {}; }

struct Team {
    int n_threads;
    void (*work)(const void*, int);
    const void* data;
    bool is_short = false;  // of threads: none of them has worked
};

// One of them is the caller's. They begin when all exist: work waits for each other. Throws, when
// none has worked, where a thread cannot be made.
void run_on_new_threads(const Team& team) {
    std::promise<bool> all_exist;
    const std::shared_future<bool> begin = all_exist.get_future().share();
    std::vector<std::thread> threads;
    const auto end = [&](bool work) {
        all_exist.set_value(work);
        if (work) team.work(team.data, 0);
        for (std::thread& thread : threads) thread.join();
    };
    try {
        for (int thread = 1; thread < team.n_threads; ++thread) {
            threads.emplace_back([&team, begin, thread] {
                if (begin.get()) team.work(team.data, thread);
            });
        }
    } catch (...) {
        end(false);
        throw;
    }
    end(true);
}

// Nothing is thrown here: the runtime is C.
void run_in_region(void* data) {
    Team& team = *static_cast<Team*>(data);
    const int thread = openmp.thread_num();
    if (openmp.num_threads() == team.n_threads) return team.work(team.data, thread);
    if (thread == 0) team.is_short = true;  // as a nested region is
}

}  // namespace

void use_openmp(const OpenMP& runtime) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget);
    if (registered == 0) openmp = runtime;
}

void run_together(int n_threads, void (*work)(const void*, int), const void* data) {
    Team team{n_threads, work, data};
    if (openmp.parallel) {
        openmp.parallel(run_in_region, &team, static_cast<unsigned>(n_threads), 0);
    } else {
        team.is_short = true;
    }
    if (team.is_short) run_on_new_threads(team);
}

}  // namespace gmm_jepa
