"""Published weights under their own names to ours: names, the order of kernel axes, nothing else.

The originals hold patch kernels as `[D, 1, pf, pt]` (frequency first); ours are `[D, 1, pt, pf]`.
"""

import re

import torch

_AST = [
    (r"v\.cls_token|v\.dist_token|v\.pos_embed", None),
    (r"v\.patch_embed\.proj\.(weight|bias)", r"embed.\1"),
    (r"v\.blocks\.(\d+)\.(norm[12])\.(\w+)", r"blocks.\1.\2.\3"),
    (r"v\.blocks\.(\d+)\.attn\.(qkv|proj)\.(\w+)", r"blocks.\1.attention.\2.\3"),
    (r"v\.blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
    (r"v\.norm\.(\w+)", r"norm.\1"),
    (r"mlp_head\.0\.(\w+)", r"head_norm.\1"),
    (r"mlp_head\.1\.(\w+)", r"head.\1"),
    (r"v\.head(_dist)?\.\w+", None),  # ImageNet heads that AST keeps and never uses
]
_AUM = [
    (r"cls_token|pos_embed(\.pos_embed)?", None),
    (r"patch_embed\.proj\.(weight|bias)", r"embed.\1"),
    (r"layers\.(\d+)\.norm\.weight", r"layers.\1.norm.weight"),
    (r"layers\.(\d+)\.mixer\.(in_proj|out_proj)\.weight", r"layers.\1.mixer.\2.weight"),
    (r"layers\.(\d+)\.mixer\.conv1d_b\.(\w+)", r"layers.\1.mixer.backward_branch.conv_\2"),
    (r"layers\.(\d+)\.mixer\.(x_proj|dt_proj)_b\.(\w+)", r"layers.\1.mixer.backward_branch.\2.\3"),
    (r"layers\.(\d+)\.mixer\.D_b", r"layers.\1.mixer.backward_branch.D"),
    (r"layers\.(\d+)\.mixer\.conv1d\.(\w+)", r"layers.\1.mixer.forward_branch.conv_\2"),
    (r"layers\.(\d+)\.mixer\.(x_proj|dt_proj)\.(\w+)", r"layers.\1.mixer.forward_branch.\2.\3"),
    (r"layers\.(\d+)\.mixer\.(A_log|D)", r"layers.\1.mixer.forward_branch.\2"),
    (r"norm_f\.weight", r"norm.weight"),
    (r"head\.(\w+)", r"head.\1"),
]


def from_ast(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of AST's own code (names v.blocks.0...) -> state dict of `fftp.AST`.

    Raises ValueError for a tensor that AST does not have.
    """
    ours = _renamed(state, _AST)
    state = _stripped(state)
    tokens = [state[n] for n in ("v.cls_token", "v.dist_token") if n in state]
    ours["embed.class_token"] = torch.cat(tokens, 1)[0]
    ours["embed.position"] = state["v.pos_embed"][0]
    return _time_major(ours)


def from_aum(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of AuM's own code (names layers.0.mixer...) -> state dict of `fftp.AuM`.

    The direction shows in the names: A_b_log alone is "v1", with conv1d_b it is "v2". Raises ValueError for a tensor that AuM
    does not have.
    """
    state = _stripped(state)
    both = any("conv1d_b" in name for name in state)
    home = r"layers.\1.mixer.backward_branch.A_log" if both else r"layers.\1.mixer.A_backward_log"
    ours = _renamed(state, [(r"layers\.(\d+)\.mixer\.A_b_log", home), *_AUM])
    ours["embed.class_token"] = state["cls_token"][0]
    position = state.get("pos_embed.pos_embed", state.get("pos_embed"))
    if position is not None:
        ours["embed.position"] = position[0]
    return _time_major(ours)


def _stripped(state):
    """Without the prefix that torch's DataParallel leaves."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _renamed(state, rules):
    ours = {}
    for name, tensor in _stripped(state).items():
        for pattern, replacement in rules:
            if re.fullmatch(pattern, name):
                if replacement is not None:
                    ours[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            raise ValueError(f"{name!r} is not a tensor of this model; is the checkpoint another one's?")
    return ours


def _time_major(ours):
    ours["embed.weight"] = ours["embed.weight"].transpose(2, 3).contiguous()
    for name in [n for n in ours if n.endswith("conv_weight")]:
        ours[name] = ours[name].squeeze(1)  # depthwise: (E, 1, K) -> (E, K)
    return ours
