"""Files of weights, and other people's layouts of them under the names of AST's own code: transformers' AST, timm's ViT.

Reading a file never runs code. A folder as transformers writes it also says what tensors do not: heads, strides, class
names and normalisation.
"""

import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fftp import checkpoint
from fftp.errors import UserError

RATE, MELS = 16_000, 128  # of every published model
_ROOT = "audio_spectrogram_transformer."
_NAMES = {
    "embeddings.cls_token": "v.cls_token",
    "embeddings.distillation_token": "v.dist_token",
    "embeddings.position_embeddings": "v.pos_embed",
    "embeddings.patch_embeddings.projection": "v.patch_embed.proj",
    "layernorm": "v.norm",
    "classifier.layernorm": "mlp_head.0",
    "classifier.dense": "mlp_head.1",
}
# Of a layer: as releases before 5 name it, and as 5 names it in memory; both write the first to files.
_LAYER = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
    "attention.attention.query": "attn.q",
    "attention.q_proj": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.k_proj": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.v_proj": "attn.v",
}
_LAYER_NUMBER = re.compile(r"^(?:encoder\.layer|layers)\.(\d+)\.(.+)$")


def read(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors or a PyTorch file, out of a wrapper called state_dict or model if there is one.

    Nothing in the file is run. Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}: give a .safetensors or .pth file of published weights.")
    if path.suffix == ".safetensors":
        return checkpoint.read_tensors(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path} is no plain state dict: it is not a PyTorch file, or reading it would run code{what}; "
            "save its state dict alone, best as .safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is damaged or not a PyTorch file: take another copy.") from error
    while isinstance(held, dict) and (inner := next((held[k] for k in ("state_dict", "model") if k in held), None)):
        held = inner
    if not isinstance(held, dict) or not held or not all(isinstance(v, torch.Tensor) for v in held.values()):
        raise UserError(
            f"{path} holds no state dict: a dictionary of tensors is wanted, alone or as state_dict or model."
        )
    return held


def is_transformers(state: dict[str, torch.Tensor]) -> bool:
    return any(name.startswith(_ROOT) for name in state)


def from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of transformers' ASTForAudioClassification -> under AST's own names.

    Raises ValueError for a tensor that it does not have, and where one of a layer's query, key and value is missing.
    """
    ours, parts = {}, {}
    for name, tensor in state.items():
        plain, kind = name.removeprefix(_ROOT), ""
        if plain.endswith((".weight", ".bias")):
            plain, _, kind = plain.rpartition(".")
            kind = f".{kind}"
        number = _LAYER_NUMBER.match(plain)
        target = _LAYER.get(number[2]) if number else _NAMES.get(plain)
        if target is None:
            raise ValueError(f"{name!r} is not a tensor of transformers' AST; is the checkpoint another model's?")
        if number is None:
            ours[target + kind] = tensor
        elif target in ("attn.q", "attn.k", "attn.v"):
            parts.setdefault(f"v.blocks.{number[1]}.attn.qkv{kind}", {})[target[-1]] = tensor
        else:
            ours[f"v.blocks.{number[1]}.{target}{kind}"] = tensor
    for name, found in parts.items():
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            if letter not in found:
                raise ValueError(f"{transformers_name(name.replace('qkv', letter))} ({word}) is missing; is it whole?")
        ours[name] = torch.cat([found[letter] for letter in "qkv"])
    return ours


def transformers_name(name: str) -> str:
    """What a file of transformers calls a tensor of AST's own code, for messages."""
    plain, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    block = re.match(r"^v\.blocks\.(\d+)\.(.+)$", plain)
    if block:
        wanted = "attn.q" if block[2] == "attn.qkv" else block[2]
        theirs = next((a for a, b in _LAYER.items() if b == wanted), block[2])
        return f"{_ROOT}encoder.layer.{block[1]}.{theirs}{dot}{kind}"
    theirs = next((a for a, b in _NAMES.items() if b == plain), plain)
    return f"{'' if theirs.startswith('classifier') else _ROOT}{theirs}{dot}{kind}"


