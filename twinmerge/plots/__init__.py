"""The doctor's numbers as pictures: energy curves, cosines, drift by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra, OutputError

if TYPE_CHECKING:
    from ..merging.doctor import Diagnosis

INCH_PER_EXPERT = 0.45


def check_extra() -> None:
    """Raises `MissingExtra` before a long run, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtra("plots need matplotlib: pip install 'twinmerge[plot]'") from None


def write_plots(diagnosis: Diagnosis, folder: Path | str) -> list[Path]:
    """Write PNG files of what was measured into `folder`, which is made; gives their paths.

    energy.png, cosines.png and drift.png; what could not be measured has no picture. Files of these
    names are replaced. Raises `MissingExtra`, and `OutputError` if the folder cannot be written.
    """
    check_extra()
    folder = Path(folder)
    pictures: dict[str, Callable[[Diagnosis], Any]] = {}
    if diagnosis.spectra:
        pictures["energy.png"] = energy_curves
    if len(diagnosis.measured) > 1:
        pictures["cosines.png"] = cosine_map
    if any(any(tensor.moved) for tensor in diagnosis.tensors):
        pictures["drift.png"] = drift_by_layer
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in pictures.items():
            draw(diagnosis).savefig(folder / name, dpi=120)
            written.append(folder / name)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise OutputError(f"{folder}: cannot write plots there: {reason}.") from problem
    return written


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot: it keeps figures, and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def energy_curves(diagnosis: Diagnosis) -> Any:
    """Energy of the exclusive part over rank: every sampled matrix, and each expert's median.

    Medians are over the matrices that have that many singular values.
    """
    figure, axes = _figure(8.0, 5.0)
    for index, name in enumerate(diagnosis.measured):
        mine = [s.energy for s in diagnosis.spectra if s.expert == name]
        color = f"C{index % 10}"
        for energy in mine:
            axes.plot(
                [int(r) for r in energy], list(energy.values()), color=color, alpha=0.12, lw=1
            )
        ranks = sorted({int(rank) for energy in mine for rank in energy})
        middle = [median(e[str(r)] for e in mine if str(r) in e) for r in ranks]
        style = "-" if index < 10 else "--"
        axes.plot(ranks, middle, style, color=color, lw=2, label=name)
    for share in (0.90, 0.95, 0.99):
        axes.axhline(share, color="grey", lw=0.5, ls=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("rank")
    axes.set_ylabel("share of the energy")
    sampled = f"{len(diagnosis.sampled)} of {diagnosis.matrices} matrices"
    axes.set_title(f"Exclusive part, against {diagnosis.against} ({sampled}; bold: median)")
    axes.legend(fontsize="small", ncols=2)
    return figure


def cosine_map(diagnosis: Diagnosis) -> Any:
    """Cosines between task vectors, one cell per pair; a zero task vector has none."""
    names = diagnosis.measured
    side = 3 + INCH_PER_EXPERT * len(names)
    figure, axes = _figure(side + 1, side)
    cells = [[float("nan") if c is None else c for c in row] for row in diagnosis.cosines]
    image = axes.imshow(cells, vmin=-1, vmax=1, cmap="RdBu_r")
    if len(names) <= 20:
        for i, row in enumerate(diagnosis.cosines):
            for j, cosine in enumerate(row):
                if cosine is not None:
                    color = "white" if abs(cosine) > 0.6 else "black"
                    axes.text(j, i, f"{cosine:.2f}", ha="center", va="center", color=color, size=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Cosines between task vectors")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def drift_by_layer(diagnosis: Diagnosis) -> Any:
    """How far every layer's matrices moved, as a share of their norm in the base."""
    experts = [expert for expert in diagnosis.experts if expert.layers]
    layers = list(experts[0].layers or ())
    figure, axes = _figure(max(7.0, 3 + 0.3 * len(layers)), 5.0)
    for index, expert in enumerate(experts):
        drifts = [(expert.layers or {}).get(layer) for layer in layers]
        heights = [float("nan") if drift is None else drift for drift in drifts]
        style = "o-" if index < 10 else "s--"
        axes.plot(heights, style, ms=4, color=f"C{index % 10}", label=expert.name)
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize="small")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("‖W_t - W_0‖ / ‖W_0‖")
    axes.set_title("Drift from the base, by layer")
    axes.legend(fontsize="small", ncols=2)
    return figure
