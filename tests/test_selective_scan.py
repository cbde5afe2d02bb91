"""The scan and the causal convolution: each backend against float64, forward and gradients by name."""

import functools

import pytest
import torch
import torch.nn.functional as nnf

import kernels
from kernels import native as shared
from kernels.selective_scan import blocked, native

NAMES = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "A_backward"]
needs_native = pytest.mark.skipif(native.refuses() is not None, reason=f"the native kernels: {native.refuses()}.")
# The instruction sets of this processor.
LEVELS = range(native.LIBRARY.widest() + 1) if native.refuses() is None else ()
BACKENDS = ["reference", "blocked", pytest.param("native", marks=needs_native)]
FUSED = ["blocked", pytest.param("native", marks=needs_native)]


def use(monkeypatch, backend):
    monkeypatch.setenv("FFTP_BACKEND", f"selective_scan={backend}")


def arguments(B, L, E, S=16, two=True, seed=0):
    """Inputs by name in float64, of the sizes they have in a model."""
    generator = torch.Generator().manual_seed(seed + 1000 * L + E)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    given = {
        "u": normal(B, L, E),
        "delta": normal(B, L, E),
        "A": -torch.exp(0.5 * normal(E, S) + 1),
        "B": normal(B, L, S),
        "C": normal(B, L, S),
        "D": normal(E),
        "z": normal(B, L, E),
        "delta_bias": normal(E) - 2,
    }
    if two:
        given["A_backward"] = -torch.exp(0.5 * normal(E, S) + 1)
    # Rounded once, so that float32 and float64 see the same numbers.
    return {name: tensor.float().double() for name, tensor in given.items()}


