/* Waveforms for one width of vector; native.c has this file included once for each instruction set (../native.h). */

#define FN static inline __attribute__((always_inline, unused))

typedef float NAME(half) __attribute__((vector_size(2 * LANES)));
typedef float NAME(loose_half) __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef double NAME(doubles) __attribute__((vector_size(4 * LANES)));

/* Mean of n numbers, summed in double: chunks of CHUNK first. */
FN float NAME(mean)(const float *x, int64_t n)
{
    const int step = LANES / 2;
    double total = 0;
    for (int64_t at = 0; at < n; at += CHUNK) {
        const int64_t some = n - at < CHUNK ? n - at : CHUNK;
        NAME(doubles) sums = {0};
        int64_t i = 0;
        for (; i + step <= some; i += step) {
            NAME(half) part = *(const NAME(loose_half) *)(x + at + i);
            sums += __builtin_convertvector(part, NAME(doubles));
        }
        double sum = 0;
        for (; i < some; i++)
            sum += x[at + i];
        for (int lane = 0; lane < step; lane++)
            sum += sums[lane];
        total += sum;
    }
    return (float)(total / (double)(n > 0 ? n : 1));
}

static void NAME(waveforms)(const void *job, int64_t b, float *scratch)
{
    (void)scratch;
    const struct waveforms *w = job;
    const int64_t W = w->W, n = w->length[b] < W ? w->length[b] : W;
    const int16_t *samples = w->samples + w->start[b];
    float *out = w->out + b * W;
    const float gain = w->gain ? w->gain[b] : 1.0f;
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)samples[i] * SCALE * gain;
    const float mean = NAME(mean)(out, n);
    memset(out + n, 0, 4 * (size_t)(W - n));
    if (!w->other_start || w->weight[b] == 1.0f) {
        for (int64_t i = 0; i < n; i++)
            out[i] -= mean;
        return;
    }
    const int64_t m = w->other_length[b] < W ? w->other_length[b] : W, both = m < n ? m : n;
    const int16_t *other = w->samples + w->other_start[b];
    const float weight = w->weight[b], rest = 1.0f - weight;
    int64_t sum = 0; /* exact, as a sum of such numbers in double is */
    for (int64_t i = 0; i < m; i++)
        sum += other[i];
    const float other_mean = (float)((double)sum * (double)SCALE / (double)(m > 0 ? m : 1));
    for (int64_t i = 0; i < both; i++)
        out[i] = weight * (out[i] - mean) + rest * ((float)other[i] * SCALE - other_mean);
    for (int64_t i = both; i < n; i++)
        out[i] = weight * (out[i] - mean) + rest * 0.0f;
    const float mixture = NAME(mean)(out, n);
    for (int64_t i = 0; i < n; i++)
        out[i] -= mixture;
}

#undef FN
