/* What native.c multiplies and adds up, on one head's numbers: products, layouts, the softmax and its slopes.

   By vectors each product is `matrix` (../matrix.h), whose left side may lie anywhere: P and dS are never transposed. By tiles
   (../tiles.h) it is `tile_matrix`, whose left side lies in rows: V and K are transposed, once a head. BLOCK is queries here. */

#include "../matrix.h"

#define WIDTH 64     /* of a head */
#define NEAR_KEYS 64 /* whose scores with BLOCK queries are looked at while they are near: 8 KB */

#ifdef TILED
#include "../tiles.h"
#else
#define STEP ROWS
INLINE void tiles_on(void) {}
INLINE void tiles_off(void) {}
INLINE void tile_matrix(const uint16_t *left, int64_t row, int64_t rows, const uint16_t *right, int64_t pairs, float *to,
                        int64_t pitch, int add)
{
}
#endif

/* to (rows, BLOCK) = left (rows, 2 pairs) right; row is left's stride. */
INLINE void product(const int tiles, const uint16_t *left, const int64_t row, int64_t rows, const uint16_t *right,
                    int64_t pairs, float *to)
{
    if (tiles)
        tile_matrix(left, row, rows, right, pairs, to, BLOCK, 0);
    else
        matrix(left, row, 2, rows, right, pairs, to, BLOCK, 0);
}

/* to (rows, WIDTH) = (or += where `add`) left (rows, BLOCK) right, which comes in halves. */
INLINE void wide_product(const int tiles, const uint16_t *left, int64_t rows, const uint16_t *right, float *to, int add)
{
    for (int64_t half = 0; half < 2; half++, right += BLOCK * BLOCK, to += BLOCK)
        if (tiles)
            tile_matrix(left, BLOCK, rows, right, BLOCK / 2, to, WIDTH, add);
        else
            matrix(left, BLOCK, 2, rows, right, BLOCK / 2, to, WIDTH, add);
}

/* to (BLOCK, WIDTH) = the transpose of pairs (keys / 2, BLOCK, 2) times a head's rows, which come as `paired` lays them out, and
   by tiles `across` as well. n: how many of the BLOCK are wanted. */
INLINE void mixture(const int tiles, const uint16_t *pairs, int64_t keys, int64_t n, const uint16_t *paired,
                    const uint16_t *across, float *to)
{
    if (tiles) {
        float sums[WIDTH * BLOCK] __attribute__((aligned(64)));
        tile_matrix(across, keys, WIDTH, pairs, keys / 2, sums, BLOCK, 0);
        for (int64_t d = 0; d < WIDTH; d += 16)
            for (int64_t t = 0; t < n; t += 16)
                turn(sums + d * BLOCK + t, 2 * BLOCK, to + t * WIDTH + d, 2 * WIDTH);
    } else {
        for (int64_t half = 0; half < 2; half++)
            matrix(pairs, 2, 2 * BLOCK, round_up(n, ROWS), paired + half * keys * BLOCK, keys / 2, to + half * BLOCK, WIDTH, 0);
    }
}

/* 2^x for x <= 0 to 3e-6 of itself, 1 for 0, 0 from -150 down, NaN for NaN. */
INLINE __m512 power(__m512 x)
{
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); /* x less the integer below it, 0 for an infinite x */
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(1.3426685706e-2f), _mm512_set1_ps(5.2242472768e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4128021300e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9304484129e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x); /* times 2 to that integer */
}

