/* Attention and its gradients for processors that multiply bfloat16, by vectors (AVX512-BF16) or by tiles (AMX); called through
   ctypes by native.py.

   A task is one head of one clip, read where it lies, or some of its queries. 32 queries at a time: their scores with every
   key, transposed, S^T = K Q^T (float32), so that the largest, the exponentials, their sum and what the gradients add up are
   whole vectors of queries; rounded to bfloat16 for the next products. Gradients compute P anew from x:

   P = softmax(Q K^T / 8), out = P V; dV = P^T G, dP = G V^T, dS = P (dP - rowsum(P dP)) / 8, dQ = dS K, dK = dS^T Q

   The pieces, from the rows of a head to its softmax, are native_matrix.h's. */

#define TILES
#include "../native.h"

/* x is (B, L, 3 H 64) and out (B, L, H 64), both contiguous bfloat16; bias (3 H 64) is added to x, or NULL.
   A task is one of `parts` of a head's queries; threads: how many tasks are under way at a time. */
struct attention {
    int64_t B, L, H, parts, threads;
    const uint16_t *x;
    const float *bias;
    uint16_t *out;
};

/* grad (of out), x and d_x are contiguous bfloat16. d_bias: (B, 3 H 64), each clip's share, or NULL where nobody wants it.
   A task is a head. */
struct gradients {
    int64_t B, L, H, threads;
    const uint16_t *grad, *x;
    const float *bias;
    uint16_t *d_x;
    float *d_bias;
};

#ifdef __x86_64__
#include "native_matrix.h"

/* The next n floats of the scratch space. */
static void *next(float **scratch, int64_t n)
{
    float *at = *scratch;
    *scratch += n;
    return at;
}

/* How far on the head lies that this thread takes next, if each takes its turn, in rows of `width` numbers; 0 at the end. */
static int64_t next_head(int64_t task, int64_t threads, int64_t B, int64_t L, int64_t H, int64_t width)
{
    const int64_t then = task + threads;
    return then < B * H ? (then / H - task / H) * L * width + (then % H - task % H) * WIDTH : 0;
}

INLINE void attention(const int tiles, const void *job, int64_t task, float *scratch)
{
    const struct attention *w = job;
    const int64_t L = w->L, keys = round_up(L, tiles ? STEP : ROWS), D = w->H * WIDTH, blocks = (L + BLOCK - 1) / BLOCK;
    const int64_t head = task / w->parts % w->H, clip = task / w->parts / w->H, part = task % w->parts;
    const int64_t first = blocks * part / w->parts, end = blocks * (part + 1) / w->parts;
    const uint16_t *x = w->x + clip * L * 3 * D + head * WIDTH;
    const float *bias_q = w->bias ? w->bias + head * WIDTH : NULL, *bias_k = w->bias ? bias_q + D : NULL;
    const float *bias_v = w->bias ? bias_k + D : NULL;
    if (first == end)
        return;
    const int64_t ahead = w->parts == 1 ? next_head(task, w->threads, w->B, L, w->H, 3 * D) : 0;
    float *scores = next(&scratch, keys * BLOCK), *sums = next(&scratch, BLOCK * WIDTH), *one_over = next(&scratch, BLOCK);
    uint16_t *k = next(&scratch, keys * WIDTH / 2), *v_pairs = next(&scratch, keys * WIDTH / 2);
    uint16_t *weights = next(&scratch, keys * BLOCK / 2), *q_turned = next(&scratch, BLOCK * WIDTH / 2);
    uint16_t *v_across = next(&scratch, tiles ? keys * WIDTH / 2 : 0), *rows = (uint16_t *)scores; /* before there are any */
    if (tiles)
        tiles_on();
    take(x + 2 * D, 3 * D, bias_v, L, keys, rows);
    paired(rows, keys, v_pairs);
    if (tiles)
        across(v_pairs, keys, v_across);
    take(x + D, 3 * D, bias_k, L, keys, k);
    for (int64_t t = first * BLOCK; t < least(L, end * BLOCK); t += BLOCK) {
        const int64_t n = least(BLOCK, L - t);
        const uint16_t *then = x + ahead + t * 3 * D;
        __m512 most[2];
        take(x + t * 3 * D, 3 * D, bias_q, n, BLOCK, (uint16_t *)sums);
        turned((uint16_t *)sums, q_turned);
        fetch(then, 3 * D, n, WIDTH);
        scored(tiles, k, L, keys, q_turned, scores, most);
        fetch(then + D, 3 * D, n, WIDTH);
        softmax(scores, most, L, keys, weights, one_over);
        fetch(then + 2 * D, 3 * D, n, WIDTH);
        mixture(tiles, weights, keys, n, v_pairs, v_across, sums);
        put(sums, n, one_over, w->out + (clip * L + t) * D + head * WIDTH, D, NULL);
    }
    if (tiles)
        tiles_off();
}

static int64_t attention_floats(int64_t L)
{
    const int64_t keys = round_up(L, BLOCK);
    return keys * (BLOCK + 3 * WIDTH / 2 + BLOCK / 2) + BLOCK * (WIDTH + 1 + WIDTH / 2);
}

