"""SpecMask and SpecAugment as lists of rectangles, and painting them: plain PyTorch, on any device.

A list is rectangles int32 `[B, M, 4]` as (t0, t1, f0, f1), half open, in the order accepted, unused rows all zero;
count int32 `[B]`, how many there are; area int32 `[B]`, cells covered (for SpecAugment, whose two may overlap: the sum).
"""

import torch

from kernels import philox as keyed


def draw_spec_mask(
    seed, epoch, tickets, T, F, *, budget, max_width, max_height, full_share, shapes, attempts, clip, snap
):
    """Algorithm 1 of the paper for a batch, sample by sample the same whatever else is in it.

    While the area is below the budget and shapes are left: a shape is full height with probability full_share, else
    1..max_height bins high; 1..max_width frames wide. Its place is the first of `attempts` uniform tries that overlaps no
    accepted rectangle; a shape without one is dropped, and its number is used up.
    """
    max_width, max_height = min(max_width, T), min(max_height, F)
    B, device = tickets.numel(), tickets.device
    rectangles = torch.zeros(B, shapes, 4, dtype=torch.int32, device=device)
    count = torch.zeros(B, dtype=torch.int64, device=device)
    area = torch.zeros(B, dtype=torch.int64, device=device)
    tries = 1 + torch.arange(attempts, device=device)
    for shape in range(shapes):
        open_ = area < budget
        if device.type == "cpu" and not bool(open_.any()):
            break  # on a GPU the question would stop the queue; the remaining rounds change nothing
        a, b, c, _ = keyed.philox(seed, keyed.SPEC_MASK << 16, shape, epoch, tickets)
        height = torch.where(keyed.passes(a, full_share), F, 1 + keyed.below(b, max_height))
        width = 1 + keyed.below(c, max_width)
        if clip:
            # The last rectangle ends on the first column that reaches the budget.
            width = torch.minimum(width, (budget - area + height - 1).clamp_min(1) // height).clamp_min(1)
        if snap > 1:
            width = (-(-width // snap) * snap).clamp_max(T)
        x, y, _, _ = keyed.philox(
            seed, (keyed.SPEC_MASK << 16) + tries, shape, epoch, tickets[:, None]
        )  # (B, attempts)
        w, h = width[:, None], height[:, None]
        t0 = keyed.below(x, (T - w) // snap + 1) * snap
        f0 = keyed.below(y, F - h + 1)
        free = open_[:, None].expand(-1, attempts).clone()
        for other in range(shape):
            s0, s1, g0, g1 = rectangles[:, other].long().unbind(-1)
            # An unused row is (0, 0, 0, 0): it ends before any rectangle starts, so it never overlaps.
            free &= (t0 >= s1[:, None]) | (t0 + w <= s0[:, None]) | (f0 >= g1[:, None]) | (f0 + h <= g0[:, None])
        found, first = free.any(1), free.to(torch.uint8).argmax(1, keepdim=True)  # argmax: the lowest that fits
        t0, f0 = t0.gather(1, first).squeeze(1), f0.gather(1, first).squeeze(1)
        row = torch.stack([t0, t0 + width, f0, f0 + height], -1).to(torch.int32)
        slot = count.clamp_max(shapes - 1)[:, None, None].expand(-1, 1, 4)
        rectangles.scatter_(1, slot, torch.where(found[:, None], row, rectangles.gather(1, slot).squeeze(1))[:, None])
        count += found
        area += torch.where(found, width * height, 0)
    return rectangles, count.to(torch.int32), area.to(torch.int32)


def draw_spec_augment(seed, epoch, tickets, T, F, *, max_frequency, max_time):
    """One frequency mask, then one time mask (Park et al., 2019), as torchaudio draws them: widths 0..param-1."""
    rows = []
    for attempt, (size, parameter) in enumerate([(F, max_frequency), (T, max_time)]):
        u, s, _, _ = keyed.philox(seed, (keyed.SPEC_AUGMENT << 16) + attempt, 0, epoch, tickets)
        width = keyed.below(u, min(parameter, size))
        start = keyed.below(s, size - width)
        zero, far = torch.zeros_like(start), torch.full_like(start, T if attempt == 0 else F)
        span = [zero, far, start, start + width] if attempt == 0 else [start, start + width, zero, far]
        rows.append(torch.stack(span, -1))
    rectangles = torch.stack(rows, 1).to(torch.int32)  # (B, 2, 4)
    area = ((rectangles[..., 1] - rectangles[..., 0]) * (rectangles[..., 3] - rectangles[..., 2])).sum(1)
    count = torch.full((tickets.numel(),), 2, dtype=torch.int32, device=tickets.device)
    return rectangles, count, area.to(torch.int32)


def apply_spec_mask(log_mel, fill, seed, epoch, tickets, **settings):
    """Draw, then paint log_mel in place; returns what was drawn."""
    drawn = draw_spec_mask(seed, epoch, tickets, *log_mel.shape[1:], **settings)
    paint(log_mel, drawn[0], fill)
    return drawn


def apply_spec_augment(log_mel, fill, seed, epoch, tickets, **settings):
    """Draw, then paint log_mel in place; returns what was drawn."""
    drawn = draw_spec_augment(seed, epoch, tickets, *log_mel.shape[1:], **settings)
    paint(log_mel, drawn[0], fill)
    return drawn


def paint(log_mel, rectangles, fill):
    """log_mel[b, t0:t1, f0:f1] = fill[b] for each of sample b's rectangles, cut to T x F; in place, and returned."""
    if log_mel.device.type == "cpu":
        for clip, rows, value in zip(log_mel, rectangles.tolist(), fill.tolist(), strict=True):
            for t0, t1, f0, f1 in rows:
                if t1 > t0:
                    clip[max(t0, 0) : max(t1, 0), max(f0, 0) : max(f1, 0)] = value  # -1 would count from the end
        return log_mel
    hidden = covered(rectangles, *log_mel.shape[1:])  # slices would need the rectangles on the host
    return log_mel.copy_(torch.where(hidden, fill[:, None, None].to(log_mel.dtype), log_mel))


def covered(rectangles, T, F):
    """True where a rectangle of sample b hides the cell: bool `[B, T, F]`."""
    t = torch.arange(T, device=rectangles.device)
    f = torch.arange(F, device=rectangles.device)
    t0, t1, f0, f1 = rectangles[..., None].unbind(2)  # each (B, M, 1)
    frames, bins = ((t >= t0) & (t < t1)).float(), ((f >= f0) & (f < f1)).float()  # (B, M, T), (B, M, F)
    # How many rectangles lie over a cell. Whatever type autocast multiplies in, a sum of ones is not rounded to nothing.
    return frames.transpose(1, 2) @ bins > 0  # (B, T, M) @ (B, M, F) -> (B, T, F)
