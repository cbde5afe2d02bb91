"""The scan and the causal convolution by the Triton kernels, by the 2x rule. Run by tests/test_triton_selective_scan.py."""

import pytest
import torch
from oracles import part
from originals import check_gradients, grid, load, stored
from test_selective_scan import arguments

import kernels
from fftp import AuM, AuMConfig, convert, env
from kernels.selective_scan import chunked, chunked_kernel, fused, kernel, reference

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TYPED = ("u", "delta", "B", "C", "z")  # the others are float32 in every model
PER_CLIP = TYPED


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "selective_scan=triton,causal_conv=triton")


@pytest.fixture
def wide(monkeypatch):
    """Blocks as wide as the channels, where the interpreter would need many programs."""
    monkeypatch.setattr(kernel, "INTERPRETED", kernel.Block(channels=2048, tokens=16, warps=1))


def case(dtype, device, *sizes, **settings):
    """Inputs by name, rounded to the types that a kernel gets, and factors for the output's sum."""
    given = arguments(*sizes, **settings)
    given = {n: t.to(device, dtype if n in TYPED else torch.float32) for n, t in given.items()}
    factors = torch.randn(given["u"].shape, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    return given, factors


def run(form, given, factors, hold=lambda t: t.clone(), **settings):
    """Output, and the gradient of each input by name, for the output's gradient `factors`."""
    leaves = {n: hold(t).detach().requires_grad_() for n, t in given.items()}
    out = form(**leaves, **settings)
    grads = torch.autograd.grad(out, list(leaves.values()), hold(factors.to(out.dtype)))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def plainly(form):
    """The reference under the public function's signature."""

    def scan(u, delta, A, B, C, D, z, delta_bias, A_backward=None, reverse=False):
        return form(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse)

    return scan


SCAN = plainly(reference.selective_scan)


def doubled(given):
    return {n: t.double() for n, t in given.items()}


def check(draws, types):
    """The 2x rule, for the output and each gradient by name; draws: triples of results (ours, the reference's, exact).

    The largest error over the draws, in units of the last place: in a single draw a gradient of few numbers can find
    the reference lucky. types: name -> the type that each has to come in.
    """
    for name, dtype in types.items():
        worst = [0.0, 0.0]
        for got, plain, exact in draws:
            assert got.keys() == exact.keys() == types.keys()
            wanted = exact[name]
            assert got[name].dtype == dtype, name
            assert got[name].shape == wanted.shape, name
            assert got[name].isfinite().all(), name
            # One token leaves no decay: its gradient is 0 exactly.
            unit = torch.finfo(dtype).eps * max(float(wanted.abs().max()), 1e-30)
            errors = [float((r[name].double() - wanted).abs().max()) / unit for r in (got, plain)]
            worst = [max(pair) for pair in zip(worst, errors, strict=True)]
        assert worst[0] <= 2 * worst[1] + 1, f"{name}: {worst[0]:.2f} units, the reference {worst[1]:.2f}"


def compare(dtype, guard, device, *sizes, reverse=False, repeats=0, draws=1, change=lambda given: None, **settings):
    """The rule for one case; `repeats` more runs have to give the same bits."""
    results = []
    for seed in range(3 if device == "cuda" and sizes[1] < 100 else draws):
        given, factors = case(dtype, device, *sizes, seed=seed, **settings)
        change(given)
        got = run(kernels.selective_scan, given, factors, guard.hold, reverse=reverse)
        plain = run(SCAN, given, factors, reverse=reverse)
        results.append((got, plain, run(SCAN, doubled(given), factors.double(), reverse=reverse)))
    check(results, {"out": dtype} | {n: t.dtype for n, t in given.items()})
    for _ in range(repeats):
        again = run(kernels.selective_scan, given, factors, guard.hold, reverse=reverse)
        assert all(torch.equal(got[name], again[name]) for name in got)


def repeats(device):
    """Known-bad compilers give wrong gradients now and then; the interpreter does not."""
    return 9 if device == "cuda" else 0


# B, L, E, both ways, reverse. 63 and 97 tokens end within a group, a pair and a chunk; no block divides 200 channels.
SHAPES = [
    (2 if L < 3 else 1, L, E, two, (L + E + two) % 2 == 1)
    for L in (1, 2, 63, 97)
    for E in (192, 200)
    for two in (False, True)
]
QUICK = {(1, 192), (2, 200)}  # L and E that the 16-bit types meet too; they take the same way
EVERY = [
    pytest.param(*shape, dtype, marks=[] if dtype == "float32" or (shape[1], shape[2]) in QUICK else pytest.mark.slow)
    for shape in SHAPES
    for dtype in TYPES
]


# Lengths and widths of the models, which would take the interpreter hours: only where there is a GPU, and most of them only
# under --slow, as their references go token by token.
OF_THE_MODELS = [
    pytest.param(2, L, E, two, not two, dtype, marks=[] if (L, E) == (992, 1536) else pytest.mark.slow)
    for L in (249, 513, 992, 1213)
    for E in (192, 1536)
    for two in (False, True)
    for dtype in TYPES
]


def pytest_generate_tests(metafunc):
    if metafunc.function is test_output_and_gradients:
        more = OF_THE_MODELS if metafunc.config.getoption("--gpu") else []
        metafunc.parametrize(("B", "L", "E", "two", "reverse", "dtype"), EVERY + more)


def test_output_and_gradients(B, L, E, two, reverse, dtype, guard, device):
    draws = 3 if dtype != "float32" and L > 2 else 1  # as on a GPU: one draw finds the reference lucky in A's gradient
    compare(TYPES[dtype], guard, device, B, L, E, two=two, reverse=reverse, repeats=repeats(device), draws=draws)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_over_two_chunks(dtype, guard, device):
    compare(TYPES[dtype], guard, device, 1, 35, 24)


def test_249_tokens(guard, device):
    compare(torch.float32, guard, device, 1, 249, 192, two=False, reverse=True, repeats=repeats(device))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
def test_channels_of_the_base_model(two, dtype, wide, guard, device):
    compare(TYPES[dtype], guard, device, 1, 2, 1536, two=two, repeats=repeats(device))


@pytest.mark.parametrize("S", [1, 5, 32])
def test_states_of_other_sizes(S, guard, device):
    compare(torch.float32, guard, device, 2, 6, 20, S=S, draws=4)


def test_several_blocks_of_channels(guard, device):
    compare(torch.float32, guard, device, 2, 3, 520)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_blocks_of_every_architecture(arch, guard, device, monkeypatch):
    """The shipped blocks themselves, where the interpreter takes its own; neither divides 20 channels evenly."""
    if device == "cpu":
        monkeypatch.setattr(fused, "_block", lambda operation, _: kernel.BLOCKS[operation, arch])
    compare(torch.float32, guard, device, 1, 3, 20)
    compare_conv(torch.float32, guard, device, 1, 33, 65, 4, False)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_direction_of_time(reverse, guard, device):
    """A scan from the end is the scan of the reversed tokens, reversed: the same bits, no flip inside."""
    given, factors = case(torch.float32, device, 2, 7, 20, two=False)
    turned = {n: t.flip(1) if n in PER_CLIP else t for n, t in given.items()}
    got = run(kernels.selective_scan, given, factors, guard.hold, reverse=reverse)
    mirror = run(kernels.selective_scan, turned, factors.flip(1), guard.hold, reverse=not reverse)
    for name, tensor in got.items():
        assert torch.equal(tensor, mirror[name].flip(1) if name in ("out", *PER_CLIP) else mirror[name]), name


def test_both_ways_are_two_scans(guard, device):
    """Seen: 1e-6 of outputs up to 30; each scan's own error."""
    given, _ = case(torch.float32, device, 2, 7, 20)
    both = kernels.selective_scan(**given)
    one = {n: t for n, t in given.items() if n != "A_backward"}
    sum_of_two = kernels.selective_scan(**one) + kernels.selective_scan(
        **(one | {"A": given["A_backward"]}), reverse=True
    )
    torch.testing.assert_close(both, sum_of_two, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_not_contiguous(guard, device):
    """Halves of a projection are read where they lie, anything else is copied: the same bits."""
    given, factors = case(torch.float32, device, 2, 5, 20)
    strange = {
        "u": torch.cat([given["u"], given["z"]], -1).chunk(2, -1)[0],  # as the mixer cuts it
        "z": torch.cat([given["u"], given["z"]], -1).chunk(2, -1)[1],
        "delta": given["delta"].transpose(0, 1).contiguous().transpose(0, 1),
        "B": torch.cat([given["B"], given["C"]], -1).split([16, 16], -1)[0],
        "C": given["C"].transpose(1, 2).contiguous().transpose(1, 2),
        "A": given["A"].T.contiguous().T,
        "A_backward": given["A_backward"].T.contiguous().T,
        "D": torch.stack([given["D"], given["D"]], 1)[:, 1],
    }
    assert not any(t.is_contiguous() for t in strange.values())
    assert [fused._rows(strange[n])[0] is strange[n] for n in ("u", "z", "B", "delta", "C")] == [True] * 3 + [False] * 2
    keep = given | strange
    wanted = run(kernels.selective_scan, given, factors)
    got = run(kernels.selective_scan, keep, factors.transpose(0, 2).contiguous().transpose(0, 2), lambda t: t)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def test_empty_batch(guard, device):
    given, factors = case(torch.float32, device, 0, 7, 20)
    got = run(kernels.selective_scan, given, factors)
    assert got["out"].shape == (0, 7, 20)
    assert not any(got[name].any() for name in given)


def test_rows_do_not_depend_on_the_batch(guard, device):
    """Bit for bit: a program sees one clip."""
    given, _ = case(torch.float32, device, 5, 6, 20)
    whole = kernels.selective_scan(**given)
    for rows in (slice(4, 5), slice(1, 4)):
        part = kernels.selective_scan(**{n: t[rows] if n in PER_CLIP else t for n, t in given.items()})
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
def test_nan_stays_in_its_own_clip_and_its_own_future(two, guard, device):
    given, factors = case(torch.float32, device, 3, 4, 20, two=two)
    clean = run(kernels.selective_scan, given, factors)
    given["u"][1, 2, 5] = float("nan")
    sick = run(kernels.selective_scan, given, factors)
    for name in ("out", *PER_CLIP):
        assert torch.equal(sick[name][[0, 2]], clean[name][[0, 2]]), name
    reached = sick["out"][1].isnan()  # (L, E)
    assert reached.any(0).nonzero().flatten().tolist() == [5]
    assert reached[:, 5].tolist() == ([True] * 4 if two else [False] * 2 + [True] * 2)


def test_the_same_bits_twice(guard, device):
    given, factors = case(torch.float32, device, 2, 6, 24)
    first = run(kernels.selective_scan, given, factors)
    for _ in range(10 if device == "cuda" else 1):
        again = run(kernels.selective_scan, given, factors)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_decays_that_underflow(guard, device):
    """Steps so long that exp(delta A) is 0 in float32: nothing is divided, nothing becomes NaN."""

    def longer(given):
        given["delta"] += 1e3
        given["A"][::2] *= 100

    compare(torch.float32, guard, device, 1, 9, 20, change=longer)


def test_steps_of_almost_nothing(guard, device):
    """delta -> 0: the state neither decays nor grows, and what is left is the skip path, once for each direction.

    The gradients at -10: further down the product with log2(e), which the kernel's exponential begins with and the
    reference's does not, is rounded to more units than the rule allows.
    """
    given, _ = case(torch.float32, device, 2, 9, 20)
    given["delta"] = torch.full_like(given["delta"], -1e4)
    got = kernels.selective_scan(**given)
    wanted = 2 * given["D"] * given["u"] * torch.nn.functional.silu(given["z"])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    compare(torch.float32, guard, device, 1, 9, 20, change=lambda given: given["delta"].sub_(10))


def test_float16_beyond_its_range_inside(guard, device):
    """Sums before the gate that float16 cannot hold; the gate brings them back."""

    def large(given):
        given["u"] *= 64
        given["C"] *= 256
        given["z"].fill_(-9)

    given, _ = case(torch.float16, device, 1, 9, 20)
    large(given)
    exact = SCAN(**doubled(given))
    ungated = exact / torch.nn.functional.silu(given["z"].double())
    assert float(ungated.abs().max()) > torch.finfo(torch.float16).max
    compare(torch.float16, guard, device, 1, 9, 20, change=large)


def test_each_input_may_have_a_type_of_its_own(guard, device):
    """As autocast leaves them: the convolution's output wider than what the projections made of it."""
    given, factors = case(torch.float32, device, 2, 6, 20)
    given |= {n: given[n].bfloat16() for n in ("delta", "B", "C", "z")}
    got = run(kernels.selective_scan, given, factors, guard.hold)
    plain, exact = run(SCAN, given, factors), run(SCAN, doubled(given), factors.double())
    check([(got, plain, exact)], {"out": torch.float32} | {n: t.dtype for n, t in given.items()})


def test_no_states_are_kept_without_gradients(guard, device):
    given, _ = case(torch.float32, device, 2, 6, 20)
    out, states = fused.scan(*given.values(), False, False)
    assert states.numel() == 0
    kept, states = fused.scan(*given.values(), False, True)
    assert states.shape == (2, 2, 1, 20, 16)
    assert torch.equal(out, kept)


@pytest.fixture
def in_chunks(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "selective_scan=triton_chunked")


def compare_in_chunks(dtype, guard, device, *sizes, reverse=False, **settings):
    """The 2x rule for the output; on a GPU the same bits ten times."""
    given, _ = case(dtype, device, *sizes, **settings)
    held = {n: guard.hold(t) for n, t in given.items()}
    got = kernels.selective_scan(**held, reverse=reverse)
    assert all(torch.equal(got, kernels.selective_scan(**held, reverse=reverse)) for _ in range(repeats(device)))
    plain, exact = SCAN(**given, reverse=reverse), SCAN(**doubled(given), reverse=reverse)
    check([({"out": got}, {"out": plain}, {"out": exact})], {"out": dtype})


# A clip of 1 or 2 tokens is a single chunk; the others end within their last one.
LONG = {(97, 192, True), (249, 200, True)}  # their neighbours take the same ways in less time
IN_CHUNKS = [
    pytest.param((L, E, two, reverse), marks=pytest.mark.slow if (L, E, two) in LONG else [])
    for L, E, two, reverse in (*(shape[1:] for shape in SHAPES), (249, 192, False, True), (249, 200, True, False))
]


@pytest.mark.parametrize("shape", IN_CHUNKS)
def test_in_chunks(shape, in_chunks, guard, device):
    L, E, two, reverse = shape
    compare_in_chunks(torch.float32, guard, device, 1, L, E, two=two, reverse=reverse)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_in_chunks(dtype, in_chunks, guard, device):
    compare_in_chunks(TYPES[dtype], guard, device, 1, 19, 24)


@pytest.mark.parametrize("L", [255, 513])
@pytest.mark.slow
def test_many_chunks_short_and_long(L, in_chunks, guard, device):
    """More than four groups of chunks; 513 tokens are cut into chunks of 32."""
    compare_in_chunks(torch.float32, guard, device, 2, L, 20, S=5)


def test_chunks_of_32(in_chunks, guard, device, monkeypatch):
    """The cut of long clips, with a last chunk of one token; the same bits twice."""
    monkeypatch.setattr(chunked_kernel, "SHORT_CLIP", 32)
    compare_in_chunks(torch.float32, guard, device, 1, 65, 8, S=3)
    given, _ = case(torch.float32, device, 1, 65, 8, S=3)
    assert torch.equal(kernels.selective_scan(**given), kernels.selective_scan(**given))


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_the_blocks_of_chunks(arch, in_chunks, guard, device, monkeypatch):
    """The shipped blocks themselves; neither divides 36 channels. Several blocks of states are carried."""
    if device == "cpu":
        monkeypatch.setattr(fused, "_block", lambda operation, _: kernel.BLOCKS[operation, arch])
    compare_in_chunks(torch.float32, guard, device, 2, 19, 36)


def test_chunks_of_other_clips_rows_and_nan(in_chunks, guard, device):
    """A clip's bits do not depend on its batch, and NaN stays in its clip, its channel, and its own future."""
    given, _ = case(torch.float32, device, 2, 40, 20, two=False)
    clean = kernels.selective_scan(**given)
    alone = kernels.selective_scan(**{n: t[1:2] if n in PER_CLIP else t for n, t in given.items()})
    assert torch.equal(alone, clean[1:2])
    given["u"][1, 18, 5] = float("nan")
    sick = kernels.selective_scan(**given)
    assert sick.isnan().nonzero().tolist() == [[1, t, 5] for t in range(18, 40)]
    assert torch.equal(sick[:, :18], clean[:, :18])
    assert torch.equal(sick[0], clean[0])


def test_chunks_where_decays_underflow(in_chunks, guard, device):
    """Whole chunks whose decay is 0 in float32, and tokens that neither decay nor add."""
    given, _ = case(torch.float32, device, 1, 40, 20)
    given["delta"][:, ::3] += 1e3
    given["delta"][:, 1::3] = -1e4
    given["A"][::2] *= 100
    plain, exact = SCAN(**given), SCAN(**doubled(given))
    check([({"out": kernels.selective_scan(**given)}, {"out": plain}, {"out": exact})], {"out": torch.float32})


def test_chunks_of_strange_inputs_and_none(in_chunks, guard, device):
    given, _ = case(torch.float32, device, 2, 19, 20)
    strange = given | {
        "u": torch.cat([given["u"], given["z"]], -1).chunk(2, -1)[0],
        "delta": given["delta"].transpose(0, 1).contiguous().transpose(0, 1),
        "A": given["A"].T.contiguous().T,
    }
    assert torch.equal(kernels.selective_scan(**strange), kernels.selective_scan(**given))
    assert kernels.selective_scan(**{n: t[:0] if n in PER_CLIP else t for n, t in given.items()}).shape == (0, 19, 20)


def test_chunks_refuse_gradients(in_chunks, device):
    given, _ = case(torch.float32, device, 1, 3, 5)
    given["A"].requires_grad_()
    with pytest.raises(
        ValueError, match=r"selective_scan=triton_chunked has no gradients: call it under torch\.no_grad"
    ):
        kernels.selective_scan(**given)
    with torch.no_grad():
        assert kernels.selective_scan(**given).isfinite().all()


def test_the_check_of_a_backend_without_gradients(device, monkeypatch):
    """`python -m fftp.env --check` and a run's first step compare its output alone."""
    monkeypatch.delenv("FFTP_BACKEND")
    every = env._cases
    monkeypatch.setattr(env, "_cases", lambda *given: [each for each in every(*given) if each[0] == "selective_scan"])
    rows = env.check(device, {"selective_scan": "triton_chunked"})
    assert [(row.backend, row.good) for row in rows] == [("triton_chunked", True)]


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
def test_opcheck_of_chunks(two, device):
    given, _ = case(torch.float32, device, 1, 3, 5, S=2, two=two)
    values = [*given.values()] + ([] if two else [None])
    torch.library.opcheck(chunked.scan, (*values, False))


CONVOLUTIONS = [(2, 33, 20, 4), (1, 1, 3, 4), (3, 2, 5, 4), (2, 7, 1, 1), (2, 5, 300, 7), (1, 16, 256, 4)]  # B, L, E, K


def conv_case(dtype, device, B, L, E, K, seed=0):
    generator = torch.Generator().manual_seed(100 * L + E + 10_000 * seed)
    shapes = {"u": (B, L, E), "weight": (E, K), "bias": (E,), "factors": (B, L, E)}
    given = {n: torch.randn(*s, generator=generator).to(device, dtype) for n, s in shapes.items()}
    return given, given.pop("factors")


def in_float32(u, weight, bias, reverse):
    """The reference that rounds where the kernel does: at its inputs and its output."""
    return reference.causal_conv(u.float(), weight.float(), bias.float(), reverse).to(u.dtype)


def compare_conv(dtype, guard, device, B, L, E, K, reverse):
    results = []
    for seed in range(4 if device == "cuda" else 1):
        given, factors = conv_case(dtype, device, B, L, E, K, seed)
        got = run(kernels.causal_conv, given, factors, guard.hold, reverse=reverse)
        plain = run(in_float32, given, factors, reverse=reverse)
        results.append((got, plain, run(reference.causal_conv, doubled(given), factors.double(), reverse=reverse)))
    check(results, dict.fromkeys(got, dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_conv_output_and_gradients(sizes, reverse, dtype, guard, device):
    compare_conv(TYPES[dtype], guard, device, *sizes, reverse)


def test_conv_of_inputs_that_are_not_contiguous(guard, device):
    given, factors = conv_case(torch.float32, device, 3, 5, 20, 4)
    wanted = run(kernels.causal_conv, given, factors)
    turned = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in given.items()}
    turned["bias"] = torch.stack([given["bias"]] * 2, 1)[:, 1]
    halves = turned | {"u": torch.cat([given["u"], given["u"]], -1).chunk(2, -1)[1]}
    for strange in (turned, halves):
        assert not any(t.is_contiguous() for t in strange.values())
        got = run(kernels.causal_conv, strange, factors.transpose(0, 2).contiguous().transpose(0, 2), lambda t: t)
        for name in wanted:
            assert torch.equal(got[name], wanted[name]), name


def test_conv_of_an_empty_batch(guard, device):
    given, factors = conv_case(torch.float32, device, 0, 5, 20, 4)
    got = run(kernels.causal_conv, given, factors)
    assert got["out"].shape == (0, 5, 20)
    assert not any(got[name].any() for name in given)


def test_conv_rows_nan_and_the_same_bits(guard, device):
    """Each clip by itself, bit for bit; NaN reaches K tokens of its own channel."""
    given, factors = conv_case(torch.float32, device, 5, 20, 20, 4)
    whole = run(kernels.causal_conv, given, factors)
    again = run(kernels.causal_conv, given, factors)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    part = run(kernels.causal_conv, given | {"u": given["u"][3:4]}, factors[3:4])
    assert torch.equal(part["out"], whole["out"][3:4])
    assert torch.equal(part["u"], whole["u"][3:4])
    given["u"][2, 11, 7] = float("nan")
    sick = kernels.causal_conv(**given).isnan()
    assert sick.nonzero().tolist() == [[2, t, 7] for t in range(11, 15)]


@pytest.mark.parametrize("reverse", [False, True])
def test_conv_under_autocast(reverse, guard, device):
    """Its parameters stay in float32, and so is its output: the reference's type."""
    given, factors = conv_case(torch.float32, device, 2, 9, 20, 4)
    given["u"] = given["u"].bfloat16()
    with torch.autocast(device, torch.bfloat16):
        got = run(kernels.causal_conv, given, factors, guard.hold, reverse=reverse)
        plain = run(reference.causal_conv, given, factors, reverse=reverse)
    exact = run(reference.causal_conv, doubled(given), factors.double(), reverse=reverse)
    check([(got, plain, exact)], {n: t.dtype for n, t in plain.items()})


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
def test_opcheck(two, device):
    given, factors = case(torch.float32, device, 1, 3, 5, S=2, two=two)
    values = [*given.values()] + ([] if two else [None])
    leaves = [None if t is None else t.requires_grad_() for t in values]
    torch.library.opcheck(fused.scan, (*leaves, False, True))
    values = [None if t is None else t.detach() for t in values]
    states = fused.scan(*values, False, True)[1]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.scan_gradients, (factors, *values, states, False), test_utils=utilities)


def test_conv_opcheck(device):
    given, factors = conv_case(torch.float32, device, 1, 3, 5, 4)
    leaves = [t.requires_grad_() for t in given.values()]
    torch.library.opcheck(fused.conv, (*leaves, False, torch.float32))
    values = [t.detach() for t in given.values()]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.conv_gradients, (factors, *values, False), test_utils=utilities)


@pytest.mark.slow
def test_under_compile(device):
    def both(weight, bias, **given):
        return kernels.selective_scan(kernels.causal_conv(given.pop("u"), weight, bias), **given)

    given, factors = case(torch.float32, device, 2, 5, 20)
    given |= {n: t for n, t in conv_case(torch.float32, device, 2, 5, 20, 4)[0].items() if n != "u"}
    got, wanted = (run(form, given, factors) for form in (torch.compile(both, fullgraph=True), both))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_float64_is_refused(device):
    given = {n: t if t is None or isinstance(t, bool) else t.to(device) for n, t in arguments(1, 2, 3).items()}
    reason = "=triton, which cannot run: it adds in float32; the tensors are float64"
    with pytest.raises(ValueError, match=f"selective_scan{reason}"):
        kernels.selective_scan(**given)
    with pytest.raises(ValueError, match=f"causal_conv{reason}"):
        kernels.causal_conv(given["u"], *(torch.zeros(*size, device=device).double() for size in ((3, 4), (3,))))


@pytest.mark.parametrize("case", stored("aum_none", "aum_v1", "aum_v2", "aum_v1_fftp"))
def test_the_originals_numbers(case, wide, device):
    """AuM's own code, converted: logits and every gradient within the bounds of the oracles' README for float32."""
    tensors = load(case)
    directions = case[0].split("_")[1]
    model = AuM(AuMConfig(grid=grid(case[0]), classes=10, dim=64, depth=2, directions=directions))
    model.load_state_dict(convert.from_aum(part(tensors, "weight.")))
    model, log_mel = model.to(device), tensors["input"].to(device, copy=True).requires_grad_()
    torch.testing.assert_close(model(log_mel).double().cpu(), tensors["logits"], rtol=0, atol=2e-6)
    check_gradients(tensors, model, log_mel, convert.from_aum, 1e-4)
