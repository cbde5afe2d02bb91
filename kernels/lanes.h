/* Vectors of float32, and how they are read and written as float32 or bfloat16; an operation's native_lanes.h includes this
   first (../native.h), and undefines FN and VEC at its end. */

#define FN static inline __attribute__((always_inline, unused))
#define VEC NAME(vec)

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

/* All lanes, halves upon halves. */
FN float NAME(sum)(VEC x)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            x[lane] += x[lane + half];
    return x[0];
}
