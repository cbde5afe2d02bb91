"""AST: logits, taps and every gradient against the original code; transformers' AST; counts, costs, initialisation."""

import math

import pytest
import torch
from oracles import part
from originals import TAPS_64, check_gradients, grid, load, stored, watched

from bench import transformers_ast
from fftp import AST, ASTConfig, AuM, AuMConfig, PatchGrid, UserError, convert
from fftp.ast_model import SIZES

NAMES = ("ast_tiny", "ast_tiny_fftp")


def built(case, dtype, device="cpu"):
    """The stored weights in our model, under their original names until now."""
    tensors = load(case)
    model = AST(ASTConfig(grid=grid(case[0]), classes=10, dim=48, depth=2, heads=4))
    model.load_state_dict(convert.from_ast(part(tensors, "weight.")))
    return tensors, model.to(device, dtype), tensors["input"].to(device, dtype, copy=True).requires_grad_()


@pytest.mark.parametrize("case", stored(*NAMES))
def test_original_float64(case, device):
    tensors, model, log_mel = built(case, torch.float64, device)
    logits, features, seen = watched(model, {f"block{i}": b for i, b in enumerate(model.blocks)}, log_mel)
    # Bounds of the oracles' README; an independent loop implementation reached 2e-15 in the first two.
    torch.testing.assert_close(logits.cpu(), tensors["logits"], rtol=0, atol=1e-10)
    torch.testing.assert_close(features.cpu(), tensors["features"], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.features(log_mel).cpu(), tensors["features"], rtol=0, atol=1e-10)
    if case[1] == "full":
        torch.testing.assert_close(seen["embed.out"].cpu(), tensors["tokens_in"].double(), rtol=0, atol=TAPS_64)
        for i, rows in ((0, None), (1, 2)):  # of the last block the class tokens alone are computed
            wanted = tensors[f"tap.block{i}"].double()[:, :rows]
            # Stored in float32: half a unit in the last place of values up to 4.
            total = seen[f"block{i}.out"] + seen[f"block{i}.second"]
            torch.testing.assert_close(total.cpu(), wanted, rtol=0, atol=2 * TAPS_64)


@pytest.mark.parametrize("case", stored(*NAMES))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_original_gradients(case, dtype, bound, device):
    """Bounds of the oracles' README, of each tensor's largest entry; reached 6e-8 in float64."""
    tensors, model, log_mel = built(case, dtype, device)
    check_gradients(tensors, model, log_mel, convert.from_ast, bound)


@pytest.mark.parametrize("case", stored(*NAMES))
def test_original_float32(case):
    """2e-6: the original's own float32 run is 3.3e-7 off; the smallest known mistake (an eps) moves logits by 7e-6."""
    tensors, model, log_mel = built(case, torch.float32)
    torch.testing.assert_close(model(log_mel).double(), tensors["logits"], rtol=0, atol=2e-6)


def test_convert_refuses_another_models_tensor():
    tensors = part(load(("ast_tiny", "small")), "weight.")
    with_heads = tensors | {"v.head.weight": torch.zeros(3, 48), "v.head_dist.bias": torch.zeros(3)}
    assert (
        convert.from_ast({f"module.{n}": t for n, t in with_heads.items()}).keys() == convert.from_ast(tensors).keys()
    )
    with pytest.raises(ValueError, match=r"'layers.0.mixer.D' is not a tensor of this model"):
        convert.from_ast(tensors | {"layers.0.mixer.D": torch.zeros(3)})


