"""Our models for transformers: after `import fftp.transformers_model`, its Auto classes and pipelines read our folders.

    import fftp.transformers_model
    from transformers import pipeline
    pipeline("audio-classification", model="FOLDER")(waveform)

FOLDER is what `save_pretrained` writes. The classes are registered here, so no code from the folder is run and
trust_remote_code is not needed; without this import transformers says that it does not know the model type "fftp".
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
    SequenceFeatureExtractor,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fftp.checkpoint import CheckpointConfig
from fftp.frontend import FrontEnd, FrontEndSettings
from kernels import FbankSettings


class FFTPConfig(PretrainedConfig):
    """config.json as `fftp.checkpoint` writes it, with what transformers asks of a classifier."""

    model_type = "fftp"

    def __init__(self, labels: list[str] | tuple[str, ...] = (), **others: Any):
        if labels:
            others.setdefault("id2label", dict(enumerate(labels)))
            others.setdefault("label2id", {label: i for i, label in enumerate(labels)})
            sigmoid = others.get("multi_label") or others.get("settings", {}).get("loss") == "bce"
            kind = "multi_label_classification" if sigmoid or len(labels) == 1 else "single_label_classification"
            others.setdefault("problem_type", kind)
        super().__init__(**others)
        self.labels = list(labels)

    def about(self) -> CheckpointConfig:
        """The same as our own commands understand it."""
        return CheckpointConfig.from_json(self.to_dict())


class FFTPFeatureExtractor(SequenceFeatureExtractor):
    """Waveforms at the model's rate to `input_values [B, windows, T, F]`, normalised log-mel: `fftp.FrontEnd` on the windows
    that `fftp.predict` cuts."""

    model_input_names = ["input_values"]  # noqa: RUF012, transformers' own form

    def __init__(
        self,
        front_end: dict[str, Any] | None = None,
        feature_size: int = 128,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        **others: Any,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **others)
        self.front_end = front_end

    def __call__(self, raw_speech, sampling_rate: int | None = None, return_tensors: str | None = None) -> BatchFeature:
        """raw_speech: one mono waveform or a list of them, floats in -1..1.

        Raises ValueError for another rate, and for a list of recordings that are not cut into equally many windows.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the model takes sounds at {self.sampling_rate} Hz, got {sampling_rate} Hz: resample them"
            )
        one = np.ndim(raw_speech[0]) == 0
        made = [
            self._log_mel(torch.as_tensor(np.asarray(w, np.float32))) for w in ([raw_speech] if one else raw_speech)
        ]
        if len({len(windows) for windows in made}) > 1:
            raise ValueError("recordings of a batch have to be cut into equally many windows: give them one by one")
        return BatchFeature({"input_values": torch.stack(made).numpy()}, tensor_type=return_tensors)

    def _log_mel(self, waveform):
        """`[windows, T, F]` of one recording."""
        given = dict(self.front_end)
        settings = FrontEndSettings(**given | {"fbank": FbankSettings(**given["fbank"])})
        spans = settings.windows(len(waveform))
        pieces = torch.zeros(len(spans), max(settings.clip_samples, len(waveform) if len(spans) == 1 else 0))
        for row, (start, end) in zip(pieces, spans, strict=True):
            row[: end - start] = waveform[start:end]
        length = torch.tensor([end - start for start, end in spans])
        return FrontEnd(settings)(pieces, length)


class FFTPForAudioClassification(PreTrainedModel):
    """`fftp.AST` or `fftp.AuM` under transformers' interface; its tensors have the names of our own checkpoints."""

    config_class = FFTPConfig
    main_input_name = "input_values"

    def __init__(self, config: FFTPConfig):
        super().__init__(config)
        network = config.about().build()
        # The parts are this module's own, so that names in files are ours; the whole is kept beside them, as no part.
        for name, part in network.named_children():
            self.add_module(name, part)
        object.__setattr__(self, "network", network)
        self.post_init()

    def _init_weights(self, module):
        """Weights are drawn by the model itself when it is made."""

    def forward(
        self, input_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> SequenceClassifierOutput | tuple:
        """input_values `[B, T, F]`, or `[B, windows, T, F]`, of which the mean of the probabilities counts; labels `[B]`, or
        `[B, C]` for several a clip: adds the loss."""
        whole = input_values if input_values.ndim == 4 else input_values[:, None]
        logits = self.network(whole.flatten(0, 1)).unflatten(0, whole.shape[:2])  # (B, windows, C)
        several = self.config.problem_type == "multi_label_classification"
        logits = logits[:, 0] if logits.shape[1] == 1 else _of_windows(logits.float(), several)
        loss = None
        if labels is not None and several:
            loss = nnf.binary_cross_entropy_with_logits(logits.float(), labels.float())
        elif labels is not None:
            loss = nnf.cross_entropy(logits.float(), labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _of_windows(logits, several):
    """Logits `[B, C]` whose probabilities are the mean of the windows'."""
    if several:
        return logits.sigmoid().mean(1).logit(eps=1e-7)
    return logits.softmax(2).mean(1).clamp_min(torch.finfo(logits.dtype).tiny).log()


AutoConfig.register(FFTPConfig.model_type, FFTPConfig)
AutoFeatureExtractor.register(FFTPConfig, FFTPFeatureExtractor)
AutoModelForAudioClassification.register(FFTPConfig, FFTPForAudioClassification)
