/* The scan and the convolution for one instruction set: included by native.c once for each, with
 *   LANES     channels side by side in a vector
 *   TARGET    the attribute that lets the compiler use the instruction set
 *   NAME(f)   f with the instruction set's name behind it
 * A program of a clip's LANES channels keeps their S states in vectors: state s of all lanes is one vector.
 */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef int NAME(ints) __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef float NAME(loose) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define VEC NAME(vec)
#define INTS NAME(ints)
#define LOOSE NAME(loose)
#define WORDS NAME(words)
#define HALVES NAME(halves)
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE VEC NAME(all)(float x) { return x - (VEC){0}; }
#define ALL(x) NAME(all)(x)
INLINE VEC NAME(pick)(INTS where, VEC yes, VEC no) { return (VEC)(((INTS)yes & where) | ((INTS)no & ~where)); }
#define PICK(where, yes, no) NAME(pick)(where, yes, no)

#if LANES == 16
/* 2^x to 3 units in the last place, exactly 1 at 0; 0 below -126, inf from 128 on, NaN for NaN. */
INLINE VEC NAME(exp2)(VEC x) {
    VEC f = (VEC)_mm512_reduce_ps((__m512)x, 1); /* x less the integer below it */
    VEC p = f * 2.1612916316e-4f + 1.2467845809e-3f; /* the best of degree 6 for 0 <= f < 1 with p(0) = 1: 2e-9 */
    p = p * f + 9.6754515544e-3f;
    p = p * f + 5.5485282093e-2f;
    p = p * f + 2.4022930861e-1f;
    p = p * f + 6.9314706326e-1f;
    p = p * f + 1.0f;
    /* Times 2 to that integer. Smaller numbers than normal ones would slow down what multiplies by them. */
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)ALL(-126.0f), _CMP_NLT_UQ);
    return (VEC)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}
#else
/* 2^x to 3 units in the last place, exactly 1 at 0; 0 below -127, at most 2^127, NaN for NaN. */
INLINE VEC NAME(exp2)(VEC x) {
    const float magic = 12582912.0f + 127.0f; /* 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits */
    x = AT_MOST(ALL(127.0f), AT_LEAST(ALL(-127.0f), x));
    VEC shifted = x + magic, f = x - (shifted - magic);
    VEC p = f * 1.5353361941e-4f + 1.3398874444e-3f; /* the best of degree 6 for |f| <= 1/2 with p(0) = 1: 2e-9 */
    p = p * f + 9.6184373578e-3f;
    p = p * f + 5.5503324711e-2f;
    p = p * f + 2.4022647914e-1f;
    p = p * f + 6.9314720286e-1f;
    p = p * f + 1.0f;
    return p * (VEC)((INTS)shifted << 23); /* n + 127 becomes the exponent; NaN leaves anything there, and p carries it */
}
#endif

INLINE VEC NAME(exp)(VEC x) { return NAME(exp2)(x * 1.44269504f); }

/* log(1 + e^x) as PyTorch has it: x itself above 20. */
INLINE VEC NAME(softplus)(VEC x) {
    VEC e = NAME(exp)(PICK(x > 0, -x, x));
    VEC s = e / (e + 2.0f); /* log(1 + e) = 2 artanh(e / (2 + e)), s at most 1/3 */
    VEC q = s * s;
    VEC p = ALL(1.0f / 13.0f);
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    VEC log1p = 2.0f * (s + s * q * p);
    return PICK(x > 20.0f, x, PICK(x > 0, x, ALL(0.0f)) + PICK(x == x, log1p, x));
}

INLINE VEC NAME(sigmoid)(VEC x) {
    VEC e = NAME(exp)(PICK(x > 0, -x, x));
    VEC r = 1.0f / (1.0f + e);
    return PICK(x > 0, r, e * r);
}

/* A row of a tensor: the lanes that are there; the others 0. */
INLINE VEC NAME(load)(const float *p, int lanes) {
    if (lanes == LANES) return (VEC)(*(const LOOSE *)p);
    VEC x = {0};
    for (int i = 0; i < lanes; i++) x[i] = p[i];
    return x;
}

INLINE void NAME(store)(float *p, VEC x, int lanes) {
    if (lanes == LANES) {
        *(LOOSE *)p = (LOOSE)x;
        return;
    }
    for (int i = 0; i < lanes; i++) p[i] = x[i];
}

