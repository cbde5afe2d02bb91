/* The GELU for one width of vector; native.c has this file included once for each instruction set (../native.h).

   With a = |z|, gelu(z) = max(z, 0) - a Phi(-a), and its slope Phi(z) + z phi(z) at -a is 1 less the slope at a. So there
   are two functions of a alone, and native.py has cut each into SEGMENTS polynomials around n / 2: n = round(2 a), and
   f = 2 a - n between -0.5 and 0.5. The last segment is 0, and stands for everything behind it. A NaN stays one. */

#include "../lanes.h"

#define LAST 7.625f       /* inside of the last segment */
#define SHIFT 12582912.0f /* 1.5 * 2^23: added to a small number, it rounds it to an integer, which the low bits hold */

typedef uint32_t NAME(loose_words) __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t NAME(numbers) __attribute__((vector_size(4 * LANES)));

/* numbers[n] of SEGMENTS numbers, for the lowest bits n of each index. */
FN VEC NAME(look_up)(const float *numbers, NAME(words) index)
{
#if LANES == 16
    return (VEC)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(numbers));
#elif LANES == 8
    const __m256 near = _mm256_permutevar8x32_ps(_mm256_loadu_ps(numbers), (__m256i)index);
    const __m256 far = _mm256_permutevar8x32_ps(_mm256_loadu_ps(numbers + 8), (__m256i)index);
    return (VEC)_mm256_blendv_ps(near, far, (__m256)(index << 28));
#else
    VEC found;
    for (int lane = 0; lane < LANES; lane++)
        found[lane] = numbers[index[lane] % SEGMENTS];
    return found;
#endif
}

/* |z|, LAST at most. */
FN VEC NAME(distance)(VEC z)
{
    const VEC a = (VEC)((NAME(words))z & 0x7FFFFFFF), last = (VEC){0} + LAST;
#if LANES == 16
    return (VEC)_mm512_min_ps((__m512)last, (__m512)a); /* the second where one is NaN */
#elif LANES == 8
    return (VEC)_mm256_min_ps((__m256)last, (__m256)a);
#else
    const NAME(words) far = (NAME(words))(a > last);
    return (VEC)(((NAME(words))a & ~far) | ((NAME(words))last & far));
#endif
}

/* The function of a in this table: the coefficients of f^0, then of f^1, ... */
FN VEC NAME(function)(const float *table, VEC a)
{
    const VEC whole = FUSED(a, (VEC){0} + 2.0f, (VEC){0} + SHIFT), f = FUSED(a, (VEC){0} + 2.0f, SHIFT - whole);
    VEC y = NAME(look_up)(table + (TERMS - 1) * SEGMENTS, (NAME(words))whole);
    for (int i = TERMS - 2; i >= 0; i--)
        y = FUSED(f, y, NAME(look_up)(table + i * SEGMENTS, (NAME(words))whole));
    return y;
}

FN VEC NAME(value)(const float *table, VEC z)
{
    const NAME(words) below = (NAME(words))((NAME(numbers))z >> 31);
    const VEC a = NAME(distance)(z);
    return FUSED(-a, NAME(function)(table, a), (VEC)((NAME(words))z & ~below));
}

FN VEC NAME(slope)(const float *table, VEC z)
{
    const NAME(words) above = ~(NAME(words))((NAME(numbers))z >> 31);
    const VEC there = NAME(function)(table, NAME(distance)(z));
    return (VEC)((NAME(words))((VEC){0} + 1.0f) & above) + (VEC)((NAME(words))there ^ (above & 0x80000000));
}

/* Where a row's element i lies among vectors: two vectors of bfloat16 are read at once, even elements and odd ones, since
   a shift or a mask makes float32 of them. */
FN int64_t NAME(place)(int64_t i, int64_t narrow)
{
    const int64_t j = i % (2 * LANES);
    return narrow ? i - j + j % 2 * LANES + j / 2 : i;
}

/* Elements at .. at + n - 1 as two vectors; the lanes past them 0. */
FN void NAME(load_two)(VEC *x, const void *from, int64_t at, int64_t n, int64_t narrow)
{
    if (narrow) {
        NAME(words) both = {0};
        if (n == 2 * LANES)
            both = *(const NAME(loose_words) *)((const uint16_t *)from + at);
        else
            memcpy(&both, (const uint16_t *)from + at, 2 * (size_t)n);
        x[0] = (VEC)(both << 16);
        x[1] = (VEC)(both & 0xFFFF0000);
    } else {
        x[0] = NAME(load)(from, at, n < LANES ? n : LANES, 0);
        x[1] = n > LANES ? NAME(load)(from, at + LANES, n - LANES, 0) : (VEC){0};
    }
}

/* To bfloat16 it rounds to nearest even. A NaN stays one as long as it came from bfloat16 or is the usual one: its low bits
   are 0, and rounding does not run over. */
