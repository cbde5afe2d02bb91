"""--keep-tokens: the patches that masks cover least, as a shorter model sees them; training alone leaves any out."""

import numpy as np
import pytest
import torch

import kernels
from fftp.ast_model import AST, ASTConfig
from fftp.aum_model import AuM, AuMConfig
from fftp.errors import UserError
from fftp.patching import PatchGrid, least_covered
from tests import runs
from tests.tasks import task_of
from train import loop, run, settings

GRIDS = {
    "full frequency": PatchGrid(T=61, F=16, pt=7, pf=16, st=3, sf=16),
    "square": PatchGrid(T=37, F=23, pt=5, pf=4, st=4, sf=3),
    "one patch": PatchGrid(T=9, F=8, pt=9, pf=8, st=1, sf=1),
}


def drawn(kind, grid, device="cpu"):
    tickets = torch.arange(9, device=device)
    if kind == "specaugment":
        return kernels.draw_spec_augment(3, 1, tickets, grid.T, grid.F, max_frequency=9, max_time=25)[0]
    return kernels.draw_spec_mask(3, 1, tickets, grid.T, grid.F, budget=200, max_width=9, max_height=grid.F)[0]


@pytest.mark.parametrize("kind", ["specmask", "specaugment"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_least_covered_patches_cell_by_cell(kind, grid, device):
    """Counted in a painted clip, patch by patch in the order of tokens: bands first, then frames (AST's)."""
    rectangles = drawn(kind, grid, device)
    for K in sorted({1, (grid.N + 1) // 2, grid.N}):
        got = least_covered(rectangles, grid, K).tolist()
        for b, rows in enumerate(rectangles.tolist()):
            hidden = np.zeros((grid.T, grid.F), bool)
            for t0, t1, f0, f1 in rows:
                hidden[t0:t1, f0:f1] = True
            cells = [
                hidden[t * grid.st : t * grid.st + grid.pt, f * grid.sf : f * grid.sf + grid.pf].sum()
                for f in range(grid.n_f)
                for t in range(grid.n_t)
            ]
            order = sorted(range(grid.N), key=lambda n, cells=cells: (cells[n], n))
            assert got[b] == sorted(order[:K])


def test_without_a_rectangle_the_first_patches_stay():
    rectangles = torch.zeros(2, 64, 4, dtype=torch.int32)
    assert least_covered(rectangles, GRIDS["square"], 5).tolist() == [list(range(5))] * 2


# Patches side by side, so that those kept of a clip are the patches of a shorter clip.
SIDE_BY_SIDE = {"pt": 4, "pf": 8, "st": 4, "sf": 8, "F": 8}
MODELS = {
    "ast": (AST, ASTConfig, {"heads": 2, "depth": 2}),
    "ast, one token, no positions": (AST, ASTConfig, {"heads": 2, "depth": 2, "tokens": 1, "positions": "none"}),
    **{f"aum, {where}": (AuM, AuMConfig, {"depth": 2, "place": where}) for where in ("head", "middle", "end")},
    "aum, both ways apart": (AuM, AuMConfig, {"depth": 1, "directions": "v2"}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep", [[0, 1, 2, 3, 4], [1, 2, 5, 7, 8], [0, 3], [6]], ids=str)
def test_kept_patches_are_a_shorter_clip_with_their_own_positions(name, keep):
    """Logits and every gradient, in float64: of a model over so many patches, with the positions of those kept."""
    whole, config, sizes = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    log_mel = torch.randn(3, 9 * 4 + 3, 8, dtype=torch.float64, generator=generator)
    models = []
    for T in (39, 4 * len(keep)):
        torch.manual_seed(0)
        grid = PatchGrid(T=T, **SIDE_BY_SIDE)
        models.append(whole(config(grid=grid, classes=5, dim=32, **sizes)).double())
    long, short = models
    c = long.embed.tokens
    rows = list(range(c)) + [c + n for n in keep]
    values = {n: t.clone() for n, t in long.state_dict().items()}
    if "embed.position" in values:
        values["embed.position"] = values["embed.position"][rows]
    short.load_state_dict(values)
    pieces = torch.cat([log_mel[:, 4 * n : 4 * n + 4] for n in keep], 1)
    chosen = torch.tensor([keep] * 3)
    got, expected = long(log_mel, chosen), short(pieces)
    # The same sums of the same numbers: seen 0 to 4e-16 in float64 of logits up to 2, with room for another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, dtype=got.dtype, generator=generator)
    for logits in (got, expected):
        (logits * weight).sum().backward()
    wanted = dict(short.named_parameters())
    for parameter_name, parameter in long.named_parameters():
        gradient = parameter.grad
        if parameter_name == "embed.position":
            left = [n for n in range(len(gradient)) if n not in rows]
            assert not gradient[left].any()
            gradient = gradient[rows]
        torch.testing.assert_close(gradient, wanted[parameter_name].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ast", "aum, middle"])
def test_clips_keep_patches_of_their_own(name):
    whole, config, sizes = MODELS[name]
    model = whole(config(grid=PatchGrid(T=36, **SIDE_BY_SIDE), classes=5, dim=32, **sizes)).double()
    log_mel = torch.randn(2, 36, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([[0, 4, 5], [2, 3, 8]])
    both = model(log_mel, keep)
    for b in range(2):
        torch.testing.assert_close(both[b], model(log_mel[b : b + 1], keep[b : b + 1])[0], rtol=0, atol=1e-12)
    everything = torch.arange(9).expand(2, -1)
    assert torch.equal(model(log_mel, everything), model(log_mel))


@pytest.mark.parametrize("config", [ASTConfig, AuMConfig])
def test_work_is_that_of_the_kept_patches(config):
    """A grid of so many patches, but for the embedding, which is of all."""
    whole, few = PatchGrid(T=39, **SIDE_BY_SIDE), PatchGrid(T=20, **SIDE_BY_SIDE)
    (long, short), dim = (config(grid=grid, classes=5) for grid in (whole, few)), 192
    spared = whole.embed_macs(dim) - few.embed_macs(dim)
    assert [a - b for a, b in zip(long.macs(5), short.macs(), strict=True)] == [spared] * 2
    assert long.spared(5) == short.spared()
    assert long.macs(9) == long.macs()


def test_training_takes_the_kept_and_evaluation_all(tmp_path, capsys, monkeypatch):
    seen, features = [], AST.features

    def watched(model, log_mel, keep=None):
        seen.append((model.training, None if keep is None else keep.shape[1]))
        return features(model, log_mel, keep)

    monkeypatch.setattr(AST, "features", watched)
    ended = runs.run(capsys, *runs.TINY, "--epochs", 1, "--keep-tokens", 20, "--out", tmp_path)
    assert ended.code == 0, ended.err
    assert "30 patches (10 frames x 128 bins, stride 4 x 128), mask specmask, 20 patches in training" in ended.out
    assert set(seen) == {(True, 20), (False, None)}


def test_the_kept_are_those_of_the_masks_that_were_painted():
    task = task_of(keep_tokens=2, augment="specmask", roll=True)
    tickets = torch.arange(7)
    augment = loop.Step(task, loop.Order(task.train, 7, 0, balanced=False), 3).augment
    batch = task.train.augmented(np.arange(7), tickets.numpy(), 1, augment)
    assert torch.equal(batch.keep, least_covered(augment.rectangles(1, tickets), task.config.model.grid, 2))
    assert len({tuple(row) for row in batch.keep.tolist()}) > 1


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(UserError, match="--keep-tokens keeps the patches that masks cover least: add --augment"):
        settings.from_flags(["--augment", "none", "--keep-tokens", "9"])
    with pytest.raises(UserError, match="--keep-tokens 31: there are 30 patches, take as many or fewer"):
        run.check_geometry(settings.from_flags(["--keep-tokens", "31"])[0])
    assert run.check_geometry(settings.from_flags(["--keep-tokens", "30"])[0]).N == 30
