/* AuM's scan and causal convolution on a CPU, forward and backward, through a plain C interface (native.py calls it).
 *
 * Channels stand side by side in vector lanes, so that nothing is ever added across lanes inside the recurrence; the
 * code is one (native_lanes.h), compiled for each instruction set and chosen at run time (../native.h). Tasks are
 * clips (or a clip's channel blocks): what a task computes depends on its own inputs alone, so that neither the number of
 * threads nor their timing changes a bit.
 */
#include <stdint.h>

#define MOST_STATES 64
#define MOST_TAPS 16
#define CHUNK 32 /* tokens whose states and decays the backward makes again at a time: 64 KB at 16 lanes and 16 states */

typedef struct {
    const void *at;         /* float32, or bfloat16 where narrow */
    long clip, row, narrow; /* elements from clip to clip and from token to token; channels are neighbours */
} Rows;

typedef struct {
    Rows u, delta, z, B, C, grad;
    const float *A, *A_backward, *D, *bias; /* (E, S), (E, S) or null, (E), (E) */
    void *out;                              /* (B, L, E), of u's type */
    float *y;                               /* (B, L, E), before the gate: null where nobody will ask for gradients */
    float *kept;                            /* (B, ways, chunks, S, E): with y, the states that each CHUNK tokens begin with */
    void *d_u, *d_delta, *d_z;              /* (B, L, E), each of its own's type */
    float *d_B, *d_C;                       /* (B, L, S) */
    float *d_A, *d_D, *d_bias;              /* for each clip: (B, ways, E, S), (B, E), (B, E) */
    long clips, L, E, S, reverse;
} Scan;

typedef struct {
    Rows u, grad;
    const float *weight, *bias; /* (E, K), (E) */
    float *out;                 /* (B, L, E) */
    void *d_u;                  /* (B, L, E), of u's type */
    float *d_weight, *d_bias;   /* for each clip: (B, E, K), (B, E) */
    long clips, L, E, K, reverse;
} Conv;

#define LANES_FILE "selective_scan/native_lanes.h"
#include "../native.h"

static const body SCAN_FORWARD[SETS] = EACH(scan_forward), SCAN_BACKWARD[SETS] = EACH(scan_backward);
static const body CONV_FORWARD[SETS] = EACH(conv_forward), CONV_BACKWARD[SETS] = EACH(conv_backward);

int64_t fftp_scan_forward(const Scan *g, int64_t set, int64_t threads, parallel region) {
    const int64_t lanes = LANES_OF[set], tasks = g->clips * ((g->E + lanes - 1) / lanes);
    return run_all(SCAN_FORWARD[set], g, tasks, 3 * g->L * lanes, threads, region);
}

int64_t fftp_scan_backward(const Scan *g, int64_t set, int64_t threads, parallel region) {
    const int64_t vectors = 6 * g->L + (2 * g->L + 2 * CHUNK) * g->S;
    return run_all(SCAN_BACKWARD[set], g, g->clips, vectors * LANES_OF[set], threads, region);
}

int64_t fftp_conv_forward(const Conv *g, int64_t set, int64_t threads, parallel region) {
    return run_all(CONV_FORWARD[set], g, g->clips, 1, threads, region);
}

int64_t fftp_conv_backward(const Conv *g, int64_t set, int64_t threads, parallel region) {
    return run_all(CONV_BACKWARD[set], g, g->clips, g->L * LANES_OF[set], threads, region);
}
