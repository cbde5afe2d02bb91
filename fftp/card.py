"""The model card: README.md of a folder that `save_pretrained` writes, with what the hub reads at its top."""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fftp.checkpoint import CheckpointConfig

_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "map": "mean average precision",
    "auc": "area under the ROC curve",
    "d_prime": "d'",
}
_SHOWN = (
    "size",
    "augment",
    "mixup",
    "epochs",
    "max_steps",
    "batch_size",
    "lr",
    "optimiser",
    "precision",
    "seed",
    "recipe",
)


def text(config: "CheckpointConfig", license: str = "unknown") -> str:
    """The card in Markdown. license: of the weights, an identifier of the hub's such as "apache-2.0"."""
    kind, grid = config.to_json()["model"], config.model.grid
    name = {"ast": "AST", "aum": "AuM"}[kind]
    patches = "full-frequency" if grid.full_frequency else "square"
    return f"""---
{_top(config, kind, license)}---

# {name}, {config.model.depth} layers of {config.model.dim}, {patches} patches, {len(config.labels)} classes

An audio classifier with patches of {grid.pt} frames x {grid.pf} mel bins (every {grid.st} frames and {grid.sf} bins).

```python
import fftp

prediction = fftp.load("FOLDER").predict(waveform, sample_rate)
model = fftp.{name}.from_pretrained("FOLDER")
```

or, with transformers, after `import fftp.transformers_model`: `pipeline("audio-classification", model="FOLDER")`.

## Data

{_data(config)}

## Metrics

{_metrics(config)}

## Licence

{_licence(license)}

## Classes

{", ".join(config.labels)}
"""


def _top(config, kind, license):
    lines = [f"license: {json.dumps(license)}", "library_name: fftp", "pipeline_tag: audio-classification"]
    lines += ["tags:", "- audio", f"- {kind}", "- full-frequency-temporal-patching"]
    shown = [(key, word) for key, word in _METRICS.items() if key in config.metrics]
    if shown:
        data = json.dumps(str(config.settings.get("data", "unknown")))
        lines += ["model-index:", "- name: fftp", "  results:", "  - task:", "      type: audio-classification"]
        lines += ["    dataset:", f"      name: {data}", f"      type: {data}", "    metrics:"]
        for key, word in shown:
            lines += [f"    - type: {key}", f"      name: {json.dumps(word)}", f"      value: {config.metrics[key]}"]
    return "\n".join(lines) + "\n"


def _data(config):
    s, front_end = config.settings, config.front_end
    lines = [
        f"Sounds at {front_end.fbank.sample_rate} Hz in windows of {front_end.clip_samples} samples; {front_end.T} frames of "
        f"{front_end.F} mel bins, normalised with mean {front_end.mean:.4f} and std {front_end.std:.4f}.",
    ]
    if not s:
        return "The data of the original weights; they were converted, not trained here. " + lines[0]
    kept = ", ".join(f"{name} {s[name]}" for name in _SHOWN if s.get(name) not in (None, "", 0))
    begun = " It began from another checkpoint's weights (fine-tuning)." if s.get("init") else ""
    return f"Trained on `{s.get('data', 'unknown')}`: {kept}.{begun} {lines[0]}"


def _metrics(config):
    rows = [f"| {word} | {config.metrics[key]:.4f} |" for key, word in _METRICS.items() if key in config.metrics]
    if not rows:
        return "Not measured."
    return "\n".join(
        ["On the test split of the run that trained it:", "", "| metric | value |", "| --- | --- |", *rows]
    )


def _licence(license):
    if license == "unknown":
        return "Whoever trained these weights has stated none. The code that runs them is Apache-2.0."
    return f"{license}. The code that runs these weights is Apache-2.0."
