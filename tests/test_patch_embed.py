"""Patches: the embedding against a convolution written here, gradients, the grid's counts, changes of geometry."""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from in_c import multiplied
from oracles import fixture, needs_oracles, oracle

import kernels
import kernels.native as shared
from fftp import PatchEmbed, PatchGrid, UserError
from fftp.patching import resize_kernel, resize_positions
from kernels.linear import native as linear
from kernels.patch_embed import native

SHAPES = {  # B, T, F, pt, pf, st, sf, D
    "fftp": (3, 64, 128, 10, 128, 4, 128, 48),
    "square": (2, 64, 128, 16, 16, 10, 10, 48),
    "square-touching": (2, 64, 128, 16, 16, 16, 16, 48),
    "stride-one": (2, 31, 16, 10, 16, 1, 16, 24),
    "stride-above-patch": (2, 41, 16, 3, 16, 7, 16, 24),
    "odd": (3, 37, 13, 5, 13, 3, 1, 17),
    "odd-square": (3, 37, 13, 5, 3, 4, 2, 17),
    "one-patch": (2, 10, 16, 10, 16, 4, 16, 24),
    "one-cell-patch": (2, 7, 5, 1, 1, 1, 1, 3),
    "one-row-of-squares": (2, 9, 40, 9, 8, 1, 5, 8),
    "one-of-everything": (1, 1, 1, 1, 1, 1, 1, 1),
    "batch-1": (1, 50, 16, 10, 16, 2, 16, 8),
    "batch-33": (33, 23, 8, 4, 8, 3, 8, 8),
    "remainder-unused": (2, 39, 19, 10, 4, 10, 5, 8),
}


def case(name, positions="learned", tokens=1, place="middle", dtype=torch.float64, device="cpu"):
    """(arguments by name, stride, place) with everything drawn anew."""
    B, T, F, pt, pf, st, sf, D = SHAPES[name]
    grid = PatchGrid(T=T, F=F, pt=pt, pf=pf, st=st, sf=sf)
    generator = torch.Generator().manual_seed(sum(SHAPES[name]) + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    given = {
        "log_mel": normal(B, T, F),
        "weight": normal(D, 1, pt, pf) / (pt * pf) ** 0.5,
        "bias": normal(D),
        "position": normal(grid.N, D) if positions == "learned" else None,
        "tokens": normal(tokens, D),
    }
    return given, (st, sf), {"head": 0, "middle": grid.N // 2, "end": grid.N}[place]


def convolved(given, stride, place):
    """The originals' form: an image (B, 1, F, T) under kernels (D, 1, pf, pt), in raster order, tokens put in."""
    image, kernel = given["log_mel"].transpose(1, 2)[:, None], given["weight"].transpose(2, 3)
    rows = nnf.conv2d(image, kernel, given["bias"], stride=(stride[1], stride[0])).flatten(2).transpose(1, 2)
    if given["position"] is not None:
        rows = rows + given["position"]
    rows = list(rows.unbind(1))
    rows[place:place] = [t.expand(len(image), -1) for t in given["tokens"]]
    return torch.stack(rows, 1)


def run(form, given, stride, place):
    """Output, and the gradient of each input by name, of a sum with fixed random factors."""
    leaves = {n: t.detach().clone().requires_grad_() if t is not None else None for n, t in given.items()}
    out = form(leaves, stride, place)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * factors.to(out)).sum().backward()
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items() if t is not None}
    return {"out": out.detach()} | grads


def ours(given, stride, place):
    return kernels.patch_embed(
        given["log_mel"], given["weight"], given["bias"], stride, given["position"], given["tokens"], place
    )


