#include "lists.h"

#include <algorithm>

#include "parallel.h"

namespace gmm_jepa {
namespace {

constexpr int64_t kPiece = 16384;  // values

struct Piece {
    size_t tensor;
    int64_t first, n;
};

std::vector<Piece> pieces_of(const std::vector<int64_t>& sizes) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < sizes.size(); ++i) {
        for (int64_t first = 0; first < sizes[i]; first += kPiece) {
            pieces.push_back({i, first, std::min(kPiece, sizes[i] - first)});
        }
    }
    return pieces;
}

// Calls run(i) for every piece i.
template <typename Run>
void over(const std::vector<Piece>& pieces, int n_threads, const Run& run) {
    const int64_t n = static_cast<int64_t>(pieces.size());
    over_shares(n, n, n_threads, run);
}

}  // namespace

double sum_of_squares(const TensorList<const float>& list, const Kernels& kernels, int n_threads) {
    const std::vector<Piece> pieces = pieces_of(list.sizes);
    std::vector<double> sums(pieces.size());
    over(pieces, n_threads, [&](int64_t i) {
        const Piece& piece = pieces[i];
        sums[i] = kernels.sum_of_squares(list.tensors[piece.tensor] + piece.first, piece.n);
    });
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
}

void move_towards(const TensorList<float>& to, const TensorList<const float>& from, float weight,
                  const Kernels& kernels, int n_threads) {
    const std::vector<Piece> pieces = pieces_of(to.sizes);
    over(pieces, n_threads, [&](int64_t i) {
        const Piece& piece = pieces[i];
        kernels.move_towards(to.tensors[piece.tensor] + piece.first,
                             from.tensors[piece.tensor] + piece.first, weight, piece.n);
    });
}

}  // namespace gmm_jepa
