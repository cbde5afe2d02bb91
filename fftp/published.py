"""Published weights of AST and AuM: their files, their names and shapes, and what they say of the model.

Files under transformers' or timm's names become AST's own first (`fftp.layouts`). `from_ast` and `from_aum` change names
and the order of kernel axes, nothing else: the originals hold patch kernels as `[D, 1, pf, pt]` (frequency first), ours are
`[D, 1, pt, pf]`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fftp import layouts
from fftp.ast_model import AST, ASTConfig
from fftp.aum_model import TAPS, AuM, AuMConfig
from fftp.errors import UserError
from fftp.patching import PatchGrid

AST_STRIDE = 10  # frames and bins, of AST's published models but those that say otherwise
AST_HEAD_WIDTH = 64  # dimensions a head, in each of AST's sizes


def _layer(names, start, ours):
    """`names` below layer # of theirs -> of ours; # stands for the layer's number."""
    return {f"{start}.#.{theirs}": f"{ours}.#.{name}" for theirs, name in names.items()}


def _both(names):
    """With .weight and .bias behind each."""
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}


_AST = (
    _both({"v.patch_embed.proj": "embed", "v.norm": "norm", "mlp_head.0": "head_norm", "mlp_head.1": "head"})
    | _layer(_both({"norm1": "norm1", "norm2": "norm2"}), "v.blocks", "blocks")
    | _layer(_both({"attn.qkv": "attention.qkv", "attn.proj": "attention.proj"}), "v.blocks", "blocks")
    | _layer(_both({"mlp.fc1": "fc1", "mlp.fc2": "fc2"}), "v.blocks", "blocks")
)
_AST_TABLES = ("v.cls_token", "v.dist_token", "v.pos_embed")
# ImageNet heads that AST keeps and never uses.
_AST_UNUSED = ("v.head.weight", "v.head.bias", "v.head_dist.weight", "v.head_dist.bias")


def _branch(ending, home):
    """One direction's tensors of an AuM mixer; those of the backward one end so."""
    names = _both({f"mixer.dt_proj{ending}": f"{home}.dt_proj"})
    names |= {f"mixer.conv1d{ending}.{kind}": f"{home}.conv_{kind}" for kind in ("weight", "bias")}
    return names | {f"mixer.x_proj{ending}.weight": f"{home}.x_proj.weight", f"mixer.D{ending}": f"{home}.D"}


_AUM = _both({"patch_embed.proj": "embed", "head": "head"}) | {"norm_f.weight": "norm.weight"}
_AUM |= _layer({f"{n}.weight": f"{n}.weight" for n in ("norm", "mixer.in_proj", "mixer.out_proj")}, "layers", "layers")
_AUM |= _layer(_branch("", "mixer.forward_branch"), "layers", "layers")
_AUM |= _layer({"mixer.A_log": "mixer.forward_branch.A_log"}, "layers", "layers")
_AUM_BACKWARD = {
    "none": {},
    "v1": _layer({"mixer.A_b_log": "mixer.A_backward_log"}, "layers", "layers"),
    "v2": _layer(
        _branch("_b", "mixer.backward_branch") | {"mixer.A_b_log": "mixer.backward_branch.A_log"}, "layers", "layers"
    ),
}
_AUM_TABLES = ("cls_token", "pos_embed.pos_embed", "pos_embed")


