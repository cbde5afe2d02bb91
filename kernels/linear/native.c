/* Products of a linear layer in bfloat16; called through ctypes by native.py.

   Of out = x W^T, with x (rows, K), W (N, K) and grad (rows, N): d_x = grad W, d_W = grad^T x. For the first two the weight is
   laid out in panels, a hundredth of the work or done once before; the left side is read where it lies by vectors, and laid out
   some rows at a time by tiles. Of the third both sides are laid out, some rows at a time: its sums run over rows.

   By vectors (AVX512-BF16) or by tiles (AMX). */

#define TILES
#include "../native.h"

#define TASK_ROWS 64          /* of a product by vectors that one thread makes at a time */
#define DEPTH 128             /* rows of a gradient's sum by vectors at a time: the second-level cache keeps them, in pairs and before */
#define TILE_DEPTH 256        /* the same by tiles; of a product by tiles, so much of a panel stays in the nearest cache */
#define CUT_ROWS 416          /* of a product by tiles that one thread makes at a time: the second-level cache keeps them, */
#define CUT_DEPTH 768         /* so many numbers of each; where that is not all, */
#define CUT_COLUMNS 768       /* so many columns of its sums are kept as well */
#define MOST_LINES 4          /* more fetched at a time are in the way of what tiles read */
#define LAID_OUT 160          /* see cost_of */
#define FROM_MEMORY 80
#define GROUP 4               /* panels whose results are written together: each row lies in a page of its own */

/* One side of a product by weight (N, K), contiguous, both multiples of BLOCK: in panels of BLOCK columns and in pairs along
   what is summed over. Either that is K, (N / BLOCK, K / 2, BLOCK, 2), or, crosswise, N: (K / BLOCK, N / 2, BLOCK, 2). */
struct pack {
    int64_t N, K, crosswise;
    const uint16_t *weight;
    uint16_t *panels;
};

/* out (rows, columns) = left (rows, depth) panels, all bfloat16, depth and columns multiples of BLOCK. Rows of left come in groups
   of `together`, whose rows begin `pitch` numbers from one another, and which begin `apart` from one another; by vectors all is
   contiguous. threads: how many tasks are under way at a time. */
struct product {
    int64_t rows, depth, columns, threads, together, pitch, apart;
    const uint16_t *left, *panels;
    uint16_t *out;
};

/* d_weight (N, K) float32 = grad^T x of contiguous bfloat16 grad (rows, N) and x (rows, K), N and K multiples of BLOCK. A task
   is one of `parts` of the columns of the wider one. */
struct gradient {
    int64_t rows, N, K, parts;
    const uint16_t *grad, *x;
    float *d_weight;
};

#ifdef __x86_64__
#include "../matrix.h"

/* Panels of pairs lie this far apart, in numbers: not by a power of two, or they would share sets of the nearest cache. */
#define LEFT (DEPTH * ROWS + 32)
#define RIGHT (DEPTH * BLOCK + 64)

/* One panel. */
static void pack(const void *job, int64_t task, float *scratch)
{
    (void)scratch;
    const struct pack *w = job;
    if (w->crosswise) {
        const uint16_t *from = w->weight + task * BLOCK;
        uint16_t *to = w->panels + task * BLOCK * w->N;
        for (int64_t n = 0; n < w->N; n += 2, from += 2 * w->K, to += 2 * BLOCK)
            pair_up(_mm512_loadu_si512(from), _mm512_loadu_si512(from + w->K), to);
    } else {
        const uint16_t *from = w->weight + task * BLOCK * w->K;
        uint16_t *to = w->panels + task * BLOCK * w->K;
        for (int64_t k = 0; k < w->K; k += BLOCK, from += BLOCK, to += BLOCK * BLOCK)
            for (int64_t n = 0; n < BLOCK; n += 16)
                turn(from + n * w->K, w->K, to + 2 * n, 2 * BLOCK);
    }
}

