#include "density.h"

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "parallel.h"

namespace gmm_jepa {
namespace {

constexpr int64_t kLeastFrames = 2 * kDensityChunks;

// The frames and channels that one call of a kernel takes.
struct Piece {
    int64_t row;
    int chunk;
    int64_t start, stop;
    int channel;
};

class Pieces {
  public:
    Pieces(const FramesShape& shape, int lanes)
        : shape_(shape), lanes_(lanes), groups_(shape.n_channels / lanes) {}

    int64_t count() const { return shape_.n_rows * kDensityChunks * groups_; }

    Piece at(int64_t i) const {
        const int64_t row = i / groups_ / kDensityChunks;
        const int chunk = static_cast<int>(i / groups_ % kDensityChunks);
        const int64_t n = n_real(shape_, row), size = n / kDensityChunks;
        return {row, chunk, chunk * size, chunk + 1 < kDensityChunks ? (chunk + 1) * size : n,
                static_cast<int>(i % groups_) * lanes_};
    }

    // Of the first value of a piece in (B, T, C).
    int64_t offset(const Piece& piece) const {
        return (piece.row * shape_.n_frames + piece.start) * shape_.n_channels + piece.channel;
    }

    bool is_whole(int64_t row) const { return n_real(shape_, row) >= kLeastFrames; }

    // What no piece covers: padding, and short rows.
    void copy_rest(const float* from, float* to) const {
        for (int64_t row = 0; row < shape_.n_rows; ++row) {
            const int64_t first = row * shape_.n_frames + (is_whole(row) ? n_real(shape_, row) : 0);
            const int64_t stop = (row + 1) * shape_.n_frames;
            std::copy(from + first * shape_.n_channels, from + stop * shape_.n_channels,
                      to + first * shape_.n_channels);
        }
    }

    // work(piece, scratch, i) for all pieces of rows that are long enough.
    template <typename Work>
    void run(int n_threads, const Work& work) const {
        const auto make = [&] { return std::vector<float>((shape_.n_frames + 1) * lanes_); };
        over_shares(count(), count(), n_threads, make, [&](int64_t i, std::vector<float>& scratch) {
            const Piece piece = at(i);
            if (is_whole(piece.row)) work(piece, scratch.data(), i);
        });
    }

  private:
    const FramesShape& shape_;
    int lanes_, groups_;
};

DensityParameters parameters_of(const float* offsets, const float* squared_widths, int chunk) {
    DensityParameters parameters;
    std::copy_n(offsets + chunk * kDensityGaussians, kDensityGaussians, parameters.offsets);
    std::copy_n(squared_widths + chunk * kDensityGaussians, kDensityGaussians,
                parameters.squared_widths);
    return parameters;
}

}  // namespace

void density_attention(const FramesShape& shape, const float* offsets,
                       const float* squared_widths, const float* x, float* out,
                       const Kernels& kernels, int n_threads) {
    const Pieces pieces(shape, kernels.lanes);
    pieces.copy_rest(x, out);
    pieces.run(n_threads, [&](const Piece& piece, float* scratch, int64_t) {
        const int64_t at = pieces.offset(piece);
        kernels.density_forward(parameters_of(offsets, squared_widths, piece.chunk), x + at,
                                shape.n_channels, static_cast<int>(piece.stop - piece.start),
                                scratch, out + at);
    });
}

void density_attention_backward(const FramesShape& shape, const float* offsets,
                                const float* squared_widths, const float* x, const float* grad,
                                float* grad_x, float* grad_offsets, float* grad_squared_widths,
                                const Kernels& kernels, int n_threads) {
    constexpr int kEach = 2 * kDensityGaussians;
    const Pieces pieces(shape, kernels.lanes);
    std::vector<double> sums(pieces.count() * kEach);  // of each piece, added in their order
    pieces.copy_rest(grad, grad_x);
    pieces.run(n_threads, [&](const Piece& piece, float* scratch, int64_t i) {
        const int64_t at = pieces.offset(piece);
        kernels.density_backward(parameters_of(offsets, squared_widths, piece.chunk), x + at,
                                 grad + at, shape.n_channels,
                                 static_cast<int>(piece.stop - piece.start), scratch, grad_x + at,
                                 &sums[i * kEach]);
    });
    double total[kDensityChunks][kEach] = {};
    for (int64_t i = 0; i < pieces.count(); ++i) {
        for (int j = 0; j < kEach; ++j) total[pieces.at(i).chunk][j] += sums[i * kEach + j];
    }
    for (int chunk = 0; chunk < kDensityChunks; ++chunk) {
        for (int j = 0; j < kDensityGaussians; ++j) {
            const int to = chunk * kDensityGaussians + j;
            grad_offsets[to] = static_cast<float>(total[chunk][j]);
            grad_squared_widths[to] = static_cast<float>(total[chunk][kDensityGaussians + j]);
        }
    }
}

}  // namespace gmm_jepa
