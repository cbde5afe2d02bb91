"""Other clips in front of a training clip, so that a model which carries its state on hears one sound after another.

It is judged on the clip alone, and so learns to forget what came before. A row of training frames is

    the end of [ clip K | ... | clip 1 ], whole patches of it | the clip's own T frames | what fills the row up

with the class token behind the clip's last patch: a forward scan hears nothing of what comes later. So rows with more, with
less and with nothing in front have one shape, and one with nothing is the clip alone.
"""

from dataclasses import replace

import torch

from fftp.patching import PatchGrid

TICKETS = 2**27  # from a clip's ticket to that of the clip before it: more than an epoch has
MOST = 8  # clips in front, so that tickets stay below 2^31


def longest(grid: PatchGrid, clips: int) -> int:
    """Patches that begin in so many clips before a clip, in one stride with its own, which stay where they are."""
    return clips * grid.T // grid.st


def grid_of(grid: PatchGrid, clips: int) -> PatchGrid:
    """The grid of a row."""
    return replace(grid, T=grid.T + grid.st * longest(grid, clips))


def in_a_row(log_mel: torch.Tensor, patches: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
    """Rows `[B, T', F]` of frames `[(1 + clips) B, T, F]`: all clips, those right before them, those before these, and so on.

    patches: int64 `[B]`, how many begin before each clip; T' is that of `grid_of`.
    """
    B, (T, F) = len(patches), log_mel.shape[1:]
    clips = len(log_mel) // B - 1
    frame = torch.arange(grid_of(grid, clips).T, device=log_mel.device)
    # Frames since each clip began, (B, T'); its last one fills the row up.
    since = (frame - grid.st * patches[:, None]).clamp_max(T - 1)
    behind = -since.div(T, rounding_mode="floor")  # 0 in the clip itself, 1 in the one before it
    b = torch.arange(B, device=log_mel.device)[:, None]
    return log_mel.reshape(-1, F)[(behind * B + b) * T + since % T]