INLINE void gradients(const int tiles, const void *job, int64_t task, float *scratch)
{
    const struct gradients *w = job;
    const int64_t L = w->L, keys = round_up(L, tiles ? STEP : ROWS), D = w->H * WIDTH, head = task % w->H, clip = task / w->H;
    const int64_t at = clip * L * 3 * D + head * WIDTH;
    const int64_t ahead = next_head(task, w->threads, w->B, L, w->H, 3 * D);
    const int64_t g_ahead = next_head(task, w->threads, w->B, L, w->H, D);
    const uint16_t *x = w->x + at, *grad = w->grad + clip * L * D + head * WIDTH;
    const float *bias_q = w->bias ? w->bias + head * WIDTH : NULL, *bias_k = w->bias ? bias_q + D : NULL;
    const float *bias_v = w->bias ? bias_k + D : NULL;
    float *scores = next(&scratch, keys * BLOCK), *d_weights = next(&scratch, keys * BLOCK);
    float *d_k = next(&scratch, keys * WIDTH), *d_v = next(&scratch, keys * WIDTH), *d_q = next(&scratch, BLOCK * WIDTH);
    uint16_t *k = next(&scratch, keys * WIDTH / 2), *v = next(&scratch, keys * WIDTH / 2);
    uint16_t *k_pairs = next(&scratch, keys * WIDTH / 2), *weights = next(&scratch, keys * BLOCK / 2);
    uint16_t *d_scores = next(&scratch, keys * BLOCK / 2), *ds_pairs = next(&scratch, keys * BLOCK / 2);
    uint16_t *rows = next(&scratch, BLOCK * WIDTH / 2), *q_turned = next(&scratch, BLOCK * WIDTH / 2);
    uint16_t *g_turned = next(&scratch, BLOCK * WIDTH / 2), *q_pairs = next(&scratch, BLOCK * WIDTH / 2);
    uint16_t *g_pairs = next(&scratch, BLOCK * WIDTH / 2), *k_across = next(&scratch, tiles ? keys * WIDTH / 2 : 0);
    float totals[3][WIDTH] = {{0}};
    take(x + D, 3 * D, bias_k, L, keys, k);
    take(x + 2 * D, 3 * D, bias_v, L, keys, v);
    paired(k, keys, k_pairs);
    if (tiles) {
        across(k_pairs, keys, k_across);
        tiles_on();
    }
    for (int64_t t = 0; t < L; t += BLOCK) {
        const int64_t n = least(BLOCK, L - t);
        const uint16_t *then = x + ahead + t * 3 * D;
        uint16_t *d_x = w->d_x + at + t * 3 * D;
        __m512 most[2];
        take(x + t * 3 * D, 3 * D, bias_q, n, BLOCK, rows);
        turned(rows, q_turned);
        paired(rows, BLOCK, q_pairs);
        take(grad + t * D, D, NULL, n, BLOCK, rows);
        turned(rows, g_turned);
        paired(rows, BLOCK, g_pairs);
        fetch(then, 3 * D, n, WIDTH);
        scored(tiles, k, L, keys, q_turned, scores, most);
        fetch(d_x, 3 * D, n, WIDTH);
        product(tiles, v, WIDTH, keys, g_turned, WIDTH / 2, d_weights);
        fetch(then + D, 3 * D, n, WIDTH);
        slopes(scores, most, d_weights, L, keys, weights, d_scores, ds_pairs);
        fetch(d_x + D, 3 * D, n, WIDTH);
        wide_product(tiles, weights, keys, g_pairs, d_v, t > 0);
        fetch(then + 2 * D, 3 * D, n, WIDTH);
        wide_product(tiles, d_scores, keys, q_pairs, d_k, t > 0);
        fetch(d_x + 2 * D, 3 * D, n, WIDTH);
        mixture(tiles, ds_pairs, keys, n, k_pairs, k_across, d_q);
        fetch(grad + g_ahead + t * D, D, n, WIDTH);
        put(d_q, n, NULL, d_x, 3 * D, totals[0]);
    }
    if (tiles)
        tiles_off();
    put(d_k, L, NULL, w->d_x + at + D, 3 * D, totals[1]);
    put(d_v, L, NULL, w->d_x + at + 2 * D, 3 * D, totals[2]);
    for (int64_t i = 0; w->d_bias && i < 3; i++)
        memcpy(w->d_bias + (clip * 3 + i) * D + head * WIDTH, totals[i], sizeof totals[i]);
}

static int64_t gradients_floats(int64_t L)
{
    const int64_t keys = round_up(L, BLOCK);
    return keys * (2 * BLOCK + 2 * WIDTH + 4 * WIDTH / 2 + 3 * BLOCK / 2) + BLOCK * (WIDTH + 5 * WIDTH / 2);
}

static void attention_by_vectors(const void *job, int64_t task, float *scratch) { attention(0, job, task, scratch); }

static void gradients_by_vectors(const void *job, int64_t task, float *scratch) { gradients(0, job, task, scratch); }

static void attention_by_tiles(const void *job, int64_t task, float *scratch) { attention(1, job, task, scratch); }

static void gradients_by_tiles(const void *job, int64_t task, float *scratch) { gradients(1, job, task, scratch); }

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
static void attention_by_vectors(const void *job, int64_t task, float *scratch) {}
static void gradients_by_vectors(const void *job, int64_t task, float *scratch) {}
static void attention_by_tiles(const void *job, int64_t task, float *scratch) {}
static void gradients_by_tiles(const void *job, int64_t task, float *scratch) {}
static int64_t attention_floats(int64_t L) { return 0; }
static int64_t gradients_floats(int64_t L) { return 0; }
#endif

int64_t fftp_attention(const struct attention *w, int64_t set, int64_t threads, parallel region)
{
    body run = set == AMX ? attention_by_tiles : attention_by_vectors;
    return run_all(run, w, w->B * w->H * w->parts, attention_floats(w->L), threads, region);
}

int64_t fftp_gradients(const struct gradients *w, int64_t set, int64_t threads, parallel region)
{
    body run = set == AMX ? gradients_by_tiles : gradients_by_vectors;
    return run_all(run, w, w->B * w->H, gradients_floats(w->L), threads, region);
}
