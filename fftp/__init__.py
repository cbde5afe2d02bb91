"""Full-frequency temporal patching (FFTP) and SpecMask for audio classification, with AST and Audio Mamba.

Everything is imported when it is first used, so that `import fftp` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "AST": "fftp.ast_model",
    "ASTConfig": "fftp.ast_model",
    "AuM": "fftp.aum_model",
    "AuMConfig": "fftp.aum_model",
    "Augment": "fftp.augment",
    "AugmentSettings": "fftp.augment",
    "CheckpointConfig": "fftp.checkpoint",
    "Classifier": "fftp.predict",
    "FrontEnd": "fftp.frontend",
    "FrontEndSettings": "fftp.frontend",
    "PatchEmbed": "fftp.patching",
    "PatchGrid": "fftp.patching",
    "RealFrontEnd": "fftp.frontend",
    "SpecMask": "fftp.spec_mask",
    "Stream": "fftp.streaming",
    "UserError": "fftp.errors",
    "attention_rollout": "fftp.explain",
    "load": "fftp.predict",
    "stream": "fftp.streaming",
    "use_fused": "kernels.dispatch",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'fftp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
