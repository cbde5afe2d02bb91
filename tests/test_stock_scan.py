"""The backends of mamba-ssm and causal-conv1d, run on the CPU through stand-ins that hold callers to the packages' contracts.

The stand-ins are written from the packages' documentation and the checks of their C++ doors (mamba-ssm 2.3.2.post1,
csrc/selective_scan/selective_scan.cpp; causal-conv1d 1.7.0, csrc/causal_conv1d.cpp), in torch operations of any float type.
"""

import copy
import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as nnf
from originals import check_gradients, stored
from test_aum_model import built
from test_selective_scan import arguments, as_float32, convolved, run

import kernels
from fftp import AuM, AuMConfig, PatchGrid, convert, env
from kernels import dispatch, packages
from kernels.selective_scan import stock
from tests import runs

BOTH = "selective_scan=mamba_ssm,causal_conv=causal_conv1d"
ACTIVATIONS = ("out", "u", "delta", "B", "C", "z")
PACKAGES = ("mamba_ssm", "selective_scan_cuda", "causal_conv1d", "causal_conv1d_cuda")


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """u, delta, z `[b, d, l]`; A `[d, n]`; B, C `[b, g, n, l]`; D, delta_bias `[d]`. Channel i is of group i // (d // g)."""
    b, d, L = u.shape
    n, g = A.shape[1], B.shape[1]
    gates = [] if z is None else [z]
    wide = torch.promote_types(u.dtype, torch.float32)
    assert all(t.dtype == u.dtype for t in (delta, B, C, *gates))
    assert all(t.dtype == wide for t in (A, D, delta_bias))
    assert delta.shape == u.shape
    assert A.shape == (d, n)
    assert B.shape == C.shape == (b, g, n, L)
    assert D.shape == delta_bias.shape == (d,)
    assert all(t.shape == u.shape for t in gates)
    assert d % g == 0
    assert n <= 256
    assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta, B, C, D, delta_bias, *gates))
    assert delta_softplus
    assert not return_last_state
    assert min(b, d, L) > 0
    calls.append((d, g))
    steps = nnf.softplus(delta.to(wide) + delta_bias[:, None])
    own = [B.to(wide).repeat_interleave(d // g, 1), C.to(wide).repeat_interleave(d // g, 1)]  # (b, d, n, l)
    state, out = torch.zeros(b, d, n, dtype=wide), []
    for t in range(L):
        gain = (steps[:, :, t] * u[:, :, t].to(wide))[..., None] * own[0][..., t]
        state = torch.exp(steps[:, :, t, None] * A) * state + gain
        out.append((state * own[1][..., t]).sum(-1))
    y = torch.stack(out, -1) + D[:, None] * u.to(wide)
    return (y if z is None else y * nnf.silu(z.to(wide))).to(u.dtype)


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """x `[b, d, l]`, weight `[d, w]`, bias `[d]`; time or channels are the innermost, the latter in multiples of eight."""
    b, d, L = x.shape
    assert min(b, d, L) > 0
    assert weight.shape[0] == d
    assert 2 <= weight.shape[1] <= 4
    assert bias.dtype == weight.dtype
    assert bias.stride(0) == 1
    assert x.stride(2) == 1 or x.stride(1) == 1
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    assert not channels_last or not any(size % 8 for size in (d, x.stride(2), x.stride(0)))
    assert activation in (None, "silu", "swish")
    calls.append(channels_last)
    windows = nnf.pad(x.to(weight.dtype), (weight.shape[1] - 1, 0)).unfold(2, weight.shape[1], 1)  # (b, d, L, w)
    y = (windows * weight[:, None]).sum(-1) + bias[:, None]
    return (y if activation is None else nnf.silu(y)).to(x.dtype)


calls: list = []


def module(name, **content):
    made = types.ModuleType(name)
    vars(made).update(content)
    return made


@pytest.fixture
def no_packages(monkeypatch):
    """As on a machine where neither is installed; what a test puts there is gone afterwards."""

    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] in PACKAGES]:
            del sys.modules[name]

    held = {n: m for n, m in sys.modules.items() if n.split(".")[0] in PACKAGES}
    forget()
    for name in PACKAGES:
        sys.modules[name] = None
    packages.refusal.cache_clear()
    calls.clear()
    yield
    forget()
    sys.modules.update(held)


