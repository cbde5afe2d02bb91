"""Drawing without a screen: matplotlib figures that are made, saved and forgotten."""

import warnings
from pathlib import Path

import numpy as np

from fftp.errors import UserError


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def figure(width: float, height: float):
    """An empty figure of so many inches. Raises UserError where matplotlib is absent."""
    if not available():
        raise UserError("Pictures need matplotlib: pip install matplotlib.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(made)
    return made


# Fonts that have what matplotlib's own has not, of the systems that people use.
ASIAN_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "IPAGothic",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
)


def _with_glyphs(drawn) -> None:
    """Give texts with Chinese, Japanese or Korean letters, class names say, fonts that have them, where there are any."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    texts = [text for text in drawn.findobj(Text) if any(ord(letter) > 0x2E7F for letter in text.get_text())]
    if texts:
        known = set(font_manager.get_font_names())
        for text in texts:
            text.set_fontfamily(["DejaVu Sans", *(name for name in ASIAN_FONTS if name in known)])


def save(drawn, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write the figure as a PNG of 200 colours: spectrograms are noisy, and true colour makes them four times as large.

    notes: texts to keep within the file, by name. Raises UserError when the file cannot be written.
    """
    from PIL import Image, PngImagePlugin

    kept = PngImagePlugin.PngInfo()
    for name, text in (notes or {}).items():
        kept.add_text(name, text)
    _with_glyphs(drawn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
        drawn.canvas.draw()
    picture = Image.fromarray(np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy())
    try:
        picture.quantize(200, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            path, "PNG", optimize=True, pnginfo=kept
        )
    except OSError as error:
        raise UserError(
            f"The picture {path} cannot be written ({error.strerror or error}): give another place."
        ) from None
