"""Muon: torch.optim.Muon's steps on single matrices, AdamW's on all else, and nothing at all after a step that broke."""

import pytest
import torch

from fftp import AST, ASTConfig, AuM, AuMConfig, PatchGrid
from train.muon import Muon, orthogonalised
from train.settings import Settings
from train.step import optimiser_of

GRID = PatchGrid(T=20, F=16, pt=5, pf=16, st=5, sf=16)
MODELS = {
    "ast": lambda: AST(ASTConfig(grid=GRID, classes=4, dim=48, depth=2, heads=3)),
    "aum": lambda: AuM(AuMConfig(grid=GRID, classes=4, dim=32, depth=2)),
}


def made(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 12), (2, 12, 5)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrices = made(shape)
    found = orthogonalised(matrices, torch.float64)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    inside = U.mT @ found @ V.mT  # diagonal, where the singular vectors are still the same
    values = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-9)
    wide = S / S.amax(1, keepdim=True) > 0.1  # what is much smaller needs more than five turns
    assert ((values > 0.6) & (values < 1.3))[wide].all()


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_a_single_matrix_moves_as_torchs_muon_moves_it(shape):
    theirs, ours = (torch.nn.Parameter(made(shape).float()) for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    peer = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    other = torch.nn.Parameter(torch.zeros(3))
    one = Muon([{"params": [ours, other], **settings}], {ours: 1}, torch.bfloat16)
    for step in range(4):
        before = ours.detach().clone()
        theirs.grad = made(shape, 1 + step).float()
        ours.grad = theirs.grad.clone()
        peer.step()
        one.step()
        # Both multiply in bfloat16, and round in other places: to a few of its units of the step's size.
        size = float((ours.detach() - before).abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * size * (1 + step))


def test_matrices_in_one_weight_move_alone():
    parts = [made((6, 6), seed).float() for seed in (1, 2, 3)]
    joint = torch.nn.Parameter(torch.cat(parts))
    alone = [torch.nn.Parameter(part) for part in parts]
    settings = {"lr": 0.1, "weight_decay": 0.5}
    rest = torch.nn.Parameter(torch.zeros(1))
    joint.grad = made((18, 6), 4).float()
    for parameter, grad in zip(alone, joint.grad.chunk(3), strict=True):
        parameter.grad = grad.clone()
    Muon([{"params": [joint, rest], **settings}], {joint: 3}, torch.float32).step()
    Muon([{"params": [*alone, rest], **settings}], dict.fromkeys(alone, 1), torch.float32).step()
    torch.testing.assert_close(joint.detach(), torch.cat([p.detach() for p in alone]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_matrix_of_the_encoder_takes_adamws_steps(name):
    models = []
    for optimiser in ("adamw", "muon"):
        torch.manual_seed(0)
        model = MODELS[name]()
        steps = optimiser_of(model, Settings(optimiser=optimiser, lr=0.01, weight_decay=0.1))
        for seed in range(3):
            for i, parameter in enumerate(model.parameters()):
                parameter.grad = made(parameter.shape, 100 * seed + i).float()
            steps.step()
        steps.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        models.append(dict(model.named_parameters()))
    plain, muon = models
    matrices = MODELS[name]().matrices()
    assert matrices.keys() < plain.keys()
    for key in plain:
        assert torch.equal(plain[key], muon[key]) == (key not in matrices), key
        if key in matrices:
            assert plain[key].shape[0] % matrices[key] == 0
            # As large as an AdamW step of these gradients, by its scale.
            assert 0.3 < float((muon[key] - plain[key]).detach().square().mean().sqrt()) / 0.01 < 5


def test_no_weight_changes_where_the_step_broke():
    model = MODELS["ast"]()
    rate, broken = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.0)
    steps = optimiser_of(model, Settings(optimiser="muon"), (rate, rate))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    steps.found_inf = broken
    steps.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