@pytest.fixture
def stand_ins(no_packages):
    scan = module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    for made in (
        scan,
        module("mamba_ssm.ops", selective_scan_interface=scan),
        module("mamba_ssm"),
        module("selective_scan_cuda"),
        module("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn),
        module("causal_conv1d_cuda"),
    ):
        sys.modules[made.__name__] = made


@pytest.fixture
def on_the_cpu(stand_ins, monkeypatch):
    """The two rows of the table without their refusals, and asked for by name."""
    for operation in ("selective_scan", "causal_conv"):
        rows = [dataclasses.replace(b, refuses=lambda *_: None) for b in dispatch.TABLE[operation]]
        monkeypatch.setitem(dispatch.TABLE, operation, tuple(rows))
    monkeypatch.setenv("FFTP_BACKEND", BOTH)


@pytest.fixture(params=[False, True], ids=["two-launches", "one-launch"])
def launches(request, monkeypatch):
    monkeypatch.setattr(stock, "ONE_LAUNCH", request.param)
    return 1 if request.param else 2


def reference(monkeypatch, *given, **named):
    with monkeypatch.context() as patch:
        patch.setenv("FFTP_BACKEND", "selective_scan=reference,causal_conv=reference")
        return run(*given, **named)


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("L", "E"), [(1, 5), (2, 3), (31, 21)])
def test_float64(on_the_cpu, launches, L, E, reverse, two, monkeypatch):
    """The same numbers as the reference but for the order of sums; both directions are one launch or two."""
    given = arguments(2, L, E, S=4, two=two)
    wanted = reference(monkeypatch, given, reverse)
    got = run(given, reverse)
    assert calls == ([(E, 1)] if not two else [(2 * E, 2)] if launches == 1 else [(E, 1), (E, 1)])
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Sums of up to 62 terms, in another order. Seen: 4e-16 of the largest entry.
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-12 * max(1.0, float(tensor.abs().max())))


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("L", "E"), [(1, 20), (2, 21), (63, 20)])
def test_the_2x_rule(on_the_cpu, launches, L, E, reverse, two, monkeypatch):
    """In float32, the largest error over four draws, as in test_selective_scan."""
    check_2x(monkeypatch, (L, E), reverse, two, torch.float32, [*ACTIVATIONS, "A", "D", "delta_bias", "A_backward"])


