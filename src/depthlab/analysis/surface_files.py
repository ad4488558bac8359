"""A surface as files for other programs: an interactive page (plotly, in the file itself) and ParaView's .vts."""

from html import escape

import numpy as np

from depthlab.analysis import Result
from depthlab.analysis.surface_figures import MAP, Scale


def extra(name: str, result: Result) -> dict[str, bytes]:
    """Files beside the figure, by suffix. The page only where plotly is installed: pip install 'depthlab[report]'."""
    if "y" not in result.arrays:
        return {}
    files = {".vts": vts(result)}
    try:
        files[".html"] = html(name, result)
    except ModuleNotFoundError:
        print("no interactive page: it needs plotly, pip install 'depthlab[report]'")
    return files


def html(name: str, result: Result) -> bytes:
    """One file that loads nothing: the surface to turn, with loss, error and coordinates under the pointer.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.io import to_html

    scale = Scale.of({name: result})
    x, y, loss, error = (result.arrays[key] for key in ("x", "y", "loss", "error"))
    z = scale.height(loss)
    text = [[f"a {a:.3g}, b {b:.3g}<br>loss {loss[i, j]:.4g}<br>error {error[i, j]:.2f} %" for i, a in enumerate(x)]
            for j, b in enumerate(y)]  # fmt: skip
    ticks = {}
    if scale.log:
        marks = np.arange(np.ceil(np.log10(scale.low)), np.floor(np.log10(scale.high)) + 1)
        ticks = {"tickvals": marks.tolist(), "ticktext": [f"{10.0**m:g}" for m in marks]}
    parts = [
        go.Surface(
            x=x.tolist(), y=y.tolist(), z=z.T.tolist(), text=text, hoverinfo="text", colorscale=MAP,
            colorbar={"title": {"text": "loss"}, **ticks},
            contours_z={"show": True, "usecolormap": True, "project_z": True},
        )
    ]  # fmt: skip
    if "path" in result.arrays:
        path = result.arrays["path"]
        heights = over_surface(x, y, z, path)
        names = [f"epoch {e}" for e in result.arrays["epochs"]]
        line = {"color": "#D55E00", "width": 5}
        parts.append(go.Scatter3d(x=path[:, 0].tolist(), y=path[:, 1].tolist(), z=heights.tolist(), text=names,
                                  mode="lines+markers", marker={"size": 2.5}, line=line))  # fmt: skip
    page = go.Figure(parts)
    page.update_layout(
        title={"text": escape(name)}, template="plotly_white", showlegend=False,
        scene={"xaxis_title": "direction 1", "yaxis_title": "direction 2",
               "zaxis": {"title": {"text": "loss"}, **ticks}, "aspectratio": {"x": 1, "y": 1, "z": 0.7}},
    )  # fmt: skip
    config = {"displaylogo": False, "showTips": False, "plotlyServerURL": "", "showSendToCloud": False}
    return to_html(page, config=config, include_plotlyjs=True, full_html=True, div_id="surface").encode()


def over_surface(x: np.ndarray, y: np.ndarray, z: np.ndarray, path: np.ndarray) -> np.ndarray:
    """(E,) heights of a path's points, bilinear between the surface's, a hair above it."""
    from scipy.interpolate import RegularGridInterpolator

    inside = np.clip(path, [x[0], y[0]], [x[-1], y[-1]])
    return RegularGridInterpolator((x, y), z)(inside) + 0.01 * (z.max() - z.min())


def vts(result: Result) -> bytes:
    """A structured grid for ParaView: points (a, b, height), fields loss, error and log10 of the loss."""
    scale = Scale.of({"": result})
    x, y, loss, error = (result.arrays[key] for key in ("x", "y", "loss", "error"))
    z = scale.height(loss)
    extent = f"0 {len(x) - 1} 0 {len(y) - 1} 0 0"
    span = max(float(np.ptp(z)), 1e-12)
    height = (z - z.min()) / span * max(np.ptp(x), np.ptp(y)) / 2  # half as high as wide

    def numbers(values: np.ndarray) -> str:
        return " ".join(f"{v:.9g}" for v in values)

    def field(name: str, values: np.ndarray) -> str:
        flat = values.T.reshape(-1)  # x runs fastest
        return f'<DataArray type="Float64" Name="{name}" format="ascii">{numbers(flat)}</DataArray>'

    points = np.stack([*np.meshgrid(x, y, indexing="xy"), height.T], axis=-1).reshape(-1)
    clean = scale.clean(loss)
    text = f"""<?xml version="1.0"?>
<VTKFile type="StructuredGrid" version="0.1" byte_order="LittleEndian">
<StructuredGrid WholeExtent="{extent}"><Piece Extent="{extent}">
<PointData Scalars="loss">
{field("loss", clean)}
{field("error", error)}
{field("log10_loss", np.log10(np.maximum(clean, 1e-300)))}
</PointData>
<Points><DataArray type="Float64" NumberOfComponents="3" format="ascii">{numbers(points)}</DataArray></Points>
</Piece></StructuredGrid>
</VTKFile>
"""
    return text.encode()
