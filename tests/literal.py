"""Keyed draws in plain Python, one word at a time: the written definition and nothing of ours, to compare with."""

M32 = 0xFFFFFFFF
SPEC_MASK, SPEC_AUGMENT = 7, 8


def words(seed: int, c0: int, c1: int = 0, c2: int = 0, c3: int = 0) -> list[int]:
    """Philox-4x32-10 (Salmon et al., SC 2011, section 3.3): four 32-bit words."""
    counter, k0, k1 = [c & M32 for c in (c0, c1, c2, c3)], seed & M32, (seed >> 32) & M32
    for _ in range(10):
        p, q = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(q >> 32) ^ counter[1] ^ k0, q & M32, (p >> 32) ^ counter[3] ^ k1, p & M32]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return counter


def below(word: int, n: int) -> int:
    return word * n >> 32


def spec_mask(
    seed, epoch, ticket, T, F, budget, max_width, max_height,
    full_share=0.7, shapes=64, attempts=100, clip=False, snap=1,
):  # fmt: skip
    """Algorithm 1 as decided: the accepted rectangles (t0, t1, f0, f1) in order, and their area."""
    max_width, max_height = min(max_width, T), min(max_height, F)
    accepted, area, shape = [], 0, 0
    while area < budget and shape < shapes:
        a, b, c, _ = words(seed, SPEC_MASK << 16, shape, epoch, ticket)
        height = F if a < round(full_share * 2**32) else 1 + below(b, max_height)
        width = 1 + below(c, max_width)
        if clip:  # no wider than the first column that reaches the budget
            columns = 1
            while area + columns * height < budget and columns < width:
                columns += 1
            width = columns
        if snap > 1:
            while width % snap:
                width += 1
            width = min(width, T)
        for attempt in range(1, attempts + 1):
            x, y, _, _ = words(seed, (SPEC_MASK << 16) + attempt, shape, epoch, ticket)
            starts = range(0, T - width + 1, snap)
            t0, f0 = starts[below(x, len(starts))], below(y, F - height + 1)
            if not any(t0 < t1 and s0 < t0 + width and f0 < f1 and g0 < f0 + height for s0, t1, g0, f1 in accepted):
                accepted.append((t0, t0 + width, f0, f0 + height))
                area += width * height
                break
        shape += 1
    return accepted, area
