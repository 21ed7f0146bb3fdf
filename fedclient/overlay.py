"""A map over its image, as a PNG that says what it is: method, answer, probability, model, and not for diagnosis."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

NOT_FOR_DIAGNOSIS = "Not for diagnosis"
INCH, DPI = 4.0, 110  # of a panel
OPAQUE = 0.55  # of the map where it is 1; where it is 0 the image shows


@dataclass(frozen=True, slots=True)
class Panel:
    """One map beside its image.

    Attributes:
        title: what is shown, in a line.
        values: [rows, columns] as displayed.
        scale: what the colour bar is of.
        top: end of the colour bar.
    """

    title: str
    values: NDArray[Any]
    scale: str
    top: float = 1.0


def drawn(
    image: NDArray[Any], panels: Sequence[Panel], lines: Sequence[str], region: NDArray[Any] | None = None
) -> bytes:
    """A PNG: the image alone, then with each map over it and a colour bar; `lines` stand above all.

    Args:
        image: [rows, columns] as displayed.
        region: bool[rows, columns]: its outline is drawn on the image.
    """
    figure = Figure(figsize=(INCH * (1 + len(panels)), INCH + 0.3 * (len(lines) + 1)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    grey: dict[str, Any] = {"cmap": "gray", "interpolation": "nearest"}
    axes[0].imshow(image, **grey)
    axes[0].set_title("image" if region is None else "image, and what is predicted", fontsize=9)
    if region is not None and region.any() and not region.all():
        axes[0].contour(region.astype(np.float32), levels=[0.5], colors="#00c8ff", linewidths=1)
    for at, panel in zip(axes[1:], panels, strict=True):
        at.imshow(image, **grey)
        share = np.clip(panel.values / max(panel.top, 1e-12), 0, 1)
        shown = at.imshow(
            panel.values, cmap="inferno", vmin=0, vmax=panel.top, alpha=OPAQUE * share, interpolation="nearest"
        )
        bar = figure.colorbar(shown, ax=at, fraction=0.046)
        if bar.solids is not None:
            bar.solids.set_alpha(1)
        bar.set_label(panel.scale, fontsize=8)
        at.set_title(panel.title, fontsize=9)
    for at in axes:
        at.set_axis_off()
    figure.suptitle("\n".join([*lines, NOT_FOR_DIAGNOSIS]), fontsize=9, x=0.01, ha="left")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Title": NOT_FOR_DIAGNOSIS, "Software": None})
    return file.getvalue()


def displayed(plane: NDArray[Any], left_right_axis: int) -> NDArray[Any]:
    """A plane [I, J] of an example as it is looked at: pictures as they are; planes of volumes, which run to the
    patient's right and front, with the front above and the patient's right on the left."""
    return plane if left_right_axis == 1 else plane[::-1, ::-1].T