FN void NAME(store_two)(void *to, int64_t at, int64_t n, int64_t narrow, const VEC *x)
{
    if (narrow) {
        NAME(words) low = (NAME(words))x[0], high = (NAME(words))x[1];
        low += 0x7FFF + (low >> 16 & 1);
        high += 0x7FFF + (high >> 16 & 1);
        low = low >> 16 | (high & 0xFFFF0000);
        if (n == 2 * LANES)
            *(NAME(loose_words) *)((uint16_t *)to + at) = low;
        else
            memcpy((uint16_t *)to + at, &low, 2 * (size_t)n);
    } else {
        NAME(store)(to, at, n < LANES ? n : LANES, 0, x[0]);
        if (n > LANES)
            NAME(store)(to, at + LANES, n - LANES, 0, x[1]);
    }
}

FN void NAME(arrange)(VEC *to, const float *bias, int64_t D, int64_t narrow)
{
    float *numbers = (float *)to;
    for (int64_t i = 0; i < D; i++)
        numbers[NAME(place)(i, narrow)] = !bias ? 0 : bias[i] == bias[i] ? bias[i] : NAN; /* NAN: see store_two */
}

FN void NAME(values)(const struct gelu *w, const float *table, const VEC *bias, int64_t at, int64_t n, int64_t narrow)
{
    VEC z[2];
    NAME(load_two)(z, w->x, at, n, narrow);
    for (int k = 0; k < 2; k++)
        z[k] = NAME(value)(table, z[k] + bias[k]);
    NAME(store_two)(w->out, at, n, narrow, z);
}

FN void NAME(rows)(const struct gelu *w, int64_t first, int64_t last, VEC *bias, int64_t narrow)
{
    float table[TERMS * SEGMENTS];
    memcpy(table, w->table, sizeof table);
    NAME(arrange)(bias, w->bias, w->D, narrow);
    const int64_t D = w->D;
    for (int64_t r = first; r < last; r++) {
        int64_t i = 0;
        for (; i + 2 * LANES <= D; i += 2 * LANES)
            NAME(values)(w, table, bias + i / LANES, r * D + i, 2 * LANES, narrow);
        if (i < D)
            NAME(values)(w, table, bias + i / LANES, r * D + i, D - i, narrow);
    }
}

static void NAME(gelu)(const void *job, int64_t task, float *scratch)
{
    const struct gelu *w = job;
    const int64_t first = task * TASK_ROWS, last = first + TASK_ROWS < w->rows ? first + TASK_ROWS : w->rows;
    if (w->narrow)
        NAME(rows)(w, first, last, (VEC *)scratch, 1);
    else
        NAME(rows)(w, first, last, (VEC *)scratch, 0);
}

FN void NAME(slopes)(const struct gradients *w, const float *table, const VEC *bias, VEC *sum, int64_t at, int64_t n,
                     int64_t narrow)
{
    VEC z[2], d[2];
    NAME(load_two)(z, w->x, at, n, narrow);
    NAME(load_two)(d, w->grad, at, n, narrow);
    for (int k = 0; k < 2; k++) {
        d[k] *= NAME(slope)(table, z[k] + bias[k]);
        sum[k] += d[k];
    }
    NAME(store_two)(w->d_x, at, n, narrow, d);
}

FN void NAME(row_gradients)(const struct gradients *w, int64_t first, int64_t last, VEC *bias, int64_t narrow)
{
    float table[TERMS * SEGMENTS];
    memcpy(table, w->table, sizeof table);
    const int64_t D = w->D, vectors = (D + 2 * LANES - 1) / (2 * LANES) * 2;
    VEC *d_bias = bias + vectors, *part = d_bias + vectors;
    NAME(arrange)(bias, w->bias, D, narrow);
    for (int64_t i = 0; i < 2 * vectors; i++)
        d_bias[i] = (VEC){0};
    for (int64_t r = first; r < last; r++) {
        int64_t i = 0;
        for (; i + 2 * LANES <= D; i += 2 * LANES)
            NAME(slopes)(w, table, bias + i / LANES, part + i / LANES, r * D + i, 2 * LANES, narrow);
        if (i < D)
            NAME(slopes)(w, table, bias + i / LANES, part + i / LANES, r * D + i, D - i, narrow);
        if (r % PART_ROWS == PART_ROWS - 1 || r == last - 1)
            for (i = 0; i < vectors; i++) {
                d_bias[i] += part[i];
                part[i] = (VEC){0};
            }
    }
    if (w->d_bias)
        for (int64_t i = 0; i < D; i++)
            w->d_bias[first / TASK_ROWS * D + i] = ((float *)d_bias)[NAME(place)(i, narrow)];
}

static void NAME(gradients)(const void *job, int64_t task, float *scratch)
{
    const struct gradients *w = job;
    const int64_t first = task * TASK_ROWS, last = first + TASK_ROWS < w->rows ? first + TASK_ROWS : w->rows;
    if (w->narrow)
        NAME(row_gradients)(w, first, last, (VEC *)scratch, 1);
    else
        NAME(row_gradients)(w, first, last, (VEC *)scratch, 0);
}

#undef LAST
#undef SHIFT
#undef FN
#undef VEC
