// em.cu, one thread: the same tiles in the same order with the functions of tile.h. It differs from
// a GPU in the order of float32 sums inside an mma, which the bound allows for, and in the last
// digits of exp and log.
#include <algorithm>
#include <bitset>
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
          chunk_(std::min(chunk_frames(K_), round_up(frames.n_rows, kSectionFrames))),
          segments_(n_segments(K_)),
          mask_(chunk_ / kTileFrames * K_),
          sums_(chunk_),
          normalisers_(chunk_),
          likelihoods_(chunk_ / kTileFrames),
          counts_(size_t(segments_) * K_),
          first_(counts_.size() * D_),
          second_(first_.size()) {}

    // Returns how many pairs the screen left.
    int64_t run() {
        int64_t pairs = 0;
        for (int64_t start = 0; start < frames_.n_rows; start += chunk_) {
            start_ = start;
            n_ = std::min(chunk_, frames_.n_rows - start);
            const int64_t tiles = (n_ + kTileFrames - 1) / kTileFrames;
            for (int64_t tile = 0; tile < tiles; ++tile) screen(tile);
            for (int64_t i = 0; i < tiles * K_; ++i) pairs += std::bitset<32>(mask_[i]).count();
            refine();
            for (int64_t tile = 0; tile < tiles; ++tile) finish_frames(tile);
            const int sections = n_sections(n_);
            for (int segment = 0; segment < segments_; ++segment) {
                const int64_t first = segment_start(sections, segment, segments_);
                const int64_t last = segment_start(sections, segment + 1, segments_);
                for (int k = 0; k < K_; ++k) {
                    add_pairs(segment, k, first * kSectionTiles,
                              std::min(tiles, last * kSectionTiles));
                }
            }
        }
        return pairs;
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

    double log_joint_of(int64_t frame, int k) const {
        const double* row = &mixture_.table[size_t(k) * D_ * 2];
        double parts[kParts] = {};
        for (int d = 0; d < D_; ++d) {
            double& sum = parts[d % kParts];
            sum = add_square(sum, x(frame, d), row[2 * d], row[2 * d + 1]);
        }
        return log_joint(mixture_.constants[k], tree_sum(parts, kParts));
    }

    // Whether the screen's warps take 16 frames and a tile at a time (screen_tiles.cuh).
    bool is_tiled() const { return depth_ == kTileSteps * kStepDepth; }

    int row_of(int frame) const {
        if (!is_tiled()) return operand_row(frame);
        return frame / kWarpFrames * kWarpFrames + warp_row(frame % kWarpFrames);
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
                const size_t row = size_t(row_of(f)) * depth_ / 2;
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
                    const float score = scores_[row_of(f)][c];
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
            if (is_tiled()) {
                mark_tile(frame_tile, tile, threshold, first_bits(valid));
            } else {
                mark(frame_tile, tile, threshold, first_bits(valid));
            }
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

    // The same by two warps of 16 frames, each of which has half of every word.
    void mark_tile(int64_t frame_tile, int tile, const float* threshold, uint32_t valid) {
        for (int k = 0; k < kTileComponents; ++k) {
            if (tile * kTileComponents + k < K_) word(frame_tile, tile * kTileComponents + k) = 0;
        }
        for (int half = 0; half < kTileFrames / kWarpFrames; ++half) {
            uint32_t words[kLanes] = {}, before[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                for (int i = 0; i < 32; ++i) {
                    const int q = i & 1, j = i >> 1 & 7, b = i >> 4;
                    const int frame = kWarpFrames * half + 2 * (lane >> 2) + q;
                    const float score = scores_[row_of(frame)][8 * j + 2 * (lane & 3) + b];
                    words[lane] |= uint32_t(survives(score, threshold[frame])) << i;
                }
            }
            for (int distance = 4; distance; distance /= 2) {
                std::copy_n(words, kLanes, before);
                for (int lane = 0; lane < kLanes; ++lane) {
                    words[lane] =
                        exchange_pairs(before[lane], before[lane ^ 4 * distance], lane, distance);
                }
            }
            for (int lane = 0; lane < kLanes; ++lane) {
                for (int b = 0; b < 2; ++b) {
                    const int k =
                        tile * kTileComponents + 8 * (lane >> 2) + 2 * (lane & 3) + b;
                    const uint32_t bits = words[lane] >> 16 * b & 0xffffu;
                    if (k < K_) word(frame_tile, k) |= bits << kWarpFrames * half & valid;
                }
            }
        }
    }

    // Calls visit(frame) for those of a component's frames that the screen left, from one tile on
    // to another, in their order.
    template <typename Visit>
    void for_pairs(int k, int64_t first_tile, int64_t last_tile, const Visit& visit) {
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
            for (int f = 0; f < kTileFrames; ++f) {
                if (word(tile, k) >> f & 1u) visit(tile * kTileFrames + f);
            }
        }
    }

    // Each frame's largest log-density, then the sum of its pairs' shares of that.
    void refine() {
        const int64_t tiles = (n_ + kTileFrames - 1) / kTileFrames;
        std::fill(sums_.begin(), sums_.end(), FrameSum{0, 0});
        for (int k = 0; k < K_; ++k) {
            for_pairs(k, 0, tiles, [&](int64_t frame) {
                uint64_t& largest = sums_[frame].largest;
                largest = std::max(largest, ordered_bits(log_joint_of(frame, k)));
            });
        }
        for (int k = 0; k < K_; ++k) {
            for_pairs(k, 0, tiles, [&](int64_t frame) {
                const double value = log_joint_of(frame, k);
                const double largest = ordered_value(sums_[frame].largest);
                uint64_t& sum = sums_[frame].sum;
                if (!mode_.hard) {
                    sum += whole_share(share(value, largest));
                } else if (value == largest) {
                    sum = std::max(sum, hard_rank(k));
                }
            });
        }
    }

    // What normalises a tile's frames, and the sum of their log p(x).
    void finish_frames(int64_t tile) {
        double lanes[kLanes] = {};
        for (int f = 0; f < kLanes; ++f) {
            const int64_t frame = tile * kTileFrames + f;
            if (frame >= n_) continue;
            normalisers_[frame] = sums_[frame].normaliser(mode_.hard);
            lanes[f] = sums_[frame].value(mode_.hard);
        }
        likelihoods_[tile] += tree_sum(lanes, kLanes);
    }

    // One warp: a component over the frames of one segment of the chunk.
    void add_pairs(int segment, int k, int64_t first_tile, int64_t last_tile) {
        const double* row = &mixture_.table[size_t(k) * D_ * 2];
        std::vector<double> first(D_), second(D_);
        double count = 0.0;
        for_pairs(k, first_tile, last_tile, [&](int64_t frame) {
            const Normaliser& of = normalisers_[frame];
            const double r = mode_.hard
                                 ? of.hard_responsibility(k)
                                 : of.responsibility(share(log_joint_of(frame, k), of.largest));
            if (r == 0.0) return;
            count += r;
            for (int d = 0; d < D_; ++d) {
                add_moments(r, x(frame, d) - row[2 * d], first[d], second[d]);
            }
        });
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
    std::vector<uint32_t> features_;
    float scores_[kTileFrames][kTileComponents];
    std::vector<uint32_t> mask_;
    std::vector<FrameSum> sums_;
    std::vector<Normaliser> normalisers_;
    std::vector<double> likelihoods_;
    std::vector<double> counts_, first_, second_;
};

}  // namespace

template <typename T>
int64_t em_statistics_emulated(const Matrix<T>& frames, const Operands& mixture, const Mode& mode,
                               const Statistics& out) {
    Emulation<T> emulation(frames, mixture, mode);
    const int64_t pairs = emulation.run();
    emulation.write(out);
    return pairs;
}

template int64_t em_statistics_emulated(const Matrix<float>&, const Operands&, const Mode&,
                                        const Statistics&);
template int64_t em_statistics_emulated(const Matrix<double>&, const Operands&, const Mode&,
                                        const Statistics&);

}  // namespace gmm_jepa::cuda
