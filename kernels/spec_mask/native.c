/* SpecMask and SpecAugment on a CPU: a clip's rectangles drawn, and painted where it is asked for; called through ctypes by
   native.py.

   Algorithm: reference.py. It is integers, a few hundred for a clip, and stores: one form does for all instruction sets. */

#include "../native.h"
#include "../philox.h"

/* What is drawn, as kernels/philox.py numbers it; the lower 16 bits count attempts. */
#define SPEC_MASK (7u << 16)
#define SPEC_AUGMENT (8u << 16)

/* SpecAugment's max_width is its longest time mask, max_height its highest frequency mask, and shapes is 2; it reads nothing
   else of the first three lines but T and F. rectangles (batch, shapes, 4). log_mel (batch, T, F) is contiguous, of elements
   of `bytes` bytes, as fill is; or NULL where nothing is to be painted. */
struct masks {
    int64_t batch, T, F, budget, max_width, max_height;
    int64_t full_threshold; /* a probability times 2^32 */
    int64_t shapes, attempts, clip, snap;
    uint64_t seed, epoch;
    const int64_t *tickets;
    int32_t *rectangles, *count, *area;
    int64_t bytes;
    const void *fill;
    void *log_mel;
};

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* A uniform integer in 0 .. n - 1, n below 2^31. */
static int64_t below(uint32_t word, int64_t n) { return (int64_t)((uint64_t)word * (uint64_t)n >> 32); }

static void draw(const struct masks *w, int64_t b, uint32_t what, int64_t shape, uint32_t words[4])
{
    words[0] = what;
    words[1] = (uint32_t)shape;
    words[2] = (uint32_t)w->epoch;
    words[3] = (uint32_t)w->tickets[b];
    philox(w->seed, words);
}

#define PAINT(cell)                                                                                                    \
    {                                                                                                                  \
        const cell fill = ((const cell *)w->fill)[b];                                                                  \
        cell *clip = (cell *)w->log_mel + b * w->T * w->F;                                                             \
        for (int64_t t = row[0]; t < row[1]; t++)                                                                      \
            for (int64_t f = row[2]; f < row[3]; f++)                                                                  \
                clip[t * w->F + f] = fill;                                                                             \
    }

/* Clip b's rectangles, `count` of them. */
static void paint(const struct masks *w, int64_t b, const int32_t *row, int64_t count)
{
    for (; w->log_mel && count--; row += 4)
        if (w->bytes == 2)
            PAINT(uint16_t)
        else if (w->bytes == 4)
            PAINT(uint32_t)
        else
            PAINT(uint64_t)
}

/* The place of a shape, in row[count]: the first attempt that overlaps no row before it. Returns whether there is one. */
static int place(const struct masks *w, int64_t b, int64_t shape, int64_t width, int64_t height, int32_t (*row)[4],
                 int64_t count)
{
    const int64_t starts = (w->T - width) / w->snap + 1;
    for (int64_t attempt = 1; attempt <= w->attempts; attempt++) {
        uint32_t words[4];
        draw(w, b, SPEC_MASK + (uint32_t)attempt, shape, words);
        const int64_t t = below(words[0], starts) * w->snap, f = below(words[1], w->F - height + 1);
        int64_t i = 0;
        while (i < count && (t >= row[i][1] || t + width <= row[i][0] || f >= row[i][3] || f + height <= row[i][2]))
            i++;
        if (i == count) {
            row[count][0] = (int32_t)t;
            row[count][1] = (int32_t)(t + width);
            row[count][2] = (int32_t)f;
            row[count][3] = (int32_t)(f + height);
            return 1;
        }
    }
    return 0;
}

static void spec_mask(const void *job, int64_t b, float *scratch)
{
    (void)scratch;
    const struct masks *w = job;
    int32_t(*row)[4] = (int32_t(*)[4])(w->rectangles + b * w->shapes * 4);
    int64_t area = 0, count = 0;
    for (int64_t shape = 0; shape < w->shapes && area < w->budget; shape++) {
        uint32_t words[4];
        draw(w, b, SPEC_MASK, shape, words);
        const int64_t height = words[0] < w->full_threshold ? w->F : 1 + below(words[1], w->max_height);
        int64_t width = 1 + below(words[2], w->max_width);
        if (w->clip) /* the last rectangle ends on the first column that reaches the budget */
            width = most(least(width, most(w->budget - area + height - 1, 1) / height), 1);
        width = least(round_up(width, w->snap), w->T);
        if (place(w, b, shape, width, height, row, count)) {
            count++;
            area += width * height;
        }
    }
    memset(row + count, 0, sizeof *row * (size_t)(w->shapes - count));
    w->count[b] = (int32_t)count;
    w->area[b] = (int32_t)area;
    paint(w, b, *row, count);
}

static void spec_augment(const void *job, int64_t b, float *scratch)
{
    (void)scratch;
    const struct masks *w = job;
    uint32_t frequency[4], time[4];
    draw(w, b, SPEC_AUGMENT, 0, frequency);
    draw(w, b, SPEC_AUGMENT + 1, 0, time);
    const int64_t height = below(frequency[0], w->max_height), width = below(time[0], w->max_width);
    const int64_t f = below(frequency[1], w->F - height), t = below(time[1], w->T - width);
    const int32_t rows[8] = {0, (int32_t)w->T, (int32_t)f, (int32_t)(f + height), (int32_t)t, (int32_t)(t + width), 0, (int32_t)w->F};
    memcpy(w->rectangles + b * 8, rows, sizeof rows);
    w->count[b] = 2;
    w->area[b] = (int32_t)(w->T * height + width * w->F);
    paint(w, b, rows, 2);
}

int64_t fftp_spec_mask(const struct masks *w, int64_t set, int64_t threads, parallel region)
{
    (void)set;
    return run_all(spec_mask, w, w->batch, 1, threads, region);
}

int64_t fftp_spec_augment(const struct masks *w, int64_t set, int64_t threads, parallel region)
{
    (void)set;
    return run_all(spec_augment, w, w->batch, 1, threads, region);
}
