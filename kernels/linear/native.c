/* The gradients of a linear layer's product in bfloat16, for processors that multiply it in vectors (AVX512-BF16); called
   through ctypes by native.py.

   Of out = x W^T, with x (rows, K), W (N, K) and grad (rows, N): d_x = grad W, d_W = grad^T x. Of the first the left side is read
   where it lies, and the weight is paired up anew each time, a hundredth of the work. Of the second both are, DEPTH rows at
   a time: its sums run over rows. */

#include "../native.h"

#define TASK_ROWS 64 /* of a product that one thread makes at a time */
#define DEPTH 128    /* rows of a gradient's sum at a time: they, in pairs and before, stay in the second-level cache */

/* d_x (rows, K) = grad (rows, N) weight (N, K), all contiguous bfloat16, N and K multiples of BLOCK; panels has room for N K
   numbers; threads: how many tasks are under way at a time. */
struct product {
    int64_t rows, N, K, threads;
    const uint16_t *grad, *weight;
    uint16_t *panels, *d_x;
};

/* d_weight (N, K) float32 = grad^T x of contiguous bfloat16 grad (rows, N) and x (rows, K), N and K multiples of BLOCK. A task
   is one of `parts` of the columns of the wider one. */
struct gradient {
    int64_t rows, N, K, parts;
    const uint16_t *grad, *x;
    float *d_weight;
};

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")
#endif

#include "../matrix.h"

/* Panels of pairs lie this far apart, in numbers: not by a power of two, or they would share sets of the nearest cache. */
#define LEFT (DEPTH * ROWS + 32)
#define RIGHT (DEPTH * BLOCK + 64)

/* One panel: BLOCK columns of the weight in pairs of rows, (N / 2, BLOCK, 2). */
static void panel(const void *job, int64_t task, float *scratch)
{
    (void)scratch;
    const struct product *w = job;
    const uint16_t *from = w->weight + task * BLOCK;
    uint16_t *to = w->panels + task * BLOCK * w->N;
    for (int64_t n = 0; n < w->N; n += 2, from += 2 * w->K, to += 2 * BLOCK)
        pair_up(_mm512_loadu_si512(from), _mm512_loadu_si512(from + w->K), to);
}

/* TASK_ROWS rows of d_x, panel by panel; meanwhile the rows that this thread reads next, and those it writes, are fetched. */
static void product(const void *job, int64_t task, float *scratch)
{
    const struct product *w = job;
    const int64_t N = w->N, K = w->K, first = task * TASK_ROWS;
    const int64_t n = least(TASK_ROWS, w->rows - first), whole = n / ROWS * ROWS;
    const int64_t then = least(first + w->threads * TASK_ROWS, w->rows), coming = least(TASK_ROWS, w->rows - then);
    const uint16_t *grad = w->grad + first * N;
    uint16_t *d_x = w->d_x + first * K, *rest = (uint16_t *)(scratch + TASK_ROWS * BLOCK);
    if (whole < n) {
        memcpy(rest, grad + whole * N, 2 * (size_t)((n - whole) * N));
        memset(rest + (n - whole) * N, 0, 2 * (size_t)((whole + ROWS - n) * N));
    }
    for (int64_t k = 0; k < K; k += BLOCK) {
        const uint16_t *right = w->panels + k * N;
        const int64_t from = coming * k / K, to = coming * (k + BLOCK) / K;
        fetch(d_x + k, K, n, BLOCK);
        fetch(w->grad + (then + from) * N, N, to - from, N);
        matrix(grad, N, 2, whole, right, N / 2, scratch, BLOCK, 0);
        if (whole < n)
            matrix(rest, N, 2, ROWS, right, N / 2, scratch + whole * BLOCK, BLOCK, 0);
        for (int64_t r = 0; r < n; r++) {
            const float *sums = scratch + r * BLOCK;
            const __m512i row = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums));
            _mm512_storeu_si512(d_x + r * K + k, row);
        }
    }
}

/* Columns first .. end - 1 of two rows in pairs, one behind the other in panels of `wide` columns, `apart` numbers apart. below
   is NULL behind the last row. */
