// 64 bits that tell arrays apart by their bytes; included by kernels_impl.h.
//
// Words 512 bytes apart (with 64-byte vectors) go through one of many sequences, each a bijection of
// every word: one changed word changes its sequence, several of one sequence give what was there
// before once in 2^32, and of more than one once in 2^64. Nothing for where somebody wants them equal.

inline uint64_t folded(uint64_t hash, uint64_t word) {
    const uint64_t both = hash ^ word;
    return (both << 29 | both >> 35) * 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio, odd
}

uint64_t fingerprint(const void* data, size_t n_bytes) {
    typedef uint32_t Words __attribute__((vector_size(GMM_JEPA_BYTES), aligned(4), may_alias));
    constexpr int kSequences = 8;  // vectors side by side: one would wait for each product
    constexpr size_t kBlock = kSequences * GMM_JEPA_BYTES;
    Words hashes[kSequences] = {};
    const auto take = [&](const char* block) {
#pragma GCC unroll 8
        for (int i = 0; i < kSequences; ++i) {
            const Words both = hashes[i] ^ *reinterpret_cast<const Words*>(block + i * GMM_JEPA_BYTES);
            hashes[i] = (both << 13 | both >> 19) * 0x9e3779b1u;
        }
    };
    const char* from = static_cast<const char*>(data);
    size_t left = n_bytes;
    for (; left >= kBlock; left -= kBlock, from += kBlock) take(from);
    alignas(64) char last[kBlock] = {};
    __builtin_memcpy(last, from, left);
    take(last);
    uint32_t words[kBlock / 4];
    __builtin_memcpy(words, hashes, kBlock);
    uint64_t hash = n_bytes;
    for (const uint32_t word : words) hash = folded(hash, word);
    return folded(hash, hash >> 32);
}
