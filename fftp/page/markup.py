"""The frame of the page, and the small words of HTML that its parts share."""

from html import escape
from importlib.resources import files
from string import Template

_FRAME = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<a class="skip" href="#main">Skip to the figures</a>
$body
<script>
$script</script>
</body>
</html>
""")


def page(title: str, body: str) -> str:
    """The whole document. title: plain text; body: markup."""
    style, script = ((files(__package__) / name).read_text("utf-8") for name in ("style.css", "script.js"))
    return _FRAME.substitute(title=text(title), body=body, style=style, script=script)


def text(value: object) -> str:
    """Anything as text of the page, or of an attribute in double quotes."""
    # A lone surrogate, as a file name may have it, is no character and cannot be written.
    return escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def section(name: str, title: str, *parts: str) -> str:
    """name: of its place in the page, for links."""
    return f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{text(title)}</h2>\n' + (
        "\n".join(part for part in parts if part) + "\n</section>\n"
    )


def note(sentence: str) -> str:
    return f'<p class="note">{text(sentence)}</p>'


def missing(sentence: str, command: str = "") -> str:
    """What the page cannot show, and why; command: what mends it."""
    return f'<p class="missing">{text(sentence)}{f" <code>{text(command)}</code>" if command else ""}</p>'


def folded(title: str, inside: str) -> str:
    return f"<details>\n<summary>{text(title)}</summary>\n{inside}\n</details>"


def table(heads: list[str], rows: list[list[object]], numbers: bool = True, label: str = "") -> str:
    """Rows of plain values; the first column names the row. numbers: the other columns stand to the right."""
    kind = ' class="numbers"' if numbers else ""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    lines = [
        f'<tr><th scope="row">{text(first)}</th>' + "".join(f"<td>{text(value)}</td>" for value in rest) + "</tr>"
        for first, *rest in rows
    ]
    body = "\n".join(lines)
    return scrolled(f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>", label)


def scrolled(inside: str, label: str) -> str:
    """What may be wider than a phone scrolls by itself, by keys as well."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">\n{inside}\n</div>'
