"""Drawing without a screen: matplotlib figures that are made, saved and forgotten."""

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
        raise UserError("Pictures need matplotlib: pip install 'fftp[plots]'.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(made)
    return made
