/* The front end on a CPU: log-mel of waveforms, and its normalisation with keyed noise; called through ctypes by native.py.

   Equations: reference.py, and kernels/philox.py for the noise. Frames of one clip lie side by side in a vector's lanes,
   so that a transform is plain scalar code on vectors, and a frame meets the same operations in the same order whatever
   else is in the batch. Until the logarithm all is double: in float32 a transform's rounding shows in nearly empty bins,
   by luck 4e-3 in one clip and 1e-5 in the next, and costs more accuracy than double costs time. */

#include <stdint.h>

#include "../philox.h"

#define TASK_FRAMES 64  /* rows of one clip's log-mel that one thread makes at a time: a multiple of any vector's lanes */
#define TASK_CELLS 8192 /* cells of one clip that one thread normalises at a time */
#define BLOCKS 256      /* counters whose four words are drawn at a time: 4 KB in the first-level cache */

/* The noise as kernels/draws.py has it. */
#define NOISE_COUNTER (6u << 16)
#define NOISE_SCALE 10.0f

/* The arguments of fbank. A transform has 2 * half points; place[n] is where sample n of a frame goes in the transform's
   input, twiddle[2 k], [2 k + 1] are cos and -sin of 2 pi k / (2 half), window is half the window. Filter f is
   weights[from[f]] ... on bins first[f] to before first[f] + count[f]. roll may be NULL. */
struct fbank {
    int64_t batch, W, stride_b, T, F, frame, hop, half, most_frames;
    double preemphasis;
    const float *waveform;
    const double *window, *twiddle, *weights;
    const int64_t *length, *roll, *place, *first, *count, *from;
    float *out;
};

/* The arguments of normalise; tickets is NULL where there is no noise. */
struct normalise {
    int64_t batch, cells;
    double mean, divisor;
    uint64_t seed, epoch;
    const int64_t *tickets;
    float *log_mel;
};

#define LANES_FILE "fbank/native_lanes.h"
#include "../native.h"

static const body FBANK[SETS] = EACH(fbank), NORMALISE[SETS] = EACH(normalise);

int64_t fftp_fbank(const struct fbank *w, int64_t set, int64_t threads, parallel region)
{
    const int64_t lanes = LANES_OF[set], parts = (w->T + TASK_FRAMES - 1) / TASK_FRAMES;
    const int64_t rows = w->hop < w->frame ? w->hop : w->frame, pitch = lanes / 2 + (w->frame - 1) / w->hop;
    const int64_t floats = 3 * w->half * lanes + round_up(w->F * lanes / 2, lanes) + rows * pitch;
    return run_all(FBANK[set], w, w->batch * parts, floats, threads, region);
}

int64_t fftp_normalise(const struct normalise *w, int64_t set, int64_t threads, parallel region)
{
    const int64_t parts = (w->cells + TASK_CELLS - 1) / TASK_CELLS;
    return run_all(NORMALISE[set], w, w->batch * parts, 8 * BLOCKS, threads, region);
}