/* Where the states of a clip's direction that chunk c begins with are kept: S rows of all channels. */
INLINE float *NAME(kept)(const Scan *g, long b, int way, long c) {
    long ways = g->A_backward ? 2 : 1, chunks = (g->L + CHUNK - 1) / CHUNK;
    return g->kept + ((b * ways + way) * chunks + c) * g->S * g->E;
}

/* The same of a tensor of rows, at element i. */
INLINE VEC NAME(row)(const Rows *from, long i, int lanes) {
    if (!from->narrow) return NAME(load)((const float *)from->at + i, lanes);
    const uint16_t *p = (const uint16_t *)from->at + i;
    if (lanes == LANES) return (VEC)(__builtin_convertvector(*(const HALVES *)p, WORDS) << 16);
    WORDS x = {0};
    for (int k = 0; k < lanes; k++) x[k] = (uint32_t)p[k] << 16;
    return (VEC)x;
}

/* To bfloat16, where narrow, it rounds to nearest even; a NaN stays one. */
INLINE void NAME(put)(void *to, long i, long narrow, VEC x, int lanes) {
    if (!narrow) {
        NAME(store)((float *)to + i, x, lanes);
        return;
    }
    WORDS bits = (WORDS)x, nan = (WORDS)(x != x);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    bits = (bits & ~nan) | (nan & 0x7FC0);
    uint16_t *p = (uint16_t *)to + i;
    if (lanes == LANES)
        *(HALVES *)p = __builtin_convertvector(bits, HALVES);
    else
        for (int k = 0; k < lanes; k++) p[k] = (uint16_t)bits[k];
}

/* One direction of LANES channels over all tokens: y[t] += <s_t, C_t>. */
INLINE void NAME(scan_states)(const Scan *g, const VEC *step, const VEC *gain, const float *B, const float *C,
                              const VEC *A, VEC *y, long b, int way, long e, int lanes, const int S) {
    int backwards = g->reverse ^ way;
    VEC state[MOST_STATES];
    for (int s = 0; s < S; s++) state[s] = (VEC){0};
    for (long i = 0; i < g->L; i++) {
        if (g->y && i % CHUNK == 0)
            for (int s = 0; s < S; s++) NAME(store)(NAME(kept)(g, b, way, i / CHUNK) + s * g->E + e, state[s], lanes);
        long t = backwards ? g->L - 1 - i : i;
        const float *b_t = B + t * g->B.row, *c_t = C + t * g->C.row;
        VEC d = step[t], du = gain[t], first = {0}, second = {0};
#pragma GCC unroll 8
        for (int s = 0; s < S; s += 2) { /* two sums: the additions do not wait for one another */
            state[s] = NAME(exp2)(d * A[s]) * state[s] + du * b_t[s];
            first += state[s] * c_t[s];
            if (s + 1 < S) {
                state[s + 1] = NAME(exp2)(d * A[s + 1]) * state[s + 1] + du * b_t[s + 1];
                second += state[s + 1] * c_t[s + 1];
            }
        }
        y[t] += first + second;
    }
}

/* Decays in powers of two. */
INLINE void NAME(decays)(const float *A, VEC *out, long e, int lanes, int S) {
    for (int s = 0; s < S; s++) {
        out[s] = (VEC){0};
        for (int i = 0; i < lanes; i++) out[s][i] = A[(e + i) * S + s] * 1.44269504f;
    }
}

