"""The encoder's blocks alone, tokens to tokens, beside torch.compile of them and, for AST, transformers' own layers."""

import logging
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as nnf

from bench import systems
from bench.bench_patch_embed import GRIDS, LAPTOP
from bench.measure import Case, holds
from kernels import dispatch

GRADIENT = {
    "ast": "attention.qkv.weight",
    "aum": "mixer.in_proj.weight",
}  # of the first block: all others lie behind it
ROWS = {"cpu": (("tiny", "(128, 10)/4", 32),), "cuda": (("base", "(128, 10)/1", 32), ("base", "(128, 50)/10", 32))}
ROWS["cuda"] += (("tiny", "(128, 10)/4", 128), ("base", "(128, 10)/1", 1))
SECONDS = 4.0  # of rounds, for each row
FLOAT32 = torch.float32


def cases(device: str) -> Iterator[Case]:
    dispatch.use_fused(True)
    for size, name, B in ROWS[device]:
        grid = LAPTOP[name] if size == "tiny" else GRIDS[name]
        for model in systems.MODELS:
            for direction in ("forward", "forward + backward"):
                yield _case(model, size, name, grid, B, direction, device)


def _case(model, size, name, grid, B, direction, device):
    dtype = FLOAT32 if device == "cpu" else torch.bfloat16
    train = direction != "forward"
    config = systems.config(model, size, grid)
    L, D = grid.N + (2 if model == "ast" else 1), config.dim
    macs = config.macs().all - grid.embed_macs(D) - D * systems.CLASSES
    weights = config.depth * sum(p.numel() for p in _blocks(model, size, grid, "cpu", 1).parameters())
    peers = {"compiled": _compiled}
    if model == "ast":
        peers["transformers"] = _transformers
    return Case(
        part="encoder",
        case={
            "model": model,
            "size": size,
            "grid": name,
            "B": B,
            "L": L,
            "dtype": str(dtype)[6:],
            "direction": direction,
        },
        backend="eager" if model == "ast" else dispatch.select("selective_scan", device, "float32").name,
        ours=lambda sets: _candidate(_plain, model, size, grid, B, L, dtype, device, train, sets),
        peers={
            n: lambda sets, f=f: _candidate(f, model, size, grid, B, L, dtype, device, train, sets)
            for n, f in peers.items()
        },
        correct=lambda: _correct(model, size, grid, L, dtype, device, train),
        set_bytes=4 * B * L * D,
        bytes=(3 if train else 1) * 4.0 * (weights + 2 * B * L * D),
        flops=(3 if train else 1) * 2.0 * B * macs,
        seconds=SECONDS,
    )


def _blocks(model, size, grid, device, depth=None):
    network = systems.build(model, size, grid, device, depth)
    return network.blocks if model == "ast" else network.layers


def _candidate(changed, model, size, grid, B, L, dtype, device, train, sets):
    blocks, modules = changed(_blocks(model, size, grid, device))
    D = systems.config(model, size, grid).dim
    inputs = [torch.randn(B, L, D, device=device, requires_grad=train) for _ in range(sets)]
    if not train:

        def forward(i):
            with torch.inference_mode():
                return _run(blocks, inputs[i], dtype)

        return forward
    leaves = [p for module in modules for p in module.parameters()]
    grads = [torch.randn(B, L, D, device=device) for _ in range(sets)]
    return lambda i: torch.autograd.grad(_run(blocks, inputs[i], dtype), [inputs[i], *leaves], grads[i])


def _run(blocks, x, dtype):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        stream = (x,)  # ours hand on what the next norm adds up
        for block in blocks:
            stream = block(*stream)
            stream = stream if isinstance(stream, tuple) else (stream,)
        return sum(part for part in stream if part is not None)


def _plain(blocks):
    """(what runs, whose parameters get gradients)."""
    return blocks, blocks


def _compiled(blocks):
    """Block by block: they share one piece of compiled code, where a whole encoder would take minutes to compile."""
    torch.compiler.reset()
    torch._logging.set_logs(dynamo=logging.ERROR)  # what is C already is left as it is, and said so for each layer
    return [torch.compile(block, dynamic=False) for block in blocks], blocks


def _transformers(blocks):
    """As many layers of ASTModel, with SDPA."""
    from transformers import ASTConfig
    from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import ASTLayer

    like, heads = blocks[0].fc1.weight, blocks[0].attention.heads
    D = like.shape[1]
    given = ASTConfig(hidden_size=D, num_attention_heads=heads, intermediate_size=4 * D, attn_implementation="sdpa")
    made = [ASTLayer(given).to(like.device).eval() for _ in blocks]

    def first(layer, x):  # version 4 returns a tuple
        out = layer(x)
        return out if isinstance(out, torch.Tensor) else out[0]

    return [partial(first, layer) for layer in made], made


def _correct(model, size, grid, L, dtype, device, train):
    """The 2x rule for the output, and for the gradients of the tokens and of the first block's first product."""
    torch.manual_seed(0)
    given = torch.randn(2, L, systems.config(model, size, grid).dim, device=device)
    grad = torch.randn_like(given)

    def run(plain, exact):
        dispatch.use_fused(not plain)
        blocks = _blocks(model, size, grid, device, systems.PROOF_LAYERS)
        blocks = blocks.double() if exact else blocks
        x = given.to(torch.float64 if exact else FLOAT32).requires_grad_()
        written = [_literal(block) for block in blocks] if plain and model == "ast" else blocks
        out = _run(written, x, torch.float64 if exact else dtype)
        first = dict(blocks[0].named_parameters())[GRADIENT[model]]
        return [out.detach(), *(torch.autograd.grad(out, [x, first], grad.to(out.dtype)) if train else ())]

    try:
        return holds(run(False, False), run(True, False), run(True, True))
    finally:
        dispatch.use_fused(True)


def _literal(block):
    """AST's block as its equations stand, the attention written out."""

    def forward(x):
        normed = block.norm1(x)
        B, L = normed.shape[:2]
        q, k, v = block.attention.qkv(normed).view(B, L, 3, block.attention.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).to(v.dtype) @ v  # (B, H, L, D / H)
        x = x + block.attention.proj(mixed.transpose(1, 2).flatten(2))
        return x + block.fc2(nnf.gelu(block.fc1(block.norm2(x))))

    return forward
