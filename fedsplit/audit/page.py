"""An audit as one self-contained page: figures, and reconstructions beside the originals."""

import base64
import html
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.audit.audit import Array, Audit

_SHOWN = 10  # records
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 66em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .9em; text-align: right }
th { border-bottom: 2px solid #444 } td:first-child, th:first-child { text-align: left }
tr.base td { color: #777 } tr.top td { font-weight: 600 } img { max-width: 100% } .bad { color: #b00 }
"""


def page(audit: Audit, x: NDArray[Any], image_shape: tuple[int, ...] | None, title: str) -> str:
    """Return the page's HTML.

    Parameters
    ----------
    audit : Audit
    x : float array (targets, *input_shape)
        The originals.
    image_shape : (channels, height, width) or None
        None draws traces.
    title : str
    """
    report = audit.report
    picture = _pictures(audit.guesses, x, image_shape)
    held = report["control"]["holds"]
    control = f"{report['control']['psnr']:.1f} dB over {report['control']['records']} records"
    stand_in = " They are the test devices' own: the run has no public set." if report["public"]["stand_in"] else ""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{_STYLE}</style><h1>{html.escape(title)}</h1>
<p>What an honest-but-curious server could make of {report["targets"]} records from all that left their devices, with
{report["public"]["records"]} public records for a prior.{stand_in} Every figure is a lower bound on what leaks.</p>
<p class="{"" if held else "bad"}">Negative control (a raw gradient must be brought back above 60 dB): {control}
{"" if held else "— it does not hold: believe none of the figures below"}</p>
<h2>Exact criterion, all releases together</h2>{_criterion(report["criterion"])}
<h2>Attacks</h2>{_attacks(report)}
<h2>Reconstructions</h2><img alt="originals and reconstructions" src="data:image/png;base64,{picture}">
<p>Rows, from above: {", ".join(["the originals", *map(html.escape, audit.guesses)])}.</p></html>
"""


def _criterion(figures: dict[str, Any]) -> str:
    rows = [f"<tr><td>{name.replace('_', ' ')}</td><td>{_number(value)}</td></tr>" for name, value in figures.items()]
    return f"<table>{''.join(rows)}</table>"


def _attacks(report: dict[str, Any]) -> str:
    columns = ("psnr", "psnr_p95", "nmse", "ssim", "identification")
    head = "".join(f"<th>{c}</th>" for c in ["", *columns])
    rows = []
    for name, scores in {**report["baselines"], **report["attacks"]}.items():
        kind = "base" if name in report["baselines"] else "top" if name == report["strongest"]["attack"] else ""
        cells = "".join(f"<td>{_number(scores[c])}</td>" for c in columns)
        rows.append(f'<tr class="{kind}"><td>{html.escape(name)}</td>{cells}</tr>')
    skipped = "".join(f"<p>{html.escape(n)}: not run, {html.escape(why)}.</p>" for n, why in report["skipped"].items())
    note = f"PSNR in dB, peak {report['peak']:.3g}; identification among {report['candidates']:,} private records."
    return f"<table><tr>{head}</tr>{''.join(rows)}</table><p>{note}</p>{skipped}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _pictures(guesses: dict[str, Array], x: NDArray[Any], image_shape: tuple[int, ...] | None) -> str:
    """Return a PNG in base64: a row for the originals and one per reconstruction."""
    from matplotlib.figure import Figure

    shown = min(_SHOWN, len(x))
    rows = [x.reshape(len(x), -1), *guesses.values()]
    figure = Figure(figsize=(1.2 * shown, 1.25 * len(rows)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(rows), shown, squeeze=False))
    for line, values in zip(axes, rows, strict=True):
        for i, axis in enumerate(line):
            axis.set_axis_off()
            if image_shape is not None:
                picture = np.moveaxis(values[i].reshape(image_shape), 0, -1)
                axis.imshow(picture.squeeze(), cmap="gray" if image_shape[0] == 1 else None, vmin=0, vmax=1)
            else:
                traces = values[i].reshape(x.shape[1], -1) if x.ndim > 2 else values[i][None]
                axis.plot(traces.T, linewidth=0.7)
                axis.set_ylim(float(x[i].min()) - 0.5, float(x[i].max()) + 0.5)
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    return base64.b64encode(file.getvalue()).decode("ascii")
