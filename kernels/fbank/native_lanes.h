/* The front end for one width of vector; native.c has this file included once for each instruction set (../native.h). */

#define VEC NAME(vec)
#define INTS NAME(ints)
#define WIDE NAME(wide)
#define DOUBLES NAME(doubles)
#define FRAMES (LANES / 2) /* side by side */
#define FN static inline __attribute__((always_inline, unused))

typedef float VEC __attribute__((vector_size(4 * LANES)));
typedef int32_t INTS __attribute__((vector_size(4 * LANES)));
typedef uint64_t WIDE __attribute__((vector_size(4 * LANES)));
typedef double DOUBLES __attribute__((vector_size(4 * LANES)));
typedef float NAME(halves) __attribute__((vector_size(2 * LANES)));
typedef float NAME(loose_halves) __attribute__((vector_size(2 * LANES), aligned(4), may_alias));

/* -- arithmetic of lanes ------------------------------------------------------------------------------------------- */

FN VEC NAME(all)(float x) { return (VEC){0} + x; }

FN VEC NAME(pick)(INTS mask, VEC yes, VEC no) { return (VEC)((mask & (INTS)yes) | (~mask & (INTS)no)); }

/* The natural logarithm of normal numbers, infinity and NaN: one unit in the last place, exact for powers of two. */
FN VEC NAME(log_of)(VEC x)
{
    INTS exponent = ((INTS)x - 0x3f3504f3) >> 23; /* x = 2^exponent (1 + f) with 1 + f from sqrt(1/2) to sqrt(2) */
    VEC f = (VEC)((INTS)x - (exponent << 23)) - 1.0f, e = __builtin_convertvector(exponent, VEC);
    /* (log(1 + f) - f + f^2 / 2) / f^3: least largest error of the logarithm, relative, 6e-9. */
    VEC p = FUSED(f, NAME(all)(-0.0763449296f), NAME(all)(0.12761575f));
    p = FUSED(f, p, NAME(all)(-0.131601825f));
    p = FUSED(f, p, NAME(all)(0.142017588f));
    p = FUSED(f, p, NAME(all)(-0.166233569f));
    p = FUSED(f, p, NAME(all)(0.200012267f));
    p = FUSED(f, p, NAME(all)(-0.250008196f));
    p = FUSED(f, p, NAME(all)(0.333333313f));
    /* log(2) in two parts, the first of few enough bits that its multiples are exact. */
    VEC low = FUSED(f * f, FUSED(f, p, NAME(all)(-0.5f)), e * -2.12194440e-4f);
    VEC result = FUSED(e, NAME(all)(0.693359375f), f + low);
    return NAME(pick)(x < INFINITY, result, x);
}

/* -- frames -------------------------------------------------------------------------------------------------------- */

FN DOUBLES NAME(twice)(const float *from)
{
    return __builtin_convertvector((NAME(halves)) * (const NAME(loose_halves) *)from, DOUBLES);
}

/* FRAMES frames from t on, each without its mean, pre-emphasised and tapered, in the order of the transform's input.

   Sample n of frame t is sample n mod hop of frame t + n / hop: turned[m][j], sample m of frame t + j, is one clip's
   stretch turned once, and a vector of samples is FRAMES neighbours in it. */
FN void NAME(prepare)(const struct fbank *w, const float *wave, int64_t t, DOUBLES *z, float *turned)
{
    const int64_t hop = w->hop, frame = w->frame, rows = hop < frame ? hop : frame, pitch = FRAMES + (frame - 1) / hop;
    const float *from = wave + t * hop;
    const int64_t left = w->W - t * hop;
    if ((pitch - 1) * hop + rows <= left)
        for (int64_t m = 0; m < rows; m++)
            for (int64_t j = 0; j < pitch; j++)
                turned[m * pitch + j] = from[j * hop + m];
    else
        for (int64_t m = 0; m < rows; m++)
            for (int64_t j = 0; j < pitch; j++)
                turned[m * pitch + j] = j * hop + m < left ? from[j * hop + m] : 0.0f;

    DOUBLES sum[4] = {{0}}; /* four at a time, so that no addition waits for the one before */
    for (int64_t n = 0, m = 0, q = 0; n < frame; n++, m++) {
        if (m == hop)
            m = 0, q++;
        sum[n & 3] += NAME(twice)(turned + m * pitch + q);
    }
    const DOUBLES mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / (double)frame;
    DOUBLES before = NAME(twice)(turned) - mean; /* Kaldi repeats the first sample in front of the frame */
    for (int64_t n = 0, m = 0, q = 0; n < frame; n++, m++) {
        if (m == hop)
            m = 0, q++;
        DOUBLES x = NAME(twice)(turned + m * pitch + q) - mean;
        z[w->place[n]] = (x - before * w->preemphasis) * w->window[n];
        before = x;
    }
    for (int64_t n = frame; n < 2 * w->half; n++)
        z[w->place[n]] = (DOUBLES){0};
}

/* Four points h apart, at z[0], z[2 h], z[4 h] and z[6 h], from transforms of h points to one of 4 h. turn: the twiddles
   of the second, third and fourth point, cos and -sin each; all 1 where plain. */