/* Rows of sums as bfloat16, of `panels` panels that lie `apart` from each other. */
INLINE void put(const float *sums, int64_t rows, int64_t panels, int64_t apart, uint16_t *to, int64_t pitch)
{
    for (int64_t r = 0; r < rows; r++, sums += BLOCK)
        for (int64_t c = 0; c < panels; c++) {
            const float *at = sums + c * apart;
            const __m512i row = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(at + 16), _mm512_loadu_ps(at));
            _mm512_storeu_si512(to + r * pitch + c * BLOCK, row);
        }
}

/* TASK_ROWS rows of a product, panel by panel; meanwhile the rows that this thread reads next, and those it writes, are fetched. */
static void product(const void *job, int64_t task, float *scratch)
{
    const struct product *w = job;
    const int64_t depth = w->depth, columns = w->columns, first = task * TASK_ROWS;
    const int64_t n = least(TASK_ROWS, w->rows - first), whole = n / ROWS * ROWS;
    const int64_t then = least(first + w->threads * TASK_ROWS, w->rows), coming = least(TASK_ROWS, w->rows - then);
    const uint16_t *left = w->left + first * depth;
    uint16_t *out = w->out + first * columns, *rest = (uint16_t *)(scratch + TASK_ROWS * BLOCK);
    if (whole < n) {
        memcpy(rest, left + whole * depth, 2 * (size_t)((n - whole) * depth));
        memset(rest + (n - whole) * depth, 0, 2 * (size_t)((whole + ROWS - n) * depth));
    }
    for (int64_t c = 0; c < columns; c += BLOCK) {
        const uint16_t *right = w->panels + c * depth;
        const int64_t from = coming * c / columns, to = coming * (c + BLOCK) / columns;
        fetch(out + c, columns, n, BLOCK);
        fetch(w->left + (then + from) * depth, depth, to - from, depth);
        matrix(left, depth, 2, whole, right, depth / 2, scratch, BLOCK, 0);
        if (whole < n)
            matrix(rest, depth, 2, ROWS, right, depth / 2, scratch + whole * BLOCK, BLOCK, 0);
        put(scratch, n, 1, 0, out + c, columns);
    }
}

static int64_t product_floats(int64_t depth) { return TASK_ROWS * BLOCK + ROWS * depth / 2; }

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

/* Which columns of grad, and which of x, are a task's. */
struct share {
    int64_t n0, n1, k0, k1;
};

INLINE struct share share_of(const struct gradient *w, int64_t task)
{
    const int64_t N = w->N, K = w->K, blocks = (N < K ? K : N) / BLOCK;
    const int64_t first = blocks * task / w->parts * BLOCK, end = blocks * (task + 1) / w->parts * BLOCK;
    return N < K ? (struct share){0, N, first, end} : (struct share){first, end, 0, K};
}

/* Of the task whose share is the largest. */
INLINE struct share largest_share(const struct gradient *w)
{
    const int64_t N = w->N, K = w->K, wide = ((N < K ? K : N) / BLOCK + w->parts - 1) / w->parts * BLOCK;
    return N < K ? (struct share){0, N, 0, wide} : (struct share){0, wide, 0, K};
}

