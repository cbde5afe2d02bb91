"""Augmentation with its settings: what is drawn, where it is applied, and in which order.

Order (AST's): gain, mixup (waveform) -> log-mel, padded -> roll -> masks -> normalise -> noise. What AST does not have comes
last among the waveforms: playing speed and shift, then background noise; and other clips in front, when all else is done
(`fftp.lead`). Every draw is keyed by (seed, epoch, ticket), see
`kernels.philox`; nothing here has a state.
"""

import typing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import kernels
from fftp import lead, perturb
from fftp.errors import UserError
from fftp.patching import PatchGrid, least_covered
from kernels import draws


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Masks, mixup, roll, noise, gain, shift, speed, background and lead; sizes in frames and mel bins.

    mask_fill: "mean" of the clip's log-mel (SpecMask) or "zero" in log-mel units (AST's SpecAugment, which is louder than
    average); "default" is each mask's own. mask_mean: the mean over all cells, padding included, or over "valid" frames.
    Raises UserError for a value that is out of its range.
    """

    augment: Literal["none", "specaugment", "specmask"] = "none"
    mask_area: int = 1024  # SpecMask: cells to reach
    mask_width: int = 16  # SpecMask: widest, frames
    mask_height: int = 128  # SpecMask: highest, bins
    mask_full_share: float = 0.7  # SpecMask: share of draws that are full height
    mask_clip: bool = False  # SpecMask: narrow the last mask to land on the area
    mask_snap: int = 1  # SpecMask: start and width are multiples of so many frames
    mask_max_frequency: int = 48  # SpecAugment: widths 0..this-1, bins
    mask_max_time: int = 48  # SpecAugment: widths 0..this-1, frames
    mask_fill: Literal["default", "mean", "zero"] = "default"
    mask_mean: Literal["all", "valid"] = "all"
    mixup: float = 0.0  # probability that a clip is mixed with another
    mixup_lambda: Literal["beta", "half"] = "beta"  # Beta(10, 10), or 0.5 always
    roll: bool = False  # up to 10 frames, round the end
    noise: bool = False  # up to 0.1 a cell, after normalising
    gain_db: float = 0.0  # waveforms louder or softer by up to so many dB
    shift_ms: float = 0.0  # waveforms earlier or later by up to so many ms; zeros come in
    speed: float = 0.0  # waveforms played faster or slower by up to this share, about their middle; pitch moves along
    background: float = 0.0  # probability that white, pink or brown noise is added to a waveform
    background_snr_min: float = 5.0  # clip over background noise, dB, at least
    background_snr_max: float = 30.0  # and at most
    keep_tokens: int = 0  # patches that training's encoder takes, those that masks cover least; 0 is all
    lead: float = 0.0  # probability that a clip has other clips in front of it, for a model that carries its state on
    lead_clips: int = 1  # how many at the most; where in them the sound begins is drawn

    def __post_init__(self):
        for name, hint in typing.get_type_hints(AugmentSettings).items():
            if choices := typing.get_args(hint):
                self._require(name, getattr(self, name) in choices, " or ".join(choices))
        for name in ("mask_width", "mask_height", "mask_max_frequency", "mask_max_time", "mask_snap"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("mask_area", "keep_tokens", "gain_db"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("mixup", "background", "lead", "mask_full_share"):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._require("lead_clips", 1 <= self.lead_clips <= lead.MOST, f"from 1 to {lead.MOST}")
        self._require("shift_ms", 0 <= self.shift_ms <= 10_000, "from 0 to 10000")
        self._require("speed", 0 <= self.speed <= 0.5, "from 0 to 0.5")
        for name in ("background_snr_min", "background_snr_max"):
            self._require(name, -100 <= getattr(self, name) <= 100, "from -100 to 100 dB")

    def _require(self, name: str, good: bool, range_: str):
        if not good:
            raise UserError(f"{self._called(name)} has to be {range_}, not {getattr(self, name)}.")

    def _called(self, name: str) -> str:
        """What sentences call a setting."""
        return name


class Augment:
    """Applies `AugmentSettings` to batches, step by step as `train.feed` does; for masks alone take `fftp.SpecMask`.

    seed: the run's; T, F: size of the log-mel; grid: of patches, for `kept` and `lead_patches`. All draws are keyed: epoch
    counts from 0, and tickets, int64 `[B]`, are the clips' places in the epoch's order, so that no two share one.
    """

    def __init__(self, settings: AugmentSettings, seed: int, T: int, F: int, grid: PatchGrid | None = None):
        self.settings, self.seed, self.T, self.F, self.grid = settings, seed, T, F, grid
        self._noise = torch.from_numpy(draws.coloured_noise(seed)) if settings.background else None

    def mixup(self, epoch: int, tickets: torch.Tensor, n: int):
        """(mixed, partner, lambda) of each sample among n clips, or None where mixup is off."""
        s = self.settings
        if s.mixup == 0:
            return None
        return draws.draw_mixup(self.seed, epoch, tickets, s.mixup, n, fixed=s.mixup_lambda == "half")

    def partners(self, epoch: int, tickets: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray] | None:
        """`mixup`'s (mixed, partner) as arrays on the host, or None where mixup is off."""
        s = self.settings
        return draws.mixup_partners(self.seed, epoch, tickets, s.mixup, n) if s.mixup else None

    def with_leads(self, positions, tickets, epoch, n: int):
        """Clips `[B]` of n and their tickets, and behind them the clips in front of them, as `fftp.lead.in_a_row` takes them:
        `[(1 + clips) B]` each, arrays or tensors as given. What stands in front is augmented by tickets of its own."""
        s = self.settings
        if s.lead == 0:
            return positions, tickets
        here = isinstance(positions, torch.Tensor)
        draw, join = (draws.lead_clips, torch.cat) if here else (draws.lead_clips_numpy, np.concatenate)
        before = draw(self.seed, epoch, tickets, positions, s.lead_clips, n)
        own = [tickets + (1 + j) * lead.TICKETS for j in range(s.lead_clips)]
        return join([positions, before.reshape(-1)]), join([tickets, *own])

    def lead_patches(self, epoch: int, tickets: torch.Tensor) -> torch.Tensor | None:
        """Patches `[B]` that each clip has in front of it, or None where no clip has any."""
        s = self.settings
        return (
            draws.draw_lead(self.seed, epoch, tickets, s.lead, lead.longest(self.grid, s.lead_clips))
            if s.lead
            else None
        )

    def gain(self, epoch: int, tickets: torch.Tensor) -> torch.Tensor | None:
        """Factors `[B]` for the waveforms, or None."""
        return draws.draw_gain(self.seed, epoch, tickets, self.settings.gain_db) if self.settings.gain_db else None

    def perturbed(
        self, waveform: torch.Tensor, length: torch.Tensor, rate: int, epoch: int, tickets: torch.Tensor
    ) -> torch.Tensor:
        """Waveforms `[B, W]` at rate Hz, zero behind length `[B]`, with speed, shift and background noise (`fftp.perturb`)."""
        s, draw = self.settings, (self.seed, epoch, tickets)
        shift = draws.draw_shift(*draw, round(s.shift_ms * rate / 1000)) if s.shift_ms else None
        speed = draws.draw_speed(*draw, s.speed) if s.speed else None
        waveform = perturb.moved(waveform, length, shift, speed)
        if not s.background:
            return waveform
        self._noise = self._noise.to(waveform.device)  # once: a captured step comes after plain ones
        drawn = draws.draw_background(*draw, s.background, s.background_snr_min, s.background_snr_max)
        return perturb.with_background(waveform, length, self._noise, *drawn)

    def roll(self, epoch: int, tickets: torch.Tensor) -> torch.Tensor | None:
        """Frames `[B]` to roll by, or None."""
        return draws.draw_roll(self.seed, epoch, tickets) if self.settings.roll else None

    def rectangles(self, epoch: int, tickets: torch.Tensor) -> torch.Tensor | None:
        """Masked rectangles int32 `[B, M, 4]`, or None."""
        s = self.settings
        if s.augment == "none":
            return None
        draw = {"specaugment": kernels.draw_spec_augment, "specmask": kernels.draw_spec_mask}[s.augment]
        return draw(self.seed, epoch, tickets, self.T, self.F, **self._sizes())[0]

    def _sizes(self) -> dict:
        """The mask's own settings, by the names that `kernels` has for them."""
        s = self.settings
        if s.augment == "specaugment":
            return {"max_frequency": s.mask_max_frequency, "max_time": s.mask_max_time}
        sizes = {"budget": s.mask_area, "max_width": s.mask_width, "max_height": s.mask_height}
        return sizes | {"full_share": s.mask_full_share, "clip": s.mask_clip, "snap": s.mask_snap}

    def fill(self, log_mel: torch.Tensor, valid_frames: torch.Tensor, roll: torch.Tensor | None) -> torch.Tensor:
        """What each clip's masks are filled with, float32 `[B]`, in log-mel units."""
        s = self.settings
        if s.mask_fill == "zero" or (s.mask_fill == "default" and s.augment == "specaugment"):
            return log_mel.new_zeros(log_mel.shape[0])
        return clip_level(log_mel, valid_frames if s.mask_mean == "valid" else None, roll)

    def mask(
        self,
        log_mel: torch.Tensor,
        valid_frames: torch.Tensor,
        epoch: int,
        tickets: torch.Tensor,
        roll: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Draw and paint the masks on un-normalised log-mel `[B, T, F]`, in place; returns their rectangles, or None.

        valid_frames `[B]`: of sound, in front of the padding; looked at for mask_mean "valid" alone. roll: how far the clips
        have been rolled, so that a mean over valid frames finds them.
        """
        augment = self.settings.augment
        if augment == "none":
            return None
        apply = {"specaugment": kernels.apply_spec_augment, "specmask": kernels.apply_spec_mask}[augment]
        fill = self.fill(log_mel, valid_frames, roll)
        return apply(log_mel, fill, self.seed, epoch, tickets, **self._sizes())[0]

    def kept(self, rectangles: torch.Tensor | None) -> torch.Tensor | None:
        """The patches `[B, K]` that go through the encoder, as `least_covered`, or None for all."""
        K = self.settings.keep_tokens
        return least_covered(rectangles, self.grid, K) if K else None

    def noise(self, epoch: int, tickets: torch.Tensor) -> tuple[int, int, torch.Tensor] | None:
        """What `FrontEnd.normalise` takes to add the noise, or None."""
        return (self.seed, epoch, tickets) if self.settings.noise else None


def clip_level(
    log_mel: torch.Tensor, valid_frames: torch.Tensor | None = None, roll: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of each clip's `[T, F]`, or of its valid frames (all, where it has none); `[B]`.

    Frame by frame first, and these in float64, so that a clip's mean has the same bits at any batch size: on a GPU the order
    of a sum over few rows depends on their number.
    """
    frames = log_mel.mean(2).double()  # (B, T)
    if valid_frames is None:
        return frames.mean(1).to(log_mel.dtype)
    t = torch.arange(frames.shape[1], device=frames.device)[None]
    if roll is not None:
        t = (t - roll[:, None]) % frames.shape[1]
    inside = (t < valid_frames[:, None]) | (valid_frames == 0)[:, None]
    return ((frames * inside).sum(1) / inside.sum(1)).to(log_mel.dtype)
