"""Tables and plots of a result: `python -m bench.report [FILE…]`, by default of the newest one.

For `<stem>.json` it writes `<stem>.md`, `<stem>-time.png` and `<stem>-memory.png` beside it. With `--readme`
it replaces what stands between the markers in README.md too: the benchmark's table, and that of `make demo`,
which is of the newest `*-demo.json` in bench/results, a copy of the `evaluation.json` that the run left; and
the tables of docs/drop_in.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.cases import GRIDS, PROBLEMS, WITHOUT_CONSISTENCY_GRADIENT
from bench.files import DROP_IN, README, RESULTS, loss_results, newest_result, replace_in_readme
from train_ref import evaluation
from train_ref.markdown import replace, table

LOSSES = {
    "co2": "CO2",
    "info_nce": "InfoNCE",
    "nt_xent": "NT-Xent",
    "nt_xent_co2": "NT-Xent with CO2",
    "conic": "ConIC",
}
PEERS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "max-autotune": "torch.compile, max-autotune",
    "lightly": "lightly",
    "linear_cross_entropy": "torch linear_cross_entropy",
    "liger": "Liger",
    "cut_cross_entropy": "Cut Cross-Entropy",
    "inf_cl": "Inf-CL",
    "memeff": "memeff",
    "siglip_kernel": "siglip-kernel",
}
PARTIAL = {"lightly": "lightly's CO2Regularizer, *which returns no gradient*"}  # what it is of a peer
PEER_COLORS = dict(
    zip(
        PEERS,
        (
            "#6c757d", "#3a6ea5", "#5fa8d3", "#7b5ea7", "#b07d62", "#8a9a5b", "#c06c84", "#556270", "#a26769",
            "#4f7cac",
        ),
        strict=True,
    )
)  # fmt: skip
FUSED_COLORS = ("#d1495b", "#e08e45", "#2a9d6f")

PLOTTED = {"loss": "co2", "B": 256, "D": 128}
DROP_INS = {  # the losses that a page of docs/drop_in tells of
    "moco": ("info_nce", "co2"),
    "lightly": ("nt_xent", "info_nce", "co2"),
    "solo_learn": ("info_nce", "nt_xent"),
    "simclr": ("nt_xent", "nt_xent_co2"),
    "instdisc": ("conic",),
}
README_DIM = 128  # the D that the README tells of; B and K are the loss's

Records = dict[str, dict]  # of one size, by implementation


class Result:
    """A JSON file, its records found by what was measured."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        self.path = path
        self.machine, self.ceilings = content["machine"], content["ceilings"]
        self.records = content["records"]

    def beside(self, suffix: str) -> Path:
        """The file of the report whose name ends like that."""
        return self.path.with_name(self.path.stem + suffix)

    def values(self, field: str, **where: object) -> list:
        """What a field holds in the records that are like `where`, in their order."""
        return list(dict.fromkeys(r[field] for r in self.records if where.items() <= r.items()))

    def impls(self, **where: object) -> list[str]:
        """Implementations, the fused ones first."""
        return sorted(
            self.values("impl", **where), key=lambda impl: [*PEERS].index(impl) if impl in PEERS else -1
        )

    def sizes(self, **where: object) -> dict[tuple[int, int], Records]:
        """The records that are like `where`, by (B, K)."""
        sizes: dict[tuple[int, int], Records] = {}
        for r in self.records:
            if where.items() <= r.items():
                sizes.setdefault((r["B"], r["K"]), {})[r["impl"]] = r
        return dict(sorted(sizes.items()))

    @property
    def caption(self) -> str:
        m = self.machine
        device = m["device"] if self.on_gpu else f"{m['device']}, {m['threads']} threads"
        triton = f", Triton {m['triton']}" if self.on_gpu else ""
        return f"{device}; torch {m['torch']}{triton}, Python {m['python']}; {m['date']}"

    @property
    def has_plots(self) -> bool:
        """Whether what is plotted was measured: a choice of cases may leave it out."""
        return bool(self.values("loss", **PLOTTED))

    @property
    def on_gpu(self) -> bool:
        return "capability" in self.machine


def write(path: Path) -> None:
    """The report of one JSON file, beside it."""
    result = Result(path)
    result.beside(".md").write_text(report(result), encoding="utf-8")
    print(f"Wrote {result.beside('.md')}")
    if result.has_plots:
        plot(result, "ms", "Time of a step", "milliseconds").savefig(result.beside("-time.png"), dpi=200)
        plot(result, "peak_mib", "Peak memory of a step", "MiB beyond its input").savefig(
            result.beside("-memory.png"), dpi=200
        )


# Tables


MEASURED = {
    False: "Its time is the median, its memory the peak beyond its input, in a process of its own.",
    True: "Its time is the GPU's, the median of replays of a graph over inputs that the second-level cache "
    "has forgotten; in the second table it is the host's, of plain calls. Memory is what the allocator "
    "reached beyond the input.",
}


