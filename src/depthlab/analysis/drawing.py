"""What the figures of the analyses share. No pyplot: nothing global, no display needed; the same input, same bytes."""

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from depthlab.report.figures import COLOURS

__all__ = ["COLOURS", "canvas", "png", "stage_lines"]


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # matplotlib would write its version
    return buffer.getvalue()


def stage_lines(axis: Any, first: np.ndarray) -> None:
    """Dotted lines where stages begin."""
    for j in np.flatnonzero(first)[1:]:
        axis.axvline(j - 0.5, color="0.6", lw=0.8, ls=":", zorder=0)
