// The maps take blocks of frames, the attention between them takes (row, head) pairs: three passes over
// the frames each way, whose results in between stay in the outer caches.
#include "self_attention.h"

#include <algorithm>
#include <vector>

#include "attention.h"
#include "linear_maps.h"

namespace gmm_jepa {
namespace {

template <typename Word>
class SelfAttention {
  public:
    SelfAttention(const SelfAttentionShape& shape, const SelfAttentionWeights& weights,
                  const float* x, const SelfAttentionKept& kept, const Kernels& kernels,
                  int n_threads)
        : shape_(shape),
          weights_(weights),
          x_(x),
          kept_(kept),
          kernels_(kernels),
          n_threads_(n_threads),
          D_(shape.n_dims),
          N_(shape.n_rows * shape.n_frames),
          block_(map_block<Word>(kernels)) {
        if (!shape.lengths) return;
        for (int64_t row = 0; row < shape.n_rows; ++row) {
            n_keys_.push_back(std::max<int64_t>(1, shape.lengths[row]));
        }
    }

    void forward(float* out) const {
        const PackedWeight<Word> qkv(kernels_, weights_.qkv, 3 * D_, D_, false, n_threads_);
        const PackedWeight<Word> last(kernels_, weights_.out, D_, D_, false, n_threads_);
        each_block([&](int64_t, int64_t first, int n, Scratch& s) {
            put_values(kernels_, x_ + first * D_, ptrdiff_t(n) * D_, false, s.rows.data());
            qkv.multiply(s.rows.data(), n, weights_.qkv_bias, s.made.data());
            std::copy_n(s.made.data(), int64_t(n) * 3 * D_, kept_.qkv + first * 3 * D_);
            std::vector<float> gates(shape_.n_heads);
            for (int i = 0; i < n; ++i) {
                kernels_.gate_row(gate_of(&s.made[int64_t(i) * 3 * D_]), gates.data());
                for (int h = 0; h < shape_.n_heads; ++h) {
                    kept_.gate[index(first + i, h)] = gates[h];
                }
            }
        });
        gated_bias_attention(attention_shape(), inputs(), shape_.dropping, kept_.attended,
                             kept_.log_sum, kernels_, n_threads_);
        each_block([&](int64_t, int64_t first, int n, Scratch& s) {
            const int64_t at = first * D_;
            put_values(kernels_, kept_.attended + at, ptrdiff_t(n) * D_, false, s.rows.data());
            last.multiply(s.rows.data(), n, weights_.out_bias, s.made.data());
            kernels_.add_rows(x_ + at, s.made.data(), ptrdiff_t(n) * D_, out + at);
        });
    }

    void backward(const float* grad, const SelfAttentionGradients& out) const {
        const PackedWeight<Word> qkv(kernels_, weights_.qkv, 3 * D_, D_, true, n_threads_);
        const PackedWeight<Word> last(kernels_, weights_.out, D_, D_, true, n_threads_);
        const int64_t n_blocks = (N_ + block_ - 1) / block_;

        // Through the last map.
        Factor<Word> of_output(kernels_, N_, D_, false), attended(kernels_, N_, D_, true);
        ColumnSums out_bias(kernels_, n_blocks, D_);
        Buffer<float> of_attended(size_t(N_) * D_);
        each_block([&](int64_t i, int64_t first, int n, Scratch& s) {
            const int64_t at = first * D_;
            out_bias.put(i, grad + at, n);
            put_values(kernels_, kept_.attended + at, ptrdiff_t(n) * D_, false, s.rows.data());
            attended.put(first, s.rows.data(), n);
            put_values(kernels_, grad + at, ptrdiff_t(n) * D_, false, s.rows.data());
            of_output.put(first, s.rows.data(), n);
            last.multiply(s.rows.data(), n, nullptr, s.made.data());
            std::copy_n(s.made.data(), int64_t(n) * D_, &of_attended[at]);
        });
        multiply_over_rows(of_output, attended, out.out, n_threads_);
        out_bias.add_up(out.out_bias);

        // Through the attention.
        Buffer<float> of_qkv(size_t(N_) * 3 * D_), of_gate(size_t(N_) * shape_.n_heads);
        float *of_q = &of_qkv[0], *of_k = of_q + N_ * D_, *of_v = of_k + N_ * D_;
        gated_bias_attention_backward(attention_shape(), inputs(), shape_.dropping,
                                      head_rows(of_attended.data(), D_),
                                      head_rows(kept_.attended, D_), kept_.log_sum,
                                      {of_q, of_k, of_v, out.table, of_gate.data()}, kernels_,
                                      n_threads_);

        // Through the gates and the first map.
        Factor<Word> of_made(kernels_, N_, 3 * D_, false), made_of(kernels_, N_, D_, true);
        ColumnSums qkv_bias(kernels_, n_blocks, 3 * D_);
        ColumnSums of_u(kernels_, n_blocks, D_), of_r(kernels_, n_blocks, D_);
        ColumnSums of_scale(kernels_, n_blocks, shape_.n_heads);
        each_block([&](int64_t i, int64_t first, int n, Scratch& s) {
            std::vector<float> gates(shape_.n_heads);
            for (int j = 0; j < n; ++j) {
                const int64_t at = (first + j) * D_;
                float* row = &s.made[int64_t(j) * 3 * D_];
                std::copy_n(of_q + at, D_, row);
                std::copy_n(of_k + at, D_, row + D_);
                std::copy_n(of_v + at, D_, row + 2 * D_);
                for (int h = 0; h < shape_.n_heads; ++h) gates[h] = of_gate[index(first + j, h)];
                kernels_.gate_row_backward(gate_of(kept_.qkv + at * 3), gates.data(), row,
                                           of_u.part(i), of_r.part(i), of_scale.part(i));
            }
            qkv_bias.put(i, s.made.data(), n);
            put_values(kernels_, s.made.data(), ptrdiff_t(n) * 3 * D_, false, s.rows.data());
            of_made.put(first, s.rows.data(), n);
            qkv.multiply(s.rows.data(), n, nullptr, s.made.data());
            const int64_t at = first * D_;
            kernels_.add_rows(grad + at, s.made.data(), ptrdiff_t(n) * D_, out.x + at);
            put_values(kernels_, x_ + at, ptrdiff_t(n) * D_, false, s.rows.data());
            made_of.put(first, s.rows.data(), n);
        });
        multiply_over_rows(of_made, made_of, out.qkv, n_threads_);
        qkv_bias.add_up(out.qkv_bias);
        of_u.add_up(out.gate_u);
        of_r.add_up(out.gate_r);
        of_scale.add_up(out.gate_scale);
    }

