/* Products of bfloat16 by the instruction that adds two products to each of sixteen sums (AVX512-BF16). Its right side comes in
   pairs of rows; of its left side it takes pairs that may lie anywhere, so that nothing is transposed for it.

   An operation's native.c includes this after native.h. From here on the compiler may use the instruction, and those of tiles.h
   where they are TILED; native.c ends that by its own pop. */

#ifndef __clang__
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")
#ifdef TILED
#pragma GCC target("amx-tile,amx-bf16")
#endif
#elif defined TILED
#pragma clang attribute push(                                                                                                  \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma"))), apply_to = function)
#endif

#define BLOCK 32 /* columns of a product at a time: two vectors of sums */
#define ROWS 8   /* of a product at a time: 16 vectors of sums, enough for the instruction's latency */

#define INLINE static inline __attribute__((always_inline))

/* to[i][:] = (or += where `add`) sum over k < pairs of left[i][k][0] right[k][:][0] + left[i][k][1] right[k][:][1], for i <
   rows, a multiple of ROWS, and BLOCK columns. row and pair are left's strides, pitch is to's. */
INLINE void matrix(const uint16_t *left, const int64_t row, const int64_t pair, int64_t rows, const uint16_t *right,
                   int64_t pairs, float *to, const int64_t pitch, int add)
{
    for (int64_t first = 0; first < rows; first += ROWS, left += ROWS * row, to += ROWS * pitch) {
        __m512 sums[ROWS][2];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
            sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        for (int64_t k = 0; k < pairs; k++) {
            const __m512bh a = (__m512bh)_mm512_loadu_si512(right + 2 * BLOCK * k);
            const __m512bh b = (__m512bh)_mm512_loadu_si512(right + 2 * BLOCK * k + BLOCK);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                int32_t both;
                memcpy(&both, left + i * row + k * pair, 4);
                const __m512bh factor = (__m512bh)_mm512_set1_epi32(both);
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], factor, a);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], factor, b);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                float *at = to + i * pitch + 16 * j;
                _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sums[i][j]) : sums[i][j]);
            }
    }
}

/* The places 0, n, 1, n + 1, ..., 15, n + 15. */
INLINE __m512i alternating(int n)
{
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(n)), 16));
}

/* Two rows of BLOCK numbers in pairs. */
INLINE void pair_up(__m512i a, __m512i b, uint16_t *to)
{
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, alternating(32), b));
    _mm512_storeu_si512(to + BLOCK, _mm512_permutex2var_epi16(a, _mm512_add_epi16(alternating(32), _mm512_set1_epi16(16)), b));
}

/* 16 x 16 values of 32 bits transposed. */
INLINE void transpose(__m512i rows[16])
{
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* b[i + c]: of rows i to i + 3 column c of each 128 bits */
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i p = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), q = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i r = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd), s = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(p, q, 0x88);
        rows[4 + c] = _mm512_shuffle_i32x4(r, s, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(p, q, 0xdd);
        rows[12 + c] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
}

/* The same of values that lie `pitch` bfloat16 apart from row to row, to where they lie `apart` apart. */
INLINE void turn(const void *from, int64_t pitch, void *to, int64_t apart)
{
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        rows[i] = _mm512_loadu_si512((const uint16_t *)from + i * pitch);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        _mm512_storeu_si512((uint16_t *)to + i * apart, rows[i]);
}

/* Have rows of `width` numbers fetched that lie too far apart for the processor to guess which come next. */
INLINE void fetch(const uint16_t *rows, int64_t pitch, int64_t n, int64_t width)
{
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < width; i += 32)
            _mm_prefetch((const char *)(rows + t * pitch + i), _MM_HINT_T1);
}
