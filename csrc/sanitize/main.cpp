// Runs everything under AddressSanitizer and UndefinedBehaviorSanitizer (make native-sanitize):
// random sizes and strides, nothing, and values that are not finite, in buffers of exact size.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "cuda/em.h"
#include "cuda/tile.h"
#include "density.h"
#include "depthwise.h"
#include "dropout.h"
#include "em.h"
#include "half_types.h"
#include "lists.h"
#include "log_mel.h"
#include "losses.h"
#include "posterior.h"
#include "residual.h"
#include "sanitize/drawn.h"
#include "screened_mixture.h"
#include "snake.h"

using namespace gmm_jepa;

namespace {

long screened_of[3];  // components that bound_round saw screened, by kind of operands

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
    const MixtureView view{log_weights.data(), means.data(), variances.data(), K, D};
    const ScreenedMixture mixture(view, kernels);
    std::vector<double> counts(K), first(K * D), second(K * D), likelihood(1), each(N);
    const int threads = static_cast<int>(any(1, 4)), k = static_cast<int>(any(1, K));
    em_statistics(matrix, mixture, {counts.data(), first.data(), second.data(), likelihood.data()},
                  threads);
    double total = 0.0;
    for (double n : counts) total += n;
    if (std::isfinite(total) && std::fabs(total - N) > 1e-6 * (N + 1)) {
        std::printf("counts of %s sum to %g, not %ld\n", kernels.name, total, long(N));
        std::exit(1);
    }
    std::vector<float> posteriors(N * K), best(N * k), squares(N);
    std::vector<BFloat16> bfloats(N * K, BFloat16(0.0));
    std::vector<Float16> halves(N * K, Float16(0.0));
    std::vector<int64_t> indices(N * k), labels(N);
    const double temperature = 1.0 + any(0, 4);
    posterior(matrix, mixture, temperature, posteriors.data(), threads);
    posterior(matrix, mixture, temperature, bfloats.data(), threads);
    posterior(matrix, mixture, temperature, halves.data(), threads);
    log_likelihood(matrix, mixture, each.data(), threads);
    topk(matrix, mixture, k, 1.0, best.data(), indices.data(), threads);
    nearest(matrix, mixture, labels.data(), squares.data(), threads);
}

// Near `value`, where rounding to an integer leads away from a mean on the other side of -z.
double misplaced(const ScreenParameters& p, int d, double value, double z) {
    const double scale = p.inverse_scale[d], off = (value - p.shift[d]) * scale;
    return p.shift[d] + (std::round(off) - std::copysign(0.49, z)) / scale;
}

// The screen's promise, for every pair of a frame and a component and with nothing to spare: a score
// reaches the threshold that belongs to the component's own log-density.
template <typename T>
void bound_round(const Kernels& kernels) {
    const int64_t K = any(1, 100), D = any(0, 1) ? any(1, 3) : any(1, 300);
    const int N = static_cast<int>(round_up(24, kernels.narrow.tile * kernels.wide.tile));
    const double apart = std::pow(10.0, any(-1, 3)), uneven = any(0, 2);
    std::vector<double> log_weights(K), means(K * D), variances(K * D);
    for (double& w : log_weights) w = normal();
    for (double& m : means) m = apart * (5.0 + normal());
    for (double& v : variances) v = 0.1 * std::exp(uneven * normal());
    const MixtureView view{log_weights.data(), means.data(), variances.data(), K, D};
    const ScreenedMixture mixture(view, kernels);
    const ScreenParameters& p = mixture.screen;
    std::vector<T> x(D);
    std::vector<double> frames(N * D);
    std::vector<uint32_t> words(size_t(N) * p.n_words);
    std::vector<float> scores(N * p.bias.size()), best(N);
    for (int i = 0; i < N; ++i) {
        const int64_t k = any(0, K - 1);
        const double far = std::pow(10.0, any(0, 3) ? 0.1 * any(0, 10) : 3.0);
        for (int64_t d = 0; d < D; ++d) {
            const double z = far * normal();
            double value = means[k * D + d] + std::sqrt(variances[k * D + d]) * z;
            if (i % 2) value = misplaced(p, int(d), value, z);
            frames[i * D + d] = x[d] = T(value);
        }
        p.pack(x.data(), &words[size_t(i) * p.n_words]);
    }
    p.run(words.data(), N, scores.data(), best.data());
    std::vector<bool> screened(K, true);
    for (int32_t k : p.unscreened) screened[k] = false;
    for (int64_t pair = 0; pair < N * K; ++pair) {
        const int64_t i = pair / K, k = pair % K;
        double square = 0.0;
        for (int64_t d = 0; d < D; ++d) {
            const double z = frames[i * D + d] - means[k * D + d];
            square += z * z / variances[k * D + d];
        }
        const float score = scores[i * p.bias.size() + k];
        if (!screened[k] || score >= p.threshold(mixture.constants[k] - 0.5 * square, 0.0)) continue;
        std::printf("%s: a score of %g misses a log-density of %g (operands %d)\n", kernels.name,
                    score, mixture.constants[k] - 0.5 * square, int(p.screen->operands));
        std::exit(1);
    }
    screened_of[int(p.screen->operands)] += long(K - p.unscreened.size());
}

