"""AuM: logits, taps and every gradient against the original code, with each scan; counts, costs, initialisation.

Traps of the original, each of which moves the stored logits: the position table's row 0 belongs to the class token
wherever that stands; "v1" shares everything but the decays between its directions and does not halve the sum; "v2" has
two of everything and does.
"""

import math

import pytest
import torch
from oracles import part, share_of_largest
from originals import TAPS_64, check_gradients, grid, load, stored, watched

from fftp import AuM, AuMConfig, PatchGrid, convert
from fftp.aum_model import SIZES, Mixer
from kernels.selective_scan import native

NAMES = ("aum_none", "aum_v1", "aum_v2", "aum_v1_fftp")
SCANS = ["selective_scan=reference", "selective_scan=blocked"]
if native.refuses() is None:
    SCANS.append("selective_scan=native,causal_conv=native,rms_norm=native")


def built(case, dtype, device="cpu"):
    """The stored weights in our model, under their original names until now."""
    tensors = load(case)
    directions = case[0].split("_")[1]
    model = AuM(AuMConfig(grid=grid(case[0]), classes=10, dim=64, depth=2, directions=directions))
    model.load_state_dict(convert.from_aum(part(tensors, "weight.")))
    return tensors, model.to(device, dtype), tensors["input"].to(device, dtype, copy=True).requires_grad_()


@pytest.mark.parametrize("case", stored(*NAMES))
def test_original_float64(case, device):
    tensors, model, log_mel = built(case, torch.float64, device)
    layers = {f"layer{i}": layer for i, layer in enumerate(model.layers)}
    mixers = {f"mixer{i}": layer.mixer for i, layer in enumerate(model.layers)}
    logits, features, seen = watched(model, layers | mixers, log_mel)
    # Bounds of the oracles' README; an independent loop implementation reached 2e-15 in the first two.
    torch.testing.assert_close(logits.cpu(), tensors["logits"], rtol=0, atol=1e-10)
    torch.testing.assert_close(features.cpu(), tensors["features"], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.features(log_mel).cpu(), tensors["features"], rtol=0, atol=1e-10)
    if case[1] == "full":
        torch.testing.assert_close(seen["embed.out"].cpu(), tensors["tokens_in"].double(), rtol=0, atol=TAPS_64)
        for i in range(2):
            for ours, name in ((f"mixer{i}.out", "hidden"), (f"layer{i}.second", "residual")):
                wanted = tensors[f"tap.layer{i}.{name}"].double()
                torch.testing.assert_close(seen[ours].cpu(), wanted, rtol=0, atol=2 * TAPS_64, msg=f"{i} {name}")


@pytest.mark.parametrize("case", stored(*NAMES))
def test_original_gradients_float64(case, device):
    """Bound of the oracles' README, of each tensor's largest entry; reached 6e-8."""
    tensors, model, log_mel = built(case, torch.float64, device)
    check_gradients(tensors, model, log_mel, convert.from_aum, 1e-6)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("case", stored(*NAMES))
def test_original_float32(case, scan, monkeypatch):
    """Bounds of the oracles' README: 2e-6 in the logits (the original's own float32 run: 3.3e-7), 1e-4 in gradients."""
    monkeypatch.setenv("FFTP_BACKEND", scan)
    tensors, model, log_mel = built(case, torch.float32)
    torch.testing.assert_close(model(log_mel).double(), tensors["logits"], rtol=0, atol=2e-6)
    check_gradients(tensors, model, log_mel, convert.from_aum, 1e-4)


