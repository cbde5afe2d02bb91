"""The patch embedding beside the ways in which others write it: Table II's rows, forward and backward, batch 1, 32, 256.

Every candidate makes the same tokens: patches, positions, class tokens. The peers embed unmasked spectrograms.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as nnf

import kernels
from bench.measure import Case, compiled, holds
from fftp.patching import PatchGrid
from kernels import dispatch
from kernels.patch_embed import reference

F = 128
# Table II: patch and stride in frames; squares on 1024 frames, full-frequency slices on 1000.
TABLE_II = [(10, 1), (10, 2), (10, 4), (25, 5), (50, 10)]
GRIDS = {f"(128, {pt})/{st}": PatchGrid(T=1000, F=F, pt=pt, pf=F, st=st, sf=F) for pt, st in TABLE_II}
GRIDS["(16, 16)/10"] = PatchGrid(T=1024, F=F, pt=16, pf=16, st=10, sf=10)
LAPTOP = {"(128, 10)/4": PatchGrid(T=128, F=F, pt=10, pf=F, st=4, sf=F), "(128, 10)/1": GRIDS["(128, 10)/1"]}
TOKENS = 2


def cases(device: str) -> Iterator[Case]:
    """By worth: batch 32 first, then the others."""
    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            for name, grid in LAPTOP.items():
                for direction in ("forward", "backward"):
                    yield _case(name, grid, 32, 192, dtype, direction, device)
        return
    for B in (32, 256, 1):
        for name, grid in GRIDS.items():
            for direction in ("forward", "backward"):
                yield _case(name, grid, B, 768, torch.bfloat16, direction, device)
    for name, grid in GRIDS.items():  # a caller's spectrogram, masked on load
        yield _case(name, grid, 32, 768, torch.bfloat16, "forward", device, masked=True)


def _case(name, grid, B, D, dtype, direction, device, masked=False):
    backward = direction == "backward"
    peers = {
        "reference": reference.patch_embed,
        "conv2d": _conv2d,
        "conv2d channels last": _channels_last,
    }
    if grid.full_frequency:
        peers |= {"conv1d": _conv1d, "linear over strided view": _strided}
    if device == "cuda" and B == 32:  # a compilation costs seconds: where the figures are read
        peers |= {f"compiled {n}": compiled(function) for n, function in list(peers.items())}
    e = dtype.itemsize
    read, written = B * grid.T * F * e, B * (grid.N + TOKENS) * D * e
    return Case(
        part="patch_embed",
        case={"grid": name, "frames": grid.T, "B": B, "D": D, "dtype": str(dtype)[6:], "direction": direction}
        | ({"masks": "on load"} if masked else {}),
        backend=_named(device, dtype),
        ours=lambda sets: _candidate(
            _masked(grid, B, device) if masked else _ours, grid, B, D, dtype, device, backward, sets
        ),
        peers={n: lambda sets, f=f: _candidate(f, grid, B, D, dtype, device, backward, sets) for n, f in peers.items()},
        correct=lambda: _correct(grid, D, dtype, device, backward),
        set_bytes=read + written,
        bytes=read + written + grid.pt * grid.pf * D * (4 if backward else e),
        flops=2 * B * grid.embed_macs(D),
    )


def _named(device, dtype):
    dispatch.use_fused(True)
    return dispatch.select("patch_embed", device, str(dtype)[6:]).name


def _inputs(grid, B, D, dtype, device, sets):
    """(log-mels, weight, bias, position, tokens), freshly drawn; leaves, but for the log-mels."""
    log_mels = [torch.randn(B, grid.T, grid.F, device=device).to(dtype) for _ in range(sets)]
    shapes = (D, 1, grid.pt, grid.pf), (D,), (grid.N, D), (TOKENS, D)
    scale = (grid.pt * grid.pf) ** -0.5
    leaves = [(torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_() for shape in shapes]
    return log_mels, leaves


def _candidate(function, grid, B, D, dtype, device, backward, sets):
    log_mels, leaves = _inputs(grid, B, D, dtype, device, sets)
    stride = (grid.st, grid.sf)
    if not backward:

        def forward(i):
            with torch.no_grad():
                return function(log_mels[i], leaves[0], leaves[1], stride, *leaves[2:], 0)

        return forward
    outs = [function(x, leaves[0], leaves[1], stride, *leaves[2:], 0) for x in log_mels]
    grads = [torch.randn_like(out) for out in outs]
    return lambda i: torch.autograd.grad(outs[i], leaves, grads[i], retain_graph=True)


def _correct(grid, D, dtype, device, backward):
    """The 2x rule on three clips, against the reference in the same type and in float64."""
    log_mels, leaves = _inputs(grid, 3, D, dtype, device, 1)
    grad = torch.randn(3, grid.N + TOKENS, D, device=device).to(dtype)

    def run(function, dtype):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        out = function(log_mels[0].to(dtype), own[0], own[1], (grid.st, grid.sf), *own[2:], 0)
        return [*torch.autograd.grad(out, own, grad.to(dtype))] if backward else [out.detach()]

    return holds(run(_ours, dtype), run(reference.patch_embed, dtype), run(reference.patch_embed, torch.float64))


def _ours(*given):
    return kernels.patch_embed(*given)


def _masked(grid, B, device):
    """Ours with the paper's masks for ten seconds, known beforehand."""
    sizes = {"budget": grid.T * F // 5, "max_width": 128, "max_height": 128}
    rectangles = kernels.draw_spec_mask(5, 1, torch.arange(B, device=device), grid.T, F, **sizes)[0]
    fill = torch.zeros(B, device=device)
    return lambda *given: kernels.patch_embed(*given, rectangles, fill)


def _conv2d(log_mel, weight, bias, stride, position, tokens, place):
    embedded = nnf.conv2d(log_mel[:, None], weight, bias, stride=stride)  # (B, D, n_t, n_f)
    return reference.join(embedded.transpose(2, 3).flatten(2).transpose(1, 2), position, tokens, place)


def _channels_last(log_mel, weight, bias, stride, position, tokens, place):
    image = log_mel[:, None].to(memory_format=torch.channels_last)
    embedded = nnf.conv2d(image, weight.to(memory_format=torch.channels_last), bias, stride=stride)
    return reference.join(embedded.transpose(2, 3).flatten(2).transpose(1, 2), position, tokens, place)


def _conv1d(log_mel, weight, bias, stride, position, tokens, place):
    """Mel bins as channels, as users of a one-dimensional convolution would."""
    embedded = nnf.conv1d(log_mel.transpose(1, 2), weight[:, 0].transpose(1, 2), bias, stride=stride[0])
    return reference.join(embedded.transpose(1, 2), position, tokens, place)


def _strided(log_mel, weight, bias, stride, position, tokens, place):
    """The same overlapping rows as ours, handed to the library's matrix product as a view."""
    B, T, bins = log_mel.shape
    D, _, pt, _ = weight.shape
    N = (T - pt) // stride[0] + 1
    rows = log_mel.as_strided((B, N, pt * bins), (T * bins, stride[0] * bins, 1))
    return reference.join(nnf.linear(rows, weight.view(D, -1), bias), position, tokens, place)
