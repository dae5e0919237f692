// em.cu, one thread: the same tiles in the same order with the functions of tile.h. It differs from
// a GPU in the order of float32 sums inside an mma, which the bound allows for, and in the last
// digits of exp and log.
#include <algorithm>
#include <vector>

#include "em.h"
#include "tile.h"

namespace gmm_jepa::cuda {
namespace {

constexpr int kLanes = 32;

// What __shfl_xor_sync leaves in every lane: sums over ever closer lanes.
double tree_sum(double* lanes, int n) {
    for (int offset = n / 2; offset; offset /= 2) {
        for (int i = 0; i < offset; ++i) lanes[i] += lanes[i + offset];
    }
    return lanes[0];
}

template <typename T>
class Emulation {
  public:
    Emulation(const Matrix<T>& frames, const Operands& mixture, const Mode& mode)
        : frames_(frames),
          mixture_(mixture),
          mode_(mode),
          K_(static_cast<int>(mixture.n_components)),
          D_(static_cast<int>(mixture.n_dims)),
          depth_(depth_of(D_)),
          chunk_(std::min(chunk_frames(K_), round_up(frames.n_rows, kBlockFrames))),
          segments_(n_segments(K_)),
          stride_(chunk_ / kTileFrames),
          mask_(stride_ * K_),
          members_(stride_ * K_),
          normalisers_(chunk_),
          likelihoods_(chunk_ / kTileFrames),
          counts_(size_t(segments_) * K_),
          first_(counts_.size() * D_),
          second_(first_.size()) {}

    void run() {
        for (int64_t start = 0; start < frames_.n_rows; start += chunk_) {
            start_ = start;
            n_ = std::min(chunk_, frames_.n_rows - start);
            const int64_t tiles = (n_ + kTileFrames - 1) / kTileFrames;
            for (int64_t tile = 0; tile < tiles; ++tile) screen(tile);
            for (int64_t first = 0; first < n_; first += kBlockFrames) refine(first);
            for (int segment = 0; segment < segments_; ++segment) {
                const int first = segment_start(tiles, segment, segments_);
                const int last = segment_start(tiles, segment + 1, segments_);
                for (int k = 0; k < K_; ++k) add_pairs(segment, k, first, last);
            }
        }
    }

    void write(const Statistics& out) const {
        double likelihood = 0.0;
        for (double value : likelihoods_) likelihood += value;
        const double spoil = std::isfinite(likelihood) ? 0.0 : std::nan("");
        *out.log_likelihood = likelihood + spoil;
        for (int k = 0; k < K_; ++k) {
            double count = 0.0;
            for (int s = 0; s < segments_; ++s) count += counts_[size_t(s) * K_ + k];
            out.counts[k] = count + spoil;
            for (int d = 0; d < D_; ++d) {
                double first = 0.0, second = 0.0;
                for (int s = 0; s < segments_; ++s) {
                    first += first_[(size_t(s) * K_ + k) * D_ + d];
                    second += second_[(size_t(s) * K_ + k) * D_ + d];
                }
                const size_t at = size_t(k) * D_ + d;
                const double mean = mixture_.table[2 * at];
                out.first[at] = first_about_zero(count, mean, first) + spoil;
                out.second[at] = second_about_zero(count, mean, first, second) + spoil;
            }
        }
    }

  private:
    const T& x(int64_t frame, int d) const { return frames_(start_ + frame, d); }

    uint32_t& word(int64_t tile, int k) { return mask_[tile * K_ + k]; }

    uint32_t& member_word(int64_t tile, int k) { return members_[k * stride_ + tile]; }

    double log_joint_of(int64_t frame, int k) const {
        const double* row = &mixture_.table[size_t(k) * D_ * 2];
        double parts[kParts] = {};
        for (int d = 0; d < D_; ++d) {
            double& sum = parts[d % kParts];
            sum = add_square(sum, x(frame, d), row[2 * d], row[2 * d + 1]);
        }
        return log_joint(mixture_.constants[k], tree_sum(parts, kParts));
    }