def report(result: Result) -> str:
    parts = [
        f"# The losses on {result.machine['device']}",
        f"{result.caption}; commit {result.machine['commit']}.",
        "A step is forward and backward to all that gets a gradient. ConIC and NT-Xent count both views of "
        "an instance among their B rows; ConIC's memory has the gradient of its weight in it. "
        f"{MEASURED[result.on_gpu]} The floor is what takes longest at the best rates measured: the matrix "
        "products, the exponentials, or reading the queue once. Speed-ups are those of the fastest fused "
        "implementation.",
    ]
    if result.has_plots:
        parts += [
            f"![Time against keys]({result.beside('-time.png').name})",
            f"![Memory against keys]({result.beside('-memory.png').name})",
        ]
    parts.append(ceilings_table(result))
    for loss in result.values("loss"):
        for dtype in result.values("dtype", loss=loss):
            for dim in result.values("D", loss=loss, dtype=dtype):
                where = {"loss": loss, "dtype": dtype, "D": dim}
                parts += [
                    f"## {LOSSES[loss]}, {dtype}, D = {dim}",
                    "Milliseconds:",
                    time_table(result, "ms", **where),
                ]
                if result.on_gpu:
                    parts += ["Milliseconds of the host:", time_table(result, "wall_ms", **where)]
                parts += ["MiB:", memory_table(result, **where)]
    return "\n\n".join(parts) + "\n"


def ceilings_table(result: Result) -> str:
    ceilings = result.ceilings
    rows = [("copy, read and write", f"{number(ceilings['copy_gb_s'])} GB/s")]
    rows += [
        (f"torch.mm, {dtype}", f"{rate:.3g} TFLOP/s") for dtype, rate in ceilings["matmul_tflop_s"].items()
    ]
    if ceilings.get("fma_tflop_s"):
        rows.append(("float32 multiply-adds", f"{ceilings['fma_tflop_s']:.3g} TFLOP/s"))
    if "exponentials_t_s" in ceilings:
        rows.append(("exponentials", f"{ceilings['exponentials_t_s']:.3g} · 10¹²/s"))
    return table(("ceiling", "measured"), rows)


def time_table(result: Result, field: str, **where: object) -> str:
    impls = result.impls(**where)
    peers = [impl for impl in impls if impl in PEERS]
    rows = [
        (
            batch,
            f"{keys:,}",
            *(cell(records, impl, field) for impl in impls),
            number(next(iter(records.values()))["floor_ms"]),
            *(speed_up(records, peer, field) for peer in peers),
        )
        for (batch, keys), records in result.sizes(**where).items()
    ]
    speed_ups = (f"speed-up over {label(peer)}" for peer in peers)
    return table(("B", "K", *map(label, impls), "floor", *speed_ups), rows)


def memory_table(result: Result, **where: object) -> str:
    impls = result.impls(**where)
    rows = [
        (batch, f"{keys:,}", *(cell(records, impl, "peak_mib") for impl in impls))
        for (batch, keys), records in result.sizes(**where).items()
    ]
    return table(("B", "K", *map(label, impls)), rows)


def newest_results() -> list[Result]:
    """The losses' newest result of a CPU and their newest of a GPU, as far as there are any."""
    newest = {result.on_gpu: result for result in map(Result, loss_results())}
    return [newest[on_gpu] for on_gpu in sorted(newest)]


def readme_headline(results: Sequence[Result]) -> str:
    """What a step of CO2 comes to on each kind of device, and what was not measured."""
    sentences = []
    for result in results:
        size = PROBLEMS["co2"].headline
        dtype = "bfloat16" if result.on_gpu else "float32"  # what such a device trains in
        records = result.sizes(loss="co2", dtype=dtype, D=README_DIM).get(size, {})
        fused = [record for impl, record in records.items() if impl not in PEERS]
        if not (fused and "eager" in records):
            continue
        ours, eager = min(fused, key=lambda record: record["ms"]), records["eager"]
        kind = "GPU" if result.on_gpu else "CPU"
        sentences.append(
            f"**On a {kind}, measured:** a step of CO2 with {size[0]} queries over {size[1]:,} keys, in "
            f"{dtype}, takes {number(ours['ms'])} ms and {number(ours['peak_mib'])} MiB, where eager PyTorch "
            f"takes {number(eager['ms'])} ms and {number(eager['peak_mib'])} MiB."
        )
        if result.on_gpu:
            sentences.append(
                f"That is the time of the GPU, as in a graph or behind a network's; the host takes "
                f"{number(ours['wall_ms'])} ms to call it, where eager PyTorch takes "
                f"{number(eager['wall_ms'])} ms."
            )
    if not any(result.on_gpu for result in results):
        sentences.append("**On a GPU, not timed yet**: the kernels are tested and compiled, no more.")
    return " ".join(sentences)


