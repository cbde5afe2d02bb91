"""AuM's scan and convolution on a CPU through native.c: what is handed over, and the gradients.

The library is built by `python setup.py build_ext --inplace` (`make env` does it); without it dispatch takes the forms
made of PyTorch's operations. Float32 inside, rows of tokens come and go as float32 or bfloat16; row-wise results are the
same bits at any batch size and number of threads.
"""

import ctypes
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from kernels.native import Library, new, pointers, readable, recorded
from kernels.selective_scan.reference import precise

LIBRARY = Library(
    Path(__file__).parent,
    ("native.c", "native_lanes.h", "../lanes.h", "../native.h"),
    ("scan_forward", "scan_backward", "conv_forward", "conv_backward"),
)
MOST_STATES, MOST_TAPS = 64, 16  # as native.c has room for
CHUNK = 32  # native.c's

_pointer = ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = (("at", _pointer), ("clip", ctypes.c_long), ("row", ctypes.c_long), ("narrow", ctypes.c_long))


def _structure(rows, pointers, numbers):
    """A structure of native.c: tensors of rows, then plain arrays, then counts."""
    fields = [(name, _Rows) for name in rows.split()] + [(name, _pointer) for name in pointers.split()]
    fields += [(name, ctypes.c_long) for name in numbers.split()]
    return type("Given", (ctypes.Structure,), {"_fields_": tuple(fields)})


_Scan = _structure(
    "u delta z B C grad",
    "A A_backward D bias out y kept d_u d_delta d_z d_B d_C d_A d_D d_bias",
    "clips L E S reverse",
)
_Conv = _structure("u grad", "weight bias out d_u d_weight d_bias", "clips L E K reverse")


def refuses() -> str | None:
    """Why the native forms cannot run, or None."""
    return LIBRARY.refuses()


def _rows(tensor):
    """A `[B, L, n]` tensor as native.c reads it: any strides, as long as the last axis is dense."""
    return _Rows(*pointers(tensor), tensor.stride(0), tensor.stride(1), tensor.dtype != torch.float32)


def _dense(tensor):
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _fill(given, tensors):
    """Put pointers of contiguous tensors in; those that are None are null."""
    for name, pointer in zip(tensors, pointers(*tensors.values()), strict=True):
        setattr(given, name, pointer)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """As `reference.selective_scan`, for every type but float64."""
    if A.shape[1] > MOST_STATES:
        raise ValueError(f"the native scan takes {MOST_STATES} states at most, got S={A.shape[1]}")
    dtype = u.dtype
    u, delta, z = map(readable, (u, delta, z))
    A, B, C, D, delta_bias, A_backward = precise(A, B, C, D, delta_bias, A_backward)
    given = (u, delta, A, B, C, D, z, delta_bias, A_backward)
    out = _ScanFunction.apply(*given, reverse) if recorded(*given) else _scanned(*_laid(*given), reverse, False)[0]
    return out.to(dtype)


def _laid(u, delta, A, B, C, D, z, bias, A_backward):
    """The same as native.c reads them."""
    u, delta, B, C, z = (_dense(t) for t in (u, delta, B, C, z))
    return (
        u,
        delta,
        A.contiguous(),
        B,
        C,
        D.contiguous(),
        z,
        bias.contiguous(),
        A_backward if A_backward is None else A_backward.contiguous(),
    )


