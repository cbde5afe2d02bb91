/* Products of bfloat16 by tiles (AMX): one instruction multiplies 16 rows of 32 numbers by 32 rows of 16.

   An operation's native.c defines TILES before native.h, and includes this behind matrix.h, whose right sides these take. Between
   tiles_on and tiles_off nothing else may use tiles. */

#define SQUARE 32 /* rows of sums at a time, two tiles; BLOCK columns of them are two tiles as well */
#define STEP 32   /* numbers of a tile's row: what is summed over comes in multiples of so many */

INLINE void tiles_on(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } sizes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        sizes.row_bytes[i] = 64;
        sizes.rows[i] = 16;
    }
    __asm__ volatile("" ::"r"(&sizes) : "memory"); /* gcc believes that the load reads but a pointer of it */
    _tile_loadconfig(&sizes);
}

INLINE void tiles_off(void) { _tile_release(); }

/* to[i][:] = (or += where `add`) sum over k < pairs of left[i][2 k] right[k][:][0] + left[i][2 k + 1] right[k][:][1], for 16 or
   SQUARE rows and BLOCK columns; pairs is a multiple of STEP / 2. row and step are left's strides, of rows and of STEP numbers;
   pitch is to's. At every step `lines` more of 64 bytes are fetched into the second-level cache, from `coming` on. */
INLINE void tile_block(const int rows, const uint16_t *left, int64_t row, int64_t step, const uint16_t *right, int64_t pairs,
                       float *to, int64_t pitch, int add, const uint16_t *coming, int64_t lines)
{
    __asm__ volatile("" ::: "memory"); /* the compiler does not know what the loads below read */
    float *below = to + 16 * pitch;
    if (add) {
        _tile_loadd(0, to, 4 * pitch);
        _tile_loadd(1, to + 16, 4 * pitch);
        if (rows == SQUARE) {
            _tile_loadd(2, below, 4 * pitch);
            _tile_loadd(3, below + 16, 4 * pitch);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < pairs; k += STEP / 2, left += step, right += STEP * BLOCK) {
        for (int64_t i = 0; i < lines; i++, coming += BLOCK)
            _mm_prefetch((const char *)coming, _MM_HINT_T1);
        _tile_loadd(4, left, 2 * row);
        _tile_loadd(6, right, 4 * BLOCK);
        _tile_loadd(7, right + BLOCK, 4 * BLOCK);
        _tile_dpbf16ps(0, 4, 6);
        if (rows == SQUARE)
            _tile_loadd(5, left + 16 * row, 2 * row);
        _tile_dpbf16ps(1, 4, 7);
        if (rows == SQUARE) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, to, 4 * pitch);
    _tile_stored(1, to + 16, 4 * pitch);
    if (rows == SQUARE) {
        _tile_stored(2, below, 4 * pitch);
        _tile_stored(3, below + 16, 4 * pitch);
    }
}

/* tile_block for any multiple of 16 rows. */
INLINE void tile_matrix(const uint16_t *left, int64_t row, int64_t rows, const uint16_t *right, int64_t pairs, float *to,
                        int64_t pitch, int add)
{
    int64_t first = 0;
    for (; first + SQUARE <= rows; first += SQUARE)
        tile_block(SQUARE, left + first * row, row, STEP, right, pairs, to + first * pitch, pitch, add, NULL, 0);
    if (first < rows)
        tile_block(16, left + first * row, row, STEP, right, pairs, to + first * pitch, pitch, add, NULL, 0);
}
