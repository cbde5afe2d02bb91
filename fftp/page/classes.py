"""What is taken for what, or how well each class is found: tables that a browser can search and a reader can hear."""

import numpy as np

from fftp.page.markup import note, percent, scrolled, table, text

MOST = 60  # classes whose matrix is drawn whole
DENSE = 20  # from so many on, in small cells
PAIRS = 12  # of the most confused ones


def confusion(counts: np.ndarray, labels: tuple[str, ...]) -> str:
    """Clips of class i taken for class j `[C, C]`: the matrix, and the pairs that are confused most."""
    parts = [_pairs(counts, labels)]
    if len(labels) <= MOST:
        parts.insert(0, _matrix(counts, labels))
    else:
        parts.insert(0, note(f"{len(labels)} classes are too many for a matrix; the pairs confused most stand here."))
    kind = "dense" if len(labels) > DENSE else "beside"
    return f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>"


def _matrix(counts, labels):
    totals = counts.sum(1)
    heads = "".join(f'<th scope="col"><span>{text(label)}</span></th>' for label in labels)
    rows = []
    for i, label in enumerate(labels):
        cells = "".join(_cell(counts[i, j], totals[i], label, labels[j], i == j) for j in range(len(labels)))
        found = percent(counts[i, i] / totals[i], 0) if totals[i] else "none"
        sums = f'<td class="sum">{found}</td><td class="sum">{totals[i]}</td>'
        rows.append(f'<tr><th scope="row">{text(label)}</th>{cells}{sums}</tr>')
    body = "\n".join(rows)
    return scrolled(
        '<table class="matrix">\n<caption>Rows are the truth, columns what it was taken for.</caption>\n'
        f'<thead><tr><td></td>{heads}<th scope="col">found</th><th scope="col">clips</th></tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>",
        "Confusion matrix",
    )


def _cell(count, total, true, taken, diagonal):
    if not count:
        return "<td></td>"
    share = count / total
    clips = "clip" if total == 1 else "clips"
    said = f"{true}: {count} of {total} {clips} ({percent(share, 0)}) " + (
        "found" if diagonal else f"taken for {taken}"
    )
    # A single mistake still has to show beside hundreds.
    strength = round(100 * (share if diagonal else min(1.0, 0.12 + 1.5 * share)))
    kind = ("right" if diagonal else "wrong") + (" strong" if strength > 55 else "")
    return f'<td class="{kind}" style="--s:{strength}%" title="{text(said)}">{count}</td>'


def _pairs(counts, labels):
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(k), len(labels)) for k in order if wrong.flat[k]]
    if not pairs:
        return note("No clip was taken for another class.")
    rows = [[labels[i], labels[j], int(wrong[i, j]), percent(wrong[i, j] / counts[i].sum(), 0)] for i, j in pairs]
    shown = table(["truth", "taken for", "clips", "of its clips"], rows, label="Confused most")
    return f'<div class="pairs">\n<h3>Confused most</h3>\n{shown}\n</div>'


def average_precision(values: np.ndarray, positives: np.ndarray, labels: tuple[str, ...]) -> str:
    """AP of each class `[C]` with its number of clips `[C]`, best first; NaN where there is no clip."""
    order = [int(k) for k in np.argsort(-np.nan_to_num(values, nan=-1), kind="stable") if np.isfinite(values[k])]
    absent = [labels[k] for k in range(len(labels)) if not np.isfinite(values[k])]
    rows = "\n".join(
        f'<tr><th scope="row">{text(labels[k])}</th><td class="bar"><span style="--s:{100 * values[k]:.1f}%"></span></td>'
        f"<td>{percent(values[k])}</td><td>{int(positives[k])}</td></tr>"
        for k in order
    )
    parts = [
        scrolled(
            '<table class="bars numbers">\n<thead><tr><th scope="col">class</th>'
            '<th scope="col" colspan="2">average precision</th>'
            f'<th scope="col">clips</th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>',
            "Average precision of each class",
        ).replace('class="scroll"', 'class="scroll tall"', 1)
    ]
    if len(order) > DENSE:
        parts.insert(0, note(f"{len(order)} classes, the best first; the list scrolls."))
    if absent:
        parts.append(note(f"Without clips, and so without a figure: {', '.join(absent)}."))
    return "\n".join(parts)
