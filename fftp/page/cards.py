"""A card for each clip: what it is, what it was taken for, its sound, its spectrogram with masks, and where the model looks."""

from dataclasses import dataclass

import numpy as np

from fftp.page.markup import percent, text

POINTS = 160  # of a rollout's curve, at most
NAMED = 4  # labels in a card's title, at most; all of them stand below with their probabilities
READY = 40  # cards whose sound says its length at once: phones allow few players that do


@dataclass(frozen=True, kw_only=True, eq=False)
class Card:
    """One clip, ready to be shown.

    rank: 1 has the highest loss. true: its labels. guesses: (label, probability), the likeliest first. seconds: of the part
    that the model sees. picture, audio: data URIs; shape: (frames, bins) of the picture. rectangles `[M, 4]` in frames and
    bins, painted in the colour `fill`. rollout `[frames]`, mean 1 over the model's input.
    """

    rank: int
    name: str
    loss: float
    true: tuple[str, ...]
    true_probabilities: tuple[float, ...]
    guesses: list[tuple[str, float]]
    seconds: float
    audio: str | None = None
    picture: str | None = None
    shape: tuple[int, int] = (0, 0)
    rectangles: np.ndarray | None = None
    fill: str = ""
    rollout: np.ndarray | None = None

    @property
    def wrong(self) -> bool:
        """Whether the likeliest label is none of its own."""
        return self.guesses[0][0] not in self.true


def markup(card: Card) -> str:
    true = ", ".join(card.true) or "no label"
    title = true if len(card.true) <= NAMED else f"{', '.join(card.true[:NAMED])} and {len(card.true) - NAMED} more"
    taken = card.guesses[0][0]
    about = f"Clip {card.rank}, {true}, taken for {taken}"
    arrow = '<span class="arrow" aria-label="taken for">&rarr;</span>'
    verdict = f'{arrow} <span class="{"wrong" if card.wrong else "right"}">{text(taken)}</span>'
    parts = [
        f'<h3><span class="rank">{card.rank}</span> {text(title)} {verdict}</h3>',
        _seen(card, about),
        _heard(card, about),
        _guesses(card),
        f'<p class="file"><span title="{text(card.name)}">{text(card.name)}</span> <span>loss {card.loss:.2f}</span></p>',
    ]
    found = (
        f'data-rank="{card.rank}" data-true="{text(true)}" data-taken="{text(taken)}" data-wrong="{int(card.wrong)}"'
    )
    body = "\n".join(part for part in parts if part)
    return f'<article class="card" aria-label="{text(about)}" {found}>\n{body}\n</article>'


def _seen(card, about):
    if card.picture is None:
        return ""
    frames, bins = card.shape
    curve = "" if card.rollout is None else _rollout(card.rollout)
    return (
        f'<div class="seen" data-seconds="{card.seconds:.3f}">\n<div class="sound">'
        f'<img src="{card.picture}" alt="{text(f"{about}: log-mel spectrogram of {card.seconds:.2f} s")}">'
        f"{_masks(card, frames, bins)}</div>\n{curve}</div>"
    )


def _masks(card, frames, bins):
    """The rectangles over the picture, low bins at its bottom; those behind the sound are outside of it."""
    if card.rectangles is None:
        return ""
    shapes = "".join(
        f'<rect x="{t0}" y="{bins - f1}" width="{min(t1, frames) - t0}" height="{f1 - f0}"/>'
        for t0, t1, f0, f1 in card.rectangles.tolist()
        if t0 < min(t1, frames) and f0 < f1
    )
    return (
        f'<svg class="masks" viewBox="0 0 {frames} {bins}" preserveAspectRatio="none" aria-hidden="true" '
        f'style="--fill:{card.fill}">{shapes}</svg>'
    )


def _rollout(rollout):
    """Attention rollout over time as an area; the dashed line is 1, what an even look would give."""
    pieces = np.array_split(rollout, min(POINTS, len(rollout)))
    values = np.array([piece.mean() for piece in pieces])
    peak = max(1.6, float(values.max()))
    step = 100 / len(values)
    steps = "".join(f"L{i * step:.4g} {40 - 38 * v / peak:.3g}H{(i + 1) * step:.4g}" for i, v in enumerate(values))
    where = 100 * values.argmax() / len(values)
    said = f"Attention rollout over time: at most {values.max():.1f} times the mean, at {where:.0f} % of the clip"
    return (
        f'<svg class="rollout" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label="{text(said)}">'
        f"<title>{text(said)}</title>"
        f'<path d="M0 40{steps}V40Z"/><line x1="0" x2="100" y1="{40 - 38 / peak:.3g}" y2="{40 - 38 / peak:.3g}"/></svg>\n'
    )


def _heard(card, about):
    if card.audio is None:
        return ""
    early = "metadata" if card.rank <= READY else "none"
    return f'<audio controls preload="{early}" src="{card.audio}" aria-label="{text(about)}"></audio>'


def _guesses(card):
    """The likeliest labels, and its own where it is not among them."""
    shown = list(card.guesses)
    shown += [
        pair for pair in zip(card.true, card.true_probabilities, strict=True) if pair[0] not in dict(card.guesses)
    ]
    rows = "\n".join(
        f'<li class="{"own" if label in card.true else "other"}" style="--s:{100 * p:.1f}%"><span>{text(label)}</span> '
        f"<span>{percent(p)}</span></li>"
        for label, p in shown
    )
    return f'<ul class="guesses">\n{rows}\n</ul>'


def switches() -> str:
    """Masks off, outlined, or painted: radio buttons that work by the style alone."""
    names = (("off", "off"), ("outline", "outlined"), ("painted", "painted"))
    radios = "".join(
        f'<input class="switch" type="radio" name="masks" id="masks-{name}"{" checked" if name == "outline" else ""}>'
        for name, _ in names
    )
    labels = "".join(f'<label for="masks-{name}">{label}</label>' for name, label in names)
    return f'{radios}\n<div class="switches"><span>Masks</span>{labels}</div>'


def tools() -> str:
    """Sorting and filtering, which need the script and show only with it."""
    return """<div class="tools" hidden>
<label>truth <select id="of-truth"><option value="">all</option></select></label>
<label>taken for <select id="of-taken"><option value="">all</option></select></label>
<label>order <select id="order"><option value="rank">highest loss</option><option value="true">truth</option>
<option value="taken">taken for</option></select></label>
<label><input type="checkbox" id="only-wrong"> only wrong ones</label>
<span id="count" role="status"></span>
</div>"""