def is_image(state: dict[str, torch.Tensor]) -> bool:
    """Whether these are a vision transformer's, as timm names them: DeiT, ViT."""
    kernel = state.get("patch_embed.proj.weight")
    return kernel is not None and "cls_token" in state and any(name.startswith("blocks.") for name in state)


def from_image(state: dict[str, torch.Tensor], channels: Literal["sum", "mean"]) -> dict[str, torch.Tensor]:
    """State dict of timm's VisionTransformer -> under AST's own names, for one channel.

    The kernels' three colour channels are added up (AST's rule) or averaged (Audio Mamba's). The head is that of images:
    whoever calls replaces it, and the norm in front of it begins anew. Raises ValueError for another number of channels.
    """
    ours = {f"v.{name}": tensor for name, tensor in state.items() if not name.startswith("head")}
    kernel = state["patch_embed.proj.weight"]
    if kernel.ndim != 4 or kernel.shape[1] not in (1, 3):
        raise ValueError(f"'patch_embed.proj.weight' is (D, 3, height, width), here it is {tuple(kernel.shape)}")
    kernel = kernel.float().sum(1, keepdim=True) if channels == "sum" else kernel.float().mean(1, keepdim=True)
    D = kernel.shape[0]
    ours["v.patch_embed.proj.weight"] = kernel
    ours["mlp_head.0.weight"], ours["mlp_head.0.bias"] = torch.ones(D), torch.zeros(D)
    ours["mlp_head.1.weight"], ours["mlp_head.1.bias"] = torch.zeros(1, D), torch.zeros(1)
    return ours


def image_name(name: str) -> str:
    """What timm calls a tensor of AST's own code, for messages."""
    return name.removeprefix("v.")


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the JSON files of a transformers folder say of the model in it; 0, None and () are what nobody said."""

    heads: int = 0
    time_stride: int = 0
    freq_stride: int = 0
    frames: int = 0
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    mean: float | None = None
    std: float | None = None
    eps: float | None = None


def read_folder(folder: Path) -> tuple[Path, Said]:
    """(The file of weights, what is said of them) of a folder as transformers' save_pretrained writes it.

    Raises UserError for a folder of another model, for one without weights, and for settings that our AST cannot have.
    """
    config = _json(folder / "config.json", required=True)
    if config.get("model_type") != "audio-spectrogram-transformer":
        kind = config.get("model_type", "something else")
        raise UserError(
            f"{folder} holds {kind}: a folder of transformers' AST (audio-spectrogram-transformer) is wanted."
        )
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"{folder} holds no weights: model.safetensors (or pytorch_model.bin) is wanted beside config.json."
        )
    extractor = _json(folder / "preprocessor_config.json", required=False)
    try:
        _refuse_unlike(folder, config, extractor)
        names = config.get("id2label") or {}
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        normalised = extractor.get("do_normalize", True) and "mean" in extractor
        return files[0], Said(
            heads=int(config["num_attention_heads"]),
            time_stride=int(config.get("time_stride", 10)),
            freq_stride=int(config.get("frequency_stride", 10)),
            frames=int(config.get("max_length", 1024)),
            labels=labels if len(set(labels)) == len(labels) else (),
            multi_label=config.get("problem_type") == "multi_label_classification",
            mean=float(extractor["mean"]) if normalised else None,
            std=float(extractor["std"]) if normalised else None,
            eps=float(config.get("layer_norm_eps", 1e-12)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'} or what lies beside it is damaged ({error}): take another copy."
        ) from error


def _refuse_unlike(folder, config, extractor):
    wanted = {"hidden_act": "gelu", "qkv_bias": True, "num_mel_bins": MELS}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(f"{folder / 'config.json'} has {name} {config[name]!r}; AST here has {value!r} alone.")
    if extractor.get("sampling_rate", RATE) != RATE:
        raise UserError(f"{folder} takes sounds at {extractor['sampling_rate']} Hz; published models take {RATE}.")


def _json(path: Path, required: bool) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: a file of weights, or a folder as transformers writes it.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: take another copy of the folder.") from error
    if not isinstance(held, dict):
        raise UserError(f"{path} holds no JSON object: a folder as transformers writes it is wanted.")
    return held