/* Two vectors as bfloat16, a number of the one beside one of the other. */
INLINE __m512i zipped(__m512 a, __m512 b)
{
    return _mm512_permutexvar_epi16(alternating(16), (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

/* A head's rows, with the bias, one behind the other: (padded, WIDTH), 0 from `rows` on. */
static void take(const uint16_t *x, int64_t pitch, const float *bias, int64_t rows, int64_t padded, uint16_t *to)
{
    const __m512i count = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i upper = _mm512_set1_epi32(-65536);
    __m512 even[2], odd[2];
    for (int i = 0; bias && i < 2; i++) {
        const __m512 a = _mm512_loadu_ps(bias + 32 * i), b = _mm512_loadu_ps(bias + 32 * i + 16);
        even[i] = _mm512_permutex2var_ps(a, count, b);
        odd[i] = _mm512_permutex2var_ps(a, _mm512_add_epi32(count, _mm512_set1_epi32(1)), b);
    }
    for (int64_t t = 0; t < rows; t++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i both = _mm512_loadu_si512(x + t * pitch + 32 * i);
            if (bias)
                both = zipped(_mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even[i]),
                              _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd[i]));
            _mm512_storeu_si512(to + t * WIDTH + 32 * i, both);
        }
    memset(to + rows * WIDTH, 0, 2 * WIDTH * (padded - rows));
}

/* (n, WIDTH) in pairs of rows, as the right side of wide_matrix: (2, n / 2, BLOCK, 2). */
static void paired(const uint16_t *rows, int64_t n, uint16_t *to)
{
    for (int64_t d = 0; d < WIDTH; d += BLOCK)
        for (int64_t t = 0; t < n; t += 2, to += 2 * BLOCK)
            pair_up(_mm512_loadu_si512(rows + t * WIDTH + d), _mm512_loadu_si512(rows + (t + 1) * WIDTH + d), to);
}

/* (BLOCK, WIDTH) transposed, a pair of a row's numbers staying one, as the right side of matrix: (WIDTH / 2, BLOCK, 2). */
static void turned(const uint16_t *rows, uint16_t *to)
{
    for (int64_t t = 0; t < BLOCK; t += 16)
        for (int64_t d = 0; d < WIDTH; d += 32)
            turn(rows + t * WIDTH + d, WIDTH, to + d * BLOCK + 2 * t, 2 * BLOCK);
}

/* (n, WIDTH) transposed, (WIDTH, n), from what `paired` made of it; n is a multiple of 32. */
static void across(const uint16_t *paired, int64_t n, uint16_t *to)
{
    for (int64_t d = 0; d < WIDTH; d += 16)
        for (int64_t t = 0; t < n; t += 32)
            turn(paired + (d / BLOCK * n + t) * BLOCK + d % BLOCK * 2, 2 * BLOCK, to + d * n + t, n);
}

/* Rows of WIDTH sums, each times its scale, as bfloat16; totals adds up each column. scales and totals may be NULL. */
static void put(const float *from, int64_t rows, const float *scales, uint16_t *to, int64_t pitch, float *totals)
{
    __m512 columns[4];
    for (int j = 0; j < 4; j++)
        columns[j] = _mm512_setzero_ps();
    for (int64_t t = 0; t < rows; t++) {
        const __m512 scale = _mm512_set1_ps(scales ? scales[t] : 1);
        __m512 row[4];
        for (int j = 0; j < 4; j++) {
            row[j] = _mm512_mul_ps(_mm512_loadu_ps(from + t * WIDTH + 16 * j), scale);
            columns[j] = _mm512_add_ps(columns[j], row[j]);
        }
        _mm512_storeu_si512(to + t * pitch, (__m512i)_mm512_cvtne2ps_pbh(row[1], row[0]));
        _mm512_storeu_si512(to + t * pitch + 32, (__m512i)_mm512_cvtne2ps_pbh(row[3], row[2]));
    }
    for (int j = 0; totals && j < 4; j++)
        _mm512_storeu_ps(totals + 16 * j, _mm512_add_ps(_mm512_loadu_ps(totals + 16 * j), columns[j]));
}

/* Scores (keys, BLOCK) = k q, and the largest of each query, of keys that the nearest cache still has. A key that makes an odd
   L even is given -infinity. */
INLINE void scored(const int tiles, const uint16_t *k, int64_t L, int64_t keys, const uint16_t *q_turned, float *scores,
                   __m512 most[2])
{
    most[0] = most[1] = _mm512_set1_ps(-INFINITY);
    for (int64_t first = 0; first < keys; first += NEAR_KEYS) {
        float *row = scores + first * BLOCK, *end = scores + least(first + NEAR_KEYS, L) * BLOCK;
        product(tiles, k + first * WIDTH, WIDTH, least(NEAR_KEYS, keys - first), q_turned, WIDTH / 2, row);
        for (; row < end; row += BLOCK)
            for (int c = 0; c < 2; c++)
                most[c] = _mm512_max_ps(most[c], _mm512_loadu_ps(row + 16 * c));
    }
    for (float *row = scores + L * BLOCK; row < scores + round_up(L, 2) * BLOCK; row += 16)
        _mm512_storeu_ps(row, _mm512_set1_ps(-INFINITY));
}

/* exp((score - most) / 8), 1 for the largest itself: a single token leaves its q and k exactly no gradient. */
INLINE __m512 exponential(const float *score, __m512 most)
{
    const __m512 scale = _mm512_set1_ps(0.125f * 1.44269504f); /* 1 / sqrt(WIDTH), and 2^x for e^x */
    return power(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(score), most), scale));
}

