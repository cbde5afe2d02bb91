/* The scan and the convolution for one width of vector; native.c has this file included once for each instruction set
 * (../native.h). A program of a clip's LANES channels keeps their S states in vectors: state s of all lanes is one vector.
 */

#include "../lanes.h"

typedef int NAME(ints) __attribute__((vector_size(4 * LANES)));
#define INTS NAME(ints)

FN VEC NAME(all)(float x) { return x - (VEC){0}; }
#define ALL(x) NAME(all)(x)
FN VEC NAME(pick)(INTS where, VEC yes, VEC no) { return (VEC)(((INTS)yes & where) | ((INTS)no & ~where)); }
#define PICK(where, yes, no) NAME(pick)(where, yes, no)

/* The second operand where either is NaN, as the instructions have it. */
#if LANES == 16
#define AT_LEAST(a, x) ((VEC)_mm512_max_ps((__m512)(a), (__m512)(x)))
#define AT_MOST(a, x) ((VEC)_mm512_min_ps((__m512)(a), (__m512)(x)))
#elif LANES == 8
#define AT_LEAST(a, x) ((VEC)_mm256_max_ps((__m256)(a), (__m256)(x)))
#define AT_MOST(a, x) ((VEC)_mm256_min_ps((__m256)(a), (__m256)(x)))
#elif defined __x86_64__
#define AT_LEAST(a, x) ((VEC)_mm_max_ps((__m128)(a), (__m128)(x)))
#define AT_MOST(a, x) ((VEC)_mm_min_ps((__m128)(a), (__m128)(x)))
#else
#define AT_LEAST(a, x) PICK((a) > (x), a, x)
#define AT_MOST(a, x) PICK((a) < (x), a, x)
#endif