INLINE void pair_rows(const uint16_t *row, const uint16_t *below, int64_t first, int64_t end, int64_t wide, int64_t apart,
                      uint16_t *to)
{
    for (int64_t i = first; i < end; i += BLOCK, to += BLOCK / wide * apart) {
        uint16_t both[2 * BLOCK];
        pair_up(_mm512_loadu_si512(row + i), below ? _mm512_loadu_si512(below + i) : _mm512_setzero_si512(), both);
        for (int64_t j = 0; j < BLOCK / wide; j++)
            memcpy(to + j * apart, both + j * 2 * wide, 4 * (size_t)wide);
    }
}

static void gradient(const void *job, int64_t task, float *scratch)
{
    const struct gradient *w = job;
    const int64_t N = w->N, K = w->K, blocks = (N < K ? K : N) / BLOCK;
    const int64_t first = blocks * task / w->parts * BLOCK, end = blocks * (task + 1) / w->parts * BLOCK;
    const int64_t n0 = N < K ? 0 : first, n1 = N < K ? N : end, k0 = N < K ? first : 0, k1 = N < K ? end : K;
    const int64_t tiles = (n1 - n0) / ROWS * ((k1 - k0) / BLOCK);
    uint16_t *left = (uint16_t *)scratch, *right = left + (n1 - n0) / ROWS * LEFT;
    for (int64_t m = 0; m < w->rows; m += DEPTH) {
        const int64_t depth = least(DEPTH, w->rows - m), coming = least(DEPTH, w->rows - m - depth);
        for (int64_t i = 0; i < depth; i += 2) {
            const uint16_t *grad = w->grad + (m + i) * N, *x = w->x + (m + i) * K;
            pair_rows(grad, i + 1 < depth ? grad + N : NULL, n0, n1, ROWS, LEFT, left + i * ROWS);
            pair_rows(x, i + 1 < depth ? x + K : NULL, k0, k1, BLOCK, RIGHT, right + i * BLOCK);
        }
        int64_t tile = 0;
        for (int64_t k = k0; k < k1; k += BLOCK)
            for (int64_t n = n0; n < n1; n += ROWS, tile++) {
                const int64_t from = coming * tile / tiles, to = coming * (tile + 1) / tiles, then = m + depth + from;
                fetch(w->grad + then * N + n0, N, to - from, n1 - n0);
                fetch(w->x + then * K + k0, K, to - from, k1 - k0);
                matrix(left + (n - n0) / ROWS * LEFT, 2, 2 * ROWS, ROWS, right + (k - k0) / BLOCK * RIGHT, (depth + 1) / 2,
                       w->d_weight + n * K + k, K, m > 0);
            }
    }
}

static int64_t product_floats(int64_t N) { return TASK_ROWS * BLOCK + ROWS * N / 2; }

static int64_t gradient_floats(int64_t N, int64_t K, int64_t parts)
{
    const int64_t wide = ((N < K ? K : N) / BLOCK + parts - 1) / parts * BLOCK;
    return ((N < K ? N : wide) / ROWS * LEFT + (N < K ? wide : K) / BLOCK * RIGHT) / 2;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* Whether the processor multiplies tiles of bfloat16 (AMX), many times as many as vectors. */
int64_t fftp_tiles(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1;
}
#else
#define BLOCK 32

static void panel(const void *job, int64_t task, float *scratch) {}
static void product(const void *job, int64_t task, float *scratch) {}
static void gradient(const void *job, int64_t task, float *scratch) {}
static int64_t product_floats(int64_t N) { return 0; }
static int64_t gradient_floats(int64_t N, int64_t K, int64_t parts) { return 0; }

int64_t fftp_tiles(void) { return 0; }
#endif

int64_t fftp_product(const struct product *w, int64_t set, int64_t threads, parallel region)
{
    (void)set;
    if (run_all(panel, w, w->K / BLOCK, 1, threads, region))
        return -1;
    return run_all(product, w, (w->rows + TASK_ROWS - 1) / TASK_ROWS, product_floats(w->N), threads, region);
}

int64_t fftp_gradient(const struct gradient *w, int64_t set, int64_t threads, parallel region)
{
    (void)set;
    return run_all(gradient, w, w->parts, gradient_floats(w->N, w->K, w->parts), threads, region);
}
