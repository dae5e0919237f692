#include <stdexcept>

#include "bindings.h"
#include "density.h"
#include "kernels.h"
#include "log_mel.h"
#include "residual.h"
#include "residual_block.h"
#include "snake.h"
#include "waveform.h"

namespace gmm_jepa {
namespace {

void log_mel_at(const Rows& waveform, bool is_int16, const int64_t* lengths,
                const LogMelSettings& settings, float* out, const Kernels& table, int n_threads) {
    waveform.check();
    if (!log_mel_supports(settings.n_fft) || settings.n_mels < 1 || settings.hop < 1) {
        throw std::invalid_argument("n_fft, n_mels, hop: not supported");
    }
    for (int64_t row = 0; row < waveform.n_rows; ++row) {
        if (lengths[row] < 0 || lengths[row] > waveform.n_columns) {
            throw std::invalid_argument("lengths_samples: expected 0 to the width of the waveform");
        }
    }
    const auto run = [&](const auto& x) { log_mel(x, lengths, settings, out, table, n_threads); };
    is_int16 ? run(waveform.as<int16_t>()) : run(waveform.as<float>());
}

void check_waveform(const WaveformShape& shape, const Kernels&) {
    if (shape.n_rows < 0 || shape.n_frames < 1 || shape.stride < 1 || shape.n_taps < 1 ||
        shape.n_channels < 1 ||
        (shape.n_frames - 1) * shape.stride + shape.n_taps > shape.n_samples) {
        throw std::invalid_argument("shape: expected sizes, and samples for all frames");
    }
}

constexpr int64_t kMostDilation = int64_t(1) << 31;  // sums of some are far from overflow

void check_unit(const ResidualShape& shape, const Kernels&) {
    if (shape.n_rows < 0 || shape.n_frames < 0 || shape.n_channels < 1 || shape.dilation < 1 ||
        shape.dilation > kMostDilation) {
        throw std::invalid_argument("shape: expected sizes, and a dilation of 1 to 2^31");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
}

void check_units(const ResidualBlockShape& shape, const Kernels&) {
    for (int64_t dilation : shape.dilations) {
        if (dilation < 1 || dilation > kMostDilation) {
            throw std::invalid_argument("dilations: expected 1 to 2^31 each");
        }
    }
    if (shape.n_rows < 0 || shape.n_frames < 0 || !takes_together(shape.n_channels) ||
        shape.dilations.empty()) {
        throw std::invalid_argument("shape: expected sizes, 16 or 32 channels, and units");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
}

void check_frames(const FramesShape& shape, const Kernels& table) {
    if (shape.n_rows < 0 || shape.n_frames < 0 || shape.n_channels < 1 ||
        shape.n_channels % table.lanes) {
        throw std::invalid_argument("shape: expected sizes, and channels that fill vectors");
    }
    check_lengths(shape.lengths, shape.n_rows, shape.n_frames);
}

void snake_at(const FramesShape& shape, const void* x, bool is_bfloat16, const float* a, float* out,
              const Kernels& table, int n_threads) {
    is_bfloat16
        ? snake(shape, static_cast<const uint16_t*>(x), a, out, table, n_threads)
        : snake(shape, static_cast<const float*>(x), a, out, table, n_threads);
}

void snake_backward_at(const FramesShape& shape, const void* x, bool is_bfloat16, const float* a,
                       const float* grad, void* grad_x, float* grad_a, const Kernels& table,
                       int n_threads) {
    is_bfloat16
        ? snake_backward(shape, static_cast<const uint16_t*>(x), a, grad,
                         static_cast<uint16_t*>(grad_x), grad_a, table, n_threads)
        : snake_backward(shape, static_cast<const float*>(x), a, grad,
                         static_cast<float*>(grad_x), grad_a, table, n_threads);
}

}  // namespace

void define_front_end(py::module_& module) {
    module.def("log_mel_supports", &log_mel_supports);
    define(module, "log_mel", &log_mel_at);
    define(module, "waveform_conv", &waveform_conv, check_waveform);
    define(module, "waveform_conv_backward", &waveform_conv_backward, check_waveform);
    define(module, "residual_unit", &residual_unit, check_unit);
    define(module, "residual_unit_backward", &residual_unit_backward, check_unit);
    define(module, "residual_block", &residual_block, check_units);
    define(module, "residual_block_backward", &residual_block_backward, check_units);
    define(module, "snake", &snake_at, check_frames);
    define(module, "snake_backward", &snake_backward_at, check_frames);
    define(module, "density_attention", &density_attention, check_frames);
    define(module, "density_attention_backward", &density_attention_backward, check_frames);
}

}  // namespace gmm_jepa
