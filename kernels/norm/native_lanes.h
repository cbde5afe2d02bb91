/* The norms for one width of vector; native.c has this file included once for each instruction set (../native.h).

   centred and narrow are constants where these functions are called, and a form is compiled for each. */

#include "../lanes.h"

FN int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }

/* What a row is measured by. The mean is mean + rest: rest is what rounding left of it, and matters in rows of nearly equal
   numbers. Both are 0 where not centred. */
typedef struct {
    float mean, rest, scale;
} NAME(row);

/* From the sum of squares about mean, and the sum of what is left about it. */
FN NAME(row) NAME(measured)(float mean, float left, float squares, int64_t D, double eps)
{
    const float rest = left / (float)D;
    return (NAME(row)){mean, rest, 1.0f / sqrtf(squares / (float)D - rest * rest + (float)eps)};
}

/* x - mean in the first n lanes, 0 in the others; x itself where not centred. */
FN VEC NAME(centre)(VEC x, float mean, int64_t n, int64_t centred)
{
    if (!centred)
        return x;
    x -= mean;
    if (n < LANES)
        memset((float *)&x + n, 0, 4 * (size_t)(LANES - n));
    return x;
}

FN VEC NAME(unit)(VEC x, NAME(row) row, int64_t centred)
{
    return (centred ? x - row.mean - row.rest : x) * row.scale;
}

/* One row from element `at` on: total, and its mean where centred, else its sum of squares. */
FN float NAME(add)(const struct norm *w, int64_t at, int64_t centred, int64_t narrow)
{
    const float *residual = w->residual, *bias = w->bias;
    float *total = w->total + at;
    const void *from = w->x;
    const int64_t D = w->D;
    VEC sum = {0};
    EACH_VECTOR(D, {
        VEC x = NAME(load)(from, at + i, n, narrow);
        if (residual)
            x += NAME(load)(residual, at + i, n, 0);
        if (bias)
            x += NAME(load)(bias, i, n, 0);
        NAME(store)(total, i, n, 0, x);
        sum = centred ? sum + x : FUSED(x, x, sum);
    })
    return centred ? NAME(sum)(sum) / (float)D : NAME(sum)(sum);
}

FN NAME(row) NAME(about)(const float *total, int64_t D, float mean, double eps)
{
    VEC squares = {0}, left = {0};
    EACH_VECTOR(D, {
        const VEC x = NAME(centre)(NAME(load)(total, i, n, 0), mean, n, 1);
        left += x;
        squares = FUSED(x, x, squares);
    })
    return NAME(measured)(mean, NAME(sum)(left), NAME(sum)(squares), D, eps);
}

FN void NAME(multiply)(const struct norm *w, int64_t at, NAME(row) row, int64_t centred, int64_t narrow)
{
    const float *total = w->total + at, *weight = w->weight, *shift = w->shift;
    void *normed = w->normed;
    EACH_VECTOR(w->D, {
        VEC x = NAME(unit)(NAME(load)(total, i, n, 0), row, centred) * NAME(load)(weight, i, n, 0);
        if (centred)
            x += NAME(load)(shift, i, n, 0);
        NAME(store)(normed, at + i, n, narrow, x);
    })
}

/* Rows `first` to `last`, PART_ROWS at most: pass after pass over all of them, so that no row waits for its own sums. */
FN void NAME(rows)(const struct norm *w, int64_t first, int64_t last, int64_t centred)
{
    float sum[PART_ROWS];
    NAME(row) row[PART_ROWS];
    for (int64_t r = first; r < last; r++)
        sum[r - first] = w->narrow_x ? NAME(add)(w, r * w->D, centred, 1) : NAME(add)(w, r * w->D, centred, 0);
    for (int64_t r = first; r < last; r++)
        row[r - first] = centred ? NAME(about)(w->total + r * w->D, w->D, sum[r - first], w->eps)
                                 : NAME(measured)(0, 0, sum[r - first], w->D, w->eps);
    for (int64_t r = first; r < last; r++)
        if (w->narrow_normed)
            NAME(multiply)(w, r * w->D, row[r - first], centred, 1);
        else
            NAME(multiply)(w, r * w->D, row[r - first], centred, 0);
}

static void NAME(norm)(const void *job, int64_t task, float *scratch)
{
    (void)scratch;
    const struct norm *w = job;
    const int64_t end = NAME(least)((task + 1) * TASK_ROWS, w->rows);
    for (int64_t r = task * TASK_ROWS; r < end; r += PART_ROWS)
        if (w->centred)
            NAME(rows)(w, r, NAME(least)(r + PART_ROWS, end), 1);
        else
            NAME(rows)(w, r, NAME(least)(r + PART_ROWS, end), 0);
}