def _scanned(u, delta, A, B, C, D, z, bias, A_backward, reverse, gradients):
    """(out, and for gradients what is before the gate and the states that are kept, else None twice)."""
    out, y, kept = new(u.shape, u.dtype), None, None
    if gradients:
        (clips, L, E), ways = u.shape, 1 if A_backward is None else 2
        y, kept = new(u.shape), new((clips, ways, -(-L // CHUNK), A.shape[1], E))
    given = _scan(u, delta, A, B, C, D, z, bias, A_backward, reverse)
    _fill(given, {"out": out, "y": y, "kept": kept})
    if out.numel():
        LIBRARY.call("scan_forward", given)
    return out, y, kept


class _ScanFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, A_backward, reverse):
        given = _laid(u, delta, A, B, C, D, z, bias, A_backward)
        out, *made = _scanned(*given, reverse, any(ctx.needs_input_grad))
        ctx.reverse = reverse
        ctx.save_for_backward(*given, *made)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        u, delta, A, B, C, D, z, bias, A_backward, y, kept = ctx.saved_tensors
        grad = _dense(grad)
        (clips, L, E), S, ways = u.shape, A.shape[1], 1 if A_backward is None else 2
        found = {f"d_{name}": new(u.shape, t.dtype) for name, t in (("u", u), ("delta", delta), ("z", z))}
        made = {
            "d_B": (clips, L, S),
            "d_C": (clips, L, S),
            "d_A": (clips, ways, E, S),
            "d_D": (clips, E),
            "d_bias": (clips, E),
        }
        found |= {name: new(shape) for name, shape in made.items()}
        given = _scan(u, delta, A, B, C, D, z, bias, A_backward, ctx.reverse)
        given.grad = _rows(grad)
        _fill(given, found | {"y": y, "kept": kept})
        if u.numel():
            LIBRARY.call("scan_backward", given)
        # Clip by clip so far; over the clips in float64, in which the order of a sum does not show.
        d_A, d_D, d_bias = (found[name].sum(0, dtype=torch.float64).float() for name in ("d_A", "d_D", "d_bias"))
        d_A_backward = None if A_backward is None else d_A[1]
        d_u, d_delta, d_z, d_B, d_C = (found[name] for name in ("d_u", "d_delta", "d_z", "d_B", "d_C"))
        return d_u, d_delta, d_A[0], d_B, d_C, d_D, d_z, d_bias, d_A_backward, None


def _scan(u, delta, A, B, C, D, z, bias, A_backward, reverse):
    given = _Scan(clips=u.shape[0], L=u.shape[1], E=u.shape[2], S=A.shape[1], reverse=int(reverse))
    for name, tensor in (("u", u), ("delta", delta), ("z", z), ("B", B), ("C", C)):
        setattr(given, name, _rows(tensor))
    _fill(given, {"A": A, "A_backward": A_backward, "D": D, "bias": bias})
    return given


def causal_conv(u, weight, bias, reverse):
    """As `reference.causal_conv`, for every type but float64."""
    if weight.shape[1] > MOST_TAPS:
        raise ValueError(f"the native convolution takes {MOST_TAPS} taps at most, got K={weight.shape[1]}")
    dtype = torch.promote_types(u.dtype, weight.dtype)
    given = (readable(u), *precise(weight, bias))
    out = (
        _ConvFunction.apply(*given, reverse) if recorded(*given) else _convolved(_dense(given[0]), *given[1:], reverse)
    )
    return out.to(dtype)


def _convolved(u, weight, bias, reverse):
    out, weight, bias = new(u.shape), weight.contiguous(), bias.contiguous()
    given = _conv(u, weight, bias, reverse)
    _fill(given, {"out": out})
    if out.numel():
        LIBRARY.call("conv_forward", given)
    return out


class _ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, bias, reverse):
        u, weight, bias = _dense(u), weight.contiguous(), bias.contiguous()
        ctx.reverse = reverse
        ctx.save_for_backward(u, weight, bias)
        return _convolved(u, weight, bias, reverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        u, weight, bias = ctx.saved_tensors
        grad = _dense(grad)
        clips, _, E = u.shape
        found = {"d_u": new(u.shape, u.dtype), "d_weight": new((clips, E, weight.shape[1])), "d_bias": new((clips, E))}
        given = _conv(u, weight, bias, ctx.reverse)
        given.grad = _rows(grad)
        _fill(given, found)
        if u.numel():
            LIBRARY.call("conv_backward", given)
        d_weight, d_bias = (found[name].sum(0, dtype=torch.float64).float() for name in ("d_weight", "d_bias"))
        return found["d_u"], d_weight, d_bias, None


def _conv(u, weight, bias, reverse):
    given = _Conv(clips=u.shape[0], L=u.shape[1], E=u.shape[2], K=weight.shape[1], reverse=int(reverse))
    given.u = _rows(u)
    _fill(given, {"weight": weight, "bias": bias})
    return given
