"""Models as folders and on the Hugging Face hub: what `AST` and `AuM` have by the name of from_pretrained and so on.

A folder holds config.json and model.safetensors, as train.run's best/ does, and README.md, the model card. Loading one runs
no code. huggingface_hub is needed for the hub alone, and imported when it is.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fftp import card
from fftp.errors import UserError

if TYPE_CHECKING:
    from fftp.checkpoint import CheckpointConfig

FILES = ("config.json", "model.safetensors")
TRANSFORMERS_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")


def is_id(source: str) -> bool:
    """Whether a text is no path that exists, and could be a model's name on the hub (NAME/NAME)."""
    path = Path(source)
    files = (".pth", ".pt", ".bin", ".safetensors")
    return not path.exists() and not path.parent.exists() and bool(_ID.match(source)) and path.suffix not in files


def fetched(name: str, files: Sequence[str], revision: str | None = None, token: str | None = None) -> Path:
    """The folder in the hub's cache that holds these files of a model, fetched where they are not there yet.

    Raises UserError where the package is absent, and for what cannot be fetched.
    """
    package = required()
    try:
        return Path(package.snapshot_download(name, revision=revision, token=token, allow_patterns=list(files)))
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
            "The huggingface_hub package is not installed, and nothing else reaches the hub: pip install huggingface_hub."
        ) from None
    return huggingface_hub


class Pretrained:
    """What `AST` and `AuM` have in common as models of a folder or of the hub.

    about: labels, front end, settings and metrics of a model that from_pretrained read; None for one made by hand.
    """

    about: "CheckpointConfig | None" = None

    @classmethod
    def from_pretrained(cls, source: Path | str, *, revision: str | None = None, token: str | None = None) -> Self:
        """The model of a checkpoint folder, of a run's out folder, or of the hub (NAME/NAME), in evaluation mode on the CPU.

        revision, token: of the hub's model. `fftp.load` gives a classifier with front end and labels for the same folder.
        Raises UserError.
        """
        from fftp import checkpoint

        given = str(source)
        path = fetched(given, FILES, revision, token) if is_id(given) else Path(source)
        model, config = checkpoint.load(path)
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise UserError(f"{source} holds an {kind}, no {cls.__name__}: fftp.{kind}.from_pretrained reads it.")
        model.about = replace(config, metrics=config.metrics or _metrics(path))
        return model

    def save_pretrained(
        self,
        save_directory: Path | str,
        *,
        config: "CheckpointConfig | None" = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint folder that from_pretrained, `fftp.load`, fftp.predict and transformers read, with a model card.

        config: labels, front end and so on; default: those that from_pretrained read. model_card_kwargs: `license`, an
        identifier of the hub's ("unknown" without it). A README.md that is there is left alone. Folders of the user's own
        (--data-root, --out) do not go into it. Raises UserError.
        """
        from fftp import checkpoint

        config, folder = config or self.about, Path(save_directory)
        if config is None:
            raise UserError(
                "This model was made by hand, so nothing says its labels and front end: give config=CheckpointConfig(...)."
            )
        if config.model != self.config:
            raise UserError("config=CheckpointConfig(...) is of another model than the one to be saved: give its own.")
        settings = {name: value for name, value in config.settings.items() if name not in ("data_root", "out")}
        config = replace(config, settings=settings)
        text = card.text(config, **(model_card_kwargs or {}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save(folder, self, config)
            checkpoint.write(folder / "preprocessor_config.json", json.dumps(_extractor(config), indent=1).encode())
            if not (folder / "README.md").exists():
                checkpoint.write(folder / "README.md", text.encode())
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): give another folder.") from None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: "CheckpointConfig | None" = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "A model of full-frequency temporal patching.",
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """What save_pretrained writes, as a commit on the hub, by huggingface_hub's ModelHubMixin; returns its address.

        Raises UserError where that package is absent, and the package's own errors for what the hub refuses.
        """
        mixin, how = required().ModelHubMixin, {"private": private, "token": token, "branch": branch}
        kept = {"config": config, "commit_message": commit_message, "model_card_kwargs": model_card_kwargs}
        return mixin.push_to_hub(self, repo_id, **how, **kept)


def _metrics(path: Path) -> dict[str, float]:
    """Of the run whose folder, or whose best/ or last/, this is; none where there is no such run."""
    for folder in (path, path.parent):
        try:
            return {
                name: float(value)
                for name, value in json.loads((folder / "result.json").read_text())["metrics"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


def _extractor(config) -> dict[str, Any]:
    """preprocessor_config.json, which transformers reads (`fftp.transformers_model`)."""
    front_end = config.front_end
    return {
        "feature_extractor_type": "FFTPFeatureExtractor",
        "sampling_rate": front_end.fbank.sample_rate,
        "feature_size": front_end.F,
        "padding_value": 0.0,
        "front_end": asdict(front_end),
    }
