"""The embedding by the Triton kernels, output and gradients by the 2x rule. Run by tests/test_triton_patch_embed.py."""

import pytest
import torch
from test_patch_embed import SHAPES

import kernels
from kernels.patch_embed import fused, kernel, reference

# B, T, F, pt, pf, st, sf, D. The tiles are 32 x 32 x 64 in the interpreter: most of these have edges in all three.
SHAPES = SHAPES | {
    "L63": (2, 81, 6, 20, 6, 1, 6, 5),
    "L97": (1, 1000, 4, 50, 4, 10, 4, 33),
    "L249": (1, 258, 3, 10, 3, 1, 3, 9),
    "L2": (2, 11, 16, 10, 16, 4, 16, 40),
    "one-mel-bin": (3, 29, 1, 4, 1, 2, 1, 7),
    "width-one": (2, 29, 8, 4, 8, 3, 8, 1),
    "whole-clip": (5, 12, 11, 12, 11, 1, 1, 34),
    "bands-that-overlap": (2, 13, 32, 13, 7, 1, 3, 6),
    "bands-far-apart": (2, 21, 40, 4, 3, 9, 11, 36),
    "tall-not-full": (2, 31, 33, 5, 32, 4, 1, 16),
    "tiles-that-divide": (2, 34, 16, 4, 16, 2, 16, 64),
    "k-below-a-tile": (4, 9, 3, 3, 3, 3, 3, 70),
}
LARGER = {
    "paper-10-4": (2, 1000, 128, 10, 128, 4, 128, 40),
    "paper-50-10": (2, 1000, 128, 50, 128, 10, 128, 40),
    "paper-square": (2, 300, 128, 16, 16, 10, 10, 40),
    "base-width": (1, 128, 128, 10, 128, 4, 128, 768),
}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "patch_embed=triton")


