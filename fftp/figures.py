"""Drawing without a screen: matplotlib figures that are made, saved and forgotten."""

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


def save(drawn, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write the figure as a PNG of 200 colours: spectrograms are noisy, and true colour makes them four times as large.

    notes: texts to keep within the file, by name. Raises UserError when the file cannot be written.
    """
    from PIL import Image, PngImagePlugin

    kept = PngImagePlugin.PngInfo()
    for name, text in (notes or {}).items():
        kept.add_text(name, text)
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