/* Clip b, channels e and on. */
static TARGET void NAME(scan_forward)(const Scan *g, long b, long e, float *room) {
    int lanes = g->E - e < LANES ? (int)(g->E - e) : LANES, S = (int)g->S;
    VEC *step = (VEC *)room, *gain = step + g->L, *y = gain + g->L, A[MOST_STATES];
    const long u = b * g->u.clip + e, raw = b * g->delta.clip + e, z = b * g->z.clip + e;
    const float *B = (const float *)g->B.at + b * g->B.clip, *C = (const float *)g->C.at + b * g->C.clip;
    VEC bias = NAME(load)(g->bias + e, lanes), D = NAME(load)(g->D + e, lanes);
    if (g->A_backward) D *= 2.0f;
    for (long t = 0; t < g->L; t++) {
        VEC x = NAME(row)(&g->u, u + t * g->u.row, lanes);
        step[t] = NAME(softplus)(NAME(row)(&g->delta, raw + t * g->delta.row, lanes) + bias);
        gain[t] = step[t] * x;
        y[t] = (VEC){0};
    }
    for (int way = 0; way < (g->A_backward ? 2 : 1); way++) {
        NAME(decays)(way ? g->A_backward : g->A, A, e, lanes, S);
        if (S == 16) /* a constant: the loop over states unrolls, and they live in registers */
            NAME(scan_states)(g, step, gain, B, C, A, y, b, way, e, lanes, 16);
        else
            NAME(scan_states)(g, step, gain, B, C, A, y, b, way, e, lanes, S);
    }
    for (long t = 0; t < g->L; t++) {
        VEC total = y[t] + D * NAME(row)(&g->u, u + t * g->u.row, lanes), gate = NAME(row)(&g->z, z + t * g->z.row, lanes);
        long at = (b * g->L + t) * g->E + e;
        if (g->y) NAME(store)(g->y + at, total, lanes);
        NAME(put)(g->out, at, g->u.narrow, total * gate * NAME(sigmoid)(gate), lanes);
    }
}

/* States of tokens first .. first + n - 1 in the scan's order, from `state` on: before[i] is the state that token i meets,
 * decay[i] what it is multiplied with. */
INLINE void NAME(recompute)(const Scan *g, const VEC *step, const VEC *gain, const float *B, const VEC *A, VEC *state,
                            VEC *before, VEC *decay, long first, long n, int backwards, const int S) {
    for (long i = 0; i < n; i++) {
        long t = backwards ? g->L - 1 - (first + i) : first + i;
        const float *b = B + t * g->B.row;
#pragma GCC unroll 16
        for (int s = 0; s < S; s++) {
            VEC a = NAME(exp2)(step[t] * A[s]);
            before[i * S + s] = state[s];
            decay[i * S + s] = a;
            state[s] = a * state[s] + gain[t] * b[s];
        }
    }
}

INLINE void NAME(scan_adjoint)(const Scan *g, const VEC *step, const VEC *gain, const VEC *u, const VEC *dy,
                               const float *B, const float *C, const VEC *A, VEC *d_step, VEC *d_u, VEC *d_B, VEC *d_C,
                               VEC *d_A, VEC *before, VEC *decay, long clip, int way, long e, int lanes, const int S) {
    int backwards = g->reverse ^ way;
    VEC state[MOST_STATES], adjoint[MOST_STATES], part[MOST_STATES];
    for (int s = 0; s < S; s++) adjoint[s] = d_A[s] = (VEC){0};
    for (long c = (g->L - 1) / CHUNK; c >= 0; c--) {
        long first = c * CHUNK, n = g->L - first < CHUNK ? g->L - first : CHUNK;
        for (int s = 0; s < S; s++) {
            state[s] = NAME(load)(NAME(kept)(g, clip, way, c) + s * g->E + e, lanes);
            part[s] = (VEC){0}; /* chunk by chunk: a sum over all tokens one after the other would lose bits */
        }
        NAME(recompute)(g, step, gain, B, A, state, before, decay, first, n, backwards, S);
        for (long i = n - 1; i >= 0; i--) {
            long t = backwards ? g->L - 1 - (first + i) : first + i;
            const float *b = B + t * g->B.row, *c_t = C + t * g->C.row;
            VEC grad = dy[t], d = step[t], du = gain[t], of_gain = {0}, of_power = {0};
#pragma GCC unroll 16
            for (int s = 0; s < S; s++) {
                VEC past = before[i * S + s], a = decay[i * S + s];
                VEC now = a * past + du * b[s];
                VEC adj = adjoint[s] + grad * c_t[s];
                d_C[t * S + s] += grad * now;
                d_B[t * S + s] += adj * du;
                of_gain += adj * b[s];
                VEC passed = adj * a, of_exponent = passed * past; /* d loss / d (step A), A in natural units */
                part[s] += of_exponent * d;
                of_power += of_exponent * A[s];
                adjoint[s] = passed;
            }
            d_step[t] += of_power * 0.693147181f + of_gain * u[t];
            d_u[t] += of_gain * d;
        }
        for (int s = 0; s < S; s++) d_A[s] += part[s];
    }
}