def theirs(model):
    """transformers' AST with our weights."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers_ast.like(model, model.head.weight.dtype)


def perturbed(config, seed=0):
    """From-scratch weights moved so that no bias is 0 and no norm 1: what is swapped or left out shows."""
    torch.manual_seed(seed)
    model = AST(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("T", "B"), [(128, 3), (1024, 1)], ids=["speechcommands", "audioset"])
def test_transformers_ast_at_base_size(T, B):
    model = perturbed(ASTConfig(grid=PatchGrid(T=T, F=128, pt=16, pf=16, st=10, sf=10), classes=35, **SIZES["base"]))
    log_mel = 0.5 * torch.randn(B, T, 128)
    with torch.no_grad():
        ours, wanted = model(log_mel), theirs(model)(log_mel).logits
    assert float(wanted.abs().max()) > 0.1
    # float32; two orders of sums in twelve blocks. Seen: 1.4e-6.
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


def test_transformers_ast_in_float64():
    model = perturbed(ASTConfig(grid=grid("ast_tiny"), classes=10, dim=48, depth=3, heads=4)).double()
    log_mel = torch.randn(2, 64, 128, dtype=torch.float64)
    with torch.no_grad():
        # With eager attention their softmax is rounded to float32, 1e-8 by the notes. Seen through SDPA: 9e-16.
        torch.testing.assert_close(model(log_mel), theirs(model)(log_mel).logits, rtol=0, atol=5e-8)


def fftp_grid(pt, st, T=1000):
    return PatchGrid(T=T, F=128, pt=pt, pf=128, st=st, sf=128)


def square(stride, T):
    return PatchGrid(T=T, F=128, pt=16, pf=16, st=stride, sf=stride)


COLUMNS = [  # PAPER_NOTES 3.2: grid and classes of each column
    (square(10, 1024), 527),
    (fftp_grid(10, 1), 527),
    (fftp_grid(50, 10), 527),
    (square(10, 128), 35),
    (fftp_grid(10, 1, 128), 35),
]


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ("tiny", [5_723_663, 5_877_839, 6_689_039, 5_423_651, 5_615_459]),
        ("small", [22_063_631, 22_371_983, 23_994_383, 21_464_099, 21_847_715]),
        ("base", [86_594_063, 87_210_767, 90_455_567, 85_395_491, 86_162_723]),
    ],
)
def test_parameter_counts(size, counts):
    for (patches, classes), wanted in zip(COLUMNS, counts, strict=True):
        with torch.device("meta"):
            model = AST(ASTConfig(grid=patches, classes=classes, **SIZES[size]))
        assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize(
    ("patches", "classes", "N", "paper", "all_"),
    [
        (square(10, 1024), 527, 1212, 103.349, 130.514),
        (square(10, 1000), 527, 1188, 101.306, 127.408),
        (fftp_grid(50, 10), 527, 96, 8.796, 8.973),
        (fftp_grid(25, 5), 527, 196, 17.299, 18.022),
        (fftp_grid(10, 4), 527, 248, 21.478, 22.630),
        (fftp_grid(10, 2), 527, 496, 42.785, 47.357),
        (fftp_grid(10, 1), 527, 991, 85.315, 103.490),
        (square(10, 128), 35, 144, 12.43, 12.82),
        (fftp_grid(10, 1, 128), 35, 119, 10.39, 10.66),
        (fftp_grid(10, 2, 128), 35, 60, 5.32, 5.40),
        (fftp_grid(10, 4, 128), 35, 30, 2.75, 2.77),
        (square(16, 128), 35, 64, 5.62, 5.70),
    ],
)
def test_multiply_accumulates_of_base(patches, classes, N, paper, all_):
    """PAPER_NOTES 1.5.1 and 3.2, in 10^9: without and with the attention products, rounded as printed."""
    macs = ASTConfig(grid=patches, classes=classes, **SIZES["base"]).macs()
    assert patches.N == N
    digits = 3 if classes == 527 else 2
    assert (round(macs.paper / 1e9, digits), round(macs.all / 1e9, digits)) == (paper, all_)


def test_multiply_accumulates_are_those_of_the_modules_own_products():
    """Counted by torch on the model itself, attention written out; one multiply-accumulate is two operations."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ASTConfig(grid=fftp_grid(10, 4, 128), classes=35)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        AST(config)(torch.zeros(1, 128, 128))
    assert counter.get_total_flops() == 2 * (config.macs().all - config.spared())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model = AST(config)
        model.blocks[-1](torch.zeros(1, 32, 192))
        whole = counter.get_total_flops()
        model.blocks[-1](torch.zeros(1, 32, 192), rows=2)
    assert 2 * whole - counter.get_total_flops() == 2 * config.spared()


@pytest.mark.parametrize("patches", [square(16, 128), fftp_grid(10, 4, 128)], ids=["square", "fftp"])
def test_initialisation(patches):
    """PAPER_NOTES 3.3. A sample's deviation is within five standard errors of its distribution's."""
    torch.manual_seed(0)
    model = AST(ASTConfig(grid=patches, classes=527, dim=192, depth=3, heads=3))
    named = dict(model.named_parameters())
    fan_in = patches.pt * patches.pf
    uniform = dict.fromkeys(("embed.weight", "embed.bias"), fan_in ** (-0.5))
    uniform |= dict.fromkeys(("head.weight", "head.bias"), 192 ** (-0.5))
    for name, p in named.items():
        p = p.detach().double()
        if name in uniform:
            bound = uniform[name]
            assert float(p.abs().max()) <= bound, name
            assert float(p.abs().max()) > 0.95 * bound, name
            assert float(p.std()) == pytest.approx(bound / 3**0.5, rel=5 * math.sqrt(0.2 / p.numel())), name
        elif "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert float(p.std()) == pytest.approx(0.02, rel=5 * math.sqrt(0.5 / p.numel())), name
            assert float(p.mean()) == pytest.approx(0, abs=5 * 0.02 / math.sqrt(p.numel())), name