def mixed_by_a_loop(mixer, x):
    """The mixer of one clip `[L, D]`, token by token, from the original's formulas; nothing of ours but the weights."""

    def convolved(branch, u, t):
        c, taps = branch.conv_bias, branch.conv_weight.shape[1]
        for j in range(taps):
            past = t - taps + 1 + j
            if past >= 0:
                c = c + branch.conv_weight[:, j] * u[past]
        return c / (1 + torch.exp(-c))

    def scanned(branch, inputs, z, A_log):
        """inputs: the convolved tokens in the order of the scan; the gated outputs in that order."""
        rank, states = branch.dt_proj.weight.shape[1], A_log.shape[1]
        state, out = torch.zeros_like(A_log), []
        for c, gate in zip(inputs, z, strict=True):
            p = branch.x_proj.weight @ c
            step = torch.log1p(torch.exp(branch.dt_proj.weight @ p[:rank] + branch.dt_proj.bias))
            B, C = p[rank : rank + states], p[rank + states :]
            state = torch.exp(step[:, None] * -torch.exp(A_log)) * state + (step * c)[:, None] * B
            out.append((state @ C + branch.D * c) * gate / (1 + torch.exp(-gate)))
        return out

    E, first = mixer.out_proj.weight.shape[1], mixer.forward_branch
    both = [mixer.in_proj.weight @ token for token in x]
    u, z = [b[:E] for b in both], [b[E:] for b in both]
    c = [convolved(first, u, t) for t in range(len(u))]
    y = scanned(first, c, z, first.A_log)
    if mixer.directions == "v1":
        back = scanned(first, c[::-1], z[::-1], mixer.A_backward_log)[::-1]
        y = [a + b for a, b in zip(y, back, strict=True)]
    if mixer.directions == "v2":
        second, turned = mixer.backward_branch, u[::-1]
        c = [convolved(second, turned, t) for t in range(len(u))]
        back = scanned(second, c, z[::-1], second.A_log)[::-1]
        y = [(a + b) / 2 for a, b in zip(y, back, strict=True)]
    return torch.stack([mixer.out_proj.weight @ row for row in y])


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_the_mixer_of_base_is_the_loop(directions):
    """Width 768, 1536 channels, 16 states, float64: output and every gradient, against a loop over tokens."""
    torch.manual_seed(4)
    model = AuM(AuMConfig(grid=grid("aum_v1_fftp"), classes=2, dim=768, depth=1, directions=directions))
    mixer: Mixer = model.layers[0].mixer.double()
    with torch.no_grad():  # away from the initial values, where decays and skips coincide
        for parameter in mixer.parameters():
            parameter += 0.1 * parameter.std().nan_to_num(1.0).clamp_min(0.1) * torch.randn_like(parameter)
    x = torch.randn(5, 768, dtype=torch.float64)
    factors = torch.randn_like(x)
    results = []
    for form in (lambda rows: mixer(rows[None])[0], lambda rows: mixed_by_a_loop(mixer, rows)):
        rows = x.clone().requires_grad_()
        out = form(rows)
        results.append([out.detach(), *torch.autograd.grad((out * factors).sum(), [rows, *mixer.parameters()])])
    names = ["out", "x", *(name for name, _ in mixer.named_parameters())]
    for name, ours, wanted in zip(names, *results, strict=True):
        assert float(wanted.abs().max()) > 0, name
        # Sums of up to 1,536 products in float64. Seen: 2e-14 of the largest entry.
        assert share_of_largest(ours, wanted) < 1e-12, name


def test_convert_refuses_another_models_tensor():
    tensors = part(load(("aum_v1", "small")), "weight.")
    assert convert.from_aum({f"module.{n}": t for n, t in tensors.items()}).keys() == convert.from_aum(tensors).keys()
    with pytest.raises(ValueError, match=r"'v.norm.weight' is not a tensor of this model"):
        convert.from_aum(tensors | {"v.norm.weight": torch.zeros(3)})


def fftp_grid(pt, st, T=1000):
    return PatchGrid(T=T, F=128, pt=pt, pf=128, st=st, sf=128)


def square(stride, T):
    return PatchGrid(T=T, F=128, pt=16, pf=16, st=stride, sf=stride)


COLUMNS = [(square(16, 1024), 527), (fftp_grid(10, 1), 527), (square(16, 128), 35), (fftp_grid(10, 1, 128), 35)]


