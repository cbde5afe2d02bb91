/* Residual addition and RMSNorm on a CPU, forward and backward; called through ctypes by native.py.

   Equations: reference.py. A row is one thread's, and its bits depend on nothing but itself; the weight's gradient is left
   in sums over TASK_ROWS rows each. */

#include <stdint.h>

#define TASK_ROWS 64 /* rows that one thread takes at a time: 48 KB of each tensor at width 192 */
#define PART_ROWS 8  /* rows of a partial sum: one sum over all rows of a task would lose bits */

/* x and normed are bfloat16 where narrow_x and narrow_normed say so, all else is float32. residual may be NULL. */
struct norm {
    int64_t rows, D, narrow_x, narrow_normed;
    double eps;
    const void *x;
    const float *residual, *weight;
    void *normed;
    float *total;
};

/* grad (of normed) may be bfloat16; d_x is bfloat16, or NULL where d serves. d_weight: (tasks, D). */
struct gradients {
    int64_t rows, D, narrow_grad;
    double eps;
    const void *grad;
    const float *d_total, *total, *weight;
    float *d;
    void *d_x;
    float *d_weight;
};

#define LANES_FILE "rms_norm/native_lanes.h"
#include "../native.h"

static const body NORM[SETS] = EACH(norm), GRADIENTS[SETS] = EACH(gradients);

static int64_t tasks(int64_t rows) { return (rows + TASK_ROWS - 1) / TASK_ROWS; }

int64_t fftp_norm(const struct norm *w, int64_t set, int64_t threads, parallel region)
{
    return run_all(NORM[set], w, tasks(w->rows), 1, threads, region);
}

int64_t fftp_gradients(const struct gradients *w, int64_t set, int64_t threads, parallel region)
{
    return run_all(GRADIENTS[set], w, tasks(w->rows), 2 * round_up(w->D, LANES_OF[set]), threads, region);
}
