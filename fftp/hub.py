"""Models as folders and on the Hugging Face hub: what `AST` and `AuM` have by the name of from_pretrained and so on.

A folder holds config.json and model.safetensors, as train.run's best/ does, and README.md, the model card. Loading one runs
no code. huggingface_hub is needed for the hub alone, and imported when it is.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from fftp.errors import UserError

TRANSFORMERS_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")


def is_id(source: str) -> bool:
    """Whether a text is no path that exists, and could be a model's name on the hub (NAME/NAME)."""
    path = Path(source)
    files = (".pth", ".pt", ".bin", ".safetensors")
    return not path.exists() and not path.parent.exists() and bool(_ID.match(source)) and path.suffix not in files


def fetched(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder in the hub's cache that holds these files of a model, fetched where they are not there yet.

    Raises UserError where the package is absent, and for what cannot be fetched.
    """
    package = required()
    try:
        return Path(package.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError, package.errors.HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no folder here and could not be fetched from the hub ({reason}): check it."
        ) from error


def required():
    """huggingface_hub. Raises UserError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError(
            "The huggingface_hub package is not installed, and nothing else reaches the hub: pip install 'fftp[hub]'."
        ) from None
    return huggingface_hub