def readme_section(result: Result) -> str:
    """Every loss and dtype at one size, speed-ups at all sizes, where peers are ahead, and the plots."""
    pictures = (
        f"![{title}]({os.path.relpath(result.beside(suffix), README.parent)})"
        for title, suffix in (
            ("Time of a step against the number of keys", "-time.png"),
            ("Peak memory of a step against the number of keys", "-memory.png"),
        )
    )
    return "\n\n".join(
        (
            headline_table(result, result.values("loss")),
            "Speed-ups over eager PyTorch / over torch.compile at other sizes, B × K:",
            *speed_ups(result),
            peers_ahead(result),
            *pictures,
        )
    )


def drop_in_section(page: str, results: Iterable[Result]) -> str:
    """The losses of a page of docs/drop_in on each machine that has measured them, and where to read more."""
    sections = []
    for result in results:
        if losses := [loss for loss in DROP_INS[page] if loss in result.values("loss")]:
            report = os.path.relpath(result.beside(".md"), DROP_IN)
            sections += [
                headline_table(result, losses),
                f"[All sizes, and how they were measured]({report}).",
            ]
    return "\n\n".join(sections)


def headline_table(result: Result, losses: Iterable[str]) -> str:
    """Losses in every dtype at the size that the README tells of, beside their peers."""
    headlines = {
        loss: {"loss": loss, "D": README_DIM} | dict(zip("BK", PROBLEMS[loss].headline, strict=True))
        for loss in losses
    }
    told = {impl for where in headlines.values() for impl in result.impls(**where)}
    impls = [impl for impl in result.impls() if impl in told]
    rows = []
    for loss, where in headlines.items():
        partial = [peer for each, peer in WITHOUT_CONSISTENCY_GRADIENT if each == loss]
        for dtype in result.values("dtype", **where):
            (records,) = result.sizes(dtype=dtype, **where).values()
            size = f"{where['B']:,} × {where['K']:,}, {dtype}"
            rows.append((f"{LOSSES[loss]}, {size}", *spent(records, impls, records.keys() - set(partial))))
            rows += [
                (f"{LOSSES[loss]} by {PARTIAL[peer]}, {size}", *spent(records, impls, {peer}))
                for peer in partial
                if peer in records
            ]
        grid = GRIDS["cuda" if result.on_gpu else "cpu"].peers[loss]
        unmeasured = [peer for peer in partial if peer in grid and peer not in result.values("impl", **where)]
        rows += [(f"{LOSSES[loss]} by {PARTIAL[peer]}", *spent({}, impls, ())) for peer in unmeasured]
    return "\n\n".join(
        (
            table(("", *map(label, impls), "speed-up over eager"), rows),
            f"Forward and backward of B rows against K (B × K), D = {README_DIM}: median time, and peak "
            f"memory beyond the input. {result.caption}.",
        )
    )


def spent(records: Records, impls: Iterable[str], told: Collection[str]) -> list[str]:
    """Cells of time and memory, and the speed-up over eager PyTorch; of what is not to be told a dash."""
    cells = [
        f"{number(records[impl]['ms'])} ms, {number(records[impl]['peak_mib'])} MiB" if impl in told else "–"
        for impl in impls
    ]
    return [*cells, speed_up(records, "eager") if "eager" in told else "–"]


def speed_ups(result: Result) -> Iterator[str]:
    """A table of each group of losses that were measured at the same sizes."""
    groups: dict[tuple, list[str]] = {}
    for loss in result.values("loss", D=README_DIM):
        sizes = result.sizes(loss=loss, impl="eager", D=README_DIM)
        groups.setdefault(tuple(sizes), []).append(loss)
    for sizes, losses in groups.items():
        rows = []
        for loss in losses:
            for dtype in result.values("dtype", loss=loss, D=README_DIM):
                measured = result.sizes(loss=loss, dtype=dtype, D=README_DIM)
                cells = (
                    " / ".join(speed_up(measured.get(size, {}), peer) for peer in ("eager", "compile"))
                    for size in sizes
                )
                rows.append((f"{LOSSES[loss]}, {dtype}", *cells))
        yield table(("", *(f"{batch:,} × {keys:,}" for batch, keys in sizes)), rows)


def peers_ahead(result: Result) -> str:
    """Where a peer is faster than the fastest fused implementation, of all that was measured."""
    ahead = [
        f"{label(peer)} at {LOSSES[loss]}, {batch:,} × {keys:,}, {dtype} ({speed_up(records, peer)})"
        for loss in result.values("loss", D=README_DIM)
        for dtype in result.values("dtype", loss=loss, D=README_DIM)
        for (batch, keys), records in result.sizes(loss=loss, dtype=dtype, D=README_DIM).items()
        for peer in records.keys() & PEERS.keys()
        if records[peer]["ms"] < min(r["ms"] for impl, r in records.items() if impl not in PEERS)
    ]
    if not ahead:
        return "No peer is ahead at any of these sizes."
    return f"Not ahead of: {'; '.join(sorted(ahead))}."


