"""AuM's scan, both directions ("v1"), beside two mamba-ssm calls with flips, torch's scan operator, and the plain forms."""

from collections.abc import Iterator

import torch
import torch.nn.functional as nnf

import kernels
from bench.measure import Case, compiled, holds
from kernels import dispatch
from kernels.selective_scan import blocked, reference

LENGTHS = (992, 97, 249, 513, 1213)
S = 16
MUFU_PER_MS = 132 * 16 * 1.98e9 / 1000  # exponentials an H100 or H200 makes: 16 a clock and multiprocessor
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "A_backward")


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        for B, L, E in ((32, 31, 384), (4, 249, 384)):
            for direction in ("forward", "forward + backward"):
                yield _case(B, L, E, torch.float32, direction, device)
        return
    for B in (32, 1):
        for L in LENGTHS:
            for direction in ("forward", "forward + backward"):
                yield _case(B, L, 1536, torch.bfloat16, direction, device)


def _case(B, L, E, dtype, direction, device):
    dispatch.use_fused(True)
    train = direction != "forward"
    peers = {"step by step": reference.selective_scan}
    if device == "cpu":
        peers["blocked"] = blocked.selective_scan
    else:
        peers = {"mamba-ssm, two calls": _mamba}
        if L <= 97 or not train:  # its backward over a long clip compiles for minutes
            peers["associative_scan"] = _associative
        if L <= 97:
            peers["step by step"] = reference.selective_scan
            peers["compiled step by step"] = compiled(reference.selective_scan)
        if B == 1 and not train:
            peers["triton_chunked"] = _chunked
    e = dtype.itemsize
    return Case(
        part="selective_scan",
        case={"B": B, "L": L, "E": E, "S": S, "dtype": str(dtype)[6:], "direction": direction},
        backend=dispatch.select("selective_scan", device, str(dtype)[6:]).name,
        ours=lambda sets: _candidate(_ours, B, L, E, dtype, device, train, sets),
        peers={n: lambda sets, f=f: _candidate(f, B, L, E, dtype, device, train, sets) for n, f in peers.items()},
        correct=lambda: _correct(L, E, dtype, device, train),
        set_bytes=4 * B * L * E * e,
        bytes=B * L * (4 * E + 2 * S) * e * (3.0 if train else 1.0),
        # Two directions of S exponentials an element; the backward makes them again.
        other_ms=(2 if train else 1) * 2 * S * B * L * E / MUFU_PER_MS if device == "cuda" else 0.0,
    )


def _inputs(B, L, E, dtype, device):
    def normal(*shape, scale=1.0):
        return torch.randn(*shape, device=device) * scale

    decays = [-torch.exp(normal(E, S, scale=0.5) + 1) for _ in range(2)]
    given = [normal(B, L, E), normal(B, L, E), decays[0], normal(B, L, S), normal(B, L, S), normal(E), normal(B, L, E)]
    given += [normal(E) - 2, decays[1]]
    narrow = {0, 1, 3, 4, 6}  # parameters stay in float32
    return [t.to(dtype) if i in narrow else t for i, t in enumerate(given)]


def _candidate(function, B, L, E, dtype, device, train, sets):
    given = [_inputs(B, L, E, dtype, device) for _ in range(sets)]
    if not train:

        def forward(i):
            with torch.no_grad():
                return function(*given[i], False)

        return forward
    grads = [torch.randn(B, L, E, device=device).to(dtype) for _ in range(sets)]
    leaves = [[t.requires_grad_() for t in one] for one in given]
    return lambda i: torch.autograd.grad(function(*leaves[i], False), leaves[i], grads[i])


def _correct(L, E, dtype, device, train):
    given = _inputs(2, L, E, dtype, device)
    grad = torch.randn(2, L, E, device=device).to(dtype)

    def run(function, dtype=None):
        own = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in given]
        out = function(*own, False)
        return [out.detach(), *(torch.autograd.grad(out, own, grad.to(out.dtype)) if train else ())]

    return holds(run(_ours), run(reference.selective_scan), run(reference.selective_scan, torch.float64))


def _ours(u, delta, A, B, C, D, z, bias, A_backward, reverse):
    return kernels.selective_scan(u, delta, A, B, C, D, z, bias, A_backward, reverse)


def _chunked(*given):
    from kernels.selective_scan import chunked

    return chunked.selective_scan(*given)


def _mamba(u, delta, A, B, C, D, z, bias, A_backward, reverse):
    """AuM's own way: one call for each direction on flipped copies, channels first."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    first = [t.transpose(1, 2).contiguous() for t in (u, delta, B, C, z)]

    def call(u, delta, B, C, z, A):
        return selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True)

    y = call(*first, A) + call(*(t.flip(-1) for t in first), A_backward).flip(-1)
    return y.transpose(1, 2)


def _associative(u, delta, A, B, C, D, z, bias, A_backward, reverse):
    """torch's associative_scan, compiled: the states of all tokens are made in memory."""
    return _compiled_associative()(u, delta, A, B, C, D, z, bias, A_backward)


_made = []


def _compiled_associative():
    if not _made:
        from torch._higher_order_ops.associative_scan import associative_scan

        def combine(first, second):
            return first[0] * second[0], first[1] * second[0] + second[1]

        def scan(u, delta, A, B, C, D, z, bias, A_backward):
            u32, step = u.float(), nnf.softplus(delta.float() + bias)

            def one_way(A, reverse):
                decay = torch.exp(step[..., None] * A)
                gain = (step * u32)[..., None] * B.float()[:, :, None]
                state = associative_scan(combine, (decay, gain), dim=1, reverse=reverse)[1]
                return (state * C.float()[:, :, None]).sum(-1) + D * u32

            return ((one_way(A, False) + one_way(A_backward, True)) * nnf.silu(z.float())).to(u.dtype)

        _made.append(torch.compile(scan, dynamic=False))
    return _made[0]