/* What a row's gradient is made with: the mean of grad * weight, 0 where not centred, and that of its product with unit. */
typedef struct {
    NAME(row) row;
    float level, share;
} NAME(along);

FN NAME(along) NAME(look)(const struct gradients *w, int64_t at, float mean, int64_t centred, int64_t narrow)
{
    const int64_t D = w->D;
    const float *total = w->total + at, *weight = w->weight;
    const void *grads = w->grad;
    VEC squares = {0}, along = {0}, left = {0}, level = {0};
    EACH_VECTOR(D, {
        const VEC x = NAME(centre)(NAME(load)(total, i, n, 0), mean, n, centred);
        const VEC grad = NAME(load)(grads, at + i, n, narrow) * NAME(load)(weight, i, n, 0);
        squares = FUSED(x, x, squares);
        along = FUSED(grad, x, along);
        if (centred) {
            left += x;
            level += grad;
        }
    })
    const NAME(row) row = NAME(measured)(mean, NAME(sum)(left), NAME(sum)(squares), D, w->eps);
    const float levels = NAME(sum)(level);
    return (NAME(along)){row, levels / (float)D, (NAME(sum)(along) - row.rest * levels) * row.scale / (float)D};
}

/* One row from element `at` on: its share of the sums (of weight, shift and bias, `vectors` each), and its own gradient. */
FN void NAME(write)(const struct gradients *w, int64_t at, NAME(along) a, VEC *sums, int64_t centred, int64_t narrow)
{
    const int64_t vectors = (w->D + LANES - 1) / LANES;
    const float *total = w->total + at, *d_total = w->d_total + at, *weight = w->weight;
    const void *grads = w->grad;
    float *d_residual = w->d + at;
    void *d_x = w->d_x;
    EACH_VECTOR(w->D, {
        const VEC unit = NAME(unit)(NAME(load)(total, i, n, 0), a.row, centred);
        const VEC grad = NAME(load)(grads, at + i, n, narrow);
        sums[i / LANES] = FUSED(grad, unit, sums[i / LANES]);
        VEC d = grad * NAME(load)(weight, i, n, 0) - unit * a.share;
        if (centred)
            d -= a.level;
        d = d * a.row.scale + NAME(load)(d_total, i, n, 0);
        if (centred) {
            sums[vectors + i / LANES] += grad;
            sums[2 * vectors + i / LANES] += d;
        }
        NAME(store)(d_residual, i, n, 0, d);
        if (d_x)
            NAME(store)(d_x, at + i, n, 1, d);
    })
}

/* As `rows`. */
FN void NAME(rows_back)(const struct gradients *w, int64_t first, int64_t last, VEC *sums, int64_t centred, int64_t narrow)
{
    float mean[PART_ROWS] = {0};
    NAME(along) along[PART_ROWS];
    if (centred)
        for (int64_t r = first; r < last; r++) {
            VEC sum = {0};
            EACH_VECTOR(w->D, { sum += NAME(load)(w->total, r * w->D + i, n, 0); })
            mean[r - first] = NAME(sum)(sum) / (float)w->D;
        }
    for (int64_t r = first; r < last; r++)
        along[r - first] = NAME(look)(w, r * w->D, mean[r - first], centred, narrow);
    for (int64_t r = first; r < last; r++)
        NAME(write)(w, r * w->D, along[r - first], sums, centred, narrow);
}

static void NAME(gradients)(const void *job, int64_t task, float *scratch)
{
    const struct gradients *w = job;
    const int64_t end = NAME(least)((task + 1) * TASK_ROWS, w->rows);
    const int64_t kinds = w->centred ? 3 : 1, vectors = (w->D + LANES - 1) / LANES;
    VEC *sums = (VEC *)scratch, *part = sums + kinds * vectors;
    for (int64_t i = 0; i < kinds * vectors; i++)
        sums[i] = (VEC){0};
    for (int64_t r = task * TASK_ROWS; r < end; r += PART_ROWS) {
        const int64_t last = NAME(least)(r + PART_ROWS, end);
        for (int64_t i = 0; i < kinds * vectors; i++)
            part[i] = (VEC){0};
        if (w->centred && w->narrow_grad)
            NAME(rows_back)(w, r, last, part, 1, 1);
        else if (w->centred)
            NAME(rows_back)(w, r, last, part, 1, 0);
        else if (w->narrow_grad)
            NAME(rows_back)(w, r, last, part, 0, 1);
        else
            NAME(rows_back)(w, r, last, part, 0, 0);
        for (int64_t i = 0; i < kinds * vectors; i++)
            sums[i] += part[i];
    }
    for (int64_t kind = 0; kind < kinds; kind++)
        memcpy(w->sums + (task * kinds + kind) * w->D, sums + kind * vectors, 4 * (size_t)w->D);
}

#undef FN
#undef VEC
#undef EACH_VECTOR