@pytest.mark.parametrize(
    ("size", "directions", "counts"),
    [
        ("tiny", "none", [6_291_023, 6_579_599, 6_110_051, 6_317_219]),
        ("tiny", "v1", [6_438_479, 6_727_055, 6_257_507, 6_464_675]),
        ("tiny", "v2", [7_019_087, 7_307_663, 6_838_115, 7_045_283]),
        ("small", "none", [23_640_719, 24_217_871, 23_279_267, 23_693_603]),
        ("small", "v1", [23_935_631, 24_512_783, 23_574_179, 23_988_515]),
        ("small", "v2", [25_539_215, 26_116_367, 25_177_763, 25_592_099]),
        ("base", "none", [91_517_711, 92_672_015, 90_795_299, 91_623_971]),
        ("base", "v1", [92_107_535, 93_261_839, 91_385_123, 92_213_795]),
        ("base", "v2", [97_084_175, 98_238_479, 96_361_763, 97_190_435]),
    ],
)
def test_parameter_counts(size, directions, counts):
    """PAPER_NOTES 4.4."""
    for (patches, classes), wanted in zip(COLUMNS, counts, strict=True):
        with torch.device("meta"):
            model = AuM(AuMConfig(grid=patches, classes=classes, directions=directions, **SIZES[size]))
        assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize(
    ("patches", "N", "v1", "v2"),
    [
        (square(16, 1024), 512, (46.17, 48.67), (48.67, 51.16)),
        (square(10, 1024), 1212, (109.17, 115.07), (115.07, 120.97)),
        (fftp_grid(50, 10), 96, (9.18, None), (9.65, None)),
        (fftp_grid(25, 5), 196, (18.17, None), (19.13, None)),
        (fftp_grid(10, 4), 248, (22.60, None), (23.82, None)),
        (fftp_grid(10, 2), 496, (45.12, 47.54), (47.54, 49.96)),
        (fftp_grid(10, 1), 991, (90.06, 94.88), (94.88, 99.71)),
    ],
)
def test_multiply_accumulates_of_base(patches, N, v1, v2):
    """PAPER_NOTES 4.4, in 10^9: without and with the scan.

    Three of its figures are off in their last digits: 9.66 (96, v2) is 9.6549, 22.61 (248, v1) is 22.6046 and 47.52
    (496, v2) is 47.5374. The others agree, and v2 without its scan costs what v1 costs with it, in every row:
    4 E + E (R + 2 S) + R E = 2 (4 E S + 2 E).
    """
    assert patches.N == N
    for directions, wanted in (("v1", v1), ("v2", v2)):
        macs = AuMConfig(grid=patches, classes=527, directions=directions, **SIZES["base"]).macs()
        for count, printed in zip(macs, wanted, strict=True):
            assert printed is None or round(count / 1e9, 2) == printed, (directions, count)


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_multiply_accumulates_are_those_of_the_modules_own_products(directions):
    """Counted by torch on the model itself, but for the scan and the short convolution, which it does not see whole."""
    from torch.utils.flop_counter import FlopCounterMode

    config = AuMConfig(grid=fftp_grid(10, 4, 64), classes=35, dim=32, depth=2, directions=directions)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        AuM(config)(torch.zeros(1, 64, 128))
    L, E, ways, branches = 15, 64, 1 if directions == "none" else 2, 2 if directions == "v2" else 1
    readout = 2 * config.depth * L * ways * E * 16  # <s_t, C_t> is a product in the reference
    taps = 2 * config.depth * L * branches * E * 4
    assert counter.get_total_flops() - readout + taps == 2 * config.macs().paper


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_initialisation(directions):
    """PAPER_NOTES 4.5. A sample's deviation is within five standard errors of its distribution's."""
    torch.manual_seed(0)
    depth, D, E, R = 6, 96, 192, 6
    patches = fftp_grid(10, 4, 128)
    model = AuM(AuMConfig(grid=patches, classes=527, dim=D, depth=depth, directions=directions))
    uniform = {
        "in_proj.weight": D**-0.5,
        "x_proj.weight": E**-0.5,
        "out_proj.weight": E**-0.5 / depth**0.5,
        "conv_weight": 0.5,
        "conv_bias": 0.5,
        "dt_proj.weight": R**-0.5,
    }
    normal = {
        "embed.weight": 1 / (0.8796 * math.sqrt(1280)),
        "embed.class_token": 0.02,
        "embed.position": 0.02,
        "head.weight": 0.02,
    }
    for name, p in model.named_parameters():
        p = p.detach().double()
        end = next((e for e in uniform if name.endswith(e)), None)
        if end:
            assert float(p.abs().max()) <= uniform[end] * (1 + 1e-6), name
            assert float(p.std()) == pytest.approx(uniform[end] / 3**0.5, rel=5 * math.sqrt(0.2 / p.numel())), name
        elif name in normal:
            assert float(p.std()) == pytest.approx(normal[name], rel=5 * math.sqrt(0.5 / p.numel())), name
        elif name.endswith(("A_log", "A_backward_log")):
            torch.testing.assert_close(p, torch.arange(1, 17).double().log().expand(E, 16), rtol=0, atol=1e-6)
        elif name.endswith("forward_branch.dt_proj.bias"):
            steps = torch.nn.functional.softplus(p).log()
            low, high = math.log(1e-3), math.log(0.1)
            assert low - 1e-3 <= float(steps.min()) < float(steps.max()) <= high + 1e-3
            error = (high - low) / 12**0.5
            assert float(steps.mean()) == pytest.approx((low + high) / 2, abs=5 * error / math.sqrt(E))
        elif "bias" in name:
            assert not p.any(), name
        else:
            assert name.endswith(("norm.weight", ".D")), name
            assert (p == 1).all(), name