static void gradient(const void *job, int64_t task, float *scratch)
{
    const struct gradient *w = job;
    const struct share s = share_of(w, task);
    const int64_t N = w->N, K = w->K, tiles = (s.n1 - s.n0) / ROWS * ((s.k1 - s.k0) / BLOCK);
    uint16_t *left = (uint16_t *)scratch, *right = left + (s.n1 - s.n0) / ROWS * LEFT;
    for (int64_t m = 0; m < w->rows; m += DEPTH) {
        const int64_t depth = least(DEPTH, w->rows - m), coming = least(DEPTH, w->rows - m - depth);
        for (int64_t i = 0; i < depth; i += 2) {
            const uint16_t *grad = w->grad + (m + i) * N, *x = w->x + (m + i) * K;
            pair_rows(grad, i + 1 < depth ? grad + N : NULL, s.n0, s.n1, ROWS, LEFT, left + i * ROWS);
            pair_rows(x, i + 1 < depth ? x + K : NULL, s.k0, s.k1, BLOCK, RIGHT, right + i * BLOCK);
        }
        int64_t tile = 0;
        for (int64_t k = s.k0; k < s.k1; k += BLOCK)
            for (int64_t n = s.n0; n < s.n1; n += ROWS, tile++) {
                const int64_t from = coming * tile / tiles, to = coming * (tile + 1) / tiles, then = m + depth + from;
                fetch(w->grad + then * N + s.n0, N, to - from, s.n1 - s.n0);
                fetch(w->x + then * K + s.k0, K, to - from, s.k1 - s.k0);
                matrix(left + (n - s.n0) / ROWS * LEFT, 2, 2 * ROWS, ROWS, right + (k - s.k0) / BLOCK * RIGHT, (depth + 1) / 2,
                       w->d_weight + n * K + k, K, m > 0);
            }
    }
}

static int64_t gradient_floats(const struct gradient *w)
{
    const struct share s = largest_share(w);
    return (s.n1 / ROWS * LEFT + s.k1 / BLOCK * RIGHT) / 2;
}

#ifdef TILED
#include "../tiles.h"

/* How a product by tiles is cut: into tasks of `rows` rows and one of `parts` of the columns, which go through the depth in
   `depths` steps of `depth` numbers. */
struct cut {
    int64_t cuts, rows, parts, depths, depth;
};

/* A piece of `whole` cut evenly into `pieces`, a multiple of `unit`. */
INLINE int64_t piece(int64_t whole, int64_t pieces, int64_t unit) { return round_up((whole + pieces - 1) / pieces, unit); }

