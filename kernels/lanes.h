/* Vectors of float32, and how they are read and written as float32 or bfloat16; an operation's native_lanes.h includes this
   first (../native.h), and undefines FN, VEC and EACH_VECTOR at its end. */

#define FN static inline __attribute__((always_inline, unused))
#define VEC NAME(vec)

/* A block for each vector of D numbers: those at i .. i + n - 1. n is the constant LANES but for the last, whose calls of
   memcpy stay out of the loop: sums would be kept in memory across them. */
#define EACH_VECTOR(D, ...)                                                                                            \
    {                                                                                                                  \
        int64_t i = 0;                                                                                                 \
        for (; (D) - i >= LANES; i += LANES) {                                                                         \
            enum { n = LANES };                                                                                        \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
        if (i < (D)) {                                                                                                 \
            const int64_t n = (D) - i;                                                                                 \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
    }

typedef float NAME(vec) __attribute__((vector_size(4 * LANES)));
typedef float NAME(loose) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES)));
typedef uint16_t NAME(loose_halves) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Numbers at .. at + n - 1 of float32, or of bfloat16 where narrow; the lanes past them 0. */
FN VEC NAME(load)(const void *from, int64_t at, int64_t n, int64_t narrow)
{
    if (narrow) {
        NAME(halves) h = {0};
        if (n == LANES)
            h = *(const NAME(loose_halves) *)((const uint16_t *)from + at);
        else
            memcpy(&h, (const uint16_t *)from + at, 2 * (size_t)n);
        return (VEC)(__builtin_convertvector(h, NAME(words)) << 16);
    }
    if (n == LANES)
        return (VEC) * (const NAME(loose) *)((const float *)from + at);
    VEC x = {0};
    memcpy(&x, (const float *)from + at, 4 * (size_t)n);
    return x;
}

/* To bfloat16 it rounds to nearest even; a NaN stays one. */
FN void NAME(store)(void *to, int64_t at, int64_t n, int64_t narrow, VEC x)
{
    if (narrow) {
        NAME(words) bits = (NAME(words))x, nan = (NAME(words))(x != x);
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        NAME(halves) h = __builtin_convertvector((bits & ~nan) | (nan & 0x7FC0), NAME(halves));
        if (n == LANES)
            *(NAME(loose_halves) *)((uint16_t *)to + at) = h;
        else
            memcpy((uint16_t *)to + at, &h, 2 * (size_t)n);
    } else if (n == LANES) {
        *(NAME(loose) *)((float *)to + at) = (NAME(loose))x;
    } else {
        memcpy((float *)to + at, &x, 4 * (size_t)n);
    }
}

/* All lanes, halves upon halves. By lanes whose numbers are constants: others would keep the vector in memory. */
FN float NAME(sum)(VEC x)
{
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#elif LANES == 8
    const __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    return (y[0] + y[2]) + (y[1] + y[3]);
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}
