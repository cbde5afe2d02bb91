"""The stored runs of AST's and AuM's own code, and what both models' tests do with them."""

import pytest
import torch
from oracles import fixture, needs_oracles, oracle, part, share_of_largest

from fftp import PatchGrid

TAPS_64 = 2e-7  # taps are stored in float32 (README of the oracles)


def grid(name: str) -> PatchGrid:
    """The stored runs take 64 frames of 128 bins; FFTP is (128, 10) / (128, 4) in the paper's order."""
    if name.endswith("fftp"):
        return PatchGrid(T=64, F=128, pt=10, pf=128, st=4, sf=128)
    stride = 10 if name.startswith("ast") else 16
    return PatchGrid(T=64, F=128, pt=16, pf=16, st=stride, sf=stride)


def stored(*names: str) -> list:
    """Parameters for a test: the small copy of those that have one, and all the full files where they are."""
    small = [pytest.param((n, "small"), id=f"{n}-small") for n in names if n in ("ast_tiny", "aum_v1")]
    return small + [pytest.param((n, "full"), id=n, marks=needs_oracles) for n in names]


def load(case: tuple[str, str]) -> dict[str, torch.Tensor]:
    name, kind = case
    return fixture(name) if kind == "small" else oracle(name)


def watched(model, layers, log_mel):
    """(logits, features, {tap name: tensor}) of one forward; taps are what stands before and behind each layer.

    Of a layer that gives several tensors the others are NAME.second and NAME.third.
    """
    seen = {}

    def keep(name):
        def hook(module, given, out):
            first, *more = out if isinstance(out, tuple) else (out,)
            seen.update({f"{name}.in": given[0].detach(), f"{name}.out": first.detach()})
            places = zip(("second", "third"), more, strict=False)
            seen.update({f"{name}.{place}": tensor.detach() for place, tensor in places if tensor is not None})

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in (("embed", model.embed), *layers.items())]
    head = model.head if not hasattr(model, "head_norm") else model.head_norm
    handles.append(head.register_forward_hook(keep("head")))
    logits = model(log_mel)
    for handle in handles:
        handle.remove()
    return logits, seen["head.in"], seen


def check_gradients(tensors, model, log_mel, convert, bound):
    """Every parameter's gradient of sum(logits * loss_weight), and the input's, in units of the tensor's largest entry.

    The small copies hold some entries of each; their places are in the original's shapes, so they go through the
    same conversion as the weights: numbers that count places first, to find where each entry has gone.
    """
    parameters = dict(model.named_parameters())
    loss = (model(log_mel) * tensors["loss_weight"].to(log_mel)).sum()
    loss.backward()
    got = {name: p.grad for name, p in parameters.items()}
    assert share_of_largest(loss.detach()[None], tensors["loss"]) < bound
    if "grad_input" in tensors:
        wanted = convert(part(tensors, "grad."))
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            assert share_of_largest(got[name], tensor) < bound, name
        assert share_of_largest(log_mel.grad, tensors["grad_input"]) < bound
        return
    ours = {"grad_input": log_mel.grad.flatten()}
    numbers, total = {}, 0
    for name, weight in part(tensors, "weight.").items():
        numbers[name] = torch.arange(total, total + weight.numel(), dtype=torch.float64).view_as(weight)
        total += weight.numel()
    flat = torch.full((total,), torch.nan, dtype=torch.float64)
    for name, places in convert(dict(numbers)).items():
        flat[places.flatten().long()] = got[name].double().cpu().flatten()
    assert not flat.isnan().any()  # every entry of every tensor has a gradient
    for name, places in numbers.items():
        ours[f"grad.{name}"] = flat[places.flatten().long()]
    for name, gradient in ours.items():
        sample = gradient[tensors[f"places.{name}"].long()].double().cpu()
        largest = float(tensors[f"largest.{name}"])
        assert float((sample - tensors[f"sample.{name}"].double()).abs().max()) < bound * largest, name
        assert abs(float(gradient.abs().max()) - largest) < bound * largest, name