@pytest.mark.parametrize("two", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_2x_rule_in_half_precision(on_the_cpu, launches, two, dtype, monkeypatch):
    """The package gets half precision and rounds once a direction; the parameters stay float32.

    Their gradients are sums of products with the output's gradient, which reaches the package in half precision too: within
    two units of that type of the largest entry. Seen: 0.63.
    """
    errors = check_2x(monkeypatch, (33, 20), False, two, dtype, ACTIVATIONS)
    unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert max(ours for name, (ours, _) in errors.items() if name not in ACTIVATIONS) / unit <= 2


def check_2x(monkeypatch, sizes, reverse, two, dtype, names):
    """Errors by name, (ours, the reference's) in units in the last place of the largest entry; those in `names` obey."""
    worst = {}
    for seed in range(4):
        exact = arguments(3, *sizes, two=two, seed=seed)
        exact |= {n: exact[n].to(dtype).double() for n in ACTIVATIONS[1:]}
        given = as_float32(exact) | {n: exact[n].to(dtype) for n in ACTIVATIONS[1:]}
        wanted, plain = reference(monkeypatch, exact, reverse), reference(monkeypatch, given, reverse)
        got = run(given, reverse)
        assert got["out"].shape == wanted["out"].shape
        for name, tensor in wanted.items():
            assert got[name].dtype == plain[name].dtype, name
            unit = torch.finfo(plain[name].dtype).eps * max(float(tensor.abs().max()), 1e-30)
            pair = [float((found[name].double() - tensor).abs().max()) / unit for found in (got, plain)]
            worst[name] = [max(both) for both in zip(pair, worst.get(name, (0.0, 0.0)), strict=True)]
    for name in set(names) & set(worst):
        ours, theirs = worst[name]
        assert ours <= 2 * theirs + 1, f"{name}: {ours:.2f} units, the reference {theirs:.2f}"
    return worst


def test_inputs_cut_from_wider_tensors_and_of_mixed_types(on_the_cpu, launches, monkeypatch):
    """As autocast leaves them: u in float32, the rest in bfloat16; the package wants one type."""
    given = as_float32(arguments(3, 11, 20))
    given |= {n: given[n].bfloat16() for n in ("delta", "z", "B", "C")}
    wide = torch.cat([given["B"], given["C"]], -1)
    strange = {"B": wide[..., :16], "C": wide[..., 16:], "z": given["z"].transpose(0, 1).contiguous().transpose(0, 1)}
    strange |= {"A": given["A"].T.contiguous().T, "D": torch.stack([given["D"]] * 2, 1)[:, 0]}
    assert not any(t.is_contiguous() for t in strange.values())
    got = kernels.selective_scan(**(given | strange))
    assert got.dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setenv("FFTP_BACKEND", "selective_scan=reference")
        wanted = kernels.selective_scan(**given)
    # float32 sums in another order; outputs reach 30. Seen: 4e-6.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_no_clips_and_too_many_states(on_the_cpu):
    got = run(as_float32(arguments(0, 7, 20)))
    assert got["out"].shape == (0, 7, 20)
    assert calls == []
    assert kernels.causal_conv(torch.zeros(0, 7, 8), torch.zeros(8, 4), torch.zeros(8)).shape == (0, 7, 8)
    with pytest.raises(ValueError, match="takes at most 256 states, got 257"):
        kernels.selective_scan(**arguments(1, 2, 3, S=257))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(
    ("B", "L", "E", "K", "channels_last"),
    [(2, 33, 16, 4, True), (1, 1, 24, 3, True), (3, 9, 20, 4, False), (2, 1, 3, 4, False), (2, 5, 1, 2, False)],
)
def test_causal_conv(on_the_cpu, B, L, E, K, channels_last, cut, reverse):
    """Channels stay innermost where the package takes them so; in float64 against torch's grouped convolution."""
    generator = torch.Generator().manual_seed(L)
    u = torch.randn(B, L, 2 * E if cut else E, generator=generator, dtype=torch.float64)
    weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((E, K), (E,)))
    factors = torch.randn(B, L, E, generator=generator, dtype=torch.float64)
    results = []
    for form in (kernels.causal_conv, convolved):
        leaves = [t.clone().requires_grad_() for t in (u, weight, bias)]
        out = form(leaves[0][..., :E], *leaves[1:], reverse)
        (out * factors).sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    assert calls == [channels_last]
    for got, wanted in zip(*results, strict=True):
        # Sums of up to 66 terms in float64. Seen: 2e-15.
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float32, torch.float32), torch.float32),
    ],
    ids=["autocast", "bfloat16", "float32"],
)
def test_causal_conv_by_the_2x_rule(on_the_cpu, dtypes, result, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    shapes = ((3, 33, 16), (16, 4), (16,))
    given = [
        torch.randn(*s, generator=generator).to(t) for s, t in zip(shapes, (dtypes[0], *dtypes[1:] * 2), strict=True)
    ]

    def both(tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = kernels.causal_conv(*leaves)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out)).sum().backward()
        return [out.detach(), *(t.grad for t in leaves)]

    got = both(given)
    monkeypatch.setenv("FFTP_BACKEND", "causal_conv=reference")
    plain, exact = both(given), both([t.double() for t in given])
    assert got[0].dtype == plain[0].dtype == result
    for ours, theirs, wanted in zip(got, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        unit = torch.finfo(ours.dtype).eps * float(wanted.abs().max())
        errors = [float((found.double() - wanted).abs().max()) / unit for found in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 1, errors


@pytest.mark.parametrize("K", [1, 5])
def test_causal_conv_refuses_other_tap_counts(on_the_cpu, K):
    with pytest.raises(ValueError, match=f"takes 2 to 4 taps, got {K}"):
        kernels.causal_conv(torch.zeros(1, 5, 8), torch.zeros(8, K), torch.zeros(8))


@pytest.mark.parametrize("case", stored("aum_none", "aum_v1", "aum_v2", "aum_v1_fftp"))
def test_the_originals_numbers_through_both_packages(on_the_cpu, launches, case):
    """Logits and every gradient of the original AuM, in each direction, with the bounds of test_aum_model."""
    tensors, model, log_mel = built(case, torch.float64)
    torch.testing.assert_close(model(log_mel), tensors["logits"], rtol=0, atol=1e-10)
    assert dispatch.in_use()["selective_scan"] == "mamba_ssm"
    assert dispatch.in_use()["causal_conv"] == "causal_conv1d"
    check_gradients(tensors, model, log_mel, convert.from_aum, 1e-6)


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_a_model_under_autocast_by_the_2x_rule(on_the_cpu, directions, monkeypatch):
    """Logits and every gradient of bfloat16 autocast: at most twice as far from float64 as with the references."""
    torch.manual_seed(3)
    grid = PatchGrid(T=64, F=128, pt=10, pf=128, st=4, sf=128)
    model, log_mel = (
        AuM(AuMConfig(grid=grid, classes=7, dim=32, depth=2, directions=directions)),
        torch.randn(2, 64, 128),
    )
    plain, exact = "selective_scan=reference,causal_conv=reference", copy.deepcopy(model).double()
    results = []
    for net, backends in ((model, BOTH), (model, plain), (exact, plain)):
        monkeypatch.setenv("FFTP_BACKEND", backends)
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=net is model):
            logits = net(log_mel.to(net.head.weight.dtype))
        logits.double().square().sum().backward()
        results.append([logits.detach().double(), *(p.grad.double() for p in net.parameters())])
    for ours, theirs, wanted in zip(*results, strict=True):
        errors = [float((found - wanted).abs().max()) for found in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps * float(wanted.abs().max()), errors


def row(operation):
    return next(b for b in dispatch.TABLE[operation] if b.name in ("mamba_ssm", "causal_conv1d"))


def test_order_of_preference():
    """After our own GPU kernel, before the CPU's."""
    for operation in ("selective_scan", "causal_conv"):
        names = [b.name for b in dispatch.TABLE[operation]]
        assert set(names[: names.index(row(operation).name)]) <= {"triton"}
        assert names[-1] == "reference"


INTERFACE = {
    "selective_scan": ("mamba_ssm/ops/selective_scan_interface.py", "mamba_ssm.ops.selective_scan_interface"),
    "causal_conv": ("causal_conv1d/__init__.py", "causal_conv1d"),
}
SIGNATURE = {
    "selective_scan": "selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False)",
    "causal_conv": "causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None)",
}
OPERATIONS = list(INTERFACE)


@pytest.fixture
def install(no_packages, tmp_path, monkeypatch):
    """Writes a package with the given text where its function should be, and its extension unless told not to."""

    def write(operation, text, extension=True):
        wanted = {"selective_scan": packages.SELECTIVE_SCAN, "causal_conv": packages.CAUSAL_CONV}[operation]
        file, path = tmp_path / INTERFACE[operation][0], INTERFACE[operation][1]
        file.parent.mkdir(parents=True)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(text)
        sys.modules.pop(path.partition(".")[0])
        if extension:
            (tmp_path / f"{wanted.extension}.py").touch()
            sys.modules.pop(wanted.extension)
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


def refused(operation, capsys, monkeypatch):
    """The reason on a GPU: the same in the table, as an error where it is asked for by name, and in fftp.env."""
    backend = row(operation)
    reason = backend.refuses("cuda", "float32")
    monkeypatch.setenv("FFTP_BACKEND", f"{operation}={backend.name}")
    with pytest.raises(dispatch.BackendError, match="which cannot run: ") as raised:
        dispatch.select(operation, "cuda", "float32")
    assert reason in str(raised.value)
    monkeypatch.delenv("FFTP_BACKEND")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    lines = runs.run(capsys, command=env.main).out.splitlines()
    assert f"{operation:<18} {backend.name:<13} cannot run: {reason}" in lines
    return reason


@pytest.mark.parametrize("operation", OPERATIONS)
def test_package_that_is_absent(operation, no_packages, capsys, monkeypatch):
    name = {"selective_scan": "mamba-ssm", "causal_conv": "causal-conv1d"}[operation]
    assert refused(operation, capsys, monkeypatch) == f"the {name} package is not installed"


def test_scan_without_its_extension(install, capsys, monkeypatch):
    install("selective_scan", f"def {SIGNATURE['selective_scan']}: ...", extension=False)
    assert refused("selective_scan", capsys, monkeypatch) == (
        "mamba-ssm is installed without its CUDA extension selective_scan_cuda: "
        "releases after 2.3.2 build it only where MAMBA_KEEP_CUDA_BUILD=TRUE is set"
    )


def test_convolution_without_its_extension(install, capsys, monkeypatch):
    install("causal_conv", f"def {SIGNATURE['causal_conv']}: ...", extension=False)
    assert refused("causal_conv", capsys, monkeypatch) == (
        "causal-conv1d is installed without its CUDA extension causal_conv1d_cuda: "
        "build it with nvcc and without CAUSAL_CONV1D_SKIP_CUDA_BUILD"
    )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "raise ImportError('x.so: undefined symbol: _ZN3c105ErrorC2E\\nand more')",
            "ImportError: x.so: undefined symbol: ",
        ),
        ("bare_metal_version", "NameError: name 'bare_metal_version' is not defined"),
        ("raise OSError", "OSError: "),
        ("", "AttributeError: module "),
    ],
    ids=["undefined symbol", "NameError", "no words", "no function"],
)
def test_import_that_fails(operation, text, said, install, capsys, monkeypatch):
    install(operation, text)
    name = SIGNATURE[operation].partition("(")[0]
    reason = refused(operation, capsys, monkeypatch)
    assert reason.startswith(f"importing {name} from {INTERFACE[operation][1]} fails: {said}")
    assert "and more" not in reason


