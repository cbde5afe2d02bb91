"""The embedding by the Triton kernels, output and gradients by the 2x rule. Run by tests/test_triton_patch_embed.py."""

import pytest
import torch
from test_patch_embed import SHAPES

import kernels
from kernels.patch_embed import fused, kernel, reference
from kernels.spec_mask.reference import covered, paint

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
    "whole-words": (2, 24, 64, 7, 64, 3, 64, 20),
    "whole-strides": (3, 20, 24, 6, 24, 2, 24, 37),
    "whole-strides-above-patch": (2, 28, 16, 3, 16, 7, 16, 24),
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


def case(name, dtype, device, positions=True, tokens=1, place="middle", masks=0):
    """(arguments by name, stride, place, the output's gradient), everything drawn anew and rounded to dtype.

    masks: rectangles a clip; some are empty, some overlap, some reach past the clip's ends.
    """
    B, T, F, pt, pf, st, sf, D = (SHAPES | LARGER)[name]
    N = ((T - pt) // st + 1) * ((F - pf) // sf + 1)
    generator = torch.Generator().manual_seed(sum((SHAPES | LARGER)[name]) + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weight = (normal(D, 1, pt, pf).float() / (pt * pf) ** 0.5).to(dtype)
    given = {"log_mel": normal(B, T, F), "weight": weight, "bias": normal(D)}
    given |= {"position": normal(N, D) if positions else None, "tokens": normal(tokens, D)}
    if masks:
        ends = [torch.randint(-2, size + 3, (B, masks, 2), generator=generator).sort(-1).values for size in (T, F)]
        given |= {"rectangles": torch.cat(ends, -1).to(device, torch.int32), "fill": normal(B).float()}
    return given, (st, sf), {"head": 0, "middle": N // 2, "end": N}[place], normal(B, N + tokens, D)


GIVEN = ("log_mel", "weight", "bias", "position", "tokens")  # what has a gradient


def run(form, given, stride, place, factors, hold=lambda t: t.clone()):
    """Output, and the gradient of each input by name, for the output's gradient `factors`."""
    leaves = {n: None if t is None else hold(t).detach() for n, t in given.items()}
    there = {n: leaves[n].requires_grad_() for n in GIVEN if leaves[n] is not None}
    out = form(**leaves, stride=stride, place=place)
    grads = torch.autograd.grad(out, list(there.values()), hold(factors.to(out.dtype)), materialize_grads=True)
    return {"out": out.detach()} | dict(zip(there, grads, strict=True))


def doubled(given):
    return {n: t.double() if n in GIVEN and t is not None else t for n, t in given.items()}


def in_float32(log_mel, weight, bias, stride, position, tokens, place, **masks):
    """The reference that rounds where the kernel does: at its inputs and its output."""
    wide = [None if t is None else t.float() for t in (log_mel, weight, bias, position, tokens)]
    return reference.patch_embed(*wide[:3], stride, *wide[3:], place, **masks).to(log_mel.dtype)


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


# float32 meets every shape but the largest; the 16-bit types, which take the same way, the quick ones.
LONG = ["fftp", "square", "square-touching", "L97", "L249", "tall-not-full"]
QUICK = ["odd", "odd-square", "one-of-everything", "tiles-that-divide"]


def _long(name, dtype):
    return name in LONG if dtype == "float32" else name not in QUICK


EVERY = [
    pytest.param(name, dtype, marks=[pytest.mark.slow] if _long(name, dtype) else [])
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
@pytest.mark.parametrize("name", ["odd-square", pytest.param("odd", marks=pytest.mark.slow)])
def test_positions_tokens_and_places(name, place, tokens, positions, guard, device):
    compare(name, torch.float32, guard, device, positions=positions, tokens=tokens, place=place)


def test_a_tile_may_hold_the_rows_of_many_clips_and_many_tokens(guard, device):
    compare("whole-clip", torch.float32, guard, device, tokens=40, place="end")


MASKED = ["odd", "odd-square", "whole-words", "stride-above-patch", "one-of-everything"]
MASKED += [pytest.param(name, marks=pytest.mark.slow) for name in ("batch-33", "bands-that-overlap", *LONG)]


@pytest.mark.parametrize("name", MASKED)
def test_hidden_cells(name, guard, device):
    compare(name, torch.float32, guard, device, masks=5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["odd-square", "whole-words"])
def test_hidden_cells_in_16_bits(name, dtype, guard, device):
    compare(name, TYPES[dtype], guard, device, masks=3)


@pytest.mark.parametrize("name", ["odd", "odd-square", "whole-words"])
def test_hidden_cells_are_those_that_paint_covers(name, guard, device):
    """Bit for bit the embedding of a painted copy; the spectrogram itself stays as it is, whatever it hides."""
    given, stride, place, factors = case(name, torch.float32, device, masks=4)
    masks = {n: given.pop(n) for n in ("rectangles", "fill")}
    painted = given | {"log_mel": paint(given["log_mel"].clone(), **masks)}
    wanted = run(kernels.patch_embed, painted, stride, place, factors)
    hidden = covered(masks["rectangles"], *given["log_mel"].shape[1:])
    given["log_mel"][hidden] = float("nan")
    before = given["log_mel"].clone()
    got = run(kernels.patch_embed, given | masks, stride, place, factors)
    assert hidden.any()
    assert torch.equal(given["log_mel"].nan_to_num(99), before.nan_to_num(99))
    for what in wanted:
        wanted[what] = torch.where(hidden, 0, wanted[what]) if what == "log_mel" else wanted[what]
        # A weight's gradient is cut into other tiles with masks and without: seen 0 on this CPU.
        torch.testing.assert_close(got[what], wanted[what], rtol=0, atol=1e-5 if what == "weight" else 0)


@pytest.mark.parametrize("F", [1, 63, 64, 65, 130])
@pytest.mark.parametrize(("B", "T", "M"), [(1, 1, 1), (3, 67, 9), (1, 30, 64), (2, 5, 0), (0, 5, 2)])
def test_bit_plane(B, T, M, F, guard, device):
    generator = torch.Generator().manual_seed(B + T + M + F)
    ends = [torch.randint(-3, size + 4, (B, M, 2), generator=generator).sort(-1).values for size in (T, F)]
    rectangles = torch.cat(ends, -1).to(device, torch.int32)
    rectangles[:, ::3, 2:] = rectangles[:, ::3, 2:].flip(-1)  # ends before starts hide nothing
    bits = fused.bit_plane(guard.hold(rectangles), T, F)
    cells = (bits[..., None] >> torch.arange(64, device=device)) & 1
    assert torch.equal(cells.flatten(2)[..., :F] == 1, covered(rectangles, T, F))


@pytest.mark.parametrize("parts", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("masks", [0, 3], ids=["plain", "masked"])
@pytest.mark.parametrize("name", ["whole-words", "k-below-a-tile", pytest.param("odd-square", marks=pytest.mark.slow)])
def test_sums_cut_into_parts(name, masks, parts, guard, device, monkeypatch):
    """k-below-a-tile: parts with nothing in them."""
    monkeypatch.setattr(kernel, "forward_parts", lambda K, N: parts)
    compare(name, torch.float32, guard, device, masks=masks, tokens=2)
    compare(name, torch.float32, guard, device, masks=masks, tokens=0, positions=False)


def test_parts_depend_on_the_patch_and_the_count_alone():
    """Table II's rows and the square grid; only the fewest, longest patches of them are cut."""
    table = [(256, 1212), (6400, 96), (3200, 196), (1280, 248), (1280, 496), (1280, 991), (12800, 128), (6400, 129)]
    assert [kernel.forward_parts(K, N) for K, N in table] == [1, 2, 1, 1, 1, 1, 4, 1]


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("masks", [0, 3], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "name",
    [
        "whole-words",
        "whole-strides",
        pytest.param("whole-strides-above-patch", marks=pytest.mark.slow),
        pytest.param("tiles-that-divide", marks=pytest.mark.slow),
    ],
)
def test_tensor_descriptors(name, masks, parts, guard, device, monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "patch_embed=triton_descriptor")
    monkeypatch.setattr(kernel, "forward_parts", lambda K, N: parts)
    made = []
    monkeypatch.setattr(fused, "_descriptors", lambda *a, real=fused._descriptors: made.append(a) or real(*a))
    for dtype in (torch.float32, torch.float16) if parts == 1 else (torch.float32,):
        for tokens, place in ((1, "middle"), (3, "head"), (0, "head")):
            compare(name, dtype, guard, device, masks=masks, tokens=tokens, place=place, positions=tokens != 1)
    # With masks pointers are taken.
    assert len(made) == (0 if masks else 6 if parts == 1 else 3)


@pytest.mark.parametrize("name", ["odd", "odd-square", "one-cell-patch"])
def test_where_descriptors_do_not_fit_pointers_are_taken(name, guard, device, monkeypatch):
    given, stride, place, _ = case(name, torch.float32, device)
    wanted = kernels.patch_embed(**given, stride=stride, place=place)
    monkeypatch.setenv("FFTP_BACKEND", "patch_embed=triton_descriptor")
    assert not fused.boxes_fit(given["log_mel"], given["weight"], stride[0])
    assert torch.equal(kernels.patch_embed(**given, stride=stride, place=place), wanted)


def test_a_clip_that_lies_past_32_bits(tmp_path, device):
    """Two windows, the second behind 2^31 elements, in a file with holes: the offsets have to be 64 bits wide."""
    T, F, far = 2**24 + 4, 128, 2**24
    if device == "cuda":
        log_mel = torch.empty(1, T, F, dtype=torch.float16, device=device)
    else:
        log_mel = torch.from_file(str(tmp_path / "log_mel"), shared=True, size=T * F, dtype=torch.float16).view(1, T, F)
    log_mel[0, :4] = torch.randn(4, F)
    log_mel[0, far:] = torch.randn(4, F)
    weight = (torch.randn(5, 1, 4, F) / 23).half().to(device)
    bias, tokens = torch.randn(5).half().to(device), torch.zeros(0, 5).half().to(device)
    got = kernels.patch_embed(log_mel, weight, bias, (far, F), None, tokens, 0)
    windows = torch.cat([log_mel[:, :4], log_mel[:, far:]])
    wanted = kernels.patch_embed(windows, weight, bias, (1, F), None, tokens, 0)[:, 0]
    assert torch.equal(got[0], wanted)
    grad = torch.randn(1, 2, 5).half().to(device)
    got = fused.weight_gradient(grad, log_mel, weight, far, F, 0, 0, None, None)
    wanted = fused.weight_gradient(grad.transpose(0, 1), windows, weight, 1, F, 0, 0, None, None)
    assert torch.equal(got, wanted)


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


@pytest.mark.parametrize(
    ("name", "backend", "parts"),
    [
        ("odd", "triton", 1),
        ("odd-square", "triton", 1),
        ("whole-words", "triton", 2),
        ("whole-words", "triton_descriptor", 1),
    ],
)
def test_rows_do_not_depend_on_the_batch(name, backend, parts, guard, device, monkeypatch):
    """Bit for bit on a GPU; numpy's products in the interpreter may differ with the row: seen 4.8e-7, times four."""
    monkeypatch.setenv("FFTP_BACKEND", f"patch_embed={backend}")
    monkeypatch.setattr(kernel, "forward_parts", lambda K, N: parts)
    given, stride, place, _ = case(name, torch.float32, device)
    given["log_mel"] = given["log_mel"].repeat(11, 1, 1)
    whole = kernels.patch_embed(**given, stride=stride, place=place)
    for rows in (slice(7, 8), slice(3, 8)):
        part = kernels.patch_embed(**(given | {"log_mel": given["log_mel"][rows]}), stride=stride, place=place)
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=0 if device == "cuda" else 2e-6)


def test_the_same_bits_twice(guard, device):
    """Ten times on a GPU: known-bad compilers give wrong gradients now and then."""
    for name in ("odd-square", "L97" if device == "cuda" else "L63"):
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
    given, stride, place, factors = case("odd-square", torch.float32, device, masks=2)
    rectangles, fill = given.pop("rectangles"), given.pop("fill")
    leaves = [None if t is None else t.requires_grad_() for t in given.values()]
    bits = fused.bit_plane(rectangles, *given["log_mel"].shape[1:])
    torch.library.opcheck(fused.embed, (*leaves[:3], *stride, *leaves[3:], place, bits, fill, False))
    arguments = (factors, given["log_mel"].detach(), given["weight"].detach(), *stride, 1, place, bits)
    schemas = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.weight_gradient, (*arguments, fill), test_utils=schemas)
    torch.library.opcheck(fused.log_mel_gradient, arguments, test_utils=schemas)
    torch.library.opcheck(fused.bit_plane, (rectangles, *given["log_mel"].shape[1:]), test_utils=schemas)


@pytest.mark.slow
@pytest.mark.parametrize("masks", [0, 2], ids=["plain", "masked"])
def test_under_compile(masks, device):
    given, stride, place, factors = case("odd-square", torch.float32, device, masks=masks)
    compiled = torch.compile(kernels.patch_embed, fullgraph=False)
    got, wanted = (run(form, given, stride, place, factors) for form in (compiled, kernels.patch_embed))
    for what in wanted:
        # The kernels' results are the same bits; the sums over the batch around them are inductor's. Seen: 1.6e-6.
        torch.testing.assert_close(got[what], wanted[what], rtol=1e-6, atol=4e-6)


def test_float64_is_refused(device):
    given, stride, place, _ = case("odd", torch.float64, device)
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
    long, patch = torch.empty(1, 2**24, 128, device="meta"), torch.empty(1, 1, 2**24, 1, device="meta")
    with pytest.raises(ValueError, match=r"over 2147483647 cells at most, got 16777216 frames of 128 bins"):
        fused._launch(long, patch, 1, 1, 0, 0)


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "bfloat16"))]
)
@pytest.mark.parametrize("masks", [pytest.param(0, marks=pytest.mark.slow), 3], ids=["plain", "masked"])
def test_the_tiles_of_every_architecture(masks, dtype, guard, device, monkeypatch):
    """The shipped tiles themselves, on one shape with edges in all of them, where the interpreter takes its own."""
    if device == "cuda":
        return  # a GPU runs its own tiles in every test above
    for arch in ("sm_80", "sm_90", "sm_100"):

        def shipped(name, log_mel, weight, bits, arch=arch):
            operation = kernel.operation(name, bits is not None, log_mel.shape[2], weight.shape[3])
            return kernel.tile(operation, arch, TYPES[dtype])

        monkeypatch.setattr(fused, "_tile", shipped)
        compare("whole-words" if masks else "tall-not-full", TYPES[dtype], guard, device, masks=masks)