INLINE __m512i narrowed(const __m512 row[2]) { return (__m512i)_mm512_cvtne2ps_pbh(row[1], row[0]); }

/* 0 in rows `from` to `to` of BLOCK numbers. */
INLINE void clear(uint16_t *rows, int64_t from, int64_t to)
{
    memset(rows + from * BLOCK, 0, 2 * (size_t)((to - from) * BLOCK));
}

/* Scores (keys, BLOCK) to exp((score - largest) / 8) in pairs of keys, (keys / 2, BLOCK, 2), and one over their sums. */
static void softmax(const float *scores, const __m512 most[2], int64_t L, int64_t keys, uint16_t *weights, float *one_over)
{
    __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const int64_t even = round_up(L, 2);
    for (int64_t k = 0; k < even; k += 2) {
        __m512 a[2], b[2];
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            a[c] = exponential(scores + k * BLOCK + 16 * c, most[c]);
            b[c] = exponential(scores + (k + 1) * BLOCK + 16 * c, most[c]);
            totals[c] = _mm512_add_ps(totals[c], _mm512_add_ps(a[c], b[c]));
        }
        pair_up(narrowed(a), narrowed(b), weights + k * BLOCK);
    }
    clear(weights, even, keys);
    for (int c = 0; c < 2; c++)
        _mm512_storeu_ps(one_over + 16 * c, _mm512_div_ps(_mm512_set1_ps(1), totals[c]));
}

/* Scores and dP, both (keys, BLOCK), to P and dS, and dS in pairs of keys. */
static void slopes(float *scores, const __m512 most[2], const float *d_weights, int64_t L, int64_t keys, uint16_t *weights,
                   uint16_t *d_scores, uint16_t *pairs)
{
    __m512 one_over[2], means[2], totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const int64_t even = round_up(L, 2);
    means[0] = means[1] = totals[0];
    for (int64_t at = 0; at < even * BLOCK; at += BLOCK)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            const __m512 e = exponential(scores + at + 16 * c, most[c]);
            totals[c] = _mm512_add_ps(totals[c], e);
            means[c] = _mm512_fmadd_ps(e, _mm512_loadu_ps(d_weights + at + 16 * c), means[c]);
            _mm512_storeu_ps(scores + at + 16 * c, e);
        }
    const __m512 eighth = _mm512_set1_ps(0.125f); /* 1 / sqrt(WIDTH) */
    for (int c = 0; c < 2; c++) {
        one_over[c] = _mm512_div_ps(_mm512_set1_ps(1), totals[c]);
        means[c] = _mm512_mul_ps(_mm512_mul_ps(means[c], one_over[c]), eighth);
    }
    for (int64_t at = 0; at < even * BLOCK; at += 2 * BLOCK) {
        __m512i rows[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512 p[2], ds[2];
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++) {
                const int64_t here = at + i * BLOCK + 16 * c;
                p[c] = _mm512_mul_ps(_mm512_loadu_ps(scores + here), one_over[c]);
                ds[c] = _mm512_mul_ps(p[c], _mm512_fmsub_ps(_mm512_loadu_ps(d_weights + here), eighth, means[c]));
            }
            rows[i] = narrowed(ds);
            _mm512_storeu_si512(weights + at + i * BLOCK, narrowed(p));
            _mm512_storeu_si512(d_scores + at + i * BLOCK, rows[i]);
        }
        pair_up(rows[0], rows[1], pairs + at);
    }
    clear(weights, even, keys);
    clear(d_scores, even, keys);
    clear(pairs, even, keys);
}