def case(name, dtype, device, positions=True, tokens=1, place="middle"):
    """(arguments by name, stride, place, the output's gradient), everything drawn anew and rounded to dtype."""
    B, T, F, pt, pf, st, sf, D = (SHAPES | LARGER)[name]
    N = ((T - pt) // st + 1) * ((F - pf) // sf + 1)
    generator = torch.Generator().manual_seed(sum((SHAPES | LARGER)[name]) + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weight = (normal(D, 1, pt, pf).float() / (pt * pf) ** 0.5).to(dtype)
    given = {"log_mel": normal(B, T, F), "weight": weight, "bias": normal(D)}
    given |= {"position": normal(N, D) if positions else None, "tokens": normal(tokens, D)}
    return given, (st, sf), {"head": 0, "middle": N // 2, "end": N}[place], normal(B, N + tokens, D)


def run(form, given, stride, place, factors, hold=lambda t: t.clone()):
    """Output, and the gradient of each input by name, for the output's gradient `factors`."""
    leaves = {n: None if t is None else hold(t).detach().requires_grad_() for n, t in given.items()}
    out = form(leaves["log_mel"], leaves["weight"], leaves["bias"], stride, leaves["position"], leaves["tokens"], place)
    there = {n: t for n, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(out, list(there.values()), hold(factors.to(out.dtype)), materialize_grads=True)
    return {"out": out.detach()} | dict(zip(there, grads, strict=True))


def doubled(given):
    return {n: None if t is None else t.double() for n, t in given.items()}


def in_float32(log_mel, weight, bias, stride, position, tokens, place):
    """The reference that rounds where the kernel does: at its inputs and its output."""
    wide = [None if t is None else t.float() for t in (log_mel, weight, bias, position, tokens)]
    return reference.patch_embed(*wide[:3], stride, *wide[3:], place).to(log_mel.dtype)


def check(got, plain, exact, dtype):
    """The 2x rule, for the output and each gradient by name."""
    assert got.keys() == exact.keys()
    for what, tensor in exact.items():
        assert got[what].dtype == dtype, what
        assert got[what].shape == tensor.shape, what
        if not tensor.numel():
            continue
        ours, theirs = (float((r[what].double() - tensor).abs().max()) for r in (got, plain))
        unit = torch.finfo(dtype).eps * float(tensor.abs().max())
        assert ours <= 2 * theirs + unit, f"{what}: {ours} against {theirs}, unit {unit}"


def compare(name, dtype, guard, device, **settings):
    given, stride, place, factors = case(name, dtype, device, **settings)
    got = run(kernels.patch_embed, given, stride, place, factors, guard.hold)
    plain = run(in_float32, given, stride, place, factors)
    exact = run(reference.patch_embed, doubled(given), stride, place, factors.double())
    check(got, plain, exact, dtype)


# float32 meets every shape; the 16-bit types, which take the same way, the quick ones.
QUICK = [
    "odd",
    "odd-square",
    "stride-above-patch",
    "one-of-everything",
    "batch-33",
    "L63",
    "tiles-that-divide",
    "whole-clip",
]
EVERY = [
    pytest.param(name, dtype, marks=[] if dtype == "float32" or name in QUICK else pytest.mark.slow)
    for name in SHAPES
    for dtype in TYPES
]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_output_and_gradients(name, dtype, guard, device):
    compare(name, TYPES[dtype], guard, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", LARGER)
def test_output_and_gradients_of_larger_shapes(name, dtype, guard, device):
    compare(name, TYPES[dtype], guard, device)


@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no-positions"])
@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("place", ["head", "middle", "end"])
@pytest.mark.parametrize("name", ["odd", "odd-square"])
def test_positions_tokens_and_places(name, place, tokens, positions, guard, device):
    compare(name, torch.float32, guard, device, positions=positions, tokens=tokens, place=place)


def test_a_tile_may_hold_the_rows_of_many_clips_and_many_tokens(guard, device):
    compare("whole-clip", torch.float32, guard, device, tokens=40, place="end")


@pytest.mark.parametrize("name", ["odd", "odd-square"])
def test_inputs_that_are_not_contiguous(name, guard, device):
    given, stride, place, factors = case(name, torch.float32, device)
    wanted = run(kernels.patch_embed, given, stride, place, factors)
    turned = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in given.items()}
    got = run(kernels.patch_embed, turned, stride, place, factors.transpose(0, 2).contiguous().transpose(0, 2))
    for what in wanted:
        assert torch.equal(got[what], wanted[what]), what


@pytest.mark.parametrize("name", ["odd", "odd-square"])
def test_empty_batch(name, guard, device):
    given, stride, place, factors = case(name, torch.float32, device)
    got = run(kernels.patch_embed, given | {"log_mel": given["log_mel"][:0]}, stride, place, factors[:0])
    assert got["out"].shape == (0, *factors.shape[1:])
    assert not any(got[n].any() for n in ("weight", "bias", "position", "tokens"))


@pytest.mark.parametrize("name", ["odd", "odd-square"])
def test_rows_do_not_depend_on_the_batch(name, guard, device):
    """Bit for bit on a GPU; numpy's products in the interpreter may differ with the row: seen 4.8e-7, times four."""
    given, stride, place, _ = case(name, torch.float32, device)
    given["log_mel"] = given["log_mel"].repeat(11, 1, 1)
    whole = kernels.patch_embed(**given, stride=stride, place=place)
    for rows in (slice(7, 8), slice(3, 8)):
        part = kernels.patch_embed(**(given | {"log_mel": given["log_mel"][rows]}), stride=stride, place=place)
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=0 if device == "cuda" else 2e-6)


def test_the_same_bits_twice(guard, device):
    """Ten times on a GPU: known-bad compilers give wrong gradients now and then."""
    for name in ("odd-square", "L97"):
        arguments = case(name, torch.float32, device)
        first = run(kernels.patch_embed, *arguments)
        for _ in range(10 if device == "cuda" else 1):
            again = run(kernels.patch_embed, *arguments)
            assert all(torch.equal(first[what], again[what]) for what in first)


def test_nan_stays_in_its_own_windows(guard, device):
    given, stride, place, _ = case("fftp", torch.float32, device)
    clean = kernels.patch_embed(**given, stride=stride, place=place)
    given["log_mel"][1, 20, 3] = float("nan")
    got = kernels.patch_embed(**given, stride=stride, place=place)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    windows = [n for n in range(14) if 4 * n <= 20 < 4 * n + 10]
    assert got[1].isnan().all(1).nonzero().flatten().tolist() == [n + (n >= place) for n in windows]
    assert int(got.isnan().sum()) == len(windows) * 48


@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no-positions"])
def test_autocast(positions, guard, device):
    """float32 parameters under autocast: the reference's output type, and no worse than twice its error."""
    given, stride, place, factors = case("L63", torch.float32, device, positions)
    results = []
    for form in (kernels.patch_embed, reference.patch_embed):
        with torch.autocast(device, torch.bfloat16):
            results.append(run(form, given, stride, place, factors))
    exact = run(reference.patch_embed, doubled(given), stride, place, factors.double())
    for what, tensor in exact.items():
        ours, theirs = (float((r[what].double() - tensor).abs().max()) for r in results)
        assert results[0][what].dtype == results[1][what].dtype, what
        assert ours <= 2 * theirs + torch.finfo(results[0][what].dtype).eps * float(tensor.abs().max()), what


def test_opcheck(device):
    given, stride, place, factors = case("odd-square", torch.float32, device)
    leaves = [None if t is None else t.requires_grad_() for t in given.values()]
    torch.library.opcheck(fused.embed, (*leaves[:3], *stride, *leaves[3:], place))
    arguments = (factors, given["log_mel"].detach(), given["weight"].detach(), *stride, 1, place)
    for operator in (fused.weight_gradient, fused.log_mel_gradient):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_under_compile(device):
    given, stride, place, factors = case("odd-square", torch.float32, device)
    compiled = torch.compile(kernels.patch_embed, fullgraph=False)
    got, wanted = (run(form, given, stride, place, factors) for form in (compiled, kernels.patch_embed))
    for what in wanted:
        torch.testing.assert_close(got[what], wanted[what], rtol=1e-6, atol=1e-6)


def test_float64_is_refused():
    given, stride, place, _ = case("odd", torch.float64, "cpu")
    with pytest.raises(
        ValueError, match="patch_embed=triton, which cannot run: it adds in float32; the tensors are float64"
    ):
        kernels.patch_embed(**given, stride=stride, place=place)


def test_too_many_rows_are_refused():
    """A batch that int32 row numbers cannot count; on the meta device, where it takes no memory."""
    log_mel, weight = torch.empty(2**21, 1033, 4, device="meta"), torch.empty(1, 1, 10, 4, device="meta")
    with pytest.raises(
        ValueError, match=r"rows .* at most, got B=2097152 clips of 1025 tokens and 1033 frames: split the batch"
    ):
        fused._launch(log_mel, weight, 1, 4, 1, 0)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_tiles_of_every_architecture(dtype, guard, device, monkeypatch):
    """The shipped tiles themselves, on one shape with edges in all of them, where the interpreter takes its own."""
    if device == "cuda":
        return  # a GPU runs its own tiles in every test above
    for arch in ("sm_80", "sm_90", "sm_100"):
        monkeypatch.setattr(fused, "_tile", lambda operation, _, arch=arch: kernel.tile(operation, arch, TYPES[dtype]))
        compare("tall-not-full", TYPES[dtype], guard, device)
