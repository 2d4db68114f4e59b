"""What was measured, kept: one JSON file for each device, a picture of it, and the README's tables.

{key of the network: {part: {"device", "torch", "date", ..., "rows": [{...}, ...]}}}, part being one of PARTS.
What scaling.py and benchmark.py's --memory measured has files of its own: {"device", "torch", ..., "rows": [...]}.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.checkpoints import write_atomically
from engine.errors import UserError

PARTS = {"training": "Training step", "sampling": "Sampling", "data": "Data path", "curves": "Learning curves"}
LAST = 100  # steps at the end of a learning curve whose mean counts, or its last fifth if that is shorter


def load(path: Path) -> dict[str, Any]:
    """The report in a file, or an empty one if there is none; raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as problem:
        raise UserError(f"{path} is damaged ({problem}): delete it and measure again") from problem


def merge(path: Path, key: str, part: str, result: dict[str, Any]) -> dict[str, Any]:
    """Puts a part in the place of the one of the same key, leaves the others, and returns the whole report."""
    report = load(path)
    report.setdefault(key, {})[part] = result
    text = json.dumps(report, indent=1)
    # a list of numbers is one line
    text = re.sub(r"\[\s+([-+.\deE,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
    return report


def tail(losses: list[float]) -> float:
    """Mean of the end of a learning curve."""
    return float(np.mean(losses[-min(LAST, max(1, len(losses) // 5)) :]))


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the fast path learns what plain fp32 does, in one sentence.

    rows: of `curves`, each with `kind` (fp32 or fast), `seed` and `losses`. The measure is how far fp32 runs of
    different seeds end from each other.
    """
    ends = {(row["kind"], row["seed"]): tail(row["losses"]) for row in rows if "losses" in row}
    plain = [end for (kind, _), end in ends.items() if kind == "fp32"]
    if ("fast", 0) not in ends or ("fp32", 0) not in ends or len(plain) < 2:
        return "not decided: a run is missing"
    apart, spread = abs(ends["fast", 0] - ends["fp32", 0]), max(plain) - min(plain)
    return (
        f"the fast path ends {apart:.5f} from fp32 of the same seed, fp32 of {len(plain)} seeds up to {spread:.5f} "
        f"from each other: {'within' if apart <= spread else 'OUTSIDE'} the seeds' spread"
    )


def number(value: float | None) -> str:
    """A figure with three digits, thousands set off."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: dict[str, Any], *, training: bool) -> list[str]:
    """A row of the training or of the sampling table."""
    head = [row["what"]]
    if not training:
        head += [f"`{row['sampler']}`", str(row["steps"]), str(row.get("evaluations", ""))]
    head += [str(row["batch"])]
    if "failed" in row:
        return [*head, f"failed: {row['failed']}"]
    over = number(row.get("over_library"))
    if not training:
        return [*head, number(row["images_per_second"]), over]
    mfu = f"{100 * row['mfu']:.1f} %" if row.get("mfu") else ""
    rate = row["images_per_second"]
    return [*head, number(rate), number(1000 * row["batch"] / rate), number(row.get("peak_gib")), mfu, over]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; short rows are filled up, and what a cell says does not end it."""
    lines = (header, ["---"] * len(header), *([*row, *[""] * (len(header) - len(row))] for row in rows))
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines]


def readme_tables(reports: list[dict[str, Any]]) -> str:
    """The README's tables of all devices, networks and parts, Markdown."""
    lines: list[str] = []
    for report in reports:
        for key, parts in report.items():
            for part in PARTS:
                if part in parts:
                    lines += ["", *readme_part(key, part, parts[part])]
    return "\n".join(lines).strip()


def network_in_words(result: dict[str, Any]) -> str:
    """Which network it is, of `image_size`, `dim`, `dim_mults`, `full_attention_size` and `parameters`."""
    size, mults = result["full_attention_size"], ",".join(map(str, result["dim_mults"]))
    attention = f"full attention up to {size} px" if size else "full attention at the innermost level alone"
    parameters = f"{result['parameters'] / 1e6:.1f} M parameters"
    return f"{result['image_size']} px, dim {result['dim']}, dim_mults {mults}, {attention}, {parameters}"


def readme_part(key: str, part: str, result: dict[str, Any]) -> list[str]:
    """One part of one device and network, Markdown lines."""
    when = f"torch {result['torch']}, {result['date']}{', quick' if result.get('quick') else ''}"
    lines = [f"**{PARTS[part]}**, `{key}` ({network_in_words(result)}), {result['device']}, {when}"]
    if "note" in result:
        lines[0] += f" ({result['note']})"
    rows = result["rows"]
    if part == "training":
        header = ["step", "batch", "images/s", "ms", "GPU memory, GiB", "MFU", "over the library"]
        lines += ["", *table(header, [cells(row, training=True) for row in rows])]
    elif part == "sampling":
        header = ["network", "sampler", "steps", "NFE", "batch", "images/s", "over the library"]
        lines += ["", *table(header, [cells(row, training=False) for row in rows])]
    elif part == "data":
        words = [f"{row['what']} {number(row.get('images_per_second')) or 'failed'}" for row in rows]
        lines[0] += f": the fast step at batch {rows[0]['batch']}, images/s with images {', '.join(words)}"
    else:
        ends = [
            f"{row['what']} {tail(row['losses']):.5f}" if "losses" in row else f"{row['what']} failed" for row in rows
        ]
        steps = max((len(row["losses"]) for row in rows if "losses" in row), default=0)
        lines[0] += f": {steps} steps on the shapes, mean loss at the end: {', '.join(ends)}; {verdict(rows)}"
    return lines


def scaling_tables(reports: list[dict[str, Any]]) -> str:
    """The README's tables of what scaling.py measured, one for each device, and what it says of the losses."""
    header = ["scaling", "preset", "dim_mults", "processes", "batch of each", "images/s", "efficiency"]
    lines: list[str] = []
    for report in reports:
        speeds = [row for row in report["rows"] if row["kind"] != "loss"]
        # weak first; the same work by more and more processes is one below the other
        speeds.sort(key=lambda row: (row["kind"] != "weak", row["preset"], row["kind"] == "weak" and row["batch"]))
        rows = [
            [
                row["kind"], f"{row['preset']}, {row['image_size']} px, dim {row['dim']}",
                ",".join(map(str, row["dim_mults"])), str(row["processes"]), str(row["batch"]),
                number(row["images_per_second"]),
                f"{100 * row['efficiency']:.1f} %" if row["efficiency"] else "",
            ]
            for row in speeds
        ]  # fmt: skip
        lines += ["", f"**Scaling**, {report['device']}, torch {report['torch']}; {report['agreement']}", ""]
        lines += table(header, rows)
    return "\n".join(lines).strip()


def memory_tables(reports: list[dict[str, Any]]) -> str:
    """The README's tables of what trains on which card, of benchmark.py's --memory, one for each device."""
    header = ["image", "card, GiB", "dim", "micro-batch x accumulation", "peak, GiB", "images/s"]
    header += ["fp32, GiB", "mixed precision, GiB", "saved"]
    lines: list[str] = []
    for report in reports:
        rows = []
        for row in sorted(report["rows"], key=lambda row: (row["image_size"], row["cap_gib"])):
            head = [f"{row['image_size']} px", f"{row['cap_gib']:g}", str(row["dim"])]
            if "failed" in row:
                rows.append([*head, f"failed: {row['failed']}"])
                continue
            known = row["fp32_gib"] and row["amp_gib"]
            saved = f"{100 * (1 - row['amp_gib'] / row['fp32_gib']):.0f} %" if known else ""
            measured = [number(row[name]) for name in ("peak_gib", "images_per_second", "fp32_gib", "amp_gib")]
            rows.append([*head, f"{row['micro_batch']} x {row['accumulation']}", *measured, saved])
        lines += ["", f"{report['device']}, torch {report['torch']}, {report['steps']} steps each", ""]
        lines += table(header, rows)
    return "\n".join(lines).strip()


def write_readme(path: Path, results: Path) -> None:
    """Puts the tables of results/ between the marks of a README; raises UserError where marks are missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    makers = {"benchmark": readme_tables, "memory": memory_tables, "scaling": scaling_tables}
    for name, tables_of in makers.items():
        begin, end = f"<!-- tables of {name} -->", f"<!-- end of the tables of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise UserError(f"{path} has no lines {begin} and {end} between which the tables could go")
        tables = tables_of([load(file) for file in sorted(results.glob(f"{name}-*.json"))])
        text = f"{before}{begin}\n{tables}\n{end}{after}"
    write_atomically(path, lambda file: file.write(text.encode()))


def picture(report: dict[str, Any]) -> bytes:
    """A panel for each part that was measured of each network, rates as bars and losses as curves: a PNG."""
    panels = [(key, part, parts[part]) for key, parts in report.items() for part in PARTS if part in parts]
    heights = [4.0 if part == "curves" else 1.2 + 0.27 * len(result["rows"]) for _, part, result in panels]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    columns = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (key, part, result), axes in zip(panels, columns, strict=True):
        rows = [row for row in result["rows"] if "failed" not in row]
        draw_curves(axes, rows) if part == "curves" else draw_bars(axes, rows)
        if part == "sampling" and rows:
            axes.set_xscale("log")
        axes.set_title(f"{PARTS[part]}, {key}, {result['device']}")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def draw_bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """images/s of each row."""
    labels = [" ".join(str(row[key]) for key in ("what", "sampler", "steps") if key in row) for row in rows]
    bars = axes.barh(range(len(rows)), [row["images_per_second"] for row in rows])
    axes.bar_label(bars, [number(row["images_per_second"]) for row in rows], padding=3)
    axes.set_yticks(
        range(len(rows)), [f"{label}, batch {row['batch']}" for label, row in zip(labels, rows, strict=True)]
    )
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("images/s")


def draw_curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Losses of each row by step, smoothed."""
    for row in rows:
        width = max(1, min(20, len(row["losses"]) // 10))
        smooth = np.convolve(row["losses"], np.ones(width) / width, "valid")
        axes.plot(smooth, "--" if row["kind"] == "fast" else "-", label=row["what"], linewidth=1)
        axes.set(yscale="log", xlabel="step", ylabel=f"loss, mean of {width} steps")
        axes.legend()
