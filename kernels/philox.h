/* Philox-4x32-10 as kernels/philox.py has it. */

#define ROUND_A 0xD2511F53u
#define ROUND_B 0xCD9E8D57u
#define WEYL_A 0x9E3779B9u
#define WEYL_B 0xBB67AE85u

/* One draw: a counter's four words, in its place. */
static void philox(uint64_t seed, uint32_t c[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        const uint64_t a = (uint64_t)ROUND_A * c[0], b = (uint64_t)ROUND_B * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)a;
        k0 += WEYL_A;
        k1 += WEYL_B;
    }
}