/* Clip b whole, channels in blocks one after the other: sums over the channels have one order. */
static TARGET void NAME(scan_backward)(const Scan *g, long b, float *room) {
    long L = g->L;
    int S = (int)g->S, ways = g->A_backward ? 2 : 1;
    VEC *step = (VEC *)room, *gain = step + L, *x = gain + L, *dy = x + L, *d_step = dy + L, *d_u = d_step + L;
    VEC *d_B = d_u + L, *d_C = d_B + L * S, *before = d_C + L * S;
    VEC *decay = before + CHUNK * S;
    const float *B = (const float *)g->B.at + b * g->B.clip, *C = (const float *)g->C.at + b * g->C.clip;
    for (long i = 0; i < L * S; i++) d_B[i] = d_C[i] = (VEC){0};
    for (long e = 0; e < g->E; e += LANES) {
        int lanes = g->E - e < LANES ? (int)(g->E - e) : LANES;
        const long u = b * g->u.clip + e, raw = b * g->delta.clip + e, z = b * g->z.clip + e, grad = b * g->grad.clip + e;
        VEC bias = NAME(load)(g->bias + e, lanes), D = NAME(load)(g->D + e, lanes) * (float)ways;
        VEC of_D = {0}, of_bias = {0}, part = {0}, A[MOST_STATES], d_A[MOST_STATES];
        for (long t = 0; t < L; t++) {
            long at = (b * L + t) * g->E + e;
            VEC gate = NAME(row)(&g->z, z + t * g->z.row, lanes), share = NAME(sigmoid)(gate);
            VEC out = NAME(row)(&g->grad, grad + t * g->grad.row, lanes);
            x[t] = NAME(row)(&g->u, u + t * g->u.row, lanes);
            step[t] = NAME(softplus)(NAME(row)(&g->delta, raw + t * g->delta.row, lanes) + bias);
            gain[t] = step[t] * x[t];
            dy[t] = out * gate * share;
            VEC y = NAME(load)(g->y + at, lanes);
            NAME(put)(g->d_z, at, g->z.narrow, out * y * share * (1.0f + gate * (1.0f - share)), lanes);
            d_step[t] = (VEC){0};
            d_u[t] = dy[t] * D;
            part += dy[t] * x[t];
            if (t % CHUNK == CHUNK - 1 || t == L - 1) {
                of_D += part;
                part = (VEC){0};
            }
        }
        for (int way = 0; way < ways; way++) {
            NAME(decays)(way ? g->A_backward : g->A, A, e, lanes, S);
            if (S == 16)
                NAME(scan_adjoint)(g, step, gain, x, dy, B, C, A, d_step, d_u, d_B, d_C, d_A, before, decay, b, way, e,
                                   lanes, 16);
            else
                NAME(scan_adjoint)(g, step, gain, x, dy, B, C, A, d_step, d_u, d_B, d_C, d_A, before, decay, b, way, e,
                                   lanes, S);
            float *to = g->d_A + ((b * ways + way) * g->E + e) * S;
            for (int i = 0; i < lanes; i++)
                for (int s = 0; s < S; s++) to[i * S + s] = d_A[s][i];
        }
        for (long t = 0; t < L; t++) {
            long at = (b * L + t) * g->E + e;
            VEC d = d_step[t] * NAME(sigmoid)(NAME(row)(&g->delta, raw + t * g->delta.row, lanes) + bias);
            NAME(put)(g->d_delta, at, g->delta.narrow, d, lanes);
            NAME(put)(g->d_u, at, g->u.narrow, d_u[t], lanes);
            part += d;
            if (t % CHUNK == CHUNK - 1 || t == L - 1) {
                of_bias += part;
                part = (VEC){0};
            }
        }
        NAME(store)(g->d_D + b * g->E + e, of_D * (float)ways, lanes);
        NAME(store)(g->d_bias + b * g->E + e, of_bias, lanes);
    }
    for (long i = 0; i < L * S; i++) {
        VEC of_B = d_B[i], of_C = d_C[i];
        for (int half = LANES / 2; half; half /= 2)
            for (int k = 0; k < half; k++) {
                of_B[k] += of_B[k + half];
                of_C[k] += of_C[k + half];
            }
        g->d_B[b * L * S + i] = of_B[0];
        g->d_C[b * L * S + i] = of_C[0];
    }
}

