// Linear maps inside an operator, of float32 or of pairs of bfloat16 (a `Word`, see kernels.h).
//
// Rows of n values are rows of n / kValues words. Sizes of maps are multiples of kMapMultiple, so that
// panels and tiles are full in every set but for the last rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "convolution_windows.h"
#include "kernels.h"
#include "parallel.h"

namespace gmm_jepa {

constexpr int kMapMultiple = 32;

// Frames that go through maps together: they stay in cache, and are whole register tiles. Even.
template <typename Word>
int64_t map_block(const Kernels& kernels) {
    return kValues<Word> == 2 ? 32 : 4 * kernels.product_rows;
}

// A row of n values, or two of pairs (the second may be null, for zeros) as pairs of values at equal
// places, to at(c) for every `columns` values from c on.
template <typename At>
void put_row(const Kernels&, const float* row, const float*, int n, int columns, const At& at) {
    for (int c = 0; c < n; c += columns) std::copy_n(row + c, columns, at(c));
}
template <typename At>
void put_row(const Kernels& kernels, const uint32_t* first, const uint32_t* second, int n,
             int columns, const At& at) {
    for (int c = 0; c < n; c += columns) {
        kernels.pair_rows(first + c / 2, second ? second + c / 2 : nullptr, columns, at(c));
    }
}

// The weight (n_out, n_in) of a map laid out for products: of rows of n_in values, or `turned`, for
// the gradient of its inputs, of rows of n_out.
template <typename Word>
class PackedWeight {
  public:
    PackedWeight(const Kernels& kernels, const float* weight, int n_out, int n_in, bool turned,
                 int n_threads)
        : kernels_(kernels),
          columns_(kernels.product_columns),
          width_(turned ? n_in : n_out),
          depth_((turned ? n_out : n_in) / kValues<Word>),
          words_(size_t(width_) * depth_),
          zeros_(width_) {
        const auto none = [] { return 0; };
        if (turned) {
            over_blocks(n_out, kSide, n_threads, none, [&](int64_t, int64_t first, int n, int) {
                pack_rows(weight, n_in, first, n);
            });
        } else {
            over_blocks(n_out, kSide, n_threads, none, [&](int64_t, int64_t first, int, int) {
                pack_columns(weight, n_in, first);
            });
        }
    }

    // to (n, width) = rows times the weight, plus the bias (width,) if there is one. Whole register
    // tiles: rows are read and results written up to kMostRows beyond n. Rows are `step` words apart;
    // 0: dense.
    void multiply(const Word* rows, int n, const float* bias, float* to, int step = 0) const {
        gmm_jepa::multiply(kernels_, ProductsOf<Word>{rows, step ? step : depth_, 1, 0, words_.data(),
                                                      bias ? bias : zeros_.data(), to, width_, n,
                                                      width_ / columns_, 1, depth_, false});
    }

  private:
    static constexpr int kSide = 16;  // of what `turn_words` turns

    // Word k of column c of panel p: words[(p depth + k) columns + c].
    Word* place(int64_t column, int64_t k) {
        return &words_[(column / columns_ * depth_ + k) * columns_ + column % columns_];
    }

    // Rows `first` to `first` + 15 of the weight are columns.
    void pack_columns(const float* weight, int n_in, int64_t first) {
        Buffer<Word> rows(size_t(kSide) * depth_);
        put_values(kernels_, weight + first * n_in, ptrdiff_t(kSide) * n_in, false, rows.data());
        const int step = std::min(kSide, columns_);
        uint32_t turned[kSide * kSide];
        for (int k = 0; k < depth_; k += kSide) {
            const uint32_t* from = reinterpret_cast<const uint32_t*>(&rows[k]);
            if (step == kSide) {
                kernels_.turn_words(from, depth_, reinterpret_cast<uint32_t*>(place(first, k)),
                                    columns_);
                continue;
            }
            kernels_.turn_words(from, depth_, turned, kSide);  // panels of fewer columns than rows
            for (int c = 0; c < kSide; c += step) {
                for (int i = 0; i < kSide; ++i) {
                    std::memcpy(place(first + c, k + i), &turned[i * kSide + c], step * sizeof(Word));
                }
            }
        }
    }

