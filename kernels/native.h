/* What the operations in C share: instruction sets, threads, the checksum of the sources.

   An operation's native.c may define LANES_FILE, the header with its arithmetic, and includes this file, which compiles that
   header for the plain instruction set of the platform and, on x86-64, for AVX2 with FMA and for AVX-512; the caller says
   which one runs. The header finds

   LANES           how many float32 a vector holds
   NAME(x)         the function or type x of this instruction set
   FUSED(a, b, c)  a b + c, rounded once where the processor can; of vectors of type NAME(vec)
   FUSED2(a, b, c) the same of vectors of type NAME(doubles)
   MUL32(a, b)     products of the lower halves of 64-bit lanes, of type NAME(wide)

   One that multiplies tiles (tiles.h) as well defines TILES first, and finds TILED where the compiler and the system know them. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_THREADS 256

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* -- one instruction set after the other --------------------------------------------------------------------------- */

#ifdef __x86_64__
#include <immintrin.h>
#if defined TILES && defined __linux__ && (defined __clang__ ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TILED
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#ifdef LANES_FILE
#ifdef __x86_64__
#define MUL32(a, b) ((NAME(wide))_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#else
#define MUL32(a, b) (((a) & UINT32_MAX) * ((b) & UINT32_MAX))
#endif
#define LANES 4
#define NAME(x) x##_plain
#define FUSED(a, b, c) ((a) * (b) + (c))
#define FUSED2(a, b, c) ((a) * (b) + (c))
#include LANES_FILE
#undef LANES
#undef NAME
#undef FUSED
#undef FUSED2
#undef MUL32

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define NAME(x) x##_avx2
#define FUSED(a, b, c) ((NAME(vec))_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FUSED2(a, b, c) ((NAME(doubles))_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define MUL32(a, b) ((NAME(wide))_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#include LANES_FILE
#undef LANES
#undef NAME
#undef FUSED
#undef FUSED2
#undef MUL32
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
#define LANES 16
#define NAME(x) x##_avx512
#define FUSED(a, b, c) ((NAME(vec))_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FUSED2(a, b, c) ((NAME(doubles))_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define MUL32(a, b) ((NAME(wide))_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#include LANES_FILE
#undef LANES
#undef NAME
#undef FUSED
#undef FUSED2
#undef MUL32
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif

typedef void (*body)(const void *job, int64_t task, float *scratch);

enum { PLAIN, AVX2, AVX512, AMX, SETS = AMX };

#ifdef __x86_64__
#define EACH(x) {x##_plain, x##_avx2, x##_avx512}
#else
#define EACH(x) {x##_plain}
#endif

static const int64_t LANES_OF[SETS] = {4, 8, 16};

#ifdef TILED
/* Whether the processor multiplies tiles of bfloat16 and the system lets this process: it has to be asked. */
static int tiles_allowed(void)
{
    const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d = 0;
    const unsigned bf16 = 1u << 22, tiles = 1u << 24;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles) && !syscall(SYS_arch_prctl, ask, tile_data);
}
#endif

/* The widest instruction set of this processor that this operation uses: 0 the platform's plain one, 1 AVX2 with FMA, 2
   AVX-512, 3 that and AMX. */
int64_t fftp_widest(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
#ifdef TILED
        if (__builtin_cpu_supports("avx512bf16") && tiles_allowed())
            return AMX;
#endif
        return AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return PLAIN;
}

/* Whether the processor multiplies bfloat16 in vectors. */
int64_t fftp_bfloat16(void)
{
#ifdef __x86_64__
    return fftp_widest() >= AVX512 && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

/* A checksum of the sources that setup.py compiled, so that native.py can tell a library of other sources. */
int64_t fftp_sources(void) { return FFTP_SOURCES; }

/* -- threads ------------------------------------------------------------------------------------------------------- */

struct work {
    body run;
    const void *job;
    int64_t tasks, next;
    size_t bytes;
};

static void worker(void *given)
{
    struct work *w = given;
    void *scratch;
    if (posix_memalign(&scratch, 64, w->bytes))
        return;
    for (;;) {
        int64_t task = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
        if (task >= w->tasks)
            break;
        w->run(w->job, task, scratch);
    }
    free(scratch);
}

static void *thread(void *given)
{
    worker(given);
    return NULL;
}

/* GOMP_parallel of the OpenMP library that torch brings, where it was found: its threads are there already, and they
   spin for a while after each of torch's own operations, which other threads would have to share the cores with. */
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Every task once; returns 0, or -1 where there was no memory for one worker. */
static int64_t run_all(body run, const void *job, int64_t tasks, int64_t floats, int64_t threads, parallel region)
{
    struct work w = {run, job, tasks, 0, round_up(4 * floats, 64)};
    if (threads > tasks)
        threads = tasks;
    if (threads > MOST_THREADS)
        threads = MOST_THREADS;
    if (threads <= 1) {
        worker(&w);
    } else if (region) {
        region(worker, &w, (unsigned)threads, 0);
    } else {
        pthread_t others[MOST_THREADS];
        int64_t started = 0;
        while (started < threads - 1 && !pthread_create(&others[started], NULL, thread, &w))
            started++;
        worker(&w);
        while (started)
            pthread_join(others[--started], NULL);
    }
    return w.next < tasks ? -1 : 0;
}