def run(given, reverse=False):
    """Output, and the gradient of each input by name, of a sum with fixed random factors."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    out = kernels.selective_scan(**leaves, reverse=reverse)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * factors.to(out)).sum().backward()
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def as_float32(given, device="cpu"):
    return {name: tensor.to(device, torch.float32) for name, tensor in given.items()}


def written_out(given, reverse=False):
    """The recurrence for every clip, channel and state by itself, as the equations have it (PAPER_NOTES 4.3)."""

    def one_way(A, backwards):
        y = torch.zeros_like(u)
        for b in range(u.shape[0]):
            state = torch.zeros_like(A)
            for t in range(u.shape[1])[:: -1 if backwards else 1]:
                for e in range(u.shape[2]):
                    for s in range(A.shape[1]):
                        decay = torch.exp(delta[b, t, e] * A[e, s])
                        state[e, s] = decay * state[e, s] + delta[b, t, e] * u[b, t, e] * given["B"][b, t, s]
                        y[b, t, e] += state[e, s] * given["C"][b, t, s]
                    y[b, t, e] += given["D"][e] * u[b, t, e]
        return y

    u, delta = given["u"], torch.log1p(torch.exp(given["delta"] + given["delta_bias"]))
    y = one_way(given["A"], reverse)
    if "A_backward" in given:
        y += one_way(given["A_backward"], not reverse)
    return y * given["z"] / (1 + torch.exp(-given["z"]))


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_reference_is_the_recurrence(two, reverse):
    given = arguments(2, 5, 3, S=2, two=two)
    got = kernels.selective_scan(**given, reverse=reverse)
    # Sums of ten terms in float64. Seen: 4e-16.
    torch.testing.assert_close(got, written_out(given, reverse), rtol=1e-12, atol=1e-13)


def test_the_references_gradients_are_its_derivatives():
    given = arguments(1, 4, 2, S=2)
    leaves = tuple(t.requires_grad_() for t in given.values())
    assert torch.autograd.gradcheck(lambda *ts: kernels.selective_scan(**dict(zip(given, ts, strict=True))), leaves)


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("E", [20, 192])
@pytest.mark.parametrize("L", [1, 2, 63, 97])
@pytest.mark.parametrize("backend", FUSED)
def test_by_the_2x_rule(backend, L, E, reverse, two, monkeypatch):
    """Its largest error against float64 is at most twice the float32 reference's, plus one unit in the last place of the scale.

    The largest over four draws of the inputs: in a single draw a gradient of twenty numbers (delta_bias) can find the
    reference lucky. Five clips of 97 tokens and 192 channels are two blocks. Seen: the means over draws are alike.
    """
    by_the_2x_rule(monkeypatch, backend, (5, L, E), reverse, two)


def by_the_2x_rule(monkeypatch, backend, sizes, reverse=False, two=True, S=16, seeds=4):
    worst = {}
    for seed in range(seeds):
        given = arguments(*sizes, S=S, two=two, seed=seed)
        use(monkeypatch, "reference")
        exact, plain = run(given, reverse), run(as_float32(given), reverse)
        use(monkeypatch, backend)
        got = run(as_float32(given), reverse)
        assert got.keys() == exact.keys()
        for name, wanted in exact.items():
            unit = torch.finfo(torch.float32).eps * max(
                float(wanted.abs().max()), 1e-30
            )  # one token: no decay, no gradient
            errors = [float((found[name].double() - wanted).abs().max()) / unit for found in (got, plain)]
            worst[name] = [max(pair) for pair in zip(errors, worst.get(name, (0.0, 0.0)), strict=True)]
    for name, (ours, reference) in worst.items():
        assert ours <= 2 * reference + 1, f"{name}: {ours:.2f} units, the reference {reference:.2f}"


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=shared.SETS.__getitem__)
@pytest.mark.parametrize("sizes", [(2, 63, 200), (2, 249, 20)], ids=str)
def test_each_instruction_set_by_the_2x_rule(level, sizes, monkeypatch):
    """Channels that fill no vector, and chunks of tokens that end inside one."""
    monkeypatch.setattr(shared, "use_set", level)
    assert native.LIBRARY.instruction_set() == shared.SETS[level]
    by_the_2x_rule(monkeypatch, "native", sizes)


@needs_native
def test_a_long_clip_by_the_2x_rule(monkeypatch):
    by_the_2x_rule(monkeypatch, "native", (1, 1213, 12), seeds=2)


@needs_native
@pytest.mark.parametrize("S", [1, 5, 64])
def test_any_number_of_states(S, monkeypatch):
    by_the_2x_rule(monkeypatch, "native", (2, 40, 20), S=S)


@needs_native
def test_more_states_than_there_is_room_for(monkeypatch):
    use(monkeypatch, "native")
    with pytest.raises(ValueError, match="64 states at most, got S=65"):
        kernels.selective_scan(**as_float32(arguments(1, 3, 4, S=65)))


@needs_native
def test_native_results_do_not_depend_on_batch_threads_or_time(monkeypatch):
    """Row-wise results bit for bit at batch 1 and 6, everything bit for bit on one thread and on two, and twice."""
    use(monkeypatch, "native")
    given = as_float32(arguments(6, 70, 40))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(given)
        torch.set_num_threads(2)
        again = [run(given) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for other in again:
        assert all(torch.equal(other[name], whole[name]) for name in whole)
    rows = ("u", "delta", "B", "C", "z")
    for b in (0, 5):
        alone = {n: t[b : b + 1] if n in rows else t for n, t in given.items()}
        assert torch.equal(kernels.selective_scan(**alone)[0], whole["out"][b])


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=shared.SETS.__getitem__)
@pytest.mark.parametrize("narrow", [("u", "delta", "z"), ("delta", "z"), ("u",)], ids="-".join)
@pytest.mark.parametrize("sizes", [(2, 65, 200), (1, 31, 20)], ids=str)
def test_native_rows_of_bfloat16_are_rounded_once(level, narrow, sizes, monkeypatch):
    """Outputs and gradients as of the same numbers in float32, rounded; the same without gradients."""
    use(monkeypatch, "native")
    monkeypatch.setattr(shared, "use_set", level)
    given = as_float32(arguments(*sizes))
    given |= {name: given[name].bfloat16().float() for name in narrow}
    mixed = given | {name: given[name].bfloat16() for name in narrow}
    grad = torch.randn(given["u"].shape, generator=torch.Generator().manual_seed(1)).to(mixed["u"].dtype)
    answers = []
    for inputs in (given, mixed):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        out = kernels.selective_scan(**leaves)
        assert out.dtype == inputs["u"].dtype
        found = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        answers.append([out.detach(), *found])
        with torch.no_grad():
            assert torch.equal(kernels.selective_scan(**leaves), out)
    for wide, found in zip(*answers, strict=True):
        assert torch.equal(wide.to(found.dtype), found)
    mixed["u"][0, 5, 3], mixed["z"][0, 7, 4] = float("nan"), float("inf")
    out = kernels.selective_scan(**mixed)
    assert out[0, 5:, 3].isnan().all()
    assert not out[0, :5, 5:].isnan().any()


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=shared.SETS.__getitem__)
@pytest.mark.parametrize("E", [40, 13])
def test_native_convolution_of_bfloat16_rows(level, E, monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "causal_conv=native")
    monkeypatch.setattr(shared, "use_set", level)
    u, weight, bias = torch.randn(2, 9, 2 * E).bfloat16()[..., E:], torch.randn(E, 4), torch.randn(E)
    grad, answers = torch.randn(2, 9, E), []
    for rows in (u.float(), u):
        leaves = [rows.detach().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = kernels.causal_conv(*leaves)
        assert out.dtype == torch.float32
        answers.append([out, *torch.autograd.grad(out, leaves, grad)])
        with torch.no_grad():
            assert torch.equal(kernels.causal_conv(*leaves), out)
    for wide, found in zip(*answers, strict=True):
        assert torch.equal(wide.to(found.dtype), found)


@needs_native
def test_the_native_exponential_is_exact_where_it_has_to_be(monkeypatch):
    """A state under steps of nothing stays what it is for a thousand tokens: e^0 is 1, not nearly 1."""
    use(monkeypatch, "native")
    L, E = 1000, 20
    delta, bias = torch.full((1, L, E), -40.0), torch.zeros(E)  # steps of 4e-18
    delta[:, 0] = 5.0
    B, C = torch.zeros(1, L, 16), torch.ones(1, L, 16)
    B[:, 0] = 1.0
    z, u = torch.full((1, L, E), 30.0), torch.ones(1, L, E)
    y = kernels.selective_scan(u, delta, -torch.ones(E, 16), B, C, torch.zeros(E), z, bias) / 30.0
    assert torch.equal(y[:, 1:], y[:, :1].expand(-1, L - 1, -1))


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_the_block_size_does_not_change_a_clip(clips, monkeypatch):
    given = as_float32(arguments(5, 13, 20))
    use(monkeypatch, "blocked")
    whole = run(given)
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 4 * 13 * 16 * 20 * clips)
    for name, tensor in run(given).items():
        if name in ("out", "u", "delta", "B", "C", "z"):
            assert torch.equal(tensor, whole[name]), name
        else:  # sums over the clips, in another order: rounding of five terms. Seen: 2e-7 of the largest entry.
            torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=2e-6 * float(whole[name].abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_not_contiguous(backend, monkeypatch):
    use(monkeypatch, backend)
    given = as_float32(arguments(3, 11, 20))
    strange = {
        "u": torch.cat([given["u"], given["z"]], -1).chunk(2, -1)[0],  # as the mixer cuts it
        "z": torch.cat([given["u"], given["z"]], -1).chunk(2, -1)[1],
        "delta": given["delta"].transpose(0, 1).contiguous().transpose(0, 1),
        "B": torch.cat([given["B"], given["C"]], -1).split([16, 16], -1)[0],
        "C": torch.cat([given["B"], given["C"]], -1).split([16, 16], -1)[1],
        "A": given["A"].T.contiguous().T,
        "A_backward": given["A_backward"].T.contiguous().T,
    }
    assert not any(t.is_contiguous() for t in strange.values())
    wanted = kernels.selective_scan(**given)
    # A product may take another path for another layout. Seen: 5e-7.
    torch.testing.assert_close(kernels.selective_scan(**(given | strange)), wanted, rtol=1e-5, atol=5e-6)
    leaves = {n: t.detach().requires_grad_() for n, t in (given | strange).items()}
    plain = {n: t.detach().clone().requires_grad_() for n, t in given.items()}
    for ts in (leaves, plain):
        kernels.selective_scan(**ts).square().sum().backward()
    for name in given:
        scale = float(plain[name].grad.abs().max())
        torch.testing.assert_close(leaves[name].grad, plain[name].grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_each_clip_is_alone(backend, reverse, monkeypatch):
    """Row by row equals the batch; a NaN in one clip leaves the others' outputs and gradients as they were."""
    use(monkeypatch, backend)
    given = as_float32(arguments(4, 17, 20))
    whole = run(given, reverse)
    poisoned = {n: t.clone() for n, t in given.items()}
    poisoned["u"][2, 8, 5] = float("nan")
    poisoned["delta"][2, 3, 1] = float("nan")
    sick = run(poisoned, reverse)
    for name in ("out", "u", "delta", "B", "C", "z"):
        healthy = [0, 1, 3]
        assert torch.equal(sick[name][healthy], whole[name][healthy]), name
    assert sick["out"][2].isnan().any()
    rows = [n for n in given if given[n].ndim == 3 and n not in ("A", "A_backward")]
    for b in range(4):
        alone = kernels.selective_scan(**(given | {n: given[n][b : b + 1] for n in rows}), reverse=reverse)
        # torch's small products may take another path for one row; outputs reach 30. Seen: 1e-6, times ten.
        torch.testing.assert_close(alone[0], whole["out"][b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_that_underflow_stay_finite(backend, monkeypatch):
    """Steps so long that exp(delta A) is 0 in float32: nothing is divided, nothing becomes NaN."""
    given = arguments(2, 31, 20)
    given["delta"] = given["delta"] + 1e3
    given["A"][::2] *= 100
    use(monkeypatch, "reference")
    exact = run(given)
    use(monkeypatch, backend)
    got = run(as_float32(given))
    for name, wanted in exact.items():
        assert got[name].isfinite().all(), name
        # float32 against float64 over sums of 31 terms of size 1e3. Seen: 4e-7 of the largest entry.
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-4, atol=5e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_of_almost_nothing_pass_the_state_on(backend, monkeypatch):
    """delta -> 0: the state neither decays nor grows, and what is left is the skip path."""
    use(monkeypatch, backend)
    given = as_float32(arguments(2, 31, 20, two=False))
    given["delta"] = torch.full_like(given["delta"], -1e4)
    wanted = given["D"] * given["u"] * nnf.silu(given["z"])
    # The gate's own rounding: a few units in the last place of numbers up to 10.
    torch.testing.assert_close(kernels.selective_scan(**given), wanted, rtol=1e-6, atol=1e-7)


def test_backend_calls_keep_no_memory_of_each_other(monkeypatch):
    """The scratch buffers are used again: a long scan before must not show in a short one."""
    use(monkeypatch, "blocked")
    given = as_float32(arguments(3, 9, 20))
    first = run(given)
    run({n: t * float("nan") for n, t in as_float32(arguments(6, 40, 64)).items()})
    for name, tensor in run(given).items():
        assert torch.equal(tensor, first[name]), name


def test_gradients_of_two_scans_at_once(monkeypatch):
    """Two forwards, then two backwards: nothing of the first is lost in the scratch of the second."""
    use(monkeypatch, "blocked")
    first, second = (as_float32(arguments(2, 9, 20, seed=s)) for s in (1, 2))
    wanted = [run(first), run(second)]
    leaves = [{n: t.clone().requires_grad_() for n, t in g.items()} for g in (first, second)]
    outs = [kernels.selective_scan(**ts) for ts in leaves]
    factors = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
    (outs[0] * factors).sum().backward()
    (outs[1] * factors).sum().backward()
    for ts, results in zip(leaves, wanted, strict=True):
        for name, leaf in ts.items():
            assert torch.equal(leaf.grad, results[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FUSED)
def test_half_precision_inputs_are_scanned_in_float32(backend, dtype, monkeypatch):
    use(monkeypatch, backend)
    given = {n: t.to(dtype) for n, t in arguments(2, 33, 20).items()}
    wanted = kernels.selective_scan(**{n: t.float() for n, t in given.items()}).to(dtype)
    got = kernels.selective_scan(**given)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.selective_scan(**given), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, monkeypatch):
    use(monkeypatch, backend)
    got = run(as_float32(arguments(0, 7, 20)))
    assert got["out"].shape == (0, 7, 20)
    assert not got["A"].any()


@pytest.mark.parametrize("name", ["delta", "z", "A", "B", "C", "D", "delta_bias", "A_backward"])
def test_refused_shapes(name):
    given = arguments(2, 5, 3, S=2)
    given[name] = torch.cat([given[name], given[name]], 0)
    with pytest.raises(ValueError, match=rf"^{name if name != 'A' else 'A|delta'}.* goes with u"):
        kernels.selective_scan(**given)


def test_refused_emptiness():
    given = arguments(2, 0, 3, S=2)
    with pytest.raises(ValueError, match="at least one token and one state, got L=0 and S=2"):
        kernels.selective_scan(**given)
    given = arguments(2, 5, 3, S=0)
    with pytest.raises(ValueError, match="got L=5 and S=0"):
        kernels.selective_scan(**given)


def convolved(u, weight, bias, reverse):
    """silu of torch's grouped conv1d over the sequence padded in front, or over its mirror image."""
    E, K = weight.shape
    x = (u.flip(1) if reverse else u).transpose(1, 2)
    y = nnf.conv1d(nnf.pad(x, (K - 1, 0)), weight[:, None], bias, groups=E).transpose(1, 2)
    return nnf.silu(y.flip(1) if reverse else y)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("B", "L", "E", "K"), [(2, 33, 20, 4), (1, 1, 3, 4), (3, 2, 5, 4), (2, 7, 1, 1), (2, 5, 4, 7)])
def test_causal_conv(B, L, E, K, reverse, device):
    generator = torch.Generator().manual_seed(L)
    given = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, L, E), (E, K), (E,))]
    factors = torch.randn(B, L, E, generator=generator, dtype=torch.float64).to(device)
    results = []
    for form in (kernels.causal_conv, convolved):
        leaves = [t.to(device).clone().requires_grad_() for t in given]
        out = form(*leaves, reverse)
        (out * factors).sum().backward()
        results.append(
            {"out": out.detach()} | dict(zip(("u", "weight", "bias"), (t.grad for t in leaves), strict=True))
        )
    for name, wanted in results[1].items():
        # Sums of up to seven terms (66 in the gradients) in float64. Seen: 5e-15.
        torch.testing.assert_close(results[0][name], wanted, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=shared.SETS.__getitem__)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(3, 33, 200, 4), (2, 1, 20, 4), (2, 97, 12, 7), (1, 1213, 17, 1)], ids=str)
