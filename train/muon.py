"""Muon for the encoder's matrices (Jordan et al., 2024), AdamW for everything else.

A matrix moves along its gradient's momentum made orthogonal: every direction counts alike, not the few that the gradient is
largest in. Scaled to the size of AdamW's steps (Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.2), so
that AdamW's rates and decays hold for both.
"""

from collections.abc import Iterable

import torch

MOMENTUM = 0.95
STEPS = 5
# Jordan's quintic: steep at 0, and it takes singular values to 0.7..1.2 and no nearer to 1, which costs nothing.
A, B, C = 3.4445, -4.7750, 2.0315
ADAMW_RMS = 0.2  # of an AdamW step over its rate, as seen in training


def orthogonalised(matrices: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """Matrices `[n, rows, columns]` with their singular values near 1, in `precision`, as the products are."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(precision)
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW over `groups`, and Muon over the matrices in them that are named.

    matrices: weight -> how many matrices lie in it, one below the other (q, k and v are three). precision: of the products.
    Other arguments are AdamW's. Like fused AdamW it takes rates as tensors, and where `found_inf` is 1 no weight changes;
    the host reads nothing.
    """

    def __init__(
        self, groups: Iterable[dict], matrices: dict[torch.nn.Parameter, int], precision: torch.dtype, **adamw
    ):
        groups = list(groups)
        self.matrices, self.precision = matrices, precision
        self.held = [(group, [p for p in group["params"] if p in matrices]) for group in groups]
        rest = [group | {"params": [p for p in group["params"] if p not in matrices]} for group in groups]
        super().__init__([group for group in rest if group["params"]], **adamw)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for group, parameters in self.held:
            alike: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for p in parameters:
                if p.grad is not None:
                    update = self._momentum(p).view(self.matrices[p], -1, p.shape[1])
                    alike.setdefault(update.shape[1:], []).append((p, update))
            for shape, found in alike.items():
                sizes = [len(update) for _, update in found]
                moves = orthogonalised(torch.cat([update for _, update in found]), self.precision).split(sizes)
                for (p, _), move in zip(found, moves, strict=True):
                    self._move(p, move.reshape(p.shape), ADAMW_RMS * max(shape) ** 0.5, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p in self.matrices:
            p.grad = None

    def _momentum(self, p):
        """Nesterov's: the gradient, and what is left of those before it."""
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return p.grad.lerp(state["momentum"].lerp_(p.grad, 1 - MOMENTUM), MOMENTUM)

    def _move(self, p, move, scale, group):
        rate = torch.as_tensor(group["lr"], dtype=p.dtype, device=p.device)
        new = p * (1 - rate * group["weight_decay"]) - rate * scale * move
        broken = getattr(self, "found_inf", None)
        p.copy_(new if broken is None else torch.where(broken > 0, p, new))
