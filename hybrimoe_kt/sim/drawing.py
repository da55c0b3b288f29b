"""How every picture looks: sized for the width of a README, told apart without colour vision. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_kt.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES = 8.0
DOTS_PER_INCH = 110
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, which people with any kind of colour vision tell apart; its yellow is too pale for lines."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "svg.hashsalt": "hybrimoe",
    "figure.constrained_layout.use": True,
}
FORMATS = (".png", ".svg")


def check_format(path: str | Path) -> Path:
    """Return the path if pictures can be written in its format."""
    file = Path(path)
    if file.suffix not in FORMATS:
        raise ConfigError(f"{file}: pictures end in .png or .svg, not {file.suffix or 'nothing'!r}")
    return file


def save(figure: Figure, path: str | Path) -> Path:
    """Write PNG or SVG by the file's ending, the same bytes for the same picture, and return the path."""
    file = check_format(path)
    plain = {"Date": None} if file.suffix == ".svg" else {"Software": None}
    try:
        figure.savefig(file, dpi=DOTS_PER_INCH, metadata=plain)
    except OSError as error:
        raise ConfigError(f"{file}: the picture cannot be written ({error.strerror}); name a writable file") from None
    pyplot().close(figure)
    return file


def pyplot() -> Any:
    """Return matplotlib's interface in our style, drawing to memory; ConfigError where it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install 'hybrimoe-kt[plot]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    return plt
