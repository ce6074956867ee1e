"""How experiments are shown: text tables, and figures where matplotlib is there."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def columns(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a table: the first column to the left, the others to the right.

    Example:
        >>> print(columns([["method", "count"], ["ELK", 152.25], ["DEER", None]]))
        method  count
        ELK     152.2
        DEER        –
    """
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in texts
    )


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figure(path: Path, draw: Callable[[dict[str, Any], Any], None], found: dict[str, Any], published: str) -> str:
    """Write a figure.

    Args:
        path: the file, a .png.
        draw: called with the result and an empty matplotlib figure.
        found: the result.
        published: what was published, for a line below.

    Returns:
        Where it is, or what is missing, in a sentence.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure: matplotlib is not installed (pip install 'reroll[plot]')."
    canvas = FigureCanvasAgg(Figure(figsize=(7, 4.5), layout="constrained"))
    draw(found, canvas.figure)
    canvas.figure.supxlabel("\n".join(textwrap.wrap(f"published: {published}", 125)), fontsize=7, color="0.35")
    canvas.figure.savefig(path, dpi=150)
    return f"figure: {path}"
