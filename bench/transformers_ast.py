"""transformers' AST with our weights: the peer of inference, and what tests/test_ast_model.py compares with."""

import torch

from fftp import AST


def like(model: AST, precision: torch.dtype = torch.float32, attention: str = "sdpa") -> torch.nn.Module:
    """ASTForAudioClassification with the weights of our model of square patches, on its device, for inference.

    eps as in PAPER_NOTES 3.5: 1e-6 in the backbone, 1e-5 in the head's norm.
    """
    import transformers

    c, g = model.config, model.config.grid
    their = transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            intermediate_size=4 * c.dim,
            layer_norm_eps=1e-6,
            patch_size=g.pt,
            time_stride=g.st,
            frequency_stride=g.sf,
            max_length=g.T,
            num_mel_bins=g.F,
            num_labels=c.classes,
            attn_implementation=attention,
        )
    ).eval()
    their.classifier.layernorm.eps = 1e-5
    their.load_state_dict(_named(model))
    return their.to(model.head.weight.device, precision)


def _named(model):
    """Our state dict under their names."""
    ours, root = model.state_dict(), "audio_spectrogram_transformer."
    names = {
        f"{root}embeddings.patch_embeddings.projection.bias": ours["embed.bias"],
        f"{root}embeddings.patch_embeddings.projection.weight": ours["embed.weight"].transpose(2, 3),
        f"{root}embeddings.cls_token": ours["embed.class_token"][None, :1],
        f"{root}embeddings.distillation_token": ours["embed.class_token"][None, 1:],
        f"{root}embeddings.position_embeddings": ours["embed.position"][None],
    }
    for kind in ("weight", "bias"):
        names[f"{root}layernorm.{kind}"] = ours[f"norm.{kind}"]
        names[f"classifier.layernorm.{kind}"] = ours[f"head_norm.{kind}"]
        names[f"classifier.dense.{kind}"] = ours[f"head.{kind}"]
        for i in range(model.config.depth):
            block, layer = f"blocks.{i}", f"{root}layers.{i}"
            q, k, v = ours[f"{block}.attention.qkv.{kind}"].chunk(3)
            for name, tensor in (("q", q), ("k", k), ("v", v), ("o", ours[f"{block}.attention.proj.{kind}"])):
                names[f"{layer}.attention.{name}_proj.{kind}"] = tensor
            names[f"{layer}.layernorm_before.{kind}"] = ours[f"{block}.norm1.{kind}"]
            names[f"{layer}.layernorm_after.{kind}"] = ours[f"{block}.norm2.{kind}"]
            names[f"{layer}.mlp.fc1.{kind}"] = ours[f"{block}.fc1.{kind}"]
            names[f"{layer}.mlp.fc2.{kind}"] = ours[f"{block}.fc2.{kind}"]
    return names