@pytest.mark.parametrize("name", SHAPES)
def test_float64_output_and_gradients(name, device):
    given, stride, place = case(name, device=device)
    got, wanted = run(ours, given, stride, place), run(convolved, given, stride, place)
    assert got.keys() == wanted.keys()
    for what, tensor in wanted.items():
        # Sums of up to 1280 products of size 1 in float64. Seen: 4e-14, times fifty.
        torch.testing.assert_close(got[what], tensor, rtol=1e-12, atol=2e-12, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", ["odd", "odd-square", "one-patch", "stride-above-patch"])
def test_a_plain_loop_gives_the_same(name, device):
    given, (st, sf), place = case(name, tokens=2, device=device)
    log_mel, weight, bias, position, tokens = (given[n].cpu().numpy() for n in given)
    _, T, F, pt, pf, _, _, _ = SHAPES[name]
    rows = []
    for f in range(0, F - pf + 1, sf):  # frequency band outer, time inner
        for t in range(0, T - pt + 1, st):
            patch = log_mel[:, t : t + pt, f : f + pf]
            rows.append(np.einsum("btf,dtf->bd", patch, weight[:, 0]) + bias + position[len(rows)])
    rows[place:place] = [np.broadcast_to(t, rows[0].shape) for t in tokens]
    got = ours(given, (st, sf), place).cpu().numpy()
    np.testing.assert_allclose(got, np.stack(rows, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["learned", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("place", ["head", "middle", "end"])
@pytest.mark.parametrize("name", ["fftp", "odd-square"])
def test_positions_tokens_and_places(name, positions, tokens, place, device):
    given, stride, at = case(name, positions, tokens, place, device=device)
    got, wanted = run(ours, given, stride, at), run(convolved, given, stride, at)
    for what, tensor in wanted.items():
        torch.testing.assert_close(got[what], tensor, rtol=1e-12, atol=2e-12, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", ["fftp", "square"])
def test_inputs_that_are_not_contiguous(name, device):
    given, stride, place = case(name, device=device)
    wanted = ours(given, stride, place)
    strange = dict(given)
    strange["log_mel"] = given["log_mel"].transpose(1, 2).contiguous().transpose(1, 2)
    strange["weight"] = torch.stack([given["weight"], given["weight"] + 1], 1)[:, 0]
    strange["position"] = given["position"].T.contiguous().T
    # Another layout, another order of additions in float64. Seen: 1.8e-14.
    torch.testing.assert_close(ours(strange, stride, place), wanted, rtol=1e-12, atol=2e-12)
    sliced = torch.stack([given["log_mel"], given["log_mel"] + 1], 1).flatten(0, 1)[::2]
    torch.testing.assert_close(ours(given | {"log_mel": sliced}, stride, place), wanted, rtol=1e-12, atol=2e-12)


@pytest.mark.parametrize("name", ["fftp", "odd-square", "one-of-everything"])
def test_hidden_cells_are_those_of_a_painted_copy(name, device):
    """Output and gradients; the spectrogram stays as it is, and what it hides is never seen, not even NaN."""
    given, stride, place = case(name, device=device)
    B, T, F = given["log_mel"].shape
    generator = torch.Generator().manual_seed(T)
    ends = [torch.randint(-2, size + 3, (B, 4, 2), generator=generator).sort(-1).values for size in (T, F)]
    rectangles = torch.cat(ends, -1).to(device, torch.int32)
    rectangles[0, 0] = torch.tensor([0, 1, 0, 1])  # the one cell of the smallest case
    fill = torch.randn(B, generator=generator).to(device)
    painted = given | {"log_mel": kernels.paint(given["log_mel"].clone(), rectangles, fill)}
    wanted = run(ours, painted, stride, place)
    hidden = kernels.paint(torch.zeros(B, T, F, device=device), rectangles, torch.ones_like(fill)) == 1
    wanted["log_mel"] = torch.where(hidden, 0, wanted["log_mel"])
    given["log_mel"][hidden] = float("nan")
    before = given["log_mel"].clone()

    def masked(g, stride, place):
        rest = (g["weight"], g["bias"], stride, g["position"], g["tokens"], place)
        return kernels.patch_embed(g["log_mel"], *rest, rectangles, fill)

    got = run(masked, given, stride, place)
    for what, tensor in wanted.items():
        assert torch.equal(got[what], tensor), what
    assert torch.equal(given["log_mel"].nan_to_num(99), before.nan_to_num(99))
    assert hidden.any()


def test_empty_batch(device):
    given, stride, place = case("fftp", device=device)
    got = run(ours, given | {"log_mel": given["log_mel"][:0]}, stride, place)
    assert got["out"].shape == (0, 15, 48)
    assert not got["weight"].any()


def test_without_tokens_patches_stand_alone(device):
    given, stride, _ = case("fftp", device=device)
    alone = kernels.patch_embed(**(given | {"tokens": None}), stride=stride, place=0)
    assert torch.equal(alone, kernels.patch_embed(**(given | {"tokens": given["tokens"][:0]}), stride=stride, place=0))
    assert alone.shape == (3, 14, 48)


def test_nan_in_one_clip_stays_there(device):
    given, stride, place = case("fftp", device=device)
    clean = ours(given, stride, place)
    given["log_mel"][1, 20, 3] = float("nan")
    got = ours(given, stride, place)
    torch.testing.assert_close(got[[0, 2]], clean[[0, 2]], rtol=1e-12, atol=1e-12)
    windows = [n for n in range(14) if 4 * n <= 20 < 4 * n + 10]
    at = [n if n < place else n + 1 for n in windows]
    assert got[1].isnan().any(1).nonzero().flatten().tolist() == at


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_mel": torch.zeros(4, 3)}, r"log_mel is \(B, T, F\)"),
        ({"weight": torch.zeros(2, 2, 3, 3)}, r"log_mel is \(B, T, F\)"),
        ({"weight": torch.zeros(2, 1, 9, 3)}, "9 frames x 3 bins does not fit a clip of 8 frames x 4 bins"),
        ({"weight": torch.zeros(2, 1, 3, 5)}, "3 frames x 5 bins does not fit"),
        ({"position": torch.zeros(5, 2)}, "N=6 patches of width D=2"),
        ({"tokens": torch.zeros(1, 3)}, "N=6 patches of width D=2"),
        ({"place": 7}, "a place in 0..N"),
        ({"stride": (0, 1)}, r"a stride is at least 1 frame and 1 bin, got \(0, 1\)"),
        ({"rectangles": torch.zeros(1, 2, 4, dtype=torch.int32)}, "rectangles and fill go together, got no fill"),
        ({"fill": torch.zeros(1)}, "rectangles and fill go together, got no rectangles"),
        (
            {"rectangles": torch.zeros(2, 2, 4, dtype=torch.int32), "fill": torch.zeros(1)},
            r"1 clips take rectangles \(B, M, 4\) and fill \(B,\), got \(2, 2, 4\)",
        ),
        ({"rectangles": torch.zeros(1, 2, 4), "fill": torch.zeros(1)}, "int32 numbers of frames and bins"),
    ],
)
def test_refused(change, message):
    given = {
        "log_mel": torch.zeros(1, 8, 4),
        "weight": torch.zeros(2, 1, 3, 4),
        "bias": torch.zeros(2),
        "stride": (1, 1),
        "position": torch.zeros(6, 2),
        "tokens": torch.zeros(1, 2),
        "place": 3,
    }
    kernels.patch_embed(**given)
    with pytest.raises(ValueError, match=message):
        kernels.patch_embed(**(given | change))


# In C -----------------------------------------------------------------------------------------------------------------

IN_C = {  # B, T, F, pt, pf, st, sf, D: widths and patches of multiples of 32; full frequency, square, touching, far apart
    "fftp": (3, 64, 128, 10, 128, 4, 128, 96),
    "square": (2, 40, 36, 16, 16, 10, 10, 64),
    "touching": (2, 41, 16, 6, 16, 6, 16, 32),
    "apart": (2, 41, 16, 2, 16, 7, 16, 32),
    "one-patch": (1, 10, 32, 10, 32, 4, 32, 64),
}


in_c = multiplied(native, linear.LIBRARY)


def in_bfloat16(monkeypatch, name, positions="learned"):
    """(arguments of which log-mel and weight are what bfloat16 holds, stride, place)."""
    monkeypatch.setitem(SHAPES, name, IN_C[name])
    given, stride, place = case(name, positions, dtype=torch.float32)
    return given | {n: given[n].bfloat16().float() for n in ("log_mel", "weight")}, stride, place


def by(backend, call, *given, monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", f"patch_embed={backend}")
    with torch.autocast("cpu", torch.bfloat16):
        return call(*given)


@pytest.mark.parametrize("positions", ["learned", "none"])
@pytest.mark.parametrize("name", IN_C)
@pytest.mark.usefixtures("in_c")
def test_in_c_by_the_2x_rule(name, positions, monkeypatch):
    given, *rest = in_bfloat16(monkeypatch, name, positions)
    found, plain = (by(backend, ours, given, *rest, monkeypatch=monkeypatch) for backend in ("native", "reference"))
    wanted = ours({n: t if t is None else t.double() for n, t in given.items()}, *rest)
    assert found.dtype == plain.dtype
    unit = 2.0 ** (torch.frexp(wanted.abs().max()).exponent - 8)  # of the last place in bfloat16
    error, allowed = ((t.double() - wanted).abs().max() for t in (found, plain))
    assert error <= 2 * allowed + unit


@pytest.mark.usefixtures("in_c")
def test_in_c_gradients_are_the_references(monkeypatch):
    given, *rest = in_bfloat16(monkeypatch, "fftp")
    found, plain = (
        by(backend, run, ours, given, *rest, monkeypatch=monkeypatch) for backend in ("native", "reference")
    )
    assert all(torch.equal(found[what], plain[what]) for what in plain)


@pytest.mark.parametrize("name", IN_C)
@pytest.mark.usefixtures("in_c")
def test_in_c_without_gradients_with_masks_and_with_the_weight_laid_out(name, monkeypatch):
    """A clip alone, and the weight in panels: the same bits. Masks are those of a painted copy."""
    given, stride, place = in_bfloat16(monkeypatch, name)
    monkeypatch.setenv("FFTP_BACKEND", "patch_embed=native,linear=native")
    weights = (given["weight"].bfloat16(), given["bias"], stride, given["position"], given["tokens"], place)
    panels, log_mel = kernels.linear_panels(weights[0].flatten(1)), given["log_mel"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = kernels.patch_embed(log_mel, *weights)
        assert whole.dtype == torch.float32
        assert torch.equal(kernels.patch_embed(log_mel, *weights, panels=panels), whole)
        if linear.LIBRARY.widest() == shared.AMX:  # else it is PyTorch's product
            assert torch.equal(kernels.patch_embed(log_mel[-1:], *weights, panels=panels), whole[-1:])
        masks = (
            torch.tensor([[[3, 9, 0, 13]]], dtype=torch.int32).expand(len(log_mel), -1, -1),
            torch.ones(len(log_mel)),
        )
        painted = kernels.patch_embed(kernels.paint(log_mel.clone(), *masks), *weights)
        assert torch.equal(kernels.patch_embed(log_mel, *weights, *masks), painted)
        assert kernels.patch_embed(log_mel[:0], *weights).shape == (0, *whole.shape[1:])


# Geometry -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "pt", "pf", "st", "sf", "N"),
    [
        (1024, 16, 16, 10, 10, 1212),
        (1000, 16, 16, 10, 10, 1188),
        (1000, 50, 128, 10, 128, 96),
        (1000, 25, 128, 5, 128, 196),
        (1000, 10, 128, 4, 128, 248),
        (1000, 10, 128, 2, 128, 496),
        (1000, 10, 128, 1, 128, 991),
        (1024, 50, 128, 10, 128, 98),
        (1024, 25, 128, 5, 128, 200),
        (1024, 10, 128, 4, 128, 254),
        (1024, 10, 128, 2, 128, 508),
        (1024, 10, 128, 1, 128, 1015),
        (128, 16, 16, 10, 10, 144),
        (128, 16, 16, 16, 16, 64),
        (128, 10, 128, 1, 128, 119),
        (128, 10, 128, 4, 128, 30),
        (1024, 16, 16, 16, 16, 512),
        (64, 16, 16, 10, 10, 60),
        (10, 10, 128, 4, 128, 1),
    ],
)
def test_patch_counts(T, pt, pf, st, sf, N):
    """The paper's Table II, PAPER_NOTES 1.5 and 1.6, and as many as a convolution makes."""
    grid = PatchGrid(T=T, F=128, pt=pt, pf=pf, st=st, sf=sf)
    assert grid.N == N == grid.n_t * grid.n_f
    image = torch.zeros(1, 1, T, 128, device="meta")
    assert nnf.conv2d(image, torch.zeros(1, 1, pt, pf, device="meta"), stride=(st, sf)).shape[2:] == (
        grid.n_t,
        grid.n_f,
    )
    assert grid.full_frequency == (pf == 128)
    assert grid.embed_macs(7) == N * pt * pf * 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pt": 129}, "A patch of 129 frames is wider than the clip of 128 frames: take --patch-time 128 or less"),
        ({"pf": 129}, "A patch of 129 mel bins is higher than the 128 bins there are: take --patch-freq 128 or less"),
        ({"st": 0}, "The patch grid's st has to be at least 1, not 0"),
        ({"T": 0}, "The patch grid's T has to be at least 1, not 0"),
    ],
)
def test_a_grid_that_does_not_fit(change, message):
    with pytest.raises(UserError) as raised:
        PatchGrid(**({"T": 128, "F": 128, "pt": 10, "pf": 128, "st": 1, "sf": 128} | change))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("place", ["head", "middle", "end"])
@pytest.mark.parametrize("positions", ["learned", "none"])
def test_patch_embed_takes_the_class_rows_from_the_head_of_the_table(tokens, place, positions, device):
    grid = PatchGrid(T=37, F=13, pt=5, pf=3, st=4, sf=2)
    embed = PatchEmbed(grid, 8, tokens, place, positions).double().to(device)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in embed.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    log_mel = torch.randn(2, 37, 13, generator=generator, dtype=torch.float64).to(device)
    given = {"log_mel": log_mel, "weight": embed.weight, "bias": embed.bias, "position": None}
    given["tokens"] = embed.class_token
    if positions == "learned":
        given["position"] = embed.position[tokens:]
        given["tokens"] = embed.class_token + embed.position[:tokens]
    wanted = convolved(given, (4, 2), {"head": 0, "middle": grid.N // 2, "end": grid.N}[place])
    torch.testing.assert_close(embed(log_mel), wanted, rtol=1e-12, atol=1e-12)
    masks = torch.tensor([[[3, 9, 0, 13]], [[5, 6, 2, 4]]], dtype=torch.int32, device=device), torch.ones(2).to(device)
    assert torch.equal(embed(log_mel, *masks), embed(kernels.paint(log_mel.clone(), *masks)))
    with pytest.raises(ValueError, match="T=37 and F=13 from the grid"):
        embed(log_mel[:, :-1])


# Changes of geometry --------------------------------------------------------------------------------------------------


def square(n_t, n_f):
    return PatchGrid(T=16 * n_t, F=16 * n_f, pt=16, pf=16, st=16, sf=16)


@pytest.fixture(params=["small", pytest.param("full", marks=needs_oracles)])
def resized(request):
    return fixture("resize") if request.param == "small" else oracle("resize")


@pytest.mark.parametrize(("n_f", "n_t"), [(8, 8), (1, 37), (12, 20), (4, 16)])
def test_positions_resize_as_aums(resized, n_f, n_t):
    given, wanted = resized["aum.pos_8x16_plus_prefix"][0], resized[f"aum.pos_to_{n_f}x{n_t}"][0]
    got = resize_positions(given, 1, square(16, 8), square(n_t, n_f))
    # The oracles' bound. Seen: 0.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_positions_of_the_same_grid_are_kept():
    position = torch.randn(130, 3)
    same = resize_positions(position, 2, square(16, 8), square(16, 8))
    assert torch.equal(same, position)
    assert same.data_ptr() != position.data_ptr()


@pytest.mark.parametrize("method", ["pinv", "bilinear"])
@pytest.mark.parametrize(("pf", "pt"), [(8, 24), (16, 8), (32, 32), (128, 10)])
def test_kernels_resize_as_aums(resized, method, pf, pt):
    """The originals' kernels are frequency-major: both sides are transposed for ours."""
    broken = method == "pinv" and (pf, pt) == (
        128,
        10,
    )  # in the original; the same rule with a cut-off is stored instead
    wanted = resized["own.kernel_pinv_128x10" if broken else f"aum.kernel_{method}_{pf}x{pt}"]
    given = resized["aum.kernel_16x16"][: len(wanted)].transpose(2, 3).contiguous()
    got = resize_kernel(given, pt, pf, method)
    # The oracles' bound. Seen: 2.1e-7.
    torch.testing.assert_close(got.transpose(2, 3), wanted, rtol=0, atol=1e-5)


def test_an_enlarged_kernel_answers_an_enlarged_patch_alike():
    """What the pseudo-inverse is for: <resize(w), resize(x)> = <w, x>."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 1, 4, 6, generator=generator, dtype=torch.float64)
    patch = torch.randn(5, 1, 4, 6, generator=generator, dtype=torch.float64)
    bigger = nnf.interpolate(patch, size=(9, 7), mode="bilinear")
    got = torch.einsum("bxtf,dxtf->bd", bigger, resize_kernel(weight, 9, 7))
    torch.testing.assert_close(got, torch.einsum("bxtf,dxtf->bd", patch, weight), rtol=1e-10, atol=1e-10)
    assert torch.equal(resize_kernel(weight, 4, 6), weight)


@pytest.mark.parametrize("place", ["head", "middle", "end"])
def test_resized_embedding_keeps_what_fits_and_resizes_the_rest(place):
    old = PatchGrid(T=64, F=128, pt=10, pf=128, st=4, sf=128)
    new = PatchGrid(T=96, F=128, pt=10, pf=128, st=2, sf=128)
    embed = PatchEmbed(old, 12, 1, place)
    for parameter in embed.parameters():
        torch.nn.init.normal_(parameter)
    same, other = embed.resized(old), embed.resized(new)
    log_mel = torch.randn(2, 64, 128)
    assert torch.equal(same(log_mel), embed(log_mel))
    assert torch.equal(other.weight, embed.weight)
    assert torch.equal(other.position, resize_positions(embed.position.data, 1, old, new))
    assert other(torch.randn(2, 96, 128)).shape == (2, new.N + 1, 12)
    assert other.place == {"head": 0, "middle": new.N // 2, "end": new.N}[place]