def from_ast(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of AST's own code (names v.blocks.0...) -> state dict of `fftp.AST`.

    Raises ValueError for a tensor that AST does not have, and for one of the patch embedding that is missing.
    """
    state = _stripped(state)
    ours = _renamed(state, _AST, (*_AST_TABLES, *_AST_UNUSED))
    _require(state, ("v.cls_token", "v.pos_embed", "v.patch_embed.proj.weight"))
    tokens = [state[n] for n in ("v.cls_token", "v.dist_token") if n in state]
    ours["embed.class_token"] = torch.cat(tokens, 1)[0]
    ours["embed.position"] = state["v.pos_embed"][0]
    return _time_major(ours)


def from_aum(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of AuM's own code (names layers.0.mixer...) -> state dict of `fftp.AuM`.

    The direction shows in the names: A_b_log alone is "v1", with conv1d_b it is "v2". Raises ValueError for a tensor that AuM
    does not have, and for one of the patch embedding that is missing.
    """
    state = _stripped(state)
    ours = _renamed(state, _AUM | _AUM_BACKWARD[_directions(state)], _AUM_TABLES)
    _require(state, ("cls_token", "patch_embed.proj.weight"))
    ours["embed.class_token"] = state["cls_token"][0]
    position = state.get("pos_embed.pos_embed", state.get("pos_embed"))
    if position is not None:
        ours["embed.position"] = position[0]
    return _time_major(ours)


def _directions(state):
    if any("_b." in name or name.endswith(".D_b") for name in state):
        return "v2"
    return "v1" if any(name.endswith("A_b_log") for name in state) else "none"


def _stripped(state):
    """Without the prefix that torch's DataParallel leaves."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


_NUMBER = re.compile(r"^((?:v\.)?(?:blocks|layers))\.(\d+)\.")


def _renamed(state, names, apart):
    """Under our names; those in `apart` are left out. Raises ValueError."""
    ours = {}
    for name, tensor in state.items():
        if name in apart:
            continue
        number = _NUMBER.match(name)
        target = names.get(_NUMBER.sub(r"\1.#.", name))
        if target is None:
            raise ValueError(f"{name!r} is not a tensor of this model; is the checkpoint another one's?")
        ours[target.replace("#", number[2]) if number else target] = tensor
    return ours


def _require(state, names):
    for name in names:
        if name not in state:
            raise ValueError(f"the tensor {name!r} is missing; is the checkpoint whole?")


def _original_name(ours, names):
    """What the original calls one of our tensors, for messages."""
    number = _NUMBER.match(ours)
    plain = _NUMBER.sub(r"\1.#.", ours)
    theirs = next((a for a, b in names.items() if b == plain), ours)
    return theirs.replace("#", number[2]) if number else theirs


def _time_major(ours):
    ours["embed.weight"] = ours["embed.weight"].transpose(2, 3).contiguous()
    for name in [n for n in ours if n.endswith("conv_weight")]:
        ours[name] = ours[name].squeeze(1)  # depthwise: (E, 1, K) -> (E, K)
    return ours


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What the tensors of a file do not say; 0 stands for what the published models have.

    heads: AST's attention heads. time_stride, freq_stride: of the patches, in frames and bins. place: of AuM's class token.
    frames: of the input, needed only where there are no positions. channels: what becomes of an image model's three.
    """

    heads: int = 0
    time_stride: int = 0
    freq_stride: int = 0
    place: Literal["head", "middle", "end"] = "middle"
    frames: int = 0
    channels: Literal["sum", "mean"] = "sum"


class Published(NamedTuple):
    """What a file holds: the model's configuration, its tensors under our names in float32, and whether it is an image
    model, whose grid is that of its images and whose head is to be replaced."""

    config: ASTConfig | AuMConfig
    weights: dict[str, torch.Tensor]
    image: bool


_WRONG_RANK = "{} holds tensors of the wrong rank: is it another model's?"


def load(path: Path, hints: Hints) -> Published:
    """The configuration that the tensors' shapes and the hints speak of, and the tensors.

    Raises UserError for a file of another model, for a tensor that is missing or too many, and for shapes that disagree.
    """
    state = _stripped(layouts.read(path))
    image, theirs = layouts.is_image(state), str  # theirs: what the file calls a tensor of AST's own code
    if layouts.is_transformers(state):
        state, theirs = _tensors(path, state, layouts.from_transformers), layouts.transformers_name
    elif image:
        state = _tensors(path, state, lambda held: layouts.from_image(held, hints.channels))
        theirs = layouts.image_name
    if any(name.startswith("v.") for name in state):
        convert, configure, names = from_ast, _image_config if image else _ast_config, _AST
    elif any(name.startswith("layers.") and ".mixer." in name for name in state):
        convert, configure, names = from_aum, _aum_config, _AUM | _AUM_BACKWARD[_directions(state)]
    else:
        raise UserError(
            f"{path} is neither AST's nor AuM's: no tensor is called v.blocks..., layers.0.mixer..., "
            f"audio_spectrogram_transformer... or blocks..., the first is {next(iter(state), None)!r}."
        )
    weights = _tensors(path, state, convert)
    for name, rank in (("embed.weight", 4), ("embed.class_token", 2), ("head.weight", 2), ("embed.position", 2)):
        if name in weights and weights[name].ndim != rank:
            raise UserError(_WRONG_RANK.format(path))
    if "head.weight" not in weights:
        lacking = theirs(_original_name("head.weight", names))
        raise UserError(f"{path} lacks {lacking}: the checkpoint is not whole, take another.")
    config = configure(path, weights, hints)
    with torch.device("meta"):
        wanted = (AST if isinstance(config, ASTConfig) else AuM)(config).state_dict()
    for name, tensor in wanted.items():
        called = theirs(_original_name(name, names))
        if name not in weights:
            raise UserError(f"{path} lacks {called}: the checkpoint is not whole, take another copy.")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{path} holds {called} as {tuple(weights[name].shape)} in our order of axes, "
                f"where the other tensors want {tuple(tensor.shape)}: is it another model's?"
            )
    return Published(config, weights, image)