    // One warp's tile: two sweeps over the components, first part of the depth for a guess of the
    // best, then all of it for what may come near that.
    void screen(int64_t frame_tile) {
        const int64_t first = frame_tile * kTileFrames;
        const int valid = static_cast<int>(std::min<int64_t>(kTileFrames, n_ - first));
        features_.assign(size_t(kTileFrames) * depth_ / 2, 0);
        bool usable[kTileFrames] = {};
        for (int f = 0; f < valid; ++f) {
            usable[f] = true;
            for (int d = 0; d < D_; ++d) {
                const float z =
                    standardised(x(first + f, d), mixture_.shift[d], mixture_.inverse_scale[d]);
                usable[f] &= is_usable(z);
                const size_t row = size_t(operand_row(f)) * depth_ / 2;
                features_[row + feature_position(d, D_)] = feature_word(z);
            }
        }
        const int tiles = (K_ + kTileComponents - 1) / kTileComponents;
        float best[kTileFrames];
        int component[kTileFrames];
        std::fill_n(best, kTileFrames, -static_cast<float>(kInfinity));
        std::fill_n(component, kTileFrames, -1);
        for (int tile = 0; tile < tiles; ++tile) {
            scores(tile, mixture_.guess, guess_steps(depth_ / kStepDepth));
            for (int f = 0; f < valid; ++f) {
                for (int c = 0; c < kTileComponents; ++c) {
                    const float score = scores_[operand_row(f)][c];
                    if (!is_better(score, 0, best[f], 0)) continue;
                    best[f] = score;
                    component[f] = tile * kTileComponents + c;
                }
            }
        }
        float threshold[kTileFrames];
        for (int f = 0; f < kTileFrames; ++f) {
            threshold[f] = -static_cast<float>(kInfinity);
            if (!usable[f] || component[f] < 0) continue;
            const double exact = log_joint_of(first + f, component[f]);
            threshold[f] = score_threshold(exact, mode_.margin, *mixture_.gain);
        }
        for (int tile = 0; tile < tiles; ++tile) {
            scores(tile, mixture_.bias, depth_ / kStepDepth);
            mark(frame_tile, tile, threshold, first_bits(valid));
        }
    }

    // scores_ of 32 rows by one tile of components: products of bfloat16, sums in float32.
    void scores(int tile, const float* bias, int steps) {
        for (int row = 0; row < kTileFrames; ++row) {
            const uint32_t* words = &features_[size_t(row) * depth_ / 2];
            for (int c = 0; c < kTileComponents; ++c) {
                const int64_t k = int64_t(tile) * kTileComponents + c;
                const uint16_t* weights = mixture_.weights + k * depth_;
                float sum = bias[k];
                for (int w = 0; w < steps * kStepDepth / 2; ++w) {
                    sum += bits_float(words[w] << 16) * bits_float(uint32_t(weights[2 * w]) << 16);
                    sum += bits_float(words[w] & 0xffff0000u) *
                           bits_float(uint32_t(weights[2 * w + 1]) << 16);
                }
                scores_[row][c] = sum;
            }
        }
    }

    // What the lanes of a warp have of the scores of one group of components.
    Scores part(int group, int lane) const {
        Scores part;
        for (int j = 0; j < 4; ++j) {
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) {
                    const int row = 16 * half + (lane >> 2) + 8 * (i >> 1);
                    const int c = 8 * j + 2 * (lane & 3) + (i & 1);
                    part.c[j][half][i] = scores_[row][group * kGroupComponents + c];
                }
            }
        }
        return part;
    }

    // The mask words of one tile: every lane's bits, exchanged until each has a component's.
    void mark(int64_t frame_tile, int tile, const float* threshold, uint32_t valid) {
        for (int group = 0; group < kTileComponents / kGroupComponents; ++group) {
            uint32_t words[kLanes] = {}, before[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                const Scores scores = part(group, lane);
                for (int n = 0; n < 8; ++n) {
                    for (int q = 0; q < 4; ++q) {
                        const bool bit = survives(scores.at(n, q), threshold[(lane & ~3) + q]);
                        words[lane] |= uint32_t(bit) << (4 * n + q);
                    }
                }
            }
            for (int distance = 4; distance; distance /= 2) {
                std::copy_n(words, kLanes, before);
                for (int lane = 0; lane < kLanes; ++lane) {
                    words[lane] = exchange_nibbles(before[lane], before[lane ^ 4 * distance], lane,
                                                   distance);
                }
            }
            for (int lane = 0; lane < kLanes; ++lane) {
                const int k = tile * kTileComponents + group * kGroupComponents +
                              lane_component(lane, lane >> 2);
                if (k < K_) word(frame_tile, k) = words[lane] & valid;
            }
        }
    }

    using Pair = std::pair<int, int>;  // component, frame of the block

    // Of the components from `start` on that a warp takes at a time, by component, then by frame.
    std::vector<Pair> pairs_of(int64_t first, int start) {
        std::vector<Pair> pairs;
        const int64_t n = std::min<int64_t>(kBlockFrames, n_ - first);
        for (int k = start; k < std::min(K_, start + kRefineComponents); ++k) {
            for (int f = 0; f < n; ++f) {
                const int64_t frame = first + f;
                if (word(frame / kTileFrames, k) >> f % kTileFrames & 1u) pairs.push_back({k, f});
            }
        }
        return pairs;
    }