def test_undecayed():
    model = AST(ASTConfig(grid=fftp_grid(10, 4, 128), classes=5, dim=48, depth=1, heads=3))
    decayed = {n for n, _ in model.named_parameters()} - model.undecayed()
    linears = ("attention.qkv", "attention.proj", "fc1", "fc2")
    assert decayed == {"embed.weight", "head.weight", *(f"blocks.0.{n}.weight" for n in linears)}


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("positions", ["learned", "none"])
def test_tokens_and_positions(tokens, positions):
    """The read-out is the mean of the class tokens' rows, and they stand at the head."""
    config = ASTConfig(grid=grid("ast_tiny"), classes=7, dim=48, depth=1, heads=4, tokens=tokens, positions=positions)
    model = perturbed(config).double()
    assert (model.embed.position is None) == (positions == "none")
    log_mel = torch.randn(2, 64, 128, dtype=torch.float64)
    _, features, seen = watched(model, {"last": model.blocks[-1]}, log_mel)
    assert seen["embed.out"].shape[1] == 60 + tokens
    wanted = model.norm(seen["last.out"] + seen["last.second"])[:, :tokens].mean(1)
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-14)
    head = model.embed.class_token if positions == "none" else model.embed.class_token + model.embed.position[:tokens]
    assert torch.equal(seen["embed.out"][:, :tokens], head.expand(2, -1, -1))


def test_without_positions_the_order_of_patches_does_not_matter():
    patches = PatchGrid(T=40, F=16, pt=10, pf=16, st=10, sf=16)
    config = ASTConfig(grid=patches, classes=7, dim=48, depth=2, heads=4, positions="none")
    model, log_mel = perturbed(config).double(), torch.randn(1, 40, 16, dtype=torch.float64)
    moved = log_mel.view(4, 10, 16)[[2, 0, 3, 1]].view(1, 40, 16)
    torch.testing.assert_close(model(moved), model(log_mel), rtol=0, atol=1e-13)


def test_attentions_are_what_the_blocks_use():
    model = perturbed(ASTConfig(grid=grid("ast_tiny_fftp"), classes=7, dim=48, depth=2, heads=4))
    log_mel = torch.randn(2, 64, 128)
    for block, attention in zip(model.blocks, model.attentions(log_mel), strict=True):
        assert attention.shape == (2, 4, 16, 16)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 16))
        given = {}
        handle = block.attention.register_forward_hook(lambda m, x, out, given=given: given.update(x=x[0], out=out[0]))
        model(log_mel)
        handle.remove()
        v = block.attention.qkv(given["x"])[..., 96:].unflatten(2, (4, 12)).transpose(1, 2)
        out = block.attention.proj((attention @ v).transpose(1, 2).flatten(2))
        # SDPA and the written-out form in float32. Seen: 2.4e-7, times twenty.
        torch.testing.assert_close(out[:, : given["out"].shape[1]], given["out"], rtol=0, atol=5e-6)


def test_a_block_asked_for_some_rows_gives_those_of_the_whole():
    block = perturbed(ASTConfig(grid=grid("ast_tiny"), classes=7, dim=48, depth=1, heads=4)).double().blocks[0]
    x, weight = torch.randn(3, 31, 48, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, 48)
    both = []
    for out in (sum(block(x, rows=2)[:2]), sum(block(x)[:2])[:, :2]):
        gradients = torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])
        both.append([out.detach(), *gradients])
    for ours, whole in zip(*both, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_clips_give_no_logits(dtype):
    model = AST(ASTConfig(grid=PatchGrid(T=20, F=16, pt=5, pf=16, st=5, sf=16), classes=4, dim=48, depth=2, heads=3))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        assert model(torch.zeros(0, 20, 16)).shape == (0, 4)


def test_refused():
    with pytest.raises(ValueError, match="dim=48 is not a multiple of heads=5"):
        ASTConfig(grid=grid("ast_tiny"), classes=7, dim=48, heads=5)
    with pytest.raises(UserError, match="wider than the clip"):
        fftp_grid(10, 1, T=9)
    with pytest.raises(ValueError, match="T=64 and F=128 from the grid"):
        AST(ASTConfig(grid=grid("ast_tiny"), classes=7, dim=48, depth=1, heads=4))(torch.zeros(1, 63, 128))


@pytest.mark.parametrize("type_", [torch.bfloat16, torch.float16])
def test_sixteen_bits_in_every_weight_are_refused_in_a_sentence(type_):
    """Norms and the residual stream are float32; autocast is the way there."""
    grid = PatchGrid(T=32, F=16, pt=8, pf=16, st=8, sf=16)
    models = (
        AST(ASTConfig(grid=grid, classes=2, dim=16, depth=1, heads=1)),
        AuM(AuMConfig(grid=grid, classes=2, dim=16, depth=1)),
    )
    for model in models:
        with pytest.raises(TypeError, match=r"norms stay in float32, .* use torch.autocast"):
            model.to(type_)(torch.zeros(1, 32, 16, dtype=type_))