/* silu(bias + sum_j weight_j u_(t - K + 1 + j)), the other way round where backwards. */
INLINE VEC NAME(taps)(const Conv *g, long u, const VEC *weight, VEC total, long t, int lanes) {
    for (long j = 0; j < g->K; j++) {
        long from = g->reverse ? t + g->K - 1 - j : t - g->K + 1 + j;
        if (from >= 0 && from < g->L) total += weight[j] * NAME(row)(&g->u, u + from * g->u.row, lanes);
    }
    return total;
}

INLINE void NAME(weights)(const Conv *g, VEC *weight, long e, int lanes) {
    for (long j = 0; j < g->K; j++) {
        weight[j] = (VEC){0};
        for (int i = 0; i < lanes; i++) weight[j][i] = g->weight[(e + i) * g->K + j];
    }
}

static TARGET void NAME(conv_forward)(const Conv *g, long b) {
    VEC weight[MOST_TAPS];
    for (long e = 0; e < g->E; e += LANES) {
        int lanes = g->E - e < LANES ? (int)(g->E - e) : LANES;
        const long u = b * g->u.clip + e;
        VEC bias = NAME(load)(g->bias + e, lanes);
        NAME(weights)(g, weight, e, lanes);
        for (long t = 0; t < g->L; t++) {
            VEC x = NAME(taps)(g, u, weight, bias, t, lanes);
            NAME(store)(g->out + (b * g->L + t) * g->E + e, x * NAME(sigmoid)(x), lanes);
        }
    }
}

static TARGET void NAME(conv_backward)(const Conv *g, long b, float *room) {
    VEC weight[MOST_TAPS], of_weight[MOST_TAPS], part[MOST_TAPS], *d = (VEC *)room;
    for (long e = 0; e < g->E; e += LANES) {
        int lanes = g->E - e < LANES ? (int)(g->E - e) : LANES;
        const long u = b * g->u.clip + e, grad = b * g->grad.clip + e;
        VEC bias = NAME(load)(g->bias + e, lanes), of_bias = {0}, bias_part = {0};
        NAME(weights)(g, weight, e, lanes);
        for (long j = 0; j < g->K; j++) of_weight[j] = part[j] = (VEC){0};
        for (long t = 0; t < g->L; t++) {
            VEC x = NAME(taps)(g, u, weight, bias, t, lanes), share = NAME(sigmoid)(x);
            d[t] = NAME(row)(&g->grad, grad + t * g->grad.row, lanes) * share * (1.0f + x * (1.0f - share));
            bias_part += d[t];
            for (long j = 0; j < g->K; j++) {
                long from = g->reverse ? t + g->K - 1 - j : t - g->K + 1 + j;
                if (from >= 0 && from < g->L) part[j] += d[t] * NAME(row)(&g->u, u + from * g->u.row, lanes);
            }
            if (t % CHUNK == CHUNK - 1 || t == g->L - 1) {
                of_bias += bias_part;
                bias_part = (VEC){0};
                for (long j = 0; j < g->K; j++) {
                    of_weight[j] += part[j];
                    part[j] = (VEC){0};
                }
            }
        }
        for (long t = 0; t < g->L; t++) {
            VEC total = {0};
            for (long j = 0; j < g->K; j++) {
                long to = g->reverse ? t - g->K + 1 + j : t + g->K - 1 - j;
                if (to >= 0 && to < g->L) total += weight[j] * d[to];
            }
            NAME(put)(g->d_u, (b * g->L + t) * g->E + e, g->u.narrow, total, lanes);
        }
        float *to = g->d_weight + (b * g->E + e) * g->K;
        for (int i = 0; i < lanes; i++)
            for (long j = 0; j < g->K; j++) to[i * g->K + j] = of_weight[j][i];
        NAME(store)(g->d_bias + b * g->E + e, of_bias, lanes);
    }
}

#undef VEC
#undef INTS
#undef LOOSE
#undef WORDS
#undef HALVES
#undef INLINE
#undef ALL
#undef PICK
