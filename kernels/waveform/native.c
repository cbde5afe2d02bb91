/* Packed samples to the waveforms of a batch on a CPU; called through ctypes by native.py.

   Equations: reference.py. A clip is one thread's, and what is computed for it depends on nothing but itself and its
   partner. */

#include <stdint.h>

#define SCALE (1.0f / 32768.0f)
#define CHUNK 256 /* samples of a partial sum, as reference.py has it */

/* gain may be NULL; so may other_start, and then other_length and weight are not read. */
struct waveforms {
    int64_t batch, W;
    const int16_t *samples;
    const int64_t *start, *length;
    const float *gain;
    const int64_t *other_start, *other_length;
    const float *weight;
    float *out;
};

#define LANES_FILE "waveform/native_lanes.h"
#include "../native.h"

static const body WAVEFORMS[SETS] = EACH(waveforms);

int64_t fftp_waveforms(const struct waveforms *w, int64_t set, int64_t threads, parallel region)
{
    return run_all(WAVEFORMS[set], w, w->batch, 1, threads, region);
}