    // Rows of the weight are rows, two of them one of pairs.
    void pack_rows(const float* weight, int n_in, int64_t first, int n) {
        Buffer<Word> rows(size_t(n) * n_in / kValues<Word>);
        put_values(kernels_, weight + first * n_in, ptrdiff_t(n) * n_in, false, rows.data());
        for (int r = 0; r < n; r += kValues<Word>) {
            const Word* row = &rows[size_t(r) * (n_in / kValues<Word>)];
            put_row(kernels_, row, row + n_in / kValues<Word>, n_in, columns_, [&](int c) {
                return place(c, (first + r) / kValues<Word>);
            });
        }
    }

    const Kernels& kernels_;
    int columns_, width_, depth_;
    Buffer<Word> words_;
    std::vector<float> zeros_;
};

// A matrix (n_rows, n_columns) whose rows come in blocks, kept as one side of a product over rows.
template <typename Word>
class Factor {
  public:
    // In panels as the right side, else as the left one.
    Factor(const Kernels& kernels, int64_t n_rows, int n_columns, bool in_panels)
        : kernels_(kernels),
          columns_(in_panels ? kernels.product_columns : n_columns),
          n_columns_(n_columns),
          used_((n_rows + kValues<Word> - 1) / kValues<Word>),
          depth_(round_up(used_, kWhole)),
          words_(size_t(depth_) * n_columns + kMostRows) {
        for (int c = 0; c < n_columns; c += columns_) {
            std::fill(place(c, used_), place(c, depth_), Word{});
        }
    }

    // n rows of words from row `start` on, which is even; they are `step` words apart, 0: dense.
    void put(int64_t start, const Word* rows, int n, int step = 0) {
        if (!step) step = n_columns_ / kValues<Word>;
        for (int r = 0; r < n; r += kValues<Word>) {
            const Word* row = rows + int64_t(r) * step;
            put_row(kernels_, row, r + 1 < n ? row + step : nullptr, n_columns_, columns_,
                    [&](int c) {
                return place(c, (start + r) / kValues<Word>);
            });
        }
    }

    int n_columns() const { return n_columns_; }
    int64_t depth() const { return depth_; }
    const Word* words() const { return words_.data(); }
    const Kernels& kernels() const { return kernels_; }

  private:
    const Kernels& kernels_;
    static constexpr int kWhole = 16;  // words of depth that tiles take at once

    Word* place(int64_t column, int64_t k) {
        return &words_[(column / columns_ * depth_ + k) * columns_];
    }

    int columns_, n_columns_;
    int64_t used_, depth_;  // words over all rows, and with zeros behind them
    Buffer<Word> words_;
};

// out (M, K) = left' right of left (n, M) and right (n, K), rows of `out` shared among threads.
template <typename Word>
void multiply_over_rows(const Factor<Word>& left, const Factor<Word>& right, float* out,
                        int n_threads) {
    const Kernels& kernels = left.kernels();
    const int M = left.n_columns(), K = right.n_columns();
    if (!left.depth()) return static_cast<void>(std::fill_n(out, int64_t(M) * K, 0.0f));
    const std::vector<float> zeros(K);
    over_blocks(M, kMapMultiple, n_threads, [] { return 0; }, [&](int64_t, int64_t m, int n, int) {
        multiply(kernels, ProductsOf<Word>{left.words() + m, 1, M, 0, right.words(), zeros.data(),
                                           out + m * K, K, n, K / kernels.product_columns, 1,
                                           static_cast<int>(left.depth()), false});
    });
}

// Sums of columns: every block's own, added up in order, so that they do not depend on threads.
class ColumnSums {
  public:
    ColumnSums(const Kernels& kernels, int64_t n_blocks, int n_columns)
        : kernels_(kernels), n_columns_(n_columns), parts_(size_t(n_blocks) * n_columns) {}

    void put(int64_t block, const float* rows, int n) {
        kernels_.sum_rows(rows, n, n_columns_, part(block));
    }

    // The sums of one block, to be added to.
    float* part(int64_t block) { return &parts_[block * n_columns_]; }

    void add_up(float* out) const {
        std::vector<double> sums(n_columns_);
        for (const float* part = parts_.data(); part < parts_.data() + parts_.size();
             part += n_columns_) {
            for (int i = 0; i < n_columns_; ++i) sums[i] += part[i];
        }
        std::copy(sums.begin(), sums.end(), out);
    }

  private:
    const Kernels& kernels_;
    int n_columns_;
    std::vector<float> parts_;
};

}  // namespace gmm_jepa
