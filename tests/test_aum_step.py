"""Token by token: the scan, the convolution and the forward AuM give what the full pass gives."""

import dataclasses

import pytest
import torch
from test_selective_scan import arguments, as_float32

import kernels
from fftp import AuM, AuMConfig, PatchGrid

LENGTHS = [1, 2, 63, 249]
ROWS = ("u", "delta", "B", "C", "z")


def stepped(given):
    """kernels.selective_scan_step over all tokens: (out `[B, L, E]`, the last state)."""
    batch, L, _ = given["u"].shape
    state, out = torch.zeros(batch, *given["A"].shape, dtype=torch.promote_types(given["u"].dtype, torch.float32)), []
    for t in range(L):
        y, state = kernels.selective_scan_step(
            **{n: v[:, t] if n in ROWS else v for n, v in given.items()}, state=state
        )
        out.append(y)
    return torch.stack(out, 1), state


@pytest.mark.parametrize("L", LENGTHS)
def test_scan_steps_are_the_scan_in_float64(L):
    given = arguments(3, L, 20, two=False)
    # The same operations, token by token. Seen: 4e-15, of outputs up to 30.
    torch.testing.assert_close(stepped(given)[0], kernels.selective_scan(**given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("L", LENGTHS)
def test_scan_steps_by_the_2x_rule(L):
    """In float32: at most twice the full pass's error against float64, plus one unit in the last place of the scale."""
    given = arguments(3, L, 20, two=False)
    exact, plain = kernels.selective_scan(**given), kernels.selective_scan(**as_float32(given))
    errors = [float((found.double() - exact).abs().max()) for found in (stepped(as_float32(given))[0], plain)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * float(exact.abs().max())


def test_scan_steps_keep_their_state_in_float32_and_leave_the_given_one_alone():
    given = {n: t.bfloat16() for n, t in arguments(2, 7, 20, two=False).items()}
    out, state = stepped(given)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, kernels.selective_scan(**given))
    before = state.clone()
    kernels.selective_scan_step(**{n: v[:, 0] if n in ROWS else v for n, v in given.items()}, state=state)
    assert torch.equal(state, before)


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("K", [1, 4])
def test_convolution_steps_are_the_convolution(L, K):
    u, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, L, 5), (5, K), (5,)))
    past, out = torch.zeros(2, K - 1, 5, dtype=torch.float64), []
    for t in range(L):
        y, past = kernels.causal_conv_step(u[:, t], weight, bias, past)
        out.append(y)
    # The same sums of four terms. Seen: 9e-16.
    wanted = kernels.causal_conv(u, weight, bias)
    torch.testing.assert_close(torch.stack(out, 1), wanted, rtol=0, atol=1e-12)
    several, inputs = kernels.causal_conv_steps(u, weight, bias, torch.zeros(2, K - 1, 5, dtype=torch.float64))
    torch.testing.assert_close(several, wanted, rtol=0, atol=1e-12)
    assert torch.equal(inputs[:, L:], past)


@pytest.mark.parametrize("L", [1, 2, 7])
def test_several_scan_steps_are_that_many_single_ones(L):
    given = arguments(2, L, 20, two=False)
    state, out = torch.randn(2, 20, given["A"].shape[1], dtype=torch.float64), []
    found, states = kernels.selective_scan_steps(**given, state=state)
    for t in range(L):
        one = {n: v[:, t] if n in ROWS else v for n, v in given.items()}
        y, state = kernels.selective_scan_step(**one, state=state)
        out.append(y)
        torch.testing.assert_close(states[:, t], state, rtol=0, atol=1e-12)
    # The same operations; a product over states may add in another order. Seen: 0.
    torch.testing.assert_close(found, torch.stack(out, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", ["delta", "z", "A", "B", "C", "D", "delta_bias", "state"])
def test_refused_shapes_of_a_scan_step(name, several):
    rows = arguments(2, 1, 3, S=2, two=False)
    given = rows if several else {n: v[:, 0] if n in ROWS else v for n, v in rows.items()}
    given["state"] = torch.zeros(2, 3, 2)
    given[name] = torch.cat([given[name], given[name]], 0)
    with pytest.raises(ValueError, match=rf"^{name if name != 'A' else 'A|delta'}.* goes with u"):
        (kernels.selective_scan_steps if several else kernels.selective_scan_step)(**given)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((2, 3), (3, 4), (3,), (2, 4, 3)), r"take past \(B, K - 1, E\)"),
        (((2, 3, 1), (3, 4), (3,), (2, 3, 3)), r"take past \(B, K - 1, E\)"),
        (((2, 3), (2, 4), (2,), (2, 3, 3)), r"takes weight \(E, K\)"),
        (((2, 3), (3, 4), (2,), (2, 3, 3)), r"takes weight \(E, K\)"),
    ],
)
def test_refused_shapes_of_a_convolution_step(shapes, said):
    with pytest.raises(ValueError, match=said):
        kernels.causal_conv_step(*(torch.zeros(s) for s in shapes))
    with pytest.raises(ValueError, match=said):
        kernels.causal_conv_steps(torch.zeros(*shapes[0][:1], 1, *shapes[0][1:]), *map(torch.zeros, shapes[1:]))