FN void NAME(butterfly)(DOUBLES *z, int64_t h, const double *turn, int plain)
{
    DOUBLES re[4], im[4];
    for (int i = 0; i < 4; i++) {
        re[i] = z[2 * i * h];
        im[i] = z[2 * i * h + 1];
    }
    for (int i = 1; i < 4 && !plain; i++) {
        DOUBLES c = (DOUBLES){0} + turn[2 * i - 2], s = (DOUBLES){0} + turn[2 * i - 1], x = re[i];
        re[i] = FUSED2(x, c, -(im[i] * s));
        im[i] = FUSED2(x, s, im[i] * c);
    }
    DOUBLES even_re = re[0] + re[1], even_im = im[0] + im[1], odd_re = re[0] - re[1], odd_im = im[0] - im[1];
    DOUBLES sum_re = re[2] + re[3], sum_im = im[2] + im[3], gap_re = re[2] - re[3], gap_im = im[2] - im[3];
    z[0] = even_re + sum_re;
    z[1] = even_im + sum_im;
    z[2 * h] = odd_re + gap_im;
    z[2 * h + 1] = odd_im - gap_re;
    z[4 * h] = even_re - sum_re;
    z[4 * h + 1] = even_im - sum_im;
    z[6 * h] = odd_re - gap_im;
    z[6 * h + 1] = odd_im + gap_re;
}

/* The transform of half complex points in bit-reversed order (real and imaginary vector each), in place. */
FN void NAME(transform)(const struct fbank *w, DOUBLES *z)
{
    const int64_t points = w->half;
    int64_t h = 4;
    if (__builtin_ctzll((uint64_t)points) & 1) { /* an odd power of two */
        for (int64_t i = 0; i < points; i += 2) {
            DOUBLES re = z[2 * i + 2], im = z[2 * i + 3];
            z[2 * i + 2] = z[2 * i] - re;
            z[2 * i + 3] = z[2 * i + 1] - im;
            z[2 * i] += re;
            z[2 * i + 1] += im;
        }
        h = 2;
    } else {
        for (int64_t i = 0; i + 4 <= points; i += 4)
            NAME(butterfly)(z + 2 * i, 1, NULL, 1);
    }
    for (; h < points; h *= 4)
        for (int64_t j = 0; j < h; j++) {
            const double *by = w->twiddle;
            const int64_t k = j * (points / (2 * h)); /* 2 pi j / (4 h) in twiddles of 2 points */
            /* In bit-reversed order the second transform is of the samples two further on, the third of the next ones. */
            const double turn[6] = {by[4 * k], by[4 * k + 1], by[2 * k], by[2 * k + 1], by[6 * k], by[6 * k + 1]};
            for (int64_t i = j; i < points; i += 4 * h)
                NAME(butterfly)(z + 2 * i, h, turn, 0);
        }
}

/* |bins 0 .. half - 1|^2 of the real transform, from that of the even samples and i times the odd ones. */
FN void NAME(powers)(const struct fbank *w, const DOUBLES *z, DOUBLES *power)
{
    const int64_t half = w->half;
    DOUBLES sum = 2.0 * (z[0] + z[1]);
    power[0] = sum * sum;
    for (int64_t k = 1; k <= half / 2; k++) {
        const DOUBLES *a = z + 2 * k, *b = z + 2 * (half - k);
        DOUBLES even_re = a[0] + b[0], even_im = a[1] - b[1], odd_re = a[1] + b[1], odd_im = b[0] - a[0];
        DOUBLES c = (DOUBLES){0} + w->twiddle[2 * k], s = (DOUBLES){0} + w->twiddle[2 * k + 1];
        DOUBLES re = FUSED2(odd_re, c, -(odd_im * s)), im = FUSED2(odd_re, s, odd_im * c);
        DOUBLES low_re = even_re + re, low_im = even_im + im, high_re = even_re - re, high_im = even_im - im;
        power[half - k] = FUSED2(high_re, high_re, high_im * high_im);
        power[k] = FUSED2(low_re, low_re, low_im * low_im);
    }
}

/* Logarithms of the filters' energies, `[F, FRAMES]`. */
FN void NAME(logarithms)(const struct fbank *w, const DOUBLES *power, float *mel)
{
    const DOUBLES nothing = 0.0 * power[0]; /* NaN where the frame has one, so that it shows in empty filters too */
    for (int64_t f = 0; f < w->F; f++) {
        const double *weights = w->weights + w->from[f];
        DOUBLES energy = nothing;
        for (int64_t k = 0; k < w->count[f]; k++)
            energy = FUSED2((DOUBLES){0} + weights[k], power[w->first[f] + k], energy);
        *(NAME(halves) *)(mel + f * FRAMES) = __builtin_convertvector(energy, NAME(halves));
    }
    for (int64_t i = 0; i < w->F * FRAMES; i += LANES) {
        VEC energy = *(VEC *)(mel + i);
        *(VEC *)(mel + i) = NAME(log_of)(NAME(pick)(energy < 0x1p-23f, NAME(all)(0x1p-23f), energy));
    }
}

