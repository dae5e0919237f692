#include "parallel.h"

#include <pthread.h>

namespace gmm_jepa {
namespace {

OpenMP openmp{};

// The runtime's threads do not live on in a child; new ones may be made there.
void forget() { openmp = {}; }

struct Team {
    int n_threads;
    void (*work)(const void*, int);
    const void* data;
};

// Calls for `first` .. n_threads - 1, the first of them on the caller's thread.
void run_on_new_threads(const Team& team, int first) {
    std::vector<std::thread> threads;
    for (int thread = first + 1; thread < team.n_threads; ++thread) {
        threads.emplace_back(team.work, team.data, thread);
    }
    team.work(team.data, first);
    for (std::thread& thread : threads) thread.join();
}

void run_in_region(void* data) {
    const Team& team = *static_cast<const Team*>(data);
    const int thread = openmp.thread_num(), last = openmp.num_threads() - 1;
    // A nested region has fewer threads than were asked for.
    if (thread == last) return run_on_new_threads(team, last);
    team.work(team.data, thread);
}

}  // namespace

void use_openmp(const OpenMP& runtime) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget);
    if (registered == 0) openmp = runtime;
}

void run_together(int n_threads, void (*work)(const void*, int), const void* data) {
    Team team{n_threads, work, data};
    if (!openmp.parallel) return run_on_new_threads(team, 0);
    openmp.parallel(run_in_region, &team, static_cast<unsigned>(n_threads), 0);
}

}  // namespace gmm_jepa