// Any operands will do, tight or not: whatever the screen leaves is shared out in full.
template <typename T>
void emulation_round() {
    const int64_t K = any(1, 150), D = any(1, 90), N = any(0, 120), depth = cuda::depth_of(int(D));
    const int64_t stride_column = any(1, 2), stride_row = stride_column * D + any(0, 3);
    const int64_t padded = round_up(K, cuda::kTileComponents);
    std::vector<uint16_t> weights(padded * depth);
    std::vector<float> bias(padded, -INFINITY), guess(bias), shift(D), scale(D, 0.5f);
    std::vector<double> table(2 * K * D), constants(K), gain(1, 0.01);
    for (uint16_t& w : weights) w = uint16_t(cuda::bfloat16_bits(float(0.1 * normal())));
    for (double& t : table) t = std::fabs(normal());
    for (int64_t k = 0; k < K; ++k) {
        const bool always = any(0, 20) == 0 || k == 0;
        if (any(0, 5)) guess[k] = float(normal());
        bias[k] = always ? INFINITY : any(0, 5) ? float(normal()) : -INFINITY;
        constants[k] = normal();
    }
    std::vector<T> frames(N ? (N - 1) * stride_row + (D - 1) * stride_column + 1 : 1);
    for (T& x : frames) {
        x = static_cast<T>(any(0, 3000) ? 3.0 * normal() : std::pow(10.0, any(0, 30)));
    }
    const Matrix<T> matrix{frames.data(), N, D, stride_row, stride_column};
    const cuda::Operands operands{weights.data(), bias.data(),  guess.data(), table.data(),
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

void residual_round(const Kernels& kernels) {
    const bool narrow = any(0, 1);
    const int64_t B = any(0, 3), T = any(1, 300), C = narrow ? 16 * any(1, 5) : any(1, 70);
    const int64_t n = B * T * C;
    const std::vector<int64_t> lengths = drawn_lengths(B, 0, T);
    const std::vector<float> x = drawn(n), grad = drawn(n), weight1 = drawn(3 * C * C),
                             weight2 = drawn(3 * C * C), bias1 = drawn(C), bias2 = drawn(C);
    const float nan = NAN;
    std::vector<float> hidden(n, nan), out(n, nan), grad_x(n, nan), grad_weight1(3 * C * C, nan),
        grad_bias1(C, nan), grad_weight2(3 * C * C, nan), grad_bias2(C, nan);
    const ResidualShape shape{B,      T, int(C), any(1, 140), any(0, 1) ? lengths.data() : nullptr,
                              narrow};
    const ResidualWeights weights{weight1.data(), bias1.data(), weight2.data(), bias2.data()};
    const int threads = static_cast<int>(any(1, 4));
    residual_unit(shape, weights, x.data(), any(0, 1) ? hidden.data() : nullptr, out.data(),
                  kernels, threads);
    residual_unit(shape, weights, x.data(), hidden.data(), out.data(), kernels, threads);
    residual_unit_backward(shape, weights, x.data(), hidden.data(), grad.data(),
                           {grad_x.data(), grad_weight1.data(), grad_bias1.data(),
                            grad_weight2.data(), grad_bias2.data()},
                           kernels, threads);
    demand_finite(out, "residual unit", kernels);
    demand_finite(grad_x, "gradient of a residual unit", kernels);
    for (const auto* gradient : {&grad_weight1, &grad_bias1, &grad_weight2, &grad_bias2}) {
        demand_finite(*gradient, "gradient of its weights", kernels);
    }
}

void depthwise_round(const Kernels& kernels) {
    const int64_t B = any(1, 3), T = any(1, 100), C = 16 * any(1, 4), K = 2 * any(0, 16) + 1;
    const std::vector<float> x = drawn(B * T * C), grad = drawn(B * T * C), weight = drawn(C * K),
                             bias = drawn(C);
    std::vector<float> out(B * T * C, NAN), grad_x(B * T * C, NAN), grad_weight(C * K, NAN),
        grad_bias(C, NAN);
    const DepthwiseShape shape{B, T, int(C), int(K)};
    const int threads = static_cast<int>(any(1, 4));
    depthwise_conv(shape, x.data(), weight.data(), any(0, 1) ? bias.data() : nullptr, out.data(),
                   kernels, threads);
    depthwise_conv_backward(
        shape, grad.data(), x.data(), weight.data(),
        {grad_x.data(), grad_weight.data(), any(0, 1) ? grad_bias.data() : nullptr}, kernels,
        threads);
    demand_finite(out, "depthwise convolution", kernels);
    demand_finite(grad_x, "gradient of a depthwise convolution", kernels);
    demand_finite(grad_weight, "gradient of its filters", kernels);
}

// One sign, two signs, two values in each other's place, and one value fewer.
void fingerprint_round(const Kernels& kernels) {
    std::vector<float> values = drawn(any(2, 600));
    const auto of = [&] { return kernels.fingerprint(values.data(), 4 * values.size()); };
    const auto demand = [&](bool holds) {
        if (holds) return;
        std::printf("fingerprints of %s do not tell arrays apart\n", kernels.name);
        std::exit(1);
    };
    const int64_t last = int64_t(values.size()) - 1, i = any(0, last - 1), j = any(i + 1, last);
    const uint64_t first = of();
    demand(of() == first);
    values[i] = -values[i];
    const uint64_t one = of();
    values[j] = -values[j];
    const uint64_t two = of();
    demand(one != first && two != first && two != one);
    values[i] = -values[i];
    values[j] = -values[j];
    demand(of() == first);
    std::swap(values[i], values[j]);
    demand(of() != first);
    values = std::vector<float>(values.size());
    const uint64_t zeros = of();
    values.pop_back();
    values.shrink_to_fit();
    demand(of() != zeros);
    values.clear();
    of();
}

void list_round(const Kernels& kernels) {
    std::vector<std::vector<float>> values, others;
    TensorList<float> to;
    TensorList<const float> from;
    for (int64_t i = any(0, 4); i > 0; --i) {
        const int64_t n = any(0, 3) ? any(0, 90) : any(16000, 40000);
        values.push_back(drawn(n));
        others.push_back(drawn(n));
        to.sizes.push_back(n);
        from.sizes.push_back(n);
    }
    for (size_t i = 0; i < values.size(); ++i) {
        to.tensors.push_back(values[i].data());
        from.tensors.push_back(others[i].data());
    }
    const int threads = static_cast<int>(any(1, 4));
    move_towards(to, from, 0.25f * float(any(0, 4)), kernels, threads);
    for (const auto& moved : values) demand_finite(moved, "moving average", kernels);
    if (!(sum_of_squares(from, kernels, threads) >= 0.0)) std::exit(1);
}

template <typename T>
void snake_round(const Kernels& kernels) {
    const int64_t B = any(0, 3), n_frames = any(1, 600), C = 16 * any(1, 4), n = B * n_frames * C;
    const std::vector<int64_t> lengths = drawn_lengths(B, 0, n_frames);
    const std::vector<float> grad = drawn(n), a(C, 0.7f);
    std::vector<T> x(n), grad_x(n);
    for (T& value : x) value = static_cast<T>(any(0, 0x7f7f));  // any finite bfloat16
    std::vector<float> out(n, NAN), grad_a(C, NAN);
    const FramesShape shape{B, n_frames, int(C), any(0, 1) ? lengths.data() : nullptr};
    const int threads = static_cast<int>(any(1, 4));
    snake(shape, x.data(), a.data(), out.data(), kernels, threads);
    snake_backward(shape, x.data(), a.data(), grad.data(), grad_x.data(), grad_a.data(), kernels,
                   threads);
    if (std::is_same_v<T, float>) {
        demand_finite(out, "snake", kernels);
        demand_finite(grad_a, "gradient of a snake", kernels);
    }
}

void density_round(const Kernels& kernels) {
    const int64_t B = any(0, 3), T = any(1, 300), C = 16 * any(1, 4), n = B * T * C;
    const std::vector<int64_t> lengths = drawn_lengths(B, 0, T);
    const std::vector<float> x = drawn(n), grad = drawn(n), offsets = drawn(16);
    const std::vector<float> widths(16, 0.7f);
    const float nan = NAN;
    std::vector<float> out(n, nan), grad_x(n, nan), grad_offsets(16, nan), grad_widths(16, nan);
    const FramesShape shape{B, T, int(C), any(0, 1) ? lengths.data() : nullptr};
    const int threads = static_cast<int>(any(1, 4));
    density_attention(shape, offsets.data(), widths.data(), x.data(), out.data(), kernels, threads);
    density_attention_backward(shape, offsets.data(), widths.data(), x.data(), grad.data(),
                               grad_x.data(), grad_offsets.data(), grad_widths.data(), kernels,
                               threads);
    demand_finite(out, "density attention", kernels);
    demand_finite(grad_x, "gradient of density attention", kernels);
}

void attention_round(const Kernels& kernels) {
    const int64_t B = any(0, 2), H = any(1, 3), T = any(1, 200), d = any(1, 40), n = B * H * T * d;
    const std::vector<int64_t> lengths = drawn_lengths(B, 1, T);
    const std::vector<float> q = drawn(n), k = drawn(n), v = drawn(n), grad = drawn(n),
                             table = drawn(H * (2 * T - 1)), gate = drawn(B * H * T);
    const float nan = NAN;
    std::vector<float> out(n, nan), log_sum(B * H * T, nan), grad_q(n, nan), grad_k(n, nan),
        grad_v(n, nan), grad_table(H * (2 * T - 1), nan), grad_gate(B * H * T, nan);
    const auto rows = [&](const std::vector<float>& of) {
        return HeadRows{of.data(), H * T * d, T * d, d};
    };
    const AttentionShape shape{B, H, T, int(d), any(0, 1) ? lengths.data() : nullptr};
    const AttentionInputs inputs{rows(q), rows(k), rows(v), table.data(), gate.data()};
    const Dropout dropping{uint64_t(any(0, 1 << 30)), -1000000000, 1.4f, any(0, 1) == 1};
    const HeadRows out_rows{out.data(), T * H * d, d, H * d};  // memory of (B, T, H, d)
    const int threads = static_cast<int>(any(1, 4));
    gated_bias_attention(shape, inputs, dropping, out.data(), log_sum.data(), kernels, threads);
    gated_bias_attention_backward(shape, inputs, dropping, rows(grad), out_rows, log_sum.data(),
                                  {grad_q.data(), grad_k.data(), grad_v.data(), grad_table.data(),
                                   grad_gate.data()},
                                  kernels, threads);
    demand_finite(out, "attention", kernels);
    for (const auto* gradient : {&grad_q, &grad_k, &grad_v, &grad_table, &grad_gate}) {
        demand_finite(*gradient, "gradient of attention", kernels);
    }
    dropout(q.data(), n, dropping, out.data(), kernels, threads);
}

void loss_round(const Kernels& kernels) {
    const int64_t n = any(0, 60), K = any(1, 200), stride = K + any(0, 3);
    const std::vector<float> values = drawn(n * stride);
    std::vector<float> targets(n * K), weights(n), gradient(n * K, NAN);
    std::vector<int64_t> of_row(n), labels(n);
    std::vector<RowLoss> losses(n);
    for (float& p : targets) p = any(0, 3) ? 0.0f : 1.0f / static_cast<float>(K);
    for (int64_t i = 0; i < n; ++i) {
        weights[i] = any(0, 1) ? 0.25f : 0.0f;
        of_row[i] = any(0, n - 1);
        labels[i] = weights[i] != 0.0f ? any(0, K - 1) : -1;
    }
    const WeightedRows rows{values.data(), n, stride, int(K), weights.data(),
                            gradient.data()};
    const int threads = static_cast<int>(any(1, 4));
    masked_kl(rows, targets.data(), of_row.data(), losses.data(), kernels, threads);
    demand_finite(gradient, "gradient of a KL", kernels);
    masked_cross_entropy(rows, labels.data(), losses.data(), kernels, threads);
    masked_mse(rows, targets.data(), losses.data(), kernels, threads);
    demand_finite(gradient, "gradient of a loss", kernels);
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
            bound_round<float>(kernels(name.c_str()));
            bound_round<double>(kernels(name.c_str()));
            log_mel_round<float>(kernels(name.c_str()));
            log_mel_round<int16_t>(kernels(name.c_str()));
            residual_round(kernels(name.c_str()));
            snake_round<float>(kernels(name.c_str()));
            snake_round<uint16_t>(kernels(name.c_str()));
            density_round(kernels(name.c_str()));
            depthwise_round(kernels(name.c_str()));
            list_round(kernels(name.c_str()));
            fingerprint_round(kernels(name.c_str()));
            attention_round(kernels(name.c_str()));
            loss_round(kernels(name.c_str()));
            if (round % 3 == 0) block_round(kernels(name.c_str()));
            if (round % 3 == 1) front_end_round(kernels(name.c_str()));
        }
        long& screened = screened_of[int(kernels(name.c_str()).narrow.operands)];
        if (!screened) {
            std::printf("%s: no component was screened\n", name.c_str());
            return 1;
        }
        screened = 0;
        std::printf("%s: clean\n", name.c_str());
    }
}
