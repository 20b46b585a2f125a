"""How the plots of the studies look. Matplotlib's object interface only: no window, no global state."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NORM_STYLES", "panels"]

# Colours that the colour-blind tell apart (M. Okabe and K. Ito, "Color Universal Design", 2008), each with its marker.
NORM_STYLES: dict[str | None, dict[str, Any]] = {
    None: {"color": "#D55E00", "marker": "s", "markersize": 4},
    "batchnorm": {"color": "#0072B2", "marker": "o", "markersize": 4},
    "layernorm": {"color": "#009E73", "marker": "^", "markersize": 5},
}


def panels(titles: list[str], xlabel: str) -> "tuple[Figure, list[Axes]]":
    """A figure with one plot for each title, side by side.

    Parameters
    ----------
    titles : list of str
        The titles.
    xlabel : str
        Label of every horizontal axis.

    Returns
    -------
    Figure, list of Axes
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(titles), 3.6), layout="constrained")
    axes = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for ax, title in zip(axes, titles):
        ax.set_title(title)
        ax.set_xlabel(xlabel)
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