def made(N, place="end", positions="learned", directions="none", dtype=torch.float64):
    """A forward AuM over N full-frequency patches of 10 frames every 4, its weights moved off their special values."""
    torch.manual_seed(N)
    grid = PatchGrid(T=10 + 4 * (N - 1) + 1, F=16, pt=10, pf=16, st=4, sf=16)  # one frame that no patch takes
    config = AuMConfig(grid=grid, classes=5, dim=16, depth=2, place=place, positions=positions, directions=directions)
    model = AuM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype), torch.randn(2, grid.T, 16, dtype=torch.float64).to(dtype)


def patch(model, log_mel, n):
    grid = model.config.grid
    return log_mel[:, n * grid.st : n * grid.st + grid.pt]


def full(model, log_mel):
    """Every token's features `[B, N + 1, D]` from the full pass, the class token among them."""
    x, residual = model.embed(log_mel), None
    for layer in model.layers:
        x, residual = layer(x, residual)
    return model.norm(x, residual)[0]


def by_steps(model, log_mel):
    """(patches' features `[B, N, D]`, the class token's `[B, D]`) token by token."""
    state, tokens = model.start(log_mel.shape[0]), []
    for n in range(model.config.grid.N):
        token, state = model.step(patch(model, log_mel, n), state)
        tokens.append(token)
    return torch.stack(tokens, 1), model.class_features(state)


