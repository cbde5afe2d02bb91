/* Residual addition and norm on a CPU, forward and backward; called through ctypes by native.py.

   Equations: reference.py; LayerNorm where `centred`, RMSNorm otherwise. A row is one thread's, and its bits depend on nothing
   but itself; the gradients of weight, shift and bias are left in sums over TASK_ROWS rows each. */

#include <stdint.h>

#define TASK_ROWS 64 /* rows that one thread takes at a time: 48 KB of each tensor at width 192 */
#define PART_ROWS 8  /* rows of a partial sum (one over all rows of a task would lose bits), which go pass by pass together */

/* x and normed are bfloat16 where narrow_x and narrow_normed say so, all else is float32. residual and bias may be NULL;
   shift is read where centred. */
struct norm {
    int64_t rows, D, centred, narrow_x, narrow_normed;
    double eps;
    const void *x;
    const float *residual, *bias, *weight, *shift;
    void *normed;
    float *total;
};

/* grad (of normed) may be bfloat16; d_x is bfloat16, or NULL where d serves. sums: (tasks, D), of weight; where centred
   (tasks, 3, D), of weight, shift and bias. */
struct gradients {
    int64_t rows, D, centred, narrow_grad;
    double eps;
    const void *grad;
    const float *d_total, *total, *weight;
    float *d;
    void *d_x;
    float *sums;
};

#define LANES_FILE "norm/native_lanes.h"
#include "../native.h"

static const body NORM[SETS] = EACH(norm), GRADIENTS[SETS] = EACH(gradients);

static int64_t tasks(int64_t rows) { return (rows + TASK_ROWS - 1) / TASK_ROWS; }

int64_t fftp_norm(const struct norm *w, int64_t set, int64_t threads, parallel region)
{
    return run_all(NORM[set], w, tasks(w->rows), 1, threads, region);
}

int64_t fftp_gradients(const struct gradients *w, int64_t set, int64_t threads, parallel region)
{
    const int64_t kinds = w->centred ? 3 : 1;
    return run_all(GRADIENTS[set], w, tasks(w->rows), 2 * kinds * round_up(w->D, LANES_OF[set]), threads, region);
}
