/* Attention without gradients for processors that multiply bfloat16 (AVX512-BF16); called through ctypes by native.py.

   Of one head six queries at a time: their scores with every key (float32), the largest, exponentials and their sum
   (float32), rounded to bfloat16, times the values. Both products are one loop, `product`: 6 x 64 sums in registers, where
   an instruction adds two products to each of sixteen sums. It wants its right side in pairs of rows, so keys and values
   are laid out anew once for each head: a small part of the work from some hundred tokens on. */

#include "../native.h"

#define WIDTH 64 /* of a head; also the keys whose scores are made at a time */
#define ROWS 6   /* queries at a time: 24 vectors of sums and 5 of factors of the 32 registers */

/* qkv is (B, L, 3 H 64) and out (B, L, H 64), both contiguous bfloat16. A task is one of `parts` of a head's queries. */
struct attention {
    int64_t B, L, H, parts;
    const uint16_t *qkv;
    uint16_t *out;
};

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")
#endif

/* sums[i][:] = sum over k < pairs of left[i][2 k] right[k][:][0] + left[i][2 k + 1] right[k][:][1], for 64 columns. */
static inline __attribute__((always_inline)) void product(const uint16_t *left, int64_t pitch, const uint16_t *right,
                                                          int64_t pairs, __m512 sums[ROWS][4])
{
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sums[i][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh of[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            of[j] = (__m512bh)_mm512_loadu_si512(right + 128 * k + 32 * j);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            int32_t both;
            memcpy(&both, left + i * pitch + 2 * k, 4);
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sums[i][j] = _mm512_dpbf16_ps(sums[i][j], factor, of[j]);
        }
    }
}

/* 2^x to 3 units in the last place, 0 from -127 down, NaN for NaN: as in selective_scan/native_body.h. */
static inline __m512 power(__m512 x)
{
    const __m512 magic = _mm512_set1_ps(12582912.0f + 127.0f);
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);
    const __m512 shifted = _mm512_add_ps(x, magic), f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(1.5353361941e-4f), _mm512_set1_ps(1.3398874444e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6184373578e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503324711e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022647914e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314720286e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

/* A row of n scores: exp((score - largest) / 8) as bfloat16, 0 from n to padded; returns one over their sum. */
static inline float softmax(float *scores, int64_t n, int64_t padded, uint16_t *out)
{
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    const __m512 scale = _mm512_set1_ps(0.125f * 1.44269504f); /* 1 / sqrt(64), and 2^x for e^x */
    for (int64_t k = n; k < padded; k++)
        scores[k] = -INFINITY;
    for (int64_t k = 0; k < padded; k += 16)
        most = _mm512_max_ps(most, _mm512_loadu_ps(scores + k));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t k = 0; k < padded; k += 32) {
        const __m512 a = power(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + k), largest), scale));
        const __m512 b = power(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + k + 16), largest), scale));
        total = _mm512_add_ps(total, _mm512_add_ps(a, b));
        _mm512_storeu_si512(out + k, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    return 1.0f / _mm512_reduce_add_ps(total);
}

/* Keys in blocks of 64, of each block pair after pair of a key's numbers; values in pairs of keys. Both 0 beyond L. */
static void lay_out(const uint16_t *k, const uint16_t *v, int64_t row, int64_t L, int64_t padded, uint16_t *keys,
                    uint16_t *values)
{
    memset(keys, 0, 2 * WIDTH * padded);
    memset(values, 0, 2 * WIDTH * padded);
    for (int64_t t = 0; t < L; t++) {
        uint16_t *block = keys + t / WIDTH * WIDTH * WIDTH + 2 * (t % WIDTH), *pair = values + t / 2 * 2 * WIDTH + t % 2;
        for (int64_t p = 0; p < WIDTH / 2; p++)
            memcpy(block + 2 * WIDTH * p, k + t * row + 2 * p, 4);
        for (int64_t d = 0; d < WIDTH; d++)
            pair[2 * d] = v[t * row + d];
    }
}

static void attention(const void *job, int64_t task, float *scratch)
{
    const struct attention *w = job;
    const int64_t L = w->L, padded = round_up(L, WIDTH), row = 3 * w->H * WIDTH;
    const int64_t head = task / w->parts % w->H, clip = task / w->parts / w->H, part = task % w->parts;
    const uint16_t *q = w->qkv + clip * L * row + head * WIDTH;
    const int64_t groups = (L + ROWS - 1) / ROWS, first = groups * part / w->parts, end = groups * (part + 1) / w->parts;
    if (first == end)
        return;
    float *scores = scratch; /* (ROWS, padded) */
    uint16_t *weights = (uint16_t *)(scores + ROWS * padded), *queries = weights + ROWS * padded;
    uint16_t *keys = queries + ROWS * WIDTH, *values = keys + WIDTH * padded;
    lay_out(q + w->H * WIDTH, q + 2 * w->H * WIDTH, row, L, padded, keys, values);
    for (int64_t t = first * ROWS; t < end * ROWS; t += ROWS) {
        const int64_t rows = L - t < ROWS ? L - t : ROWS;
        float one_over[ROWS];
        __m512 sums[ROWS][4];
        for (int64_t i = 0; i < ROWS; i++) /* the last query again where there are fewer */
            memcpy(queries + WIDTH * i, q + (t + (i < rows ? i : rows - 1)) * row, 2 * WIDTH);
        for (int64_t at = 0; at < padded; at += WIDTH) {
            product(queries, WIDTH, keys + at * WIDTH, WIDTH / 2, sums);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    _mm512_storeu_ps(scores + i * padded + at + 16 * j, sums[i][j]);
        }
        for (int64_t i = 0; i < ROWS; i++)
            one_over[i] = softmax(scores + i * padded, L, padded, weights + i * padded);
        product(weights, padded, values, padded / 2, sums);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                if (i < rows)
                    _mm256_storeu_si256(
                        (__m256i *)(w->out + ((clip * L + t + i) * w->H + head) * WIDTH + 16 * j),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[i][j], _mm512_set1_ps(one_over[i]))));
    }
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* Whether the processor has the instructions. */
int64_t fftp_bfloat16(void)
{
    return fftp_widest() == AVX512 && __builtin_cpu_supports("avx512bf16");
}
#else
static void attention(const void *job, int64_t task, float *scratch) {}

int64_t fftp_bfloat16(void) { return 0; }
#endif

int64_t fftp_attention(const struct attention *w, int64_t set, int64_t threads, parallel region)
{
    const int64_t padded = round_up(w->L, WIDTH);
    const int64_t floats = ROWS * padded + (ROWS * padded + ROWS * WIDTH + 2 * WIDTH * padded) / 2;
    return run_all(attention, w, w->B * w->H * w->parts, floats, threads, region);
}
