#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "arrays.h"
#include "parallel.h"

namespace gmm_jepa {
namespace {

constexpr int kBlockScores = 32768;  // of a block of queries: 128 KB
constexpr int kSlack = 64;           // that products and vectors may go beyond a row or a matrix
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One (batch, head) pair with its operands packed; scratch of one thread.
class Head {
  public:
    Head(const AttentionShape& shape, const AttentionInputs& inputs, const Dropout& dropout,
         const Kernels& kernels)
        : shape_(shape),
          inputs_(inputs),
          dropout_(dropout),
          kernels_(kernels),
          d_(shape.n_dims),
          columns_(kernels.product_columns),
          width_(static_cast<int>(round_up(d_, columns_))),
          scale_(1.0f / std::sqrt(static_cast<float>(d_))),
          stride_(round_up(shape.n_frames, columns_) + kSlack),
          block_(static_cast<int>(std::clamp<int64_t>(
              kBlockScores / stride_ / kernels.product_rows * kernels.product_rows,
              kernels.product_rows, round_up(shape.n_frames, kernels.product_rows)))),
          keys_(stride_ * d_),
          table_(2 * shape.n_frames + kSlack),
          queries_((block_ + kSlack) * d_),
          scores_((block_ + kSlack) * stride_),
          zeros_(std::max<int64_t>(stride_, width_)) {}

    void select(int64_t row, int64_t head) {
        row_ = row;
        head_ = head;
        n_keys_ = static_cast<int>(shape_.key_lengths ? shape_.key_lengths[row] : shape_.n_frames);
        const int64_t n = 2 * shape_.n_frames - 1;
        std::copy_n(inputs_.table + head * n, n, table_.begin());
        pack_columns(inputs_.k, keys_);
    }

  protected:
    int64_t index(int64_t query) const {
        return (row_ * shape_.n_heads + head_) * shape_.n_frames + query;
    }

    // Of (B, T, H, d).
    int64_t place(int64_t frame) const {
        return ((row_ * shape_.n_frames + frame) * shape_.n_heads + head_) * d_;
    }

    const float* bias_of(int64_t query) const { return &table_[shape_.n_frames - 1 - query]; }

    // Keys as columns: panels of (d, columns).
    void pack_columns(const HeadRows& from, std::vector<float>& to) const {
        for (int64_t j = 0; j < round_up(n_keys_, columns_); ++j) {
            const float* x = j < n_keys_ ? from.at(row_, head_, j) : nullptr;
            float* column = &to[j / columns_ * d_ * columns_ + j % columns_];
            for (int c = 0; c < d_; ++c) column[int64_t(c) * columns_] = x ? x[c] : 0.0f;
        }
    }

    // n frames as rows: panels of (n, columns).
    void pack_rows(const HeadRows& from, int64_t start, int n, std::vector<float>& to) const {
        for (int t = 0; t < n; ++t) {
            const float* x = from.at(row_, head_, start + t);
            for (int c = 0; c < d_; c += columns_) {
                std::copy_n(x + c, std::min(columns_, d_ - c), &to[(int64_t(c) * n) + t * columns_]);
            }
        }
    }

    void copy_rows(const HeadRows& from, int64_t start, int n, float factor, float* to) const {
        for (int t = 0; t < n; ++t) {
            const float* x = from.at(row_, head_, start + t);
            for (int c = 0; c < d_; ++c) *to++ = factor * x[c];
        }
    }

    // scores_ of n queries, minus infinity behind the last key.
    void score(int64_t start, int n) {
        copy_rows(inputs_.q, start, n, scale_, queries_.data());
        for (int i = 0; i < n; ++i) {
            const float gate = inputs_.gate[index(start + i)];
            const float* bias = bias_of(start + i);
            float* row = &scores_[i * stride_];
            for (int j = 0; j < n_keys_; ++j) row[j] = gate * bias[j];
            std::fill(row + n_keys_, row + round_up(n_keys_, columns_), -kInfinity);
        }
        multiply(queries_.data(), d_, 1, keys_, scores_.data(), stride_, n, n_keys_, d_, true);
    }