  private:
    struct Scratch {
        Buffer<Word> rows;   // up to 3 D values each
        Buffer<float> made;  // the same
    };

    template <typename Run>
    void each_block(const Run& run) const {
        const size_t n = size_t(block_ + kMostRows) * 3 * D_;
        over_blocks(N_, block_, n_threads_, [n] {
            return Scratch{Buffer<Word>(n / kValues<Word>), Buffer<float>(n)};
        }, run);
    }

    // Of a frame among all and a head, in (B, H, T).
    int64_t index(int64_t frame, int head) const {
        const int64_t T = shape_.n_frames;
        return (frame / T * shape_.n_heads + head) * T + frame % T;
    }

    GateRow gate_of(const float* queries) const {
        return {queries, weights_.gate_u, weights_.gate_r, weights_.gate_scale, shape_.n_heads,
                shape_.head_dims()};
    }

    AttentionShape attention_shape() const {
        return {shape_.n_rows, shape_.n_heads, shape_.n_frames, shape_.head_dims(),
                shape_.lengths ? n_keys_.data() : nullptr};
    }

    // Heads of rows that are `width` values apart.
    HeadRows head_rows(const float* data, int64_t width) const {
        return {data, shape_.n_frames * width, shape_.head_dims(), width};
    }

    AttentionInputs inputs() const {
        return {head_rows(kept_.qkv, 3 * D_), head_rows(kept_.qkv + D_, 3 * D_),
                head_rows(kept_.qkv + 2 * D_, 3 * D_), weights_.table, kept_.gate};
    }

    const SelfAttentionShape& shape_;
    const SelfAttentionWeights& weights_;
    const float* x_;
    const SelfAttentionKept& kept_;
    const Kernels& kernels_;
    int n_threads_, D_;
    int64_t N_, block_;
    std::vector<int64_t> n_keys_;
};

}  // namespace

void self_attention(const SelfAttentionShape& shape, const SelfAttentionWeights& weights,
                    const float* x, const SelfAttentionKept& kept, float* out,
                    const Kernels& kernels, int n_threads) {
    shape.narrow
        ? SelfAttention<uint32_t>(shape, weights, x, kept, kernels, n_threads).forward(out)
        : SelfAttention<float>(shape, weights, x, kept, kernels, n_threads).forward(out);
}

void self_attention_backward(const SelfAttentionShape& shape, const SelfAttentionWeights& weights,
                             const float* x, const SelfAttentionKept& kept, const float* grad,
                             const SelfAttentionGradients& out, const Kernels& kernels,
                             int n_threads) {
    shape.narrow
        ? SelfAttention<uint32_t>(shape, weights, x, kept, kernels, n_threads).backward(grad, out)
        : SelfAttention<float>(shape, weights, x, kept, kernels, n_threads).backward(grad, out);
}

}  // namespace gmm_jepa