@pytest.mark.parametrize("positions", ["learned", "none"])
@pytest.mark.parametrize("place", ["head", "middle", "end"])
@pytest.mark.parametrize("N", [1, 2, 62, 248])
def test_model_steps_are_the_full_pass_in_float64(N, place, positions):
    model, log_mel = made(N, place, positions)
    with torch.no_grad():
        tokens, features = by_steps(model, log_mel)
        wanted, at = full(model, log_mel), model.embed.place
        # One product of a row against one of many rows in float64. Seen: 4e-15.
        torch.testing.assert_close(tokens, torch.cat([wanted[:, :at], wanted[:, at + 1 :]], 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(features, model.features(log_mel), rtol=0, atol=1e-12)
        torch.testing.assert_close(model.classify(features), model(log_mel), rtol=0, atol=1e-12)


@pytest.mark.parametrize("N", [1, 2, 62, 248])
def test_model_steps_by_the_2x_rule(N):
    model, log_mel = made(N, "middle")
    with torch.no_grad():
        exact = full(model, log_mel)
        single, rounded = model.float(), log_mel.float()
        at, rows = single.embed.place, full(single, rounded).double()
        tokens, features = by_steps(single, rounded)
    ours = torch.cat([tokens[:, :at], features[:, None], tokens[:, at:]], 1).double()
    # The full pass starts from the same rounded input and weights; what it does to them is what is compared.
    errors = [float((found - exact).abs().max()) for found in (ours, rows)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * float(exact.abs().max())


def test_class_features_at_any_moment_are_those_of_a_shorter_clip():
    """place "end": after n patches as if the grid had n, with the same rows of the position table; reading changes nothing."""
    model, log_mel = made(9)
    grid, state = model.config.grid, model.start(2)
    for n in range(1, 10):
        _, state = model.step(patch(model, log_mel, n - 1), state)
        T = grid.pt + (n - 1) * grid.st
        shorter = AuM(dataclasses.replace(model.config, grid=dataclasses.replace(grid, T=T))).double()
        weights = model.state_dict()
        shorter.load_state_dict(weights | {"embed.position": weights["embed.position"][: 1 + n]})
        with torch.no_grad():
            for _ in range(2):
                wanted = shorter.features(log_mel[:, :T])
                torch.testing.assert_close(model.class_features(state), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", ["learned", "none"])
@pytest.mark.parametrize("together", [(1,) * 11, (3, 1, 7), (11,), (5, 6)], ids=str)
def test_patches_heard_together_are_steps(together, positions):
    """In pieces of so many patches: the class token after each, and the state, as patch by patch."""
    model, log_mel = made(11, positions=positions)
    grid, state, single = model.config.grid, model.start(2), model.start(2)
    with torch.no_grad():
        for k in together:
            first = state.patches * grid.st
            features, state = model.hear(log_mel[:, first : first + (k - 1) * grid.st + grid.pt], state)
            for _ in range(k):
                _, single = model.step(patch(model, log_mel, single.patches), single)
            # A product of k rows against one of one row in float64. Seen: 3e-15.
            torch.testing.assert_close(features, model.class_features(single), rtol=0, atol=1e-12)
            assert state.patches == single.patches
            for ours, theirs in zip(state.mixers, single.mixers, strict=True):
                torch.testing.assert_close(ours.scan, theirs.scan, rtol=0, atol=1e-12)
                torch.testing.assert_close(ours.past, theirs.past, rtol=0, atol=1e-12)
        torch.testing.assert_close(features, model.features(log_mel), rtol=0, atol=1e-12)


def test_what_cannot_be_heard_together():
    model, log_mel = made(3)
    for frames in (log_mel[:, :9], log_mel[:, :11], log_mel[:, :10, :8], log_mel[0]):
        with pytest.raises(ValueError, match=r"frames are \(B, \(k - 1\) st \+ pt, F\) with pt=10, st=4 and F=16, got"):
            model.hear(frames, model.start(2))
    _, state = model.hear(log_mel[:, :14], model.start(2))
    with pytest.raises(ValueError, match="the 3 patches that have a position are past: start anew"):
        model.hear(log_mel[:, :14], state)
    middle, _ = made(3, "middle")
    with pytest.raises(ValueError, match='the class token stands in the middle of a clip: place "end" hears on'):
        middle.hear(log_mel[:, :10], middle.start(2))


def test_a_state_can_be_gone_on_from_twice():
    model, log_mel = made(6)
    with torch.no_grad():
        state = model.start(2)
        for n in range(3):
            _, state = model.step(patch(model, log_mel, n), state)
        first, _ = model.step(patch(model, log_mel, 3), state)
        again, _ = model.step(patch(model, log_mel, 3), state)
    assert torch.equal(first, again)


def test_without_positions_there_is_no_end():
    model, _ = made(3, positions="none")
    longer, log_mel = made(11, positions="none")
    longer.load_state_dict(model.state_dict())
    state = model.start(2)
    with torch.no_grad():
        for n in range(11):
            _, state = model.step(patch(model, log_mel, n), state)
        torch.testing.assert_close(model.class_features(state), longer.features(log_mel), rtol=0, atol=1e-12)


def test_gradients_through_the_steps():
    model, log_mel = made(7)
    model.features(log_mel).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    by_steps(model, log_mel)[1].square().sum().backward()
    for name, tensor in wanted.items():
        # Seen: 3e-15 of the largest entry.
        got = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(got, tensor, rtol=0, atol=1e-11 * max(1.0, float(tensor.abs().max())))


def test_steps_under_autocast_are_the_pass_under_autocast():
    model, log_mel = made(9, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, features = by_steps(model, log_mel)
        wanted = model.features(log_mel)
    assert features.dtype == wanted.dtype
    # A bfloat16 product of one row may round another way: 2^-8 of the largest entry, a layer.
    assert float((features - wanted).abs().max()) <= 2 * 2**-8 * float(wanted.abs().max())


@pytest.mark.parametrize("directions", ["v1", "v2"])
def test_a_backward_direction_is_refused(directions):
    model, _ = made(3, directions=directions)
    for start in (model.start, model.layers[0].mixer.start):
        with pytest.raises(
            ValueError, match=f'directions "{directions}" scan backward too, which needs the whole clip'
        ):
            start(2)


def test_other_refusals():
    square = PatchGrid(T=32, F=32, pt=16, pf=16, st=16, sf=16)
    with pytest.raises(ValueError, match="a grid of 2 bands does not come in the order of time"):
        AuM(AuMConfig(grid=square, classes=5, dim=16, depth=1, directions="none")).start(1)
    model, log_mel = made(2, "middle")
    state = model.start(2)
    with pytest.raises(ValueError, match=r"a patch is \(B, pt, F\) with pt=10 and F=16, got \(2, 9, 16\)"):
        model.step(log_mel[:, :9], state)
    with pytest.raises(ValueError, match="the class token stands before patch 1: there were 0 so far"):
        model.class_features(state)
    for n in range(2):
        _, state = model.step(patch(model, log_mel, n), state)
    with pytest.raises(ValueError, match="the 2 patches that have a position are past: start anew"):
        model.step(patch(model, log_mel, 0), state)