def test_native_causal_conv_by_the_2x_rule(level, reverse, sizes, monkeypatch):
    monkeypatch.setattr(shared, "use_set", level)
    B, L, E, K = sizes
    generator = torch.Generator().manual_seed(L)
    given = [torch.randn(*shape, generator=generator) for shape in ((B, L, E), (E, K), (E,))]
    grad = torch.randn(B, L, E, generator=generator)
    results = {}
    for name, dtype in (("reference", torch.float64), ("plain", torch.float32), ("native", torch.float32)):
        monkeypatch.setenv("FFTP_BACKEND", f"causal_conv={name.replace('plain', 'reference')}")
        leaves = [t.to(dtype).requires_grad_() for t in given]
        out = kernels.causal_conv(*leaves, reverse)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]
    for exact, plain, ours in zip(*results.values(), strict=True):
        unit = torch.finfo(torch.float32).eps * float(exact.abs().max())
        errors = [float((found.double() - exact).abs().max()) for found in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + unit


@needs_native
def test_native_causal_conv_of_views_nan_and_nothing(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "causal_conv=native")
    whole, weight, bias = torch.randn(3, 9, 40), torch.randn(20, 4), torch.randn(20)
    u = whole[:, :, 20:]
    plain = kernels.causal_conv(u.contiguous(), weight, bias)
    assert torch.equal(kernels.causal_conv(u, weight, bias), plain)
    sick = u.clone()
    sick[1, 3, 2] = float("nan")
    assert torch.equal(kernels.causal_conv(sick, weight, bias)[[0, 2]], plain[[0, 2]])
    assert kernels.causal_conv(sick, weight, bias)[1].isnan().any()
    assert kernels.causal_conv(u[:0], weight, bias).shape == (0, 9, 20)


def test_causal_conv_sees_no_future(device):
    u, weight, bias = (torch.randn(*s, device=device) for s in ((1, 9, 3), (3, 4), (3,)))
    changed = u.clone()
    changed[:, 5] += 1
    difference = (kernels.causal_conv(changed, weight, bias) != kernels.causal_conv(u, weight, bias)).any(2)[0]
    assert difference.nonzero().flatten().tolist() == [5, 6, 7, 8]
    difference = (kernels.causal_conv(changed, weight, bias, True) != kernels.causal_conv(u, weight, bias, True)).any(
        2
    )[0]
    assert difference.nonzero().flatten().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("u", "weight", "bias"), [((2, 5), (5, 4), (5,)), ((2, 5, 3), (4, 4), (4,)), ((2, 5, 3), (3, 4), (4,))]
)
def test_causal_conv_refuses(u, weight, bias):
    with pytest.raises(ValueError, match=r"u \(B, L, E\) takes weight \(E, K\) and bias \(E,\)"):
        kernels.causal_conv(torch.zeros(u), torch.zeros(weight), torch.zeros(bias))