def _tensors(path, state, convert: Callable):
    try:
        return {name: tensor.float() for name, tensor in convert(state).items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except (IndexError, RuntimeError) as error:
        raise UserError(_WRONG_RANK.format(path)) from error


def _depth(weights):
    return 1 + max((int(number[2]) for number in map(_NUMBER.match, weights) if number), default=-1)


def _heads(path, D, hints):
    heads = hints.heads or max(1, D // AST_HEAD_WIDTH)
    if D % heads:
        raise UserError(f"{path} is {D} dimensions wide, which {heads} heads do not divide: give its own by --heads.")
    return heads


def _ast_config(path, weights, hints):
    D, _, pt, pf = weights["embed.weight"].shape
    tokens = weights["embed.class_token"].shape[0]
    heads = _heads(path, D, hints)
    grid = _published_grid(path, hints, weights, (pt, pf), (AST_STRIDE, AST_STRIDE), tokens)
    return ASTConfig(
        grid=grid, classes=weights["head.weight"].shape[0], dim=D, depth=_depth(weights), heads=heads, tokens=tokens
    )


def _image_config(path, weights, hints):
    """Of an image model, before its positions and kernels are fitted to spectrograms: its grid is the image's."""
    D, _, high, wide = weights["embed.weight"].shape
    tokens = weights["embed.class_token"].shape[0]
    patches = weights["embed.position"].shape[0] - tokens
    side = math.isqrt(max(0, patches))
    if high != wide or side < 1 or side**2 != patches:
        raise UserError(
            f"{path} has {patches} positions for patches of {wide} x {high}: a model of square images and patches is wanted."
        )
    heads = _heads(path, D, hints)
    grid = PatchGrid(T=side * wide, F=side * wide, pt=wide, pf=wide, st=wide, sf=wide)
    return ASTConfig(grid=grid, classes=1, dim=D, depth=_depth(weights), heads=heads, tokens=tokens)


def _aum_config(path, weights, hints):
    D, _, pt, pf = weights["embed.weight"].shape
    if "embed.position" not in weights and not hints.frames:
        raise UserError(f"{path} has no positions, so nothing says how long its clips are: give --frames.")
    decays, taps = "layers.0.mixer.forward_branch.A_log", "layers.0.mixer.forward_branch.conv_weight"
    for name in (decays, taps):
        if name not in weights:
            raise UserError(
                f"{path} lacks {_original_name(name, _AUM)}: the checkpoint is not whole, take another copy."
            )
    if weights[taps].shape[-1] != TAPS:
        raise UserError(f"{path} has convolutions of {weights[taps].shape[-1]} taps; AuM's have {TAPS}.")
    backward = "layers.0.mixer.backward_branch.conv_weight" in weights
    return AuMConfig(
        grid=_published_grid(path, hints, weights, (pt, pf), (pt, pf), 1),
        classes=weights["head.weight"].shape[0],
        dim=D,
        depth=_depth(weights),
        state=weights[decays].shape[-1],
        directions="v2" if backward else "v1" if "layers.0.mixer.A_backward_log" in weights else "none",
        place=hints.place,
        positions="learned" if "embed.position" in weights else "none",
    )


def _published_grid(path, hints, weights, patch, stride, tokens) -> PatchGrid:
    """The grid that the position table is for, with the strides given or the model's own.

    The number of frames that fits is not unique; a power of two is taken if there is one, as in AuM (src/flexi).
    """
    (pt, pf), st, sf = patch, hints.time_stride or stride[0], hints.freq_stride or stride[1]
    if pf > layouts.MELS:
        raise UserError(f"{path} has patches of {pf} bins; published models have {layouts.MELS} mel bins in all.")
    n_f = (layouts.MELS - pf) // sf + 1
    if "embed.position" not in weights:
        return PatchGrid(T=hints.frames, F=layouts.MELS, pt=pt, pf=pf, st=st, sf=sf)
    N = weights["embed.position"].shape[0] - tokens
    if N < 1 or N % n_f:
        raise UserError(
            f"{path} has positions for {N} patches, which {n_f} bands (patches of {pf} bins every {sf}) do not divide: "
            "give its own strides by --file-time-stride and --file-freq-stride."
        )
    least = pt + (N // n_f - 1) * st
    if least <= hints.frames < least + st:
        return PatchGrid(T=hints.frames, F=layouts.MELS, pt=pt, pf=pf, st=st, sf=sf)
    T = next((2**k for k in range(6, 20) if least <= 2**k < least + st), least)
    return PatchGrid(T=T, F=layouts.MELS, pt=pt, pf=pf, st=st, sf=sf)