@pytest.mark.parametrize(
    ("operation", "signature", "said"),
    [
        ("selective_scan", "selective_scan_fn(u, delta, A, B, C, D, z, delta_bias)", "'delta_softplus'"),
        ("selective_scan", "selective_scan_fn(mode, u, delta, A, B, C, D, z, delta_bias, delta_softplus)", "'mode'"),
        ("causal_conv", "causal_conv1d_fn(x, weight, bias)", "'activation'"),
    ],
)
def test_release_with_another_function(operation, signature, said, install, capsys, monkeypatch):
    install(operation, f"def {signature}: ...")
    reason = refused(operation, capsys, monkeypatch)
    package, name = (
        {"selective_scan": "mamba-ssm", "causal_conv": "causal-conv1d"}[operation],
        signature.partition("(")[0],
    )
    assert reason.startswith(f"this release of {package} has another {name}: ")
    assert reason.endswith(said)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_package_that_can_be_called(operation, install, capsys, monkeypatch):
    install(operation, f"def {SIGNATURE[operation]}: ...")
    backend = row(operation)
    assert backend.refuses("cuda", "float32") is None
    assert backend.refuses("cuda", "bfloat16") is None
    assert "float64" in backend.refuses("cuda", "float64")
    monkeypatch.setenv("FFTP_BACKEND", f"{operation}={backend.name}")
    assert dispatch.select(operation, "cuda", "bfloat16") is backend
    monkeypatch.delenv("FFTP_BACKEND")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    lines = runs.run(capsys, command=env.main).out.splitlines()
    (state,) = {line for line in lines if line.startswith(f"{operation:<18} {backend.name:<13}")}
    assert state.endswith(("runs with --fused", "triton is preferred"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_imported_on_a_cpu_and_once_on_a_gpu(operation, install, tmp_path):
    count = tmp_path / "imports"
    install(operation, f"with open({str(count)!r}, 'a') as f: f.write('x')\ndef {SIGNATURE[operation]}: ...")
    backend = row(operation)
    assert backend.refuses("cpu", "float32") == "it runs on an NVIDIA GPU; the tensors are on cpu"
    assert dispatch.table("cpu", "float32")
    assert not count.exists()
    for _ in range(3):
        assert backend.refuses("cuda", "float32") is None
    del sys.modules[INTERFACE[operation][1]]
    assert backend.refuses("cuda", "float32") is None  # the answer is kept
    assert count.read_text() == "x"


def test_deterministic_algorithms_rule_the_scan_out(stand_ins):
    torch.use_deterministic_algorithms(True)
    try:
        assert "adds with atomics, and deterministic" in row("selective_scan").refuses("cuda", "float32")
        assert row("causal_conv").refuses("cuda", "float32") is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert row("selective_scan").refuses("cuda", "float32") is None


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_installed_package_on_a_gpu(operation, device):
    """With --gpu and the package there: the real kernel by the 2x rule, as `python -m fftp.env --check` asks."""
    if reason := row(operation).refuses(device, "float32"):
        pytest.skip(f"{row(operation).name}: {reason}")
    rows = [r for r in env.check(device) if r[1] == row(operation).name]
    assert len(rows) == 1
    assert all(r[-1] for r in rows), rows
