// 64 bits that tell arrays apart by their bytes; included by kernels_impl.h.
//
// Much as XXH3 does (Collet): a word of 64 bits, turned by a key of its place, gives the product of
// its two halves, and each lane turns its sum of products before the next is added. The words are
// added up beside them, for a half that is 0 hides the other. To cancel, changes must agree in both
// sums: no choice of bits alone arranges that (tests/native/test_fingerprint.py). Nothing for where
// somebody wants arrays to agree.

typedef uint64_t Lanes __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));

inline Lanes product_of_halves(Lanes words) {
#if GMM_JEPA_BYTES == 64
    return (Lanes)_mm512_mul_epu32((__m512i)words, _mm512_srli_epi64((__m512i)words, 32));
#elif GMM_JEPA_BYTES == 32
    return (Lanes)_mm256_mul_epu32((__m256i)words, _mm256_srli_epi64((__m256i)words, 32));
#else
    return (words & 0xffffffffu) * (words >> 32);
#endif
}

// By every bit of the word and of the hash (the finaliser of SplitMix64, Steele and others).
inline uint64_t folded(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111ebu;
    return hash ^ hash >> 31;
}

uint64_t fingerprint(const void* data, size_t n_bytes) {
    constexpr int kVectors = GMM_JEPA_BYTES == 64 ? 8 : 4;  // side by side: sums wait for nothing
    constexpr size_t kBlock = kVectors * GMM_JEPA_BYTES, kWords = kBlock / 8;
    constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio, odd
    uint64_t places[kWords];
    for (size_t i = 0; i < kWords; ++i) places[i] = folded(i, kStep);
    Lanes keys[kVectors], products[kVectors] = {}, sums[kVectors] = {};
    __builtin_memcpy(keys, places, kBlock);
    const auto take = [&](const char* block) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            const Lanes words = *reinterpret_cast<const Lanes*>(block + i * GMM_JEPA_BYTES);
            products[i] = (products[i] << 29 | products[i] >> 35) + product_of_halves(words ^ keys[i]);
            sums[i] += words;
            keys[i] += kStep;
        }
    };
    const char* from = static_cast<const char*>(data);
    size_t left = n_bytes;
    for (; left >= kBlock; left -= kBlock, from += kBlock) take(from);
    alignas(64) char last[kBlock] = {};
    __builtin_memcpy(last, from, left);
    take(last);
    uint64_t hash = n_bytes;
    const auto fold = [&](const Lanes* of) {
        __builtin_memcpy(places, of, kBlock);
        for (const uint64_t word : places) hash = folded(hash, word);
    };
    fold(products);
    fold(sums);
    return hash;
}