#if LANES == 16
/* 2^x to 3 units in the last place, exactly 1 at 0; 0 below -126, inf from 128 on, NaN for NaN. */
FN VEC NAME(exp2)(VEC x) {
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
FN VEC NAME(exp2)(VEC x) {
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

FN VEC NAME(exp)(VEC x) { return NAME(exp2)(x * 1.44269504f); }

/* log(1 + e^x) as PyTorch has it: x itself above 20. */
FN VEC NAME(softplus)(VEC x) {
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

FN VEC NAME(sigmoid)(VEC x) {
    VEC e = NAME(exp)(PICK(x > 0, -x, x));
    VEC r = 1.0f / (1.0f + e);
    return PICK(x > 0, r, e * r);
}

/* Element i and on of a tensor of rows. */
FN VEC NAME(row)(const Rows *from, long i, int lanes) { return NAME(load)(from->at, i, lanes, from->narrow); }

/* Where the states of a clip's direction that chunk c begins with are kept: S rows of all channels. */
FN float *NAME(kept)(const Scan *g, long b, int way, long c) {
    long ways = g->A_backward ? 2 : 1, chunks = (g->L + CHUNK - 1) / CHUNK;
    return g->kept + ((b * ways + way) * chunks + c) * g->S * g->E;
}

/* One direction of LANES channels over all tokens: y[t] += <s_t, C_t>. */
FN void NAME(scan_states)(const Scan *g, const VEC *step, const VEC *gain, const float *B, const float *C,
                          const VEC *A, VEC *y, long b, int way, long e, int lanes, const int S) {
    int backwards = g->reverse ^ way;
    VEC state[MOST_STATES];
    for (int s = 0; s < S; s++) state[s] = (VEC){0};
    for (long i = 0; i < g->L; i++) {
        if (g->y && i % CHUNK == 0)
            for (int s = 0; s < S; s++) NAME(store)(NAME(kept)(g, b, way, i / CHUNK), s * g->E + e, lanes, 0, state[s]);
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
FN void NAME(decays)(const float *A, VEC *out, long e, int lanes, int S) {
    for (int s = 0; s < S; s++) {
        out[s] = (VEC){0};
        for (int i = 0; i < lanes; i++) out[s][i] = A[(e + i) * S + s] * 1.44269504f;
    }
}

/* A task is a clip's LANES channels. */
static void NAME(scan_forward)(const void *job, int64_t task, float *room) {
    const Scan *g = job;
    const long blocks = (g->E + LANES - 1) / LANES, b = task / blocks, e = task % blocks * LANES;
    int lanes = g->E - e < LANES ? (int)(g->E - e) : LANES, S = (int)g->S;
    VEC *step = (VEC *)room, *gain = step + g->L, *y = gain + g->L, A[MOST_STATES];
    const long u = b * g->u.clip + e, raw = b * g->delta.clip + e, z = b * g->z.clip + e;
    const float *B = (const float *)g->B.at + b * g->B.clip, *C = (const float *)g->C.at + b * g->C.clip;
    VEC bias = NAME(load)(g->bias, e, lanes, 0), D = NAME(load)(g->D, e, lanes, 0);
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
        if (g->y) NAME(store)(g->y, at, lanes, 0, total);
        NAME(store)(g->out, at, lanes, g->u.narrow, total * gate * NAME(sigmoid)(gate));
    }
}

/* States of tokens first .. first + n - 1 in the scan's order, from `state` on: before[i] is the state that token i meets,
 * decay[i] what it is multiplied with. */
FN void NAME(recompute)(const Scan *g, const VEC *step, const VEC *gain, const float *B, const VEC *A, VEC *state,
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

FN void NAME(scan_adjoint)(const Scan *g, const VEC *step, const VEC *gain, const VEC *u, const VEC *dy,
                           const float *B, const float *C, const VEC *A, VEC *d_step, VEC *d_u, VEC *d_B, VEC *d_C,
                           VEC *d_A, VEC *before, VEC *decay, long clip, int way, long e, int lanes, const int S) {
    int backwards = g->reverse ^ way;
    VEC state[MOST_STATES], adjoint[MOST_STATES], part[MOST_STATES];
    for (int s = 0; s < S; s++) adjoint[s] = d_A[s] = (VEC){0};
    for (long c = (g->L - 1) / CHUNK; c >= 0; c--) {
        long first = c * CHUNK, n = g->L - first < CHUNK ? g->L - first : CHUNK;
        for (int s = 0; s < S; s++) {
            state[s] = NAME(load)(NAME(kept)(g, clip, way, c), s * g->E + e, lanes, 0);
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

/* A task is clip b whole, channels in blocks one after the other: sums over the channels have one order. */
static void NAME(scan_backward)(const void *job, int64_t b, float *room) {
    const Scan *g = job;
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
        VEC bias = NAME(load)(g->bias, e, lanes, 0), D = NAME(load)(g->D, e, lanes, 0) * (float)ways;
        VEC of_D = {0}, of_bias = {0}, part = {0}, A[MOST_STATES], d_A[MOST_STATES];
        for (long t = 0; t < L; t++) {
            long at = (b * L + t) * g->E + e;
            VEC gate = NAME(row)(&g->z, z + t * g->z.row, lanes), share = NAME(sigmoid)(gate);
            VEC out = NAME(row)(&g->grad, grad + t * g->grad.row, lanes);
            x[t] = NAME(row)(&g->u, u + t * g->u.row, lanes);
            step[t] = NAME(softplus)(NAME(row)(&g->delta, raw + t * g->delta.row, lanes) + bias);
            gain[t] = step[t] * x[t];
            dy[t] = out * gate * share;
            VEC y = NAME(load)(g->y, at, lanes, 0);
            NAME(store)(g->d_z, at, lanes, g->z.narrow, out * y * share * (1.0f + gate * (1.0f - share)));
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
            NAME(store)(g->d_delta, at, lanes, g->delta.narrow, d);
            NAME(store)(g->d_u, at, lanes, g->u.narrow, d_u[t]);
            part += d;
            if (t % CHUNK == CHUNK - 1 || t == L - 1) {
                of_bias += part;
                part = (VEC){0};
            }
        }
        NAME(store)(g->d_D, b * g->E + e, lanes, 0, of_D * (float)ways);
        NAME(store)(g->d_bias, b * g->E + e, lanes, 0, of_bias);
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
FN VEC NAME(taps)(const Conv *g, long u, const VEC *weight, VEC total, long t, int lanes) {
    for (long j = 0; j < g->K; j++) {
        long from = g->reverse ? t + g->K - 1 - j : t - g->K + 1 + j;
        if (from >= 0 && from < g->L) total += weight[j] * NAME(row)(&g->u, u + from * g->u.row, lanes);
    }
    return total;
}

FN void NAME(weights)(const Conv *g, VEC *weight, long e, int lanes) {
    for (long j = 0; j < g->K; j++) {
        weight[j] = (VEC){0};
        for (int i = 0; i < lanes; i++) weight[j][i] = g->weight[(e + i) * g->K + j];
    }
}

static void NAME(conv_forward)(const void *job, int64_t b, float *room) {
    (void)room;
    const Conv *g = job;
    VEC weight[MOST_TAPS];
    for (long e = 0; e < g->E; e += LANES) {
        int lanes = g->E - e < LANES ? (int)(g->E - e) : LANES;
        const long u = b * g->u.clip + e;
        VEC bias = NAME(load)(g->bias, e, lanes, 0);
        NAME(weights)(g, weight, e, lanes);
        for (long t = 0; t < g->L; t++) {
            VEC x = NAME(taps)(g, u, weight, bias, t, lanes);
            NAME(store)(g->out, (b * g->L + t) * g->E + e, lanes, 0, x * NAME(sigmoid)(x));
        }
    }
}

static void NAME(conv_backward)(const void *job, int64_t b, float *room) {
    const Conv *g = job;
    VEC weight[MOST_TAPS], of_weight[MOST_TAPS], part[MOST_TAPS], *d = (VEC *)room;
    for (long e = 0; e < g->E; e += LANES) {
        int lanes = g->E - e < LANES ? (int)(g->E - e) : LANES;
        const long u = b * g->u.clip + e, grad = b * g->grad.clip + e;
        VEC bias = NAME(load)(g->bias, e, lanes, 0), of_bias = {0}, bias_part = {0};
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
            NAME(store)(g->d_u, (b * g->L + t) * g->E + e, lanes, g->u.narrow, total);
        }
        float *to = g->d_weight + (b * g->E + e) * g->K;
        for (int i = 0; i < lanes; i++)
            for (long j = 0; j < g->K; j++) to[i * g->K + j] = of_weight[j][i];
        NAME(store)(g->d_bias, b * g->E + e, lanes, 0, of_bias);
    }
}

#undef FN
#undef VEC
#undef EACH_VECTOR
#undef INTS
#undef ALL
#undef PICK
#undef AT_LEAST
#undef AT_MOST
