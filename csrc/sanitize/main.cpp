// Runs everything under AddressSanitizer and UndefinedBehaviorSanitizer (make native-sanitize):
// random sizes and strides, nothing, and values that are not finite, in buffers of exact size.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/em.h"
#include "cuda/tile.h"
#include "em.h"
#include "log_mel.h"
#include "posterior.h"

using namespace gmm_jepa;

namespace {

std::mt19937 generator(0);

int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

double normal() { return std::normal_distribution<double>()(generator); }

template <typename T>
void mixture_round(const Kernels& kernels) {
    const int64_t K = any(1, 150), D = any(1, 90), N = any(0, 120);
    const int64_t stride_column = any(1, 2), stride_row = stride_column * D + any(0, 3);
    std::vector<double> log_weights(K), means(K * D), variances(K * D);
    for (double& w : log_weights) w = any(0, 20) ? normal() : -INFINITY;
    for (double& m : means) m = 3.0 * normal();
    for (double& v : variances) v = any(0, 200) ? 0.1 + std::fabs(normal()) : 1e-12;
    std::vector<T> frames(N ? (N - 1) * stride_row + (D - 1) * stride_column + 1 : 1);
    for (T& x : frames) x = static_cast<T>(any(0, 3000) ? 3.0 * normal() : std::pow(10.0, any(0, 60)));
    const Matrix<T> matrix{frames.data(), N, D, stride_row, stride_column};
    const MixtureView mixture{log_weights.data(), means.data(), variances.data(), K, D};
    std::vector<double> counts(K), first(K * D), second(K * D), likelihood(1), each(N);
    const int threads = static_cast<int>(any(1, 4)), k = static_cast<int>(any(1, K));
    em_statistics(matrix, mixture, {counts.data(), first.data(), second.data(), likelihood.data()},
                  kernels, threads);
    double total = 0.0;
    for (double n : counts) total += n;
    if (std::isfinite(total) && std::fabs(total - N) > 1e-6 * (N + 1)) {
        std::printf("counts of %s sum to %g, not %ld\n", kernels.name, total, long(N));
        std::exit(1);
    }
    std::vector<float> posteriors(N * K), best(N * k), squares(N);
    std::vector<int64_t> indices(N * k), labels(N);
    posterior(matrix, mixture, 1.0 + any(0, 4), posteriors.data(), kernels, threads);
    log_likelihood(matrix, mixture, each.data(), kernels, threads);
    topk(matrix, mixture, k, 1.0, best.data(), indices.data(), kernels, threads);
    nearest(matrix, mixture, labels.data(), squares.data(), kernels, threads);
}

// Any operands will do, tight or not: whatever the screen leaves is shared out in full.
template <typename T>
void emulation_round() {
    const int64_t K = any(1, 150), D = any(1, 90), N = any(0, 120), depth = cuda::depth_of(int(D));
    const int64_t stride_column = any(1, 2), stride_row = stride_column * D + any(0, 3);
    const int64_t padded = round_up(K, cuda::kTileComponents);
    std::vector<uint16_t> weights(padded * depth);
    std::vector<float> bias(padded, -INFINITY), shift(D), scale(D, 0.5f);
    std::vector<uint8_t> always(padded);
    std::vector<double> table(2 * K * D), constants(K), gain(1, 0.01);
    for (uint16_t& w : weights) w = uint16_t(cuda::bfloat16_bits(float(0.1 * normal())));
    for (double& t : table) t = std::fabs(normal());
    for (int64_t k = 0; k < K; ++k) {
        always[k] = any(0, 20) == 0 || k == 0;
        bias[k] = any(0, 5) ? float(normal()) : -INFINITY;
        constants[k] = normal();
    }
    std::vector<T> frames(N ? (N - 1) * stride_row + (D - 1) * stride_column + 1 : 1);
    for (T& x : frames) {
        x = static_cast<T>(any(0, 3000) ? 3.0 * normal() : std::pow(10.0, any(0, 30)));
    }
    const Matrix<T> matrix{frames.data(), N, D, stride_row, stride_column};
    const cuda::Operands operands{weights.data(), bias.data(),  always.data(), table.data(),
                                  constants.data(), shift.data(), scale.data(),  gain.data(), K, D};
    std::vector<double> counts(K), first(K * D), second(K * D), likelihood(1);
    const bool hard = any(0, 1);
    cuda::em_statistics_emulated(matrix, operands, {hard, 34.0},
                                 {counts.data(), first.data(), second.data(), likelihood.data()});
    double total = 0.0;
    for (double n : counts) total += n;
    if (std::isfinite(total) ? std::fabs(total - N) > 1e-6 * (N + 1) : true) {
        std::printf("emulated counts sum to %g, not %ld\n", total, long(N));
        std::exit(1);
    }
}

template <typename T>
void log_mel_round(const Kernels& kernels) {
    const int sizes[] = {4, 6, 150, 400, 512};
    const int n_fft = sizes[any(0, 4)], n_mels = static_cast<int>(any(1, 9));
    const int64_t B = any(0, 3), S = any(1, 3000), hop = any(1, 500), stride = any(1, 2);
    std::vector<T> waveform(B * S * stride + 1);
    for (T& x : waveform) x = static_cast<T>(100.0 * normal());
    std::vector<int64_t> lengths(B);
    for (int64_t& length : lengths) length = any(0, S);
    std::vector<float> window(n_fft, 1.0f), filters((n_fft / 2 + 1) * n_mels);
    for (float& f : filters) f = static_cast<float>(any(0, 1));
    std::vector<float> out(B * (S / hop + 1) * n_mels, NAN);
    log_mel(Matrix<T>{waveform.data(), B, S, S * stride, stride}, lengths.data(),
            {window.data(), filters.data(), n_fft, n_mels, hop, 1e-6f}, out.data(), kernels,
            static_cast<int>(any(1, 4)));
    for (float value : out) {
        if (!std::isfinite(value)) std::exit(std::printf("log-mel of %s\n", kernels.name) ? 1 : 1);
    }
}

}  // namespace

int main() {
    for (int round = 0; round < 60; ++round) {
        emulation_round<float>();
        emulation_round<double>();
    }
    std::printf("emulation of the CUDA kernels: clean\n");
    std::istringstream names(available_kernels());
    for (std::string name; std::getline(names, name, ',');) {
        for (int round = 0; round < 60; ++round) {
            mixture_round<float>(kernels(name.c_str()));
            mixture_round<double>(kernels(name.c_str()));
            log_mel_round<float>(kernels(name.c_str()));
            log_mel_round<int16_t>(kernels(name.c_str()));
        }
        std::printf("%s: clean\n", name.c_str());
    }
}