    // One block: each warp's components, then the frames' sums over warps, then who stays.
    void refine(int64_t first) {
        constexpr int kStride = kRefineWarps * kRefineComponents;
        std::vector<LogSumExp> sums(kBlockFrames);
        std::vector<float> remembered[kRefineWarps];
        for (int warp = 0; warp < kRefineWarps; ++warp) {
            std::vector<LogSumExp> own(kBlockFrames);
            for (int start = kRefineComponents * warp; start < K_; start += kStride) {
                const std::vector<Pair> pairs = pairs_of(first, start);
                for (size_t i = 0; i < pairs.size(); i += kBatch) {
                    const size_t n = std::min<size_t>(kBatch, pairs.size() - i);
                    batch(first, &pairs[i], n, own, remembered[warp]);
                }
            }
            for (int f = 0; f < kBlockFrames; ++f) sums[f].merge(own[f]);
        }
        double lanes[kBlockFrames] = {}, cuts[kBlockFrames] = {};
        for (int f = 0; f < std::min<int64_t>(kBlockFrames, n_ - first); ++f) {
            normalisers_[first + f] = sums[f].normaliser(mode_.hard);
            lanes[f] = sums[f].value(mode_.hard);
            cuts[f] = lanes[f] + kLogNegligible;
        }
        for (int tile = 0; tile < kBlockTiles; ++tile) {
            likelihoods_[first / kTileFrames + tile] +=
                tree_sum(lanes + tile * kTileFrames, kLanes);
            for (int k = 0; k < K_; ++k) member_word(first / kTileFrames + tile, k) = 0;
        }
        for (int warp = 0; warp < kRefineWarps; ++warp) {
            size_t place = 0;
            for (int start = kRefineComponents * warp; start < K_; start += kStride) {
                for (const auto& [k, f] : pairs_of(first, start)) {
                    const bool known = place < kRemembered;
                    const bool stays = mode_.hard
                                           ? sums[f].component == k
                                           : !known || !is_negligible(remembered[warp][place],
                                                                      cuts[f]);
                    const int64_t frame = first + f;
                    member_word(frame / kTileFrames, k) |= uint32_t(stays) << f % kTileFrames;
                    ++place;
                }
            }
        }
    }

    void batch(int64_t first, const Pair* pairs, size_t n, std::vector<LogSumExp>& sums,
               std::vector<float>& remembered) const {
        double values[kBatch];
        for (size_t i = 0; i < n; ++i) {
            const auto& [k, f] = pairs[i];
            values[i] = log_joint_of(first + f, k);
            remembered.push_back(static_cast<float>(values[i]));
            sums[f].see(values[i], k);
        }
        for (size_t i = 0; i < n; ++i) sums[pairs[i].second].raise();
        for (size_t i = 0; i < n; ++i) {
            LogSumExp& sum = sums[pairs[i].second];
            sum.add(share(values[i], sum.largest));
        }
    }

    // One warp: a component over the frames of one segment of the chunk.
    void add_pairs(int segment, int k, int first_tile, int last_tile) {
        const double* row = &mixture_.table[size_t(k) * D_ * 2];
        std::vector<double> first(D_), second(D_);
        double count = 0.0;
        for (int tile = first_tile; tile < last_tile; ++tile) {
            for (int f = 0; f < kTileFrames; ++f) {
                if (!(member_word(tile, k) >> f & 1u)) continue;
                const int64_t frame = int64_t(tile) * kTileFrames + f;
                const double r = normalisers_[frame].responsibility(log_joint_of(frame, k));
                count += r;
                for (int d = 0; d < D_; ++d) {
                    add_moments(r, x(frame, d) - row[2 * d], first[d], second[d]);
                }
            }
        }
        const size_t at = size_t(segment) * K_ + k;
        counts_[at] += count;
        for (int d = 0; d < D_; ++d) {
            first_[at * D_ + d] += first[d];
            second_[at * D_ + d] += second[d];
        }
    }

    const Matrix<T>& frames_;
    const Operands& mixture_;
    Mode mode_;
    int K_, D_, depth_;
    int64_t chunk_, start_ = 0, n_ = 0;
    int segments_;
    int64_t stride_;
    std::vector<uint32_t> features_;
    float scores_[kTileFrames][kTileComponents];
    std::vector<uint32_t> mask_, members_;
    std::vector<Normaliser> normalisers_;
    std::vector<double> likelihoods_;
    std::vector<double> counts_, first_, second_;
};

}  // namespace

template <typename T>
void em_statistics_emulated(const Matrix<T>& frames, const Operands& mixture, const Mode& mode,
                            const Statistics& out) {
    Emulation<T> emulation(frames, mixture, mode);
    emulation.run();
    emulation.write(out);
}

template void em_statistics_emulated(const Matrix<float>&, const Operands&, const Mode&,
                                     const Statistics&);
template void em_statistics_emulated(const Matrix<double>&, const Operands&, const Mode&,
                                     const Statistics&);

}  // namespace gmm_jepa::cuda