def test_undecayed():
    names = {}
    for directions in ("none", "v1", "v2"):
        model = AuM(AuMConfig(grid=grid("aum_v1"), classes=5, dim=32, depth=1, directions=directions))
        names[directions] = {n for n, _ in model.named_parameters()} - model.undecayed()
    branch = ("conv_weight", "x_proj.weight", "dt_proj.weight")
    forward = {f"layers.0.mixer.forward_branch.{n}" for n in branch}
    whole = {"embed.weight", "head.weight", "layers.0.mixer.in_proj.weight", "layers.0.mixer.out_proj.weight"}
    assert names["none"] == names["v1"] == whole | forward
    assert names["v2"] == whole | forward | {f"layers.0.mixer.backward_branch.{n}" for n in branch}


@pytest.mark.parametrize("place", ["head", "middle", "end"])
@pytest.mark.parametrize("positions", ["learned", "none"])
def test_class_token_place_and_positions(place, positions):
    """The class token stands where it should with row 0 of the table, and the read-out is its row."""
    config = AuMConfig(grid=grid("aum_v1_fftp"), classes=7, dim=32, depth=1, place=place, positions=positions)
    torch.manual_seed(1)
    model = AuM(config).double()
    log_mel = torch.randn(2, 64, 128, dtype=torch.float64)
    _, features, seen = watched(model, {"last": model.layers[-1]}, log_mel)
    at = {"head": 0, "middle": 7, "end": 14}[place]
    row = model.embed.class_token[0]
    if positions == "learned":
        row = row + model.embed.position[0]
    else:
        assert model.embed.position is None
    assert torch.equal(seen["embed.out"][:, at], row.expand(2, -1))
    wanted = (seen["last.out"] + seen["last.second"])[:, at]
    wanted = wanted / (wanted.square().mean(1, keepdim=True) + 1e-5).sqrt() * model.norm.weight
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_who_sees_whom(directions):
    """A forward model's first token knows nothing of the last; in both other forms it does."""
    torch.manual_seed(2)
    model = AuM(AuMConfig(grid=grid("aum_v1_fftp"), classes=7, dim=32, depth=2, directions=directions, place="head"))
    log_mel = torch.randn(1, 64, 128).requires_grad_()
    model(log_mel).square().sum().backward()
    assert bool(log_mel.grad.any()) == (directions != "none")


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_all_scans_give_the_same_model_under_autocast(directions, monkeypatch):
    """bfloat16 autocast: the scan runs in float32 with each backend, and its inputs are the same bits."""
    torch.manual_seed(3)
    model = AuM(AuMConfig(grid=grid("aum_v1_fftp"), classes=7, dim=32, depth=2, directions=directions))
    log_mel, results = torch.randn(2, 64, 128), []
    for scan in SCANS:
        monkeypatch.setenv("FFTP_BACKEND", scan.split(",")[0])  # another convolution would make other inputs
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(log_mel)
        logits.float().square().sum().backward()
        results.append([logits.detach().float(), *(p.grad.clone() for p in model.parameters())])
    for result in results[1:]:
        for ours, wanted in zip(result, results[0], strict=True):
            assert ours.isfinite().all()
            # One bfloat16 rounding apart where a float32 sum falls the other way: 2^-8 of the largest entry, twice over.
            assert float((ours - wanted).abs().max()) <= 2**-7 * float(wanted.abs().max())