    // c (rows, columns) = a b, or c += a b; b is packed for `n_columns` columns and `n_k` rows.
    void multiply(const float* a, int64_t stride_a, int64_t stride_k, const std::vector<float>& b,
                  float* c, int64_t stride_c, int n_rows, int n_columns, int n_k,
                  bool accumulate) const {
        kernels_.products({a, stride_a, stride_k, 0, b.data(), zeros_.data(), c, stride_c, n_rows,
                           (n_columns + columns_ - 1) / columns_, 1, n_k, accumulate});
    }

    const AttentionShape& shape_;
    const AttentionInputs& inputs_;
    const Dropout& dropout_;
    const Kernels& kernels_;
    int d_, columns_, width_;
    float scale_;
    int64_t stride_;  // of a row of scores
    int block_, n_keys_ = 0;
    int64_t row_ = 0, head_ = 0;
    std::vector<float> keys_, table_, queries_, scores_, zeros_;
};

class ForwardHead : public Head {
  public:
    ForwardHead(const AttentionShape& shape, const AttentionInputs& inputs, const Dropout& dropout,
                const Kernels& kernels)
        : Head(shape, inputs, dropout, kernels),
          values_(shape.n_frames * width_),
          made_((block_ + kSlack) * width_) {}

    void run(float* out, float* log_sum) {
        pack_rows(inputs_.v, 0, n_keys_, values_);
        std::vector<float> totals(block_);
        for (int64_t start = 0; start < shape_.n_frames; start += block_) {
            const int n = static_cast<int>(std::min<int64_t>(block_, shape_.n_frames - start));
            score(start, n);
            for (int i = 0; i < n; ++i) {
                const float top = kernels_.softmax_row(&scores_[i * stride_], n_keys_, dropout_,
                                                       index(start + i), &totals[i]);
                log_sum[index(start + i)] = top + std::log(totals[i]);
            }
            multiply(scores_.data(), stride_, 1, values_, made_.data(), width_, n, d_, n_keys_,
                     false);
            for (int i = 0; i < n; ++i) {
                float* to = out + place(start + i);
                for (int c = 0; c < d_; ++c) to[c] = made_[int64_t(i) * width_ + c] / totals[i];
            }
        }
    }

  private:
    std::vector<float> values_, made_;
};

class BackwardHead : public Head {
  public:
    BackwardHead(const AttentionShape& shape, const AttentionInputs& inputs,
                 const Dropout& dropout, const Kernels& kernels)
        : Head(shape, inputs, dropout, kernels),
          value_columns_(keys_.size()),
          key_rows_(shape.n_frames * width_),
          of_probabilities_(scores_.size()),
          grad_table_(table_.size()),
          grads_((block_ + kSlack) * d_),
          grad_rows_(int64_t(block_) * width_),
          query_rows_(grad_rows_.size()),
          made_((block_ + kSlack) * width_),
          grad_keys_((shape.n_frames + kSlack) * width_),
          grad_values_(grad_keys_.size()) {}

    // grad_table (2 T - 1,) receives this pair's share.
    void run(const HeadRows& grad, const HeadRows& out, const float* log_sum,
             const AttentionGradients& to, float* grad_table) {
        pack_columns(inputs_.v, value_columns_);
        pack_rows(inputs_.k, 0, n_keys_, key_rows_);
        std::fill(grad_table_.begin(), grad_table_.end(), 0.0f);
        std::fill(grad_keys_.begin(), grad_keys_.end(), 0.0f);
        std::fill(grad_values_.begin(), grad_values_.end(), 0.0f);
        for (int64_t start = 0; start < shape_.n_frames; start += block_) {
            const int n = static_cast<int>(std::min<int64_t>(block_, shape_.n_frames - start));
            through_softmax(start, n, grad, out, log_sum, to.gate);
            multiply(of_probabilities_.data(), stride_, 1, key_rows_, made_.data(), width_, n, d_,
                     n_keys_, false);
            for (int i = 0; i < n; ++i) {
                float* q = to.q + place(start + i);
                for (int c = 0; c < d_; ++c) q[c] = scale_ * made_[int64_t(i) * width_ + c];
            }
            const HeadRows queries{queries_.data(), 0, 0, d_};
            pack_rows(queries, 0, n, query_rows_);
            multiply(of_probabilities_.data(), 1, stride_, query_rows_, grad_keys_.data(), width_,
                     n_keys_, d_, n, true);
            pack_rows(grad, start, n, grad_rows_);
            multiply(scores_.data(), 1, stride_, grad_rows_, grad_values_.data(), width_, n_keys_,
                     d_, n, true);
        }
        for (int64_t j = 0; j < shape_.n_frames; ++j) {
            for (int c = 0; c < d_; ++c) {
                to.k[place(j) + c] = j < n_keys_ ? grad_keys_[j * width_ + c] : 0.0f;
                to.v[place(j) + c] = j < n_keys_ ? grad_values_[j * width_ + c] : 0.0f;
            }
        }
        std::copy_n(grad_table_.begin(), 2 * shape_.n_frames - 1, grad_table);
    }

