"""In which precision a model runs, and its weights made ready for that once."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as nnf
from torch import nn

import kernels
from fftp.patching import PatchEmbed
from kernels import dispatch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def precision_of(wanted: str, device: torch.device) -> torch.dtype:
    """auto is bfloat16 where the processor multiplies it: a GPU since Ampere, a CPU with AVX512-BF16 or AMX."""
    if wanted in PRECISIONS:
        return PRECISIONS[wanted]
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        pays = any(answer() for answer in asked if answer is not None)
    return torch.bfloat16 if pays else torch.float32


def check_norms(weight: torch.Tensor) -> None:
    """Raises TypeError for a model whose every weight is of 16 bits: its norms and residual stream are float32."""
    if weight.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"a model's norms stay in float32, not {weight.dtype}: instead of .bfloat16() or .half() use torch.autocast, or "
            'fftp.Classifier(..., precision="bfloat16")'
        )


def product(layer: nn.Linear, x: torch.Tensor, part: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(x times the layer's weight, and its bias where that is still to be added, else None).

    A product in bfloat16 would spread the bias over its result first and sum the gradient over it after, so it is left to
    what reads the result anyway; in other types the product adds it for nothing. Whatever stands in a layer's place is
    called, as the layer itself is in other types. part: of the layer's outputs, these alone; a slice without a step.
    """
    whole, narrow = part == slice(None), dispatch.computed_in(x) == torch.bfloat16
    if type(layer) is not nn.Linear or (whole and not narrow):
        out = layer(x)
        return out if whole else out[..., part], None
    weight, bias, panels = layer.weight, layer.bias, getattr(layer, "panels", None)
    if not whole:  # a slice of all would be copied for its gradient
        panels = kernels.panels_of(panels, weight, part)
        weight, bias = weight[part], bias if bias is None else bias[part]
    if not narrow:
        return nnf.linear(x, weight, bias), None
    return kernels.linear(x, weight, panels), bias


class Prepared:
    """A model for inference in one precision: `features` and `classify` as the model itself has them.

    In bfloat16 the results are autocast's on the same batch, bit for bit: products in bfloat16; norms, residual stream,
    softmax sums and the scan's state in float32. Weights of products are cast here, once, and not at every call (and, for
    a processor with AMX, laid out once more beside that); all others are the model's own. In float32 it is the model. The
    model itself stays as it is, and later changes of its weights are not seen.
    """

    def __init__(self, model: nn.Module, precision: torch.dtype):
        self.precision = precision
        self.model = _cast(model, precision) if precision == torch.bfloat16 else model

    def features(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Normalised log-mel `[B, T, F]` to the encoder's features `[B, D]`."""
        with self.running(log_mel.device):
            return self.model.features(log_mel)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[B, D]` to logits `[B, C]`."""
        with self.running(features.device):
            return self.model.classify(features)

    def __call__(self, log_mel: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(log_mel))

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Within it `model`'s other functions give what they give in this precision, without gradients."""
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)
        with torch.inference_mode(), autocast:
            yield


def _cast(model, precision):
    """A copy that shares all parameters but the weights of products."""
    shared = {id(p): p for p in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    for module in made.modules():
        if isinstance(module, (nn.Linear, PatchEmbed)):
            module.weight = nn.Parameter(module.weight.detach().to(precision), requires_grad=False)
            module.panels = kernels.linear_panels(module.weight.flatten(1))
    return made
