// Rows of words turned into columns; included by kernels_impl.h.

constexpr int kSide = 16;  // words a way; also rows, columns and words of an AMX tile

// to[w][r] = from[r][w] of 16 x 16 words, rows so many words apart.
#if GMM_JEPA_BYTES == 64
void turn_words(const uint32_t* from, ptrdiff_t stride, uint32_t* to, ptrdiff_t to_stride) {
    __m512i row[kSide], pair[kSide];
    for (int i = 0; i < kSide; ++i) row[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < kSide; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    // row[4 g + c]: column c of each four, of rows 4 g .. 4 g + 3
    for (int g = 0; g < kSide; g += 4) {
        row[g] = _mm512_unpacklo_epi64(pair[g], pair[g + 2]);
        row[g + 1] = _mm512_unpackhi_epi64(pair[g], pair[g + 2]);
        row[g + 2] = _mm512_unpacklo_epi64(pair[g + 1], pair[g + 3]);
        row[g + 3] = _mm512_unpackhi_epi64(pair[g + 1], pair[g + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512i a = _mm512_shuffle_i32x4(row[c], row[c + 4], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(row[c + 8], row[c + 12], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(row[c], row[c + 4], 0xee);
        const __m512i e = _mm512_shuffle_i32x4(row[c + 8], row[c + 12], 0xee);
        _mm512_storeu_si512(to + c * to_stride, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + (c + 4) * to_stride, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + (c + 8) * to_stride, _mm512_shuffle_i32x4(d, e, 0x88));
        _mm512_storeu_si512(to + (c + 12) * to_stride, _mm512_shuffle_i32x4(d, e, 0xdd));
    }
}
#else
void turn_words(const uint32_t* from, ptrdiff_t stride, uint32_t* to, ptrdiff_t to_stride) {
    for (int w = 0; w < kSide; ++w) {
        for (int r = 0; r < kSide; ++r) to[w * to_stride + r] = from[r * stride + w];
    }
}
#endif