/* How many of them if each has `most` at most. */
INLINE int64_t pieces_of(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

/* What a task takes: products, a row to lay out, which is as long as a product with LAID_OUT columns, and a column's way from
   memory, as long as a product with FROM_MEMORY rows. */
INLINE int64_t cost_of(int64_t rows, int64_t columns) { return rows * columns + LAID_OUT * rows + FROM_MEMORY * columns; }

/* The cheapest for all threads together, each of which takes task after task. */
static struct cut cut_of(const struct product *w)
{
    const int64_t depths = pieces_of(w->depth, CUT_DEPTH), threads = least(w->threads, MOST_THREADS), panels = w->columns / BLOCK;
    const int64_t fewest = depths > 1 ? pieces_of(w->columns, CUT_COLUMNS) : 1, cuts = pieces_of(w->rows, CUT_ROWS);
    struct cut found = {.depths = depths, .depth = piece(w->depth, depths, STEP)};
    int64_t cheapest = INT64_MAX;
    for (int64_t parts = fewest; parts <= least(panels, fewest + threads - 1); parts++) {
        const int64_t full = pieces_of(cuts * parts, threads) * threads / parts; /* whole rounds of tasks, if rows can be cut so */
        for (int64_t wanted = cuts; wanted <= full; wanted += full > cuts ? full - cuts : 1) {
            const int64_t rows = piece(w->rows, wanted, 16), made = pieces_of(w->rows, rows);
            const int64_t cost = pieces_of(made * parts, threads) * cost_of(rows, pieces_of(panels, parts) * BLOCK);
            if (cost < cheapest) {
                cheapest = cost;
                found.cuts = made;
                found.rows = rows;
                found.parts = parts;
            }
        }
    }
    return found;
}

/* Rows first .. first + n - 1 of left, as many as a square of tiles has or fewer, from number `at` on: STEP numbers of each, then
   the next STEP. */
static void lay_out(const struct product *w, int64_t first, int64_t n, int64_t at, int64_t depth, uint16_t *to)
{
    const int64_t padded = round_up(n, 16);
    for (int64_t i = 0; i < padded; i++) {
        const int64_t r = first + i;
        const uint16_t *row = w->left + r / w->together * w->apart + r % w->together * w->pitch + at;
        for (int64_t k = 0; k < depth; k += STEP)
            _mm512_storeu_si512(to + k * padded + i * STEP, i < n ? _mm512_loadu_si512(row + k) : _mm512_setzero_si512());
    }
}

/* Step by step through the depth, the rows laid out and panel after panel multiplied with them all; meanwhile the next panel
   comes from memory, behind the last one that which the part's next task begins with. */
static void tile_product(const void *job, int64_t task, float *scratch)
{
    const struct product *w = job;
    const struct cut cut = cut_of(w);
    const int64_t columns = w->columns, panels = columns / BLOCK, part = task % cut.parts;
    const int64_t begin = panels * part / cut.parts, end = panels * (part + 1) / cut.parts, apart = cut.rows * BLOCK;
    const int64_t first = task / cut.parts * cut.rows, n = least(cut.rows, w->rows - first), padded = round_up(n, 16);
    /* So many lines of the next panel are fetched at each step of each square: with 256 rows all of it while this one goes by. */
    const int64_t lines = least(MOST_LINES, pieces_of(SQUARE * SQUARE, padded));
    uint16_t *left = (uint16_t *)scratch;
    float *sums = scratch + cut.rows * cut.depth / 2;
    tiles_on();
    for (int64_t at = 0; at < w->depth; at += cut.depth) {
        const int64_t depth = least(cut.depth, w->depth - at), block = piece(depth, pieces_of(depth, TILE_DEPTH), STEP);
        for (int64_t r = 0; r < n; r += SQUARE)
            lay_out(w, first + r, least(SQUARE, n - r), at, depth, left + r * depth);
        for (int64_t c = begin; c < end; c++) {
            const int64_t then = at + depth < w->depth ? at + depth : 0, j = (c - begin) % GROUP;
            const int64_t next = c + 1 < end ? (c + 1) * w->depth + at : begin * w->depth + then;
            const uint16_t *right = w->panels + (c * w->depth + at) * BLOCK, *coming = w->panels + next * BLOCK;
            float *to = sums + (cut.depths > 1 ? c - begin : j) * apart;
            for (int64_t k = 0; k < depth; k += block) {
                const int64_t deep = least(block, depth - k), add = at + k > 0;
                for (int64_t r = 0; r < padded; r += SQUARE, coming += deep / STEP * lines * BLOCK) {
                    const int64_t rows = least(SQUARE, padded - r);
                    const uint16_t *square = left + r * depth + k * rows;
                    if (rows == SQUARE)
                        tile_block(SQUARE, square, STEP, SQUARE * STEP, right + k * BLOCK, deep / 2, to + r * BLOCK, BLOCK, add,
                                   coming, lines);
                    else
                        tile_block(16, square, STEP, 16 * STEP, right + k * BLOCK, deep / 2, to + r * BLOCK, BLOCK, add, coming,
                                   lines);
                }
            }
            if (at + depth == w->depth && (j == GROUP - 1 || c == end - 1))
                put(to - j * apart, n, j + 1, apart, w->out + first * columns + (c - j) * BLOCK, columns);
        }
    }
    tiles_off();
}

static int64_t tile_product_floats(const struct product *w)
{
    const struct cut cut = cut_of(w);
    const int64_t panels = cut.depths > 1 ? pieces_of(w->columns / BLOCK, cut.parts) : GROUP;
    return cut.rows * cut.depth / 2 + cut.rows * BLOCK * panels;
}

/* Rows m .. m + depth - 1 of columns first .. end - 1 as (columns, TILE_DEPTH), 0 up to a multiple of STEP. */
static void columns_of(const uint16_t *rows, int64_t width, int64_t depth, int64_t first, int64_t end, uint16_t *to)
{
    for (int64_t m = 0; m < depth; m += 32)
        for (int64_t c = first; c < end; c += BLOCK) {
            uint16_t pairs[16][2 * BLOCK];
            for (int64_t i = 0; i < 16; i++) {
                const uint16_t *row = rows + (m + 2 * i) * width + c;
                const __m512i above = m + 2 * i < depth ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
                pair_up(above, m + 2 * i + 1 < depth ? _mm512_loadu_si512(row + width) : _mm512_setzero_si512(), pairs[i]);
            }
            for (int64_t half = 0; half < 2; half++)
                turn(&pairs[0][half * BLOCK], 2 * BLOCK, to + (c - first + 16 * half) * TILE_DEPTH + m, TILE_DEPTH);
        }
}

static void tile_gradient(const void *job, int64_t task, float *scratch)
{
    const struct gradient *w = job;
    const struct share s = share_of(w, task);
    const int64_t N = w->N, K = w->K;
    uint16_t *left = (uint16_t *)scratch, *right = left + (s.n1 - s.n0) * TILE_DEPTH;
    tiles_on();
    for (int64_t m = 0; m < w->rows; m += TILE_DEPTH) {
        const int64_t depth = least(TILE_DEPTH, w->rows - m), padded = round_up(depth, STEP);
        columns_of(w->grad + m * N, N, depth, s.n0, s.n1, left);
        for (int64_t i = 0; i < padded; i += 2)
            for (int64_t k = s.k0; k < s.k1; k += BLOCK) {
                const uint16_t *x = w->x + (m + i) * K + k;
                const __m512i above = i < depth ? _mm512_loadu_si512(x) : _mm512_setzero_si512();
                pair_up(above, i + 1 < depth ? _mm512_loadu_si512(x + K) : _mm512_setzero_si512(),
                        right + (k - s.k0) * TILE_DEPTH + i * BLOCK);
            }
        for (int64_t k = s.k0; k < s.k1; k += BLOCK)
            tile_matrix(left, TILE_DEPTH, s.n1 - s.n0, right + (k - s.k0) * TILE_DEPTH, padded / 2,
                        w->d_weight + s.n0 * K + k, K, m > 0);
    }
    tiles_off();
}

static int64_t tile_gradient_floats(const struct gradient *w)
{
    const struct share s = largest_share(w);
    return (s.n1 + s.k1) * TILE_DEPTH / 2;
}
#endif

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
#define BLOCK 32

static void pack(const void *job, int64_t task, float *scratch) {}
static void product(const void *job, int64_t task, float *scratch) {}
static void gradient(const void *job, int64_t task, float *scratch) {}
static int64_t product_floats(int64_t depth) { return 0; }
static int64_t gradient_floats(const struct gradient *w) { return 0; }
#endif

int64_t fftp_pack(const struct pack *w, int64_t set, int64_t threads, parallel region)
{
    (void)set;
    return run_all(pack, w, (w->crosswise ? w->K : w->N) / BLOCK, 1, threads, region);
}

int64_t fftp_product(const struct product *w, int64_t set, int64_t threads, parallel region)
{
#ifdef TILED
    if (set == AMX) {
        const struct cut cut = cut_of(w);
        return run_all(tile_product, w, cut.cuts * cut.parts, tile_product_floats(w), threads, region);
    }
#endif
    return run_all(product, w, (w->rows + TASK_ROWS - 1) / TASK_ROWS, product_floats(w->depth), threads, region);
}

int64_t fftp_gradient(const struct gradient *w, int64_t set, int64_t threads, parallel region)
{
#ifdef TILED
    if (set == AMX)
        return run_all(tile_gradient, w, w->parts, tile_gradient_floats(w), threads, region);
#endif
    return run_all(gradient, w, w->parts, gradient_floats(w), threads, region);
}
