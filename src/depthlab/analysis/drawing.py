"""What the figures of the analyses share. No pyplot: nothing global, no display needed; the same input, same bytes."""

from typing import Any

import numpy as np

from depthlab.report.figures import COLOURS, canvas, png

__all__ = ["COLOURS", "canvas", "png", "stage_lines"]


def stage_lines(axis: Any, first: np.ndarray) -> None:
    """Dotted lines where stages begin."""
    for j in np.flatnonzero(first)[1:]:
        axis.axvline(j - 0.5, color="0.6", lw=0.8, ls=":", zorder=0)
