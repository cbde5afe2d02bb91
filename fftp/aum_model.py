"""AuM, the Audio Mamba of Erol, Senocak, Feng and Chung (2024), over any patch grid.

Letters as in `kernels.selective_scan`: E = 2 D channels, S = 16 states, R = ceil(D / 16) the rank of delta, K = 4 taps.
It equals the original code (commit b0eb85d) in tests/test_aum_model.py, logits and every gradient, in all three
directions. The original's traps are listed there.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

import kernels
from fftp.hub import Pretrained
from fftp.inference import check_norms, product
from fftp.patching import Macs, PatchEmbed, PatchGrid
from kernels import ranges

SIZES = {
    "tiny": {"dim": 192, "depth": 24},
    "small": {"dim": 384, "depth": 24},
    "base": {"dim": 768, "depth": 24},
}
NORM_EPS = 1e-5
TAPS = 4
DELTA_MIN, DELTA_MAX, DELTA_FLOOR = 1e-3, 0.1, 1e-4  # initial step sizes, log-uniform


@dataclass(frozen=True, kw_only=True)
class AuMConfig:
    """directions: "none" (forward only, Fo-Fo), "v1" (Fo-Bi, AuM's own: one input, scanned both ways with separate decays)
    or "v2" (Bi-Bi, Vision Mamba's: a branch of its own for each way, halved sum). place: of the class token."""

    grid: PatchGrid
    classes: int
    dim: int = 192
    depth: int = 24
    state: int = 16
    directions: Literal["none", "v1", "v2"] = "v1"
    place: Literal["head", "middle", "end"] = "middle"
    positions: Literal["learned", "none"] = "learned"

    @property
    def inner(self) -> int:
        return 2 * self.dim

    @property
    def rank(self) -> int:
        return math.ceil(self.dim / 16)

    def macs(self, kept: int | None = None) -> Macs:
        """Multiply-accumulates of one clip; the scan counts 4 E S + 2 E a token and direction. kept: as in `ASTConfig.macs`."""
        D, E, L, ways = self.dim, self.inner, (kept or self.grid.N) + 1, 1 if self.directions == "none" else 2
        branches = 2 if self.directions == "v2" else 1
        branch = E * TAPS + E * (self.rank + 2 * self.state) + self.rank * E
        paper = self.grid.embed_macs(D) + self.depth * L * (2 * D * E + E * D + branches * branch) + D * self.classes
        return Macs(paper, paper + self.depth * L * ways * (4 * E * self.state + 2 * E))

    def spared(self, kept: int | None = None) -> int:
        """As `ASTConfig.spared`: every layer is run whole."""
        return 0


class MixerState(NamedTuple):
    """What a forward mixer knows of the tokens so far: the scan's state `[B, E, S]` and the convolution's last inputs
    `[B, K - 1, E]`."""

    scan: torch.Tensor
    past: torch.Tensor


class AuMState(NamedTuple):
    """What `AuM.step` knows of the clips so far: each mixer's state, how many patches there were, and the class token's
    features `[B, D]` once it has stood in its place (never, for place "end")."""

    mixers: tuple[MixerState, ...]
    patches: int
    class_features: torch.Tensor | None


class RMSNorm(nn.Module):
    """total = residual + x; total / sqrt(mean(total^2) + eps) * weight, in float32."""

    def __init__(self, D: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x, residual=None, dtype=None):
        """(normed, total), both `[..., D]`: as `kernels.rms_norm`."""
        return kernels.rms_norm(x, residual, self.weight, NORM_EPS, dtype)


class Branch(nn.Module):
    """What makes delta, B and C from the convolved input, with its own decay and skip: one for each direction in "v2"."""

    def __init__(self, config: AuMConfig):
        super().__init__()
        E, S, R = config.inner, config.state, config.rank
        self.conv_weight = nn.Parameter(torch.empty(E, TAPS))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.x_proj = nn.Linear(E, R + 2 * S, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(E, S))
        self.D = nn.Parameter(torch.empty(E))

    def forward(self, u, z, reverse, A_backward_log=None):
        """Scan u, gated by z, both `[B, L, E]`; both ways where A_backward_log `[E, S]` is given."""
        u = kernels.causal_conv(u, self.conv_weight, self.conv_bias, reverse)
        delta, B, C = self._selected(u)
        backward = None if A_backward_log is None else -A_backward_log.exp()
        return kernels.selective_scan(
            u, delta, -self.A_log.exp(), B, C, self.D, z, self.dt_proj.bias, A_backward=backward, reverse=reverse
        )

    def steps(self, u, z, state, keep):
        """L tokens of the forward scan: u, z `[B, L, E]`; returns (out `[B, L, E]`, the state after the first `keep`)."""
        u, inputs = kernels.causal_conv_steps(u, self.conv_weight, self.conv_bias, state.past)
        delta, B, C = self._selected(u)
        out, states = kernels.selective_scan_steps(
            u, delta, -self.A_log.exp(), B, C, self.D, z, self.dt_proj.bias, state.scan
        )
        past = inputs[:, keep : keep + state.past.shape[1]]
        return out, state if keep == 0 else MixerState(states[:, keep - 1], past)

    def _selected(self, u):
        """Raw step sizes `[..., E]`, B and C `[..., S]` of the convolved input."""
        R, S = self.dt_proj.in_features, self.A_log.shape[1]
        raw, B, C = self.x_proj(u).split([R, S, S], -1)
        # The bias joins in float32 inside the scan, as in the original.
        return nn.functional.linear(raw, self.dt_proj.weight), B, C


class Mixer(nn.Module):
    """The bidirectional Mamba block: project, convolve, scan, gate, project back; `[B, L, D]` in and out."""

    def __init__(self, config: AuMConfig):
        super().__init__()
        self.directions = config.directions
        self.in_proj = nn.Linear(config.dim, 2 * config.inner, bias=False)
        self.forward_branch = Branch(config)
        if config.directions == "v1":
            self.A_backward_log = nn.Parameter(torch.empty(config.inner, config.state))
        if config.directions == "v2":
            self.backward_branch = Branch(config)
        self.out_proj = nn.Linear(config.inner, config.dim, bias=False)

    def forward(self, x):
        u, z = product(self.in_proj, x)[0].chunk(2, -1)  # (B, L, D) @ (D, 2 E) -> 2 x (B, L, E)
        y = self.forward_branch(u, z, False, self.A_backward_log if self.directions == "v1" else None)
        if self.directions == "v2":
            y = (y + self.backward_branch(u, z, True)) / 2
        return product(self.out_proj, y)[0]

    def start(self, batch: int) -> MixerState:
        """The state before the first token of `batch` clips. Raises ValueError for a mixer that looks both ways."""
        if self.directions != "none":
            raise ValueError(
                f'directions "{self.directions}" scan backward too, which needs the whole clip: '
                'only directions "none" go token by token'
            )
        weight, A = self.forward_branch.conv_weight, self.forward_branch.A_log
        past = weight.new_zeros(batch, weight.shape[1] - 1, weight.shape[0])
        wide = torch.promote_types(A.dtype, torch.float32)
        return MixerState(A.new_zeros(batch, *A.shape, dtype=wide), past)

    def steps(self, x: torch.Tensor, state: MixerState, keep: int) -> tuple[torch.Tensor, MixerState]:
        """The next L tokens, `[B, L, D]` in and out, and the state after the first `keep` of them: rows of `forward`, with
        what it saw before them."""
        u, z = product(self.in_proj, x)[0].chunk(2, -1)
        y, state = self.forward_branch.steps(u, z, state, keep)
        return product(self.out_proj, y)[0], state


class Layer(nn.Module):
    """mixer(norm(total)), total = residual + x: the addition waits for the norm behind it. There is no MLP.

    x `[B, L, D]` is what the layer before made, residual the stream without it, in float32, None in front of the first
    layer. Returns the same two for the next.
    """

    def __init__(self, config: AuMConfig):
        super().__init__()
        self.norm = RMSNorm(config.dim)
        self.mixer = Mixer(config)

    def forward(self, x, residual=None):
        normed, total = self.norm(x, residual)
        return self.mixer(normed), total


class AuM(nn.Module, Pretrained):
    """Normalised log-mel `[B, T, F]` to logits `[B, C]`."""

    def __init__(self, config: AuMConfig):
        super().__init__()
        self.config = config
        self.embed = PatchEmbed(config.grid, config.dim, 1, config.place, config.positions)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """AuM's initialisation: Mamba's for the mixers, LeCun normal for the patches, 0.02 for tokens and head."""
        for layer in self.layers:
            mixer = layer.mixer
            _init_branch(mixer.forward_branch, log_uniform_delta=True)
            if mixer.directions == "v1":
                mixer.A_backward_log.data.copy_(_decay_logs(mixer.A_backward_log))
            if mixer.directions == "v2":
                # The original's backward bias is not protected from being zeroed: its steps start at softplus(0) = 0.69.
                _init_branch(mixer.backward_branch, log_uniform_delta=False)
            mixer.out_proj.weight.data /= math.sqrt(self.config.depth)
        fan_in = self.config.grid.pt * self.config.grid.pf
        # LeCun's variance divided by that of a normal cut at two deviations, though nothing is cut here: as in the source.
        nn.init.normal_(self.embed.weight, std=fan_in**-0.5 / 0.87962566103423978)
        nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.embed.class_token, std=0.02)
        if self.embed.position is not None:
            nn.init.normal_(self.embed.position, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def features(
        self, log_mel: torch.Tensor, keep: torch.Tensor | None = None, ends: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The class token after the last norm, `[B, D]`. keep: as in `AST.features`; ends: as in `_ending_at`."""
        check_norms(self.norm.weight)
        if ends is not None:
            return self._ending_at(log_mel, ends)
        at = self.embed.place if keep is None else self.embed.place_among(keep.shape[1])
        x, residual = self.embed(log_mel, keep=keep), None
        with ranges.range("encoder"):
            for layer in self.layers:
                x, residual = layer(x, residual)
        return self._last_norm(x[:, at], residual[:, at])

    def _ending_at(self, log_mel, ends):
        """Features `[B, D]` of the first `ends` patches of each clip, int64 `[B]`: the class token stands behind them, and what
        comes later is not heard. log_mel `[B, T, F]` may be of any length. Raises ValueError for a model that hears what comes
        later, or that has learned positions.
        """
        grid, c = self.config.grid, self.config
        if (c.directions, c.place, c.positions, grid.n_f) != ("none", "end", "none", 1):
            raise ValueError(
                'clips end where they like with directions "none", place "end", positions "none" and full-frequency '
                f'patches alone, not with "{c.directions}", "{c.place}", "{c.positions}" and {grid.n_f} bands'
            )
        k, token = (log_mel.shape[1] - grid.pt) // grid.st + 1, self.embed.class_token
        with ranges.range("embed"):
            weights = (self.embed.weight, self.embed.bias, (grid.st, grid.sf), None, token, k)
            x = kernels.patch_embed(log_mel, *weights, panels=self.embed.panels)  # (B, k + 1, D)
            stands = (torch.arange(k + 1, device=x.device) == ends[:, None])[:, :, None]
            x, residual = torch.where(stands, token.to(x.dtype), x), None
        with ranges.range("encoder"):
            for layer in self.layers:
                x, residual = layer(x, residual)
        # A sum with one number in it: a gather's gradient has no fixed order on a GPU.
        return self._last_norm(*(torch.where(stands, t, 0).sum(1) for t in (x, residual)))

    def _last_norm(self, x, residual):
        """Features `[B, D]` in the residual stream's type, autocast or not."""
        return self.norm(x, residual, residual.dtype)[0]

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[B, D]` to logits `[B, C]`."""
        with ranges.range("head"):
            return self.head(features)

    def forward(
        self, log_mel: torch.Tensor, keep: torch.Tensor | None = None, ends: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.classify(self.features(log_mel, keep, ends))

    def start(self, batch: int) -> AuMState:
        """The state before the first patch of `batch` clips, for `step`.

        Raises ValueError for directions "v1" and "v2", which need the whole clip, and for square patches, whose order is
        not that of time.
        """
        if self.config.grid.n_f != 1:
            raise ValueError(
                f"a grid of {self.config.grid.n_f} bands does not come in the order of time: "
                "only full-frequency patches go one by one"
            )
        state = AuMState(tuple(layer.mixer.start(batch) for layer in self.layers), 0, None)
        return self._pass_class_token(state) if self.embed.place == 0 else state

    def step(self, patch: torch.Tensor, state: AuMState) -> tuple[torch.Tensor, AuMState]:
        """The next patch of each clip: (its token's features after the last norm `[B, D]`, the state after it).

        patch `[B, pt, F]`: normalised log-mel, frames n st to n st + pt for the n-th call from 0. The work of a call does not
        grow with n. The class token takes its place by itself; `class_features` reads it. The given state is left as it is.
        Raises ValueError when the shape is another, or when there are learned positions and the grid's N patches are past.
        """
        grid, n = self.config.grid, state.patches
        if patch.ndim != 3 or patch.shape[1:] != (grid.pt, grid.F):
            raise ValueError(f"a patch is (B, pt, F) with pt={grid.pt} and F={grid.F}, got {tuple(patch.shape)}")
        x = self._embedded(patch, 1, state, self.embed.class_token[:0])
        features, mixers = self._through(x, state.mixers, 1)
        state = AuMState(mixers, n + 1, state.class_features)
        stands_next = self.embed.where != "end" and n + 1 == self.embed.place
        return features, self._pass_class_token(state) if stands_next else state

    def hear(self, frames: torch.Tensor, state: AuMState) -> tuple[torch.Tensor, AuMState]:
        """The next patches of each clip together: (the class token's features `[B, D]` after them, the state after them).

        What `step` for each patch and `class_features` give, in one pass, which reads every weight once; place "end" alone.
        frames `[B, (k - 1) st + pt, F]` holds k patches, the first frame being n st after n patches. Raises ValueError when the
        shape or the place is another, or when positions end before.
        """
        grid = self.config.grid
        k, rest = divmod(frames.shape[1] - grid.pt, grid.st) if frames.ndim == 3 else (-1, 0)
        if k < 0 or rest or frames.shape[2] != grid.F:
            raise ValueError(
                f"frames are (B, (k - 1) st + pt, F) with pt={grid.pt}, st={grid.st} and F={grid.F}, "
                f"got {tuple(frames.shape)}"
            )
        if self.embed.where != "end":
            raise ValueError(f'the class token stands in the {self.embed.where} of a clip: place "end" hears on')
        x = self._embedded(frames, k + 1, state, self._class_row())
        features, mixers = self._through(x, state.mixers, k + 1)
        return features, AuMState(mixers, state.patches + k + 1, None)

    def class_features(self, state: AuMState) -> torch.Tensor:
        """The class token's features `[B, D]`, for `classify`.

        place "end": of the patches so far, as if the clip ended here; after N patches they are `features` of the clip. Any
        number of times: the state does not change. "middle" and "head": what the token saw before its place, which no later
        patch changes; for "head" that is nothing of the clip. Raises ValueError when it has not stood in its place yet.
        """
        if self.embed.where == "end":
            state = self._pass_class_token(state)
        if state.class_features is None:
            raise ValueError(
                f"the class token stands before patch {self.embed.place}: there were {state.patches} so far"
            )
        return state.class_features

    def _embedded(self, frames, k, state, tokens):
        """k patches with their positions, then the class tokens `[c, D]`: `[B, k + c, D]`."""
        grid, n, position = self.config.grid, state.patches, self.embed.position
        if position is not None and n + k > grid.N:
            raise ValueError(f"the {grid.N} patches that have a position are past: start anew")
        rows = None if position is None else position[1 + n : 1 + n + k]
        weights = (self.embed.weight, self.embed.bias, (grid.st, grid.sf), rows, tokens, k)
        return kernels.patch_embed(frames, *weights, panels=self.embed.panels)

    def _class_row(self):
        """The class token with its position, `[1, D]`."""
        token = self.embed.class_token
        return token if self.embed.position is None else token + self.embed.position[:1]

    def _pass_class_token(self, state):
        token = self._class_row().expand(state.mixers[0].scan.shape[0], 1, -1)
        features, mixers = self._through(token, state.mixers, 1)
        return AuMState(mixers, state.patches, features)

    def _through(self, x, mixers, keep):
        """Tokens `[B, L, D]` through all layers: (the last one's features after the last norm `[B, D]`, the mixers' states
        after the first `keep`)."""
        residual, after = None, []
        for layer, state in zip(self.layers, mixers, strict=True):
            normed, residual = layer.norm(x, residual)
            x, state = layer.mixer.steps(normed, state, keep)
            after.append(state)
        return self._last_norm(x[:, -1], residual[:, -1]), tuple(after)

    def undecayed(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: vectors, tokens, positions, and the decays themselves."""
        named = self.named_parameters()
        kept = ("embed.class_token", "embed.position")
        return {n for n, p in named if p.ndim < 2 or n in kept or n.endswith(("A_log", "A_backward_log"))}

    def matrices(self) -> dict[str, int]:
        """As AST's: the projections in and out of each mixer, the former for u and for z."""
        depth = range(self.config.depth)
        into = {f"layers.{i}.mixer.in_proj.weight": 2 for i in depth}
        return into | {f"layers.{i}.mixer.out_proj.weight": 1 for i in depth}


def _decay_logs(like):
    """ln(1..S) in each row: S4D-real."""
    return torch.arange(1, like.shape[1] + 1, dtype=torch.float32).log().expand_as(like)


def _init_branch(branch, log_uniform_delta):
    bound = TAPS**-0.5
    nn.init.uniform_(branch.conv_weight, -bound, bound)
    nn.init.uniform_(branch.conv_bias, -bound, bound)
    branch.A_log.data.copy_(_decay_logs(branch.A_log))
    nn.init.ones_(branch.D)
    bound = branch.dt_proj.in_features**-0.5
    nn.init.uniform_(branch.dt_proj.weight, -bound, bound)
    if not log_uniform_delta:
        nn.init.zeros_(branch.dt_proj.bias)
        return
    low, high = math.log(DELTA_MIN), math.log(DELTA_MAX)
    step = torch.empty_like(branch.dt_proj.bias).uniform_(low, high).exp().clamp_min(DELTA_FLOOR)
    branch.dt_proj.bias.data.copy_(step + (-(-step).expm1()).log())  # the inverse of softplus