  private:
    // scores_ become probabilities as dropout left them, of_probabilities_ the scores' gradients.
    void through_softmax(int64_t start, int n, const HeadRows& grad, const HeadRows& out,
                         const float* log_sum, float* grad_gate) {
        score(start, n);
        copy_rows(grad, start, n, 1.0f, grads_.data());
        multiply(grads_.data(), d_, 1, value_columns_, of_probabilities_.data(), stride_, n,
                 n_keys_, d_, false);
        for (int i = 0; i < n; ++i) {
            const float* y = out.at(row_, head_, start + i);
            float delta = 0.0f;
            for (int c = 0; c < d_; ++c) delta += grads_[int64_t(i) * d_ + c] * y[c];
            const int64_t at = index(start + i);
            const SoftmaxGradient row{&scores_[i * stride_],
                                      &of_probabilities_[i * stride_],
                                      n_keys_,
                                      log_sum[at],
                                      delta,
                                      bias_of(start + i),
                                      inputs_.gate[at],
                                      &grad_table_[shape_.n_frames - 1 - start - i]};
            grad_gate[at] = kernels_.softmax_row_backward(row, dropout_, at);
        }
    }

    std::vector<float> value_columns_, key_rows_, of_probabilities_, grad_table_, grads_,
        grad_rows_, query_rows_, made_, grad_keys_, grad_values_;
};

// work(head, number) for every (row, head) pair, each thread with a head of its own.
template <typename OneHead, typename Work>
void over_heads(const AttentionShape& shape, const AttentionInputs& inputs, const Dropout& dropout,
                const Kernels& kernels, int n_threads, const Work& work) {
    const auto make = [&] { return OneHead(shape, inputs, dropout, kernels); };
    over_blocks(shape.n_rows * shape.n_heads, 1, n_threads, make,
                [&](int64_t pair, int64_t, int, OneHead& head) {
        head.select(pair / shape.n_heads, pair % shape.n_heads);
        work(head, pair);
    });
}

}  // namespace

void gated_bias_attention(const AttentionShape& shape, const AttentionInputs& inputs,
                          const Dropout& dropout, float* out, float* log_sum,
                          const Kernels& kernels, int n_threads) {
    over_heads<ForwardHead>(shape, inputs, dropout, kernels, n_threads,
                            [&](ForwardHead& head, int64_t) { head.run(out, log_sum); });
}

void gated_bias_attention_backward(const AttentionShape& shape, const AttentionInputs& inputs,
                                   const Dropout& dropout, const HeadRows& grad,
                                   const HeadRows& out, const float* log_sum,
                                   const AttentionGradients& gradients, const Kernels& kernels,
                                   int n_threads) {
    const int64_t n = 2 * shape.n_frames - 1;
    std::vector<float> shares(shape.n_rows * shape.n_heads * n);
    over_heads<BackwardHead>(shape, inputs, dropout, kernels, n_threads,
                             [&](BackwardHead& head, int64_t pair) {
                                 head.run(grad, out, log_sum, gradients, &shares[pair * n]);
                             });
    std::fill_n(gradients.table, shape.n_heads * n, 0.0f);
    for (int64_t pair = 0; pair < shape.n_rows * shape.n_heads; ++pair) {
        float* to = gradients.table + pair % shape.n_heads * n;
        for (int64_t i = 0; i < n; ++i) to[i] += shares[pair * n + i];
    }
}

}  // namespace gmm_jepa