static void NAME(fbank)(const void *job, int64_t task, float *scratch)
{
    const struct fbank *w = job;
    const int64_t parts = (w->T + TASK_FRAMES - 1) / TASK_FRAMES, b = task / parts, F = w->F, T = w->T;
    const int64_t begin = task % parts * TASK_FRAMES, end = begin + TASK_FRAMES < T ? begin + TASK_FRAMES : T;
    int64_t valid = w->length[b] < w->frame ? 0 : (w->length[b] - w->frame) / w->hop + 1;
    if (valid > w->most_frames)
        valid = w->most_frames;
    const int64_t roll = w->roll ? (w->roll[b] % T + T) % T : 0;
    DOUBLES *z = (DOUBLES *)scratch, *power = z + 2 * w->half;
    float *mel = (float *)(power + w->half), *turned = mel + round_up(F * FRAMES, LANES), *out = w->out + b * T * F;

    int64_t t = begin;
    for (; t < end && t < valid; t += FRAMES) {
        NAME(prepare)(w, w->waveform + b * w->stride_b, t, z, turned);
        NAME(transform)(w, z);
        NAME(powers)(w, z, power);
        NAME(logarithms)(w, power, mel);
        for (int64_t j = 0; j < FRAMES && t + j < end && t + j < valid; j++) {
            float *row = out + (t + j + roll) % T * F;
            for (int64_t f = 0; f < F; f++)
                row[f] = mel[f * FRAMES + j];
        }
    }
    for (t = valid > begin ? valid : begin; t < end; t++)
        memset(out + (t + roll) % T * F, 0, 4 * F);
}

/* -- normalisation ------------------------------------------------------------------------------------------------- */

/* The four words of counters first .. first + BLOCKS - 1 of a clip's noise, in order; scratch holds 4 BLOCKS words.
   A 64-bit lane holds a 32-bit counter; what gathers in its upper half, products do not see. */
FN void NAME(noise_words)(uint64_t seed, uint64_t epoch, int64_t ticket, int64_t first, uint64_t *words, uint64_t *scratch)
{
    uint64_t *ab = scratch, *cd = scratch + BLOCKS;
    WIDE lane = {0};
    for (int i = 0; i < LANES / 2; i++)
        lane[i] = (uint64_t)i;
    for (int64_t i = 0; i < BLOCKS; i += LANES / 2) {
        WIDE c0 = (WIDE){0} + NOISE_COUNTER, c1 = lane + (uint64_t)(first + i);
        WIDE c2 = (WIDE){0} + epoch, c3 = (WIDE){0} + (uint64_t)ticket;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            WIDE a = MUL32(c0, (WIDE){0} + ROUND_A), b = MUL32(c2, (WIDE){0} + ROUND_B);
            c0 = (b >> 32) ^ c1 ^ k0;
            c2 = (a >> 32) ^ c3 ^ k1;
            c1 = b;
            c3 = a;
            k0 += WEYL_A;
            k1 += WEYL_B;
        }
        *(WIDE *)(ab + i) = (c0 & UINT32_MAX) | (c1 << 32);
        *(WIDE *)(cd + i) = (c2 & UINT32_MAX) | (c3 << 32);
    }
    for (int64_t i = 0; i < BLOCKS; i++) {
        words[2 * i] = ab[i];
        words[2 * i + 1] = cd[i];
    }
}

/* Without fused multiply-adds, which would round otherwise than the reference: setup.py turns them off. */
static void NAME(normalise)(const void *job, int64_t task, float *scratch)
{
    const struct normalise *w = job;
    const int64_t parts = (w->cells + TASK_CELLS - 1) / TASK_CELLS, b = task / parts, begin = task % parts * TASK_CELLS;
    const int64_t n = w->cells - begin < TASK_CELLS ? w->cells - begin : TASK_CELLS;
    const float mean = (float)w->mean, divisor = (float)w->divisor;
    float *cells = w->log_mel + b * w->cells + begin;
    if (!w->tickets) {
        for (int64_t i = 0; i < n; i++)
            cells[i] = (cells[i] - mean) / divisor;
        return;
    }
    uint32_t clip[4] = {NOISE_COUNTER, 0, (uint32_t)w->epoch, (uint32_t)w->tickets[b]};
    philox(w->seed, clip);
    const float scale = (float)(clip[0] >> 8) * 0x1p-24f / NOISE_SCALE;
    uint32_t *words = (uint32_t *)scratch;
    for (int64_t at = 0; at < n; at += 4 * BLOCKS) {
        const int64_t first = 1 + (begin + at) / 4, some = n - at < 4 * BLOCKS ? n - at : 4 * BLOCKS;
        NAME(noise_words)(w->seed, w->epoch, w->tickets[b], first, (uint64_t *)words, (uint64_t *)(words + 4 * BLOCKS));
        for (int64_t i = 0; i < some; i++) {
            float cell = (float)(int32_t)(words[i] >> 8) * 0x1p-24f;
            cells[at + i] = (cells[at + i] - mean) / divisor + cell * scale;
        }
    }
}

#undef VEC
#undef INTS
#undef WIDE
#undef DOUBLES
#undef FRAMES
#undef FN
