// Products of pairs of bfloat16 by AMX, 16 x 16 sums of 16 words of depth an instruction; included
// by kernels_impl.h after products_kernel.h and turn_kernel.h.
//
// Operands lie in memory as the vector loops have them: rows of words are what a tile of the left
// one holds, and panels, a vector of columns a word, what one of the right one does. Where words of
// the left one lie side by side by row, as for the gradients of weights, they are turned first.

// What the intrinsics read from memory GCC does not know: it is to be there before.
inline void as_written() { asm volatile("" ::: "memory"); }

// This thread's tiles, of `words` words of depth, for as long as it lives.
struct Tiles {
    explicit Tiles(int words) {
        struct alignas(64) Config {
            uint8_t palette, start_row, reserved[14];
            uint16_t bytes_a_row[16];
            uint8_t rows[16];
        } config = {};
        config.palette = 1;
        for (int i = 0; i < 4; ++i) set(config, i, kSide, kSide);       // sums
        for (int i = 4; i < 6; ++i) set(config, i, kSide, words);       // left
        for (int i = 6; i < 8; ++i) set(config, i, words, kSide);       // right
        as_written();
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    template <typename Config>
    static void set(Config& config, int tile, int rows, int words) {
        config.rows[tile] = uint8_t(rows);
        config.bytes_a_row[tile] = uint16_t(4 * words);
    }
};

// 32 or 16 rows (kBoth) by 32 or 16 columns (kWide) of sums, in the tiles 0 to 3.
template <bool kBoth, bool kWide>
struct Sums {
    // From rows `stride` floats apart; 0: from one row.
    static void load(const float* from, ptrdiff_t stride) {
        _tile_loadd(0, from, 4 * stride);
        if (kWide) _tile_loadd(1, from + kSide, 4 * stride);
        if (kBoth) _tile_loadd(2, from + kSide * stride, 4 * stride);
        if (kBoth && kWide) _tile_loadd(3, from + kSide * stride + kSide, 4 * stride);
    }
    static void store(float* to, ptrdiff_t stride) {
        _tile_stored(0, to, 4 * stride);
        if (kWide) _tile_stored(1, to + kSide, 4 * stride);
        if (kBoth) _tile_stored(2, to + kSide * stride, 4 * stride);
        if (kBoth && kWide) _tile_stored(3, to + kSide * stride + kSide, 4 * stride);
    }
    // Adds n products. Rows of `left` are `left_row` words apart, the lower half's begin `lower`
    // words on, the next product's `left_step` words; the same of `right`.
    static void add(const uint32_t* left, ptrdiff_t left_row, ptrdiff_t lower, ptrdiff_t left_step,
                    const uint32_t* right, ptrdiff_t right_row, ptrdiff_t right_step, int n) {
        for (; n > 0; --n, left += left_step, right += right_step) {
            _tile_loadd(4, left, 4 * left_row);
            _tile_loadd(6, right, 4 * right_row);
            _tile_dpbf16ps(0, 4, 6);
            if (kWide) {
                _tile_loadd(7, right + kSide, 4 * right_row);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (kBoth) {
                _tile_loadd(5, left + lower, 4 * left_row);
                _tile_dpbf16ps(2, 5, 6);
                if (kWide) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
};

// 32 or 16 frames by 32 components; sums start from the bias.
template <bool kBoth>
inline void screen_tiles(const gmm_jepa::ScreenProducts& p, const uint32_t* features,
                         const uint32_t* weights, const float* bias, float* scores) {
    Sums<kBoth, true>::load(bias, 0);
    Sums<kBoth, true>::add(features, p.n_words, kSide * ptrdiff_t(p.n_words), kSide, weights,
                           kPanel, kSide * kPanel, p.n_words / kSide);
    Sums<kBoth, true>::store(scores, ptrdiff_t(p.n_panels) * kPanel);
}

// As `screen`, of frames in groups that the caller keeps small.
void screen_by_tiles(const gmm_jepa::ScreenProducts& p) {
    constexpr int kMost = 64;
    const Tiles tiles(kSide);
    const ptrdiff_t stride = ptrdiff_t(p.n_panels) * kPanel;
    for (int start = 0; start < p.n_frames; start += kMost) {
        const int stop = start + kMost < p.n_frames ? start + kMost : p.n_frames;
        Floats most[kMost];
        for (int f = 0; f < kMost; ++f) most[f] = Floats{} - __builtin_inff();
        for (int panel = 0; panel < p.n_panels; ++panel) {
            const uint32_t* weights = p.weights + ptrdiff_t(panel) * p.n_words * kPanel;
            for (int f = start; f < stop;) {
                const uint32_t* features = p.features + ptrdiff_t(f) * p.n_words;
                float* scores = p.scores + f * stride + panel * kPanel;
                const float* bias = p.bias + panel * kPanel;
                const bool both = f + 2 * kSide <= stop;
                for (int k = 0; k < kPanel; k += 2 * kSide) {
                    if (both) {
                        screen_tiles<true>(p, features, weights + k, bias + k, scores + k);
                    } else {
                        screen_tiles<false>(p, features, weights + k, bias + k, scores + k);
                    }
                }
                const int next = f + (both ? 2 : 1) * kSide;
                for (; f < next; ++f, scores += stride) {
                    for (int k = 0; k < kPanel; k += kLanes) {
                        most[f - start] = larger(*reinterpret_cast<const Floats*>(scores + k),
                                                 most[f - start]);
                    }
                }
            }
        }
        for (int f = start; f < stop; ++f) p.best[f] = _mm512_reduce_max_ps((__m512)most[f - start]);
    }
}

constexpr gmm_jepa::Screen kTileScreen = {gmm_jepa::Operands::kBfloat16,
                                          kPanel,
                                          kSide,
                                          64,
                                          kSide,
                                          pack<Bfloat16, float>,
                                          pack<Bfloat16, double>,
                                          screen_by_tiles};

// Some rows, all panels and taps, of products whose rows have their words side by side.
template <bool kBoth, bool kWide>
void row_tiles(const gmm_jepa::PairProducts& p, int row, int step) {
    typedef Sums<kBoth, kWide> Tiled;
    constexpr int kColumns = kWide ? 2 * kSide : kSide;
    const uint32_t* b = p.b;
    float* c = p.c + row * p.stride_c;
    for (int panel = 0; panel < p.n_panels; ++panel, c += kColumns) {
        p.accumulate ? Tiled::load(c, p.stride_c) : Tiled::load(p.bias + panel * kColumns, 0);
        const uint32_t* a = p.a + row * p.stride_a;
        for (int tap = 0; tap < p.n_taps; ++tap, a += p.stride_tap, b += p.n_k * kColumns) {
            Tiled::add(a, p.stride_a, kSide * p.stride_a, step, b, kColumns, step * kColumns,
                       p.n_k / step);
        }
        Tiled::store(c, p.stride_c);
    }
}

constexpr int kTurned = 16;  // tiles of depth that are turned together

// Adds the products of n <= kTurned tiles of depth from word k on, each of `words` words, for rows
// whose words lie side by side, of one tap.
template <bool kBoth, bool kWide>
void turned_tiles(const gmm_jepa::PairProducts& p, int row, int k, int n, int words) {
    typedef Sums<kBoth, kWide> Tiled;
    constexpr int kColumns = kWide ? 2 * kSide : kSide, kTile = kSide * kSide;
    alignas(64) uint32_t turned[2 * kTurned * kTile];
    for (int half = 0; half <= int(kBoth); ++half) {
        for (int i = 0; i < n; ++i) {
            const uint32_t* from = p.a + row + half * kSide + (k + i * kSide) * p.stride_k;
            uint32_t* to = turned + (half * kTurned + i) * kTile;
            if (words == kSide) {
                turn_words(from, p.stride_k, to, kSide);
                continue;
            }
            for (int w = 0; w < words; ++w) {
                for (int r = 0; r < kSide; ++r) to[r * kSide + w] = from[w * p.stride_k + r];
            }
        }
    }
    as_written();
    float* c = p.c + row * p.stride_c;
    const uint32_t* b = p.b + k * kColumns;
    for (int panel = 0; panel < p.n_panels; ++panel, c += kColumns, b += p.n_k * kColumns) {
        p.accumulate || k ? Tiled::load(c, p.stride_c) : Tiled::load(p.bias + panel * kColumns, 0);
        Tiled::add(turned, kSide, kTurned * kTile, kTile, b, kColumns, kSide * kColumns, n);
        Tiled::store(c, p.stride_c);
    }
}

template <bool kWide>
void products_by_tiles(const gmm_jepa::PairProducts& p, bool rows_of_words) {
    if (rows_of_words) {
        const int step = p.n_k % kSide ? kSide / 2 : kSide;
        const Tiles tiles(step);
        for (int row = 0; row < p.n_rows; row += 2 * kSide) {
            row + kSide < p.n_rows ? row_tiles<true, kWide>(p, row, step)
                                   : row_tiles<false, kWide>(p, row, step);
        }
        return;
    }
    for (int k = 0; k < p.n_k;) {
        const int left = p.n_k - k, words = left < kSide ? left : kSide;
        const int most = left / words, n = most < kTurned ? most : kTurned;
        const Tiles tiles(words);
        for (int row = 0; row < p.n_rows; row += 2 * kSide) {
            row + kSide < p.n_rows ? turned_tiles<true, kWide>(p, row, k, n, words)
                                   : turned_tiles<false, kWide>(p, row, k, n, words);
        }
        k += n * words;
    }
}

void pair_products_by_tiles(const gmm_jepa::PairProducts& p) {
    const bool rows_of_words = p.stride_k == 1 && p.n_k % (kSide / 2) == 0;
    const bool words_of_rows = p.stride_a == 1 && p.n_taps == 1 && p.n_rows % kSide == 0;
    if (!rows_of_words && !words_of_rows) return products<uint32_t>(p);
    p.half_panels ? products_by_tiles<false>(p, rows_of_words)
                  : products_by_tiles<true>(p, rows_of_words);
}
