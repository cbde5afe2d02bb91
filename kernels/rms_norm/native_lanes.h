/* The norm for one width of vector; native.c has this file included once for each instruction set (../native.h). */

#include "../lanes.h"

FN float NAME(scale)(float squares, int64_t D, double eps) { return 1.0f / sqrtf(squares / (float)D + (float)eps); }

/* One row from element `row` on: total, and the sum of its squares. */
FN float NAME(add)(const struct norm *w, int64_t row, int64_t narrow)
{
    VEC squares = {0};
    for (int64_t i = 0; i < w->D; i += LANES) {
        const int64_t n = w->D - i < LANES ? w->D - i : LANES;
        VEC x = NAME(load)(w->x, row + i, n, narrow);
        if (w->residual)
            x += NAME(load)(w->residual, row + i, n, 0);
        NAME(store)(w->total, row + i, n, 0, x);
        squares = FUSED(x, x, squares);
    }
    return NAME(sum)(squares);
}

FN void NAME(multiply)(const struct norm *w, int64_t row, float scale, int64_t narrow)
{
    for (int64_t i = 0; i < w->D; i += LANES) {
        const int64_t n = w->D - i < LANES ? w->D - i : LANES;
        VEC x = NAME(load)(w->total, row + i, n, 0) * scale * NAME(load)(w->weight, i, n, 0);
        NAME(store)(w->normed, row + i, n, narrow, x);
    }
}

static void NAME(norm)(const void *job, int64_t task, float *scratch)
{
    (void)scratch;
    const struct norm *w = job;
    const int64_t last = (task + 1) * TASK_ROWS < w->rows ? (task + 1) * TASK_ROWS : w->rows;
    for (int64_t r = task * TASK_ROWS; r < last; r++) {
        const int64_t row = r * w->D;
        const float squares = w->narrow_x ? NAME(add)(w, row, 1) : NAME(add)(w, row, 0);
        const float scale = NAME(scale)(squares, w->D, w->eps);
        if (w->narrow_normed)
            NAME(multiply)(w, row, scale, 1);
        else
            NAME(multiply)(w, row, scale, 0);
    }
}

/* One row from element `row` on: its share of the weight's gradient, and its own. */
FN void NAME(row_gradients)(const struct gradients *w, int64_t row, VEC *d_weight, int64_t narrow)
{
    VEC squares = {0}, along = {0};
    for (int64_t i = 0; i < w->D; i += LANES) {
        const int64_t n = w->D - i < LANES ? w->D - i : LANES;
        const VEC x = NAME(load)(w->total, row + i, n, 0);
        const VEC grad = NAME(load)(w->grad, row + i, n, narrow) * NAME(load)(w->weight, i, n, 0);
        squares = FUSED(x, x, squares);
        along = FUSED(grad, x, along);
    }
    const float scale = NAME(scale)(NAME(sum)(squares), w->D, w->eps);
    const float share = NAME(sum)(along) * scale / (float)w->D;
    for (int64_t i = 0; i < w->D; i += LANES) {
        const int64_t n = w->D - i < LANES ? w->D - i : LANES;
        const VEC unit = NAME(load)(w->total, row + i, n, 0) * scale, grad = NAME(load)(w->grad, row + i, n, narrow);
        d_weight[i / LANES] = FUSED(grad, unit, d_weight[i / LANES]);
        VEC d = grad * NAME(load)(w->weight, i, n, 0) - unit * share;
        d = d * scale + NAME(load)(w->d_total, row + i, n, 0);
        NAME(store)(w->d, row + i, n, 0, d);
        if (w->d_x)
            NAME(store)(w->d_x, row + i, n, 1, d);
    }
}

static void NAME(gradients)(const void *job, int64_t task, float *scratch)
{
    const struct gradients *w = job;
    const int64_t last = (task + 1) * TASK_ROWS < w->rows ? (task + 1) * TASK_ROWS : w->rows;
    const int64_t vectors = (w->D + LANES - 1) / LANES;
    VEC *d_weight = (VEC *)scratch, *part = d_weight + vectors;
    for (int64_t i = 0; i < 2 * vectors; i++)
        d_weight[i] = (VEC){0};
    for (int64_t r = task * TASK_ROWS; r < last; r++) {
        if (w->narrow_grad)
            NAME(row_gradients)(w, r * w->D, part, 1);
        else
            NAME(row_gradients)(w, r * w->D, part, 0);
        if (r % PART_ROWS == PART_ROWS - 1 || r == last - 1)
            for (int64_t i = 0; i < vectors; i++) {
                d_weight[i] += part[i];
                part[i] = (VEC){0};
            }
    }
    memcpy(w->d_weight + task * w->D, d_weight, 4 * (size_t)w->D);
}

#undef FN
#undef VEC
