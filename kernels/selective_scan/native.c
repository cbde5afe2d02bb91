/* AuM's scan and causal convolution on a CPU, forward and backward, through a plain C interface (native.py calls it).
 *
 * Channels stand side by side in vector lanes, so that nothing is ever added across lanes inside the recurrence; the
 * code is one (native_body.h), compiled for the baseline, AVX2 with FMA and AVX-512, and chosen at run time. Tasks are
 * clips (or a clip's channel blocks): what a task computes depends on its own inputs alone, so that neither the number of
 * threads nor their timing changes a bit.
 */
#include <stdint.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between functions that are all inlined */

/* The second operand where either is NaN, as the instructions have it. */
#if defined(__x86_64__)
#define AT_LEAST(a, x) ((VEC)_mm_max_ps((__m128)(a), (__m128)(x)))
#define AT_MOST(a, x) ((VEC)_mm_min_ps((__m128)(a), (__m128)(x)))
#else
#define AT_LEAST(a, x) PICK((a) > (x), a, x)
#define AT_MOST(a, x) PICK((a) < (x), a, x)
#endif
#define LANES 4
#define TARGET
#define NAME(f) f##_baseline
#include "native_body.h"
#undef LANES
#undef TARGET
#undef NAME

#if defined(__x86_64__)
#undef AT_LEAST
#undef AT_MOST
#define AT_LEAST(a, x) ((VEC)_mm256_max_ps((__m256)(a), (__m256)(x)))
#define AT_MOST(a, x) ((VEC)_mm256_min_ps((__m256)(a), (__m256)(x)))
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(f) f##_avx2
#include "native_body.h"
#undef LANES
#undef TARGET
#undef NAME

#undef AT_LEAST
#undef AT_MOST
#define AT_LEAST(a, x) ((VEC)_mm512_max_ps((__m512)(a), (__m512)(x)))
#define AT_MOST(a, x) ((VEC)_mm512_min_ps((__m512)(a), (__m512)(x)))
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx2,fma,prefer-vector-width=512")))
#define NAME(f) f##_avx512
#include "native_body.h"
#undef LANES
#undef TARGET
#undef NAME
#endif

enum { BASELINE, AVX2, AVX512 };

/* The widest instruction set of this processor: 0 the platform's plain one, 1 AVX2 with FMA, 2 AVX-512. */
int64_t fftp_widest(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return BASELINE;
}

/* A checksum of the sources that setup.py compiled, so that kernels/native.py can tell a library of other sources. */
int64_t fftp_sources(void) { return FFTP_SOURCES; }

static long lanes_of(int level) { return level == AVX512 ? 16 : level == AVX2 ? 8 : 4; }

enum { SCAN_FORWARD, SCAN_BACKWARD, CONV_FORWARD, CONV_BACKWARD };

typedef struct {
    const void *given;
    long tasks, next, room; /* room: floats of scratch that a thread needs */
    int kind, level, failed;
} Job;

#if defined(__x86_64__)
#define CALL(f, ...) \
    (job->level == AVX512 ? f##_avx512(__VA_ARGS__) : job->level == AVX2 ? f##_avx2(__VA_ARGS__) : f##_baseline(__VA_ARGS__))
#else
#define CALL(f, ...) f##_baseline(__VA_ARGS__)
#endif

/* What a thread does: take the next task until none is left. */
static void work(void *pointer) {
    Job *job = pointer;
    float *room = 0;
    if (job->room && posix_memalign((void **)&room, 64, 4 * job->room)) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    long lanes = lanes_of(job->level);
    for (;;) {
        long task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (task >= job->tasks) break;
        if (job->kind == SCAN_FORWARD) {
            const Scan *g = job->given;
            long blocks = (g->E + lanes - 1) / lanes;
            CALL(scan_forward, g, task / blocks, task % blocks * lanes, room);
        } else if (job->kind == SCAN_BACKWARD)
            CALL(scan_backward, job->given, task, room);
        else if (job->kind == CONV_FORWARD)
            CALL(conv_forward, job->given, task);
        else
            CALL(conv_backward, job->given, task, room);
    }
    free(room);
}

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Run a kind of work on so many threads. parallel is the GOMP_parallel of the OpenMP that PyTorch has loaded, or null: its
 * threads spin for a while after PyTorch's own work, so that others would have to share the cores with them; without it
 * one thread does all. Returns -1 where memory is short. */
static int64_t run(int kind, const void *given, int64_t level, int64_t threads, Parallel parallel, long tasks, long room) {
    Job job = {given, tasks, 0, room * lanes_of((int)level), kind, (int)level, 0};
    if (threads > tasks) threads = tasks;
    if (threads > 1 && parallel)
        parallel(work, &job, (unsigned)threads, 0);
    else
        work(&job);
    return job.failed ? -1 : 0;
}

int64_t fftp_scan_forward(const Scan *g, int64_t level, int64_t threads, Parallel parallel) {
    long lanes = lanes_of((int)level);
    return run(SCAN_FORWARD, g, level, threads, parallel, g->clips * ((g->E + lanes - 1) / lanes), 3 * g->L);
}

int64_t fftp_scan_backward(const Scan *g, int64_t level, int64_t threads, Parallel parallel) {
    return run(SCAN_BACKWARD, g, level, threads, parallel, g->clips, 6 * g->L + (2 * g->L + 2 * CHUNK) * g->S);
}

int64_t fftp_conv_forward(const Conv *g, int64_t level, int64_t threads, Parallel parallel) {
    return run(CONV_FORWARD, g, level, threads, parallel, g->clips, 0);
}

int64_t fftp_conv_backward(const Conv *g, int64_t level, int64_t threads, Parallel parallel) {
    return run(CONV_BACKWARD, g, level, threads, parallel, g->clips, g->L);
}
