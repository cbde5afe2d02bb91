/* A bias and the exact GELU behind it on a CPU, forward and backward; called through ctypes by native.py.

   Equations: reference.py. An element's bits depend on nothing but x, bias and grad; the bias's gradient is left in sums
   over TASK_ROWS rows each. */

#include <stdint.h>

#define TASK_ROWS 64 /* rows that one thread takes at a time: 96 KB of each bfloat16 tensor at width 768 */
#define PART_ROWS 8  /* rows of a partial sum: one sum over all rows of a task would lose bits */
#define SEGMENTS 16  /* of a table: a vector of AVX-512 */
#define TERMS 7      /* of the polynomial in each */

/* x and out are bfloat16 where narrow, else float32. bias may be NULL. */
struct gelu {
    int64_t rows, D, narrow;
    const float *table, *bias;
    const void *x;
    void *out;
};

/* grad (of out), x and d_x are bfloat16 where narrow. d_bias: (tasks, D), or NULL where nobody wants it. */
struct gradients {
    int64_t rows, D, narrow;
    const float *table, *bias;
    const void *grad, *x;
    void *d_x;
    float *d_bias;
};

#define LANES_FILE "gelu/native_lanes.h"
#include "../native.h"

static const body GELU[SETS] = EACH(gelu), GRADIENTS[SETS] = EACH(gradients);

static int64_t tasks(int64_t rows) { return (rows + TASK_ROWS - 1) / TASK_ROWS; }

int64_t fftp_gelu(const struct gelu *w, int64_t set, int64_t threads, parallel region)
{
    const int64_t floats = round_up(w->D, 2 * LANES_OF[set]);
    return run_all(GELU[set], w, tasks(w->rows), floats, threads, region);
}

int64_t fftp_gradients(const struct gradients *w, int64_t set, int64_t threads, parallel region)
{
    const int64_t floats = round_up(w->D, 2 * LANES_OF[set]);
    return run_all(GRADIENTS[set], w, tasks(w->rows), 3 * floats, threads, region);
}