def demo_section(rows: list[dict]) -> str:
    """What features are worth, as `train_ref` leaves it: a row a measure, a column a network."""
    header, *measures = evaluation.cells(rows)
    return table(header, measures)


def label(impl: str) -> str:
    return PEERS.get(impl, f"fused ({impl})")


def cell(records: Records, impl: str, field: str) -> str:
    record = records.get(impl, {})
    is_partial = field == "ms" and (record.get("loss"), impl) in WITHOUT_CONSISTENCY_GRADIENT
    return number(record.get(field)) + (" (no gradient of CO2's term)" if is_partial else "")


def number(value: float | None) -> str:
    """Three digits, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def speed_up(records: Records, peer: str, field: str = "ms") -> str:
    """How many times as fast as a peer the fastest fused implementation is."""
    fused = [r[field] for impl, r in records.items() if impl not in PEERS]
    return f"{records[peer][field] / min(fused):.1f} ×" if fused and peer in records else "–"


# Plots


def plot(result: Result, field: str, title: str, unit: str) -> Figure:
    """`field` against K on logarithmic axes, a panel for each dtype."""
    dtypes = result.values("dtype", **PLOTTED)
    figure = Figure(figsize=(5 * len(dtypes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        draw(axes, result, dtype, field)
        axes.set_title(dtype)
    panels[0].set_ylabel(unit)
    figure.suptitle(
        f"{title}, forward and backward: {LOSSES[PLOTTED['loss']]}, B = {PLOTTED['B']}, D = {PLOTTED['D']}",
        weight="bold",
    )
    figure.supxlabel(result.caption, fontsize=8, color="0.4")
    return figure


def draw(axes: Axes, result: Result, dtype: str, field: str) -> None:
    """One panel: a line for each implementation, and the reference that goes with the field."""
    sizes = {keys: records for (_, keys), records in result.sizes(dtype=dtype, **PLOTTED).items()}
    compared = {keys: records for keys, records in sizes.items() if PEERS.keys() & records.keys()} or sizes
    if field == "ms":
        sizes = compared  # beyond them time only goes on along its line
        floor = {keys: next(iter(records.values()))["floor_ms"] for keys, records in sizes.items()}
        reference(axes, floor, "floor")
    else:
        mib = PLOTTED["B"] * {"float32": 4, "bfloat16": 2}[dtype] / 2**20
        reference(axes, {keys: keys * mib for keys in compared}, "one B×K matrix")

    fused_colors = iter(FUSED_COLORS)
    for impl in result.impls(dtype=dtype, **PLOTTED):
        measured = {keys: records[impl][field] for keys, records in sizes.items() if impl in records}
        points = [(keys, value) for keys, value in measured.items() if value is not None]
        color, width = (PEER_COLORS[impl], 1.5) if impl in PEERS else (next(fused_colors), 2.5)
        axes.plot(*zip(*points, strict=True), color=color, linewidth=width, marker="o", markersize=5)
        end = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        name = label(impl)
        if field == "ms" and impl not in PEERS:
            name += f"\n{speed_up(sizes[points[-1][0]], 'eager')} vs eager"
        axes.annotate(name, points[-1], color=color, **end)

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(sizes), [f"{keys:,}" for keys in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("keys in the queue, K")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def reference(axes: Axes, values: dict[int, float], name: str) -> None:
    """A thin dashed line, its name below its middle."""
    points = list(values.items())
    axes.plot(*zip(*points, strict=True), color="0.35", linestyle="--", linewidth=1)
    below = {"xytext": (10, -4), "textcoords": "offset points", "va": "top"}
    axes.annotate(name, points[len(points) // 2], color="0.35", size=9, **below)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results in JSON")
    parser.add_argument(
        "--readme", action="store_true", help="put their tables and the demo's into README.md and docs"
    )
    arguments = parser.parse_args()
    files = arguments.files or [result.path for result in newest_results()]
    if not files:
        raise SystemExit(f"there are no results in {RESULTS}; `python -m bench` makes some")
    for path in files:
        write(path)
    if arguments.readme:
        results = [Result(path) for path in files]
        replace_in_readme("headline", readme_headline(results))
        replace_in_readme("benchmark", "\n\n".join(map(readme_section, results)))
        if demo := newest_result("-demo"):
            replace_in_readme("demo", demo_section(json.loads(demo.read_text(encoding="utf-8"))))
        for page in DROP_INS:
            replace(DROP_IN / f"{page}.md", {"measured": drop_in_section(page, results)})


if __name__ == "__main__":
    main()
