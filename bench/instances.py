"""`python -m bench.instances`: what a classifier of many rows costs a step, wherever its rows live.

Writes `bench/results/<date>-<device>-instances.json` and a report beside it:

- a training step (activation, loss, backward, update) against the number of instances, beside the same step
  with all of them under torch.optim.SGD: its dense update alone, which is what grows;
- activation of a batch of new rows, in rows a second, on each tier of storage;
- what the disk's rows cost: fetching and keeping a batch, and a training step that reads ahead;
- the exchange of rows with their catch-up, and the update of the active rows, as kernels, beside what copying
  as many bytes takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import ceilings
from bench.files import replace_in_readme, result_file
from contrastive_ops import DelayedSGD, InstanceClassifier, _ops, conic_loss
from contrastive_ops._contract import SGDSettings
from contrastive_ops.classifier.history import History
from contrastive_ops.classifier.storage import Storage
from train_ref.machine import describe
from train_ref.markdown import table

DIM, ACTIVE, BATCH = 128, 65536, 512
COUNTS = (100_000, 1_000_000, 10_000_000)
TIERS = ("device", "host", "disk")
STEP = SGDSettings(lr=0.06, momentum=0.9, weight_decay=1e-4, nesterov=False)


def seconds(run: Callable[[], Any], rounds: int, device: str) -> list[float]:
    """What each round takes, after a first that warms up."""
    taken = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[1:]


class Training:
    """Steps of ConIC on random features, with new rows in every batch."""

    def __init__(self, count: int, device: str, **arguments: Any) -> None:
        self.classifier = InstanceClassifier(count, DIM, ACTIVE, device=device, **arguments)
        self.optimizer = DelayedSGD(self.classifier)
        self.generator = torch.Generator().manual_seed(0)
        # Instances in an order of their own, as a shuffled epoch has them.
        self.order = torch.randperm(count, generator=self.generator)
        self.at = 0
        self.views = torch.randn(2, BATCH // 2, DIM, device=device, requires_grad=True)

    def batch(self, size: int) -> torch.Tensor:
        if self.at + size > len(self.order):
            self.at = 0
        self.at += size
        return self.order[self.at - size : self.at]

    def activate(self) -> None:
        """A batch of rows, and the end of the step, so that the next may evict them."""
        self.classifier.activate(self.batch(BATCH))
        self.classifier.history.append(STEP)
        self.optimizer.zero_grad()

    def step_ahead(self) -> None:
        self.step(ahead=True)

    def step(self, ahead: bool = False) -> None:
        classifier = self.classifier
        target = classifier.activate(self.batch(BATCH // 2))
        if ahead:
            at = self.at if self.at + BATCH // 2 <= len(self.order) else 0
            classifier.prefetch(self.order[at : at + BATCH // 2])
        loss = conic_loss(self.views, classifier.weight, target, num_instances=classifier.num_instances)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.views.grad = None


def training_steps(device: str, tier: str, rounds: int) -> list[dict[str, Any]]:
    """Rounds in turns, so that a machine that slows down slows every count alike."""
    trainings = {count: Training(count, device, storage=tier) for count in COUNTS}
    times: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(rounds):
        for count, training in trainings.items():
            times[count] += seconds(training.step, 1, device)
    return [{"what": "step", "tier": tier, "N": n, **milliseconds(taken)} for n, taken in times.items()]


def dense_update(count: int, device: str, rounds: int) -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.randn(count, DIM, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.06, momentum=0.9, weight_decay=1e-4)
    return {"what": "dense update", "N": count, **milliseconds(seconds(optimizer.step, rounds, device))}


def activations(device: str, tier: str, count: int, batches: int) -> list[dict[str, Any]]:
    """Activating rows never seen before, and rows that were evicted once and have to be caught up."""
    with tempfile.TemporaryDirectory() as folder:
        path = folder if tier == "disk" else None
        training = Training(count, device, storage=tier, path=path)
        epoch = (batches + 1) * BATCH + ACTIVE  # so that all of the first rows are evicted again
        training.order = training.order[: -(-epoch // BATCH) * BATCH]
        new = seconds(training.activate, len(training.order) // BATCH - 1, device)
        old = seconds(training.activate, batches, device)
        training.classifier.close()
    return [
        {
            "what": f"activate {kind} rows",
            "tier": tier,
            "N": count,
            "rows_s": round(BATCH / statistics.median(taken)),
            **milliseconds(taken),
        }
        for kind, taken in (("new", new), ("old", old))
    ]


def fill(store: Storage, count: int) -> None:
    """Keep every row once."""
    for first in range(0, count, 4096):
        instances = np.arange(first, min(first + 4096, count))
        reserved, at = store.reserve(instances)
        reserved[at] = torch.randn(len(instances), 2, DIM)
        store.commit(instances, 0)
    store.state_dict()


def calls_of_stores(stores: dict[str, Storage], count: int, rounds: int) -> list[dict[str, Any]]:
    """Fetching and keeping a batch of rows that were kept before; the stores in turns, 20 ms each."""
    taken: dict[tuple[str, str], list[float]] = {}
    generator, records = np.random.default_rng(0), torch.randn(BATCH, 2, DIM)

    def timed(what: str, name: str, call: Callable[..., Any], *arguments: Any) -> None:
        start = time.perf_counter()
        call(*arguments)
        taken.setdefault((what, name), []).append(time.perf_counter() - start)

    def keep(store: Storage, instances: np.ndarray) -> None:
        reserved, at = store.reserve(instances)
        reserved[at] = records
        store.commit(instances, 0)

    for _ in range(rounds):
        for name, store in stores.items():
            now, ahead, gone = np.split(generator.choice(count, 3 * BATCH, replace=False), 3)
            timed("fetch", name, store.fetch, now)
            timed("announce", name, store.prefetch, ahead)
            time.sleep(0.02)  # a training step, which leaves the processors alone
            timed("fetch what was announced", name, store.fetch, ahead)
            timed("keep", name, keep, store, gone)
    return [
        {"what": what, "store": name, "N": count, **milliseconds(times)}
        for (what, name), times in taken.items()
    ]


def steps_that_read_ahead(trainings: dict[str, Training], device: str, rounds: int) -> list[dict[str, Any]]:
    """Training steps that announce the next batch's rows before the loss; the stores in turns."""
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            times[name] += seconds(training.step_ahead, 1, device)
    return [
        {"what": "step, reading ahead", "store": name, **milliseconds(taken)} for name, taken in times.items()
    ]


def disk(device: str, count: int, rounds: int) -> list[dict[str, Any]]:
    """What rows on disk cost that were all kept before, beside rows of the tier "device"."""
    with tempfile.TemporaryDirectory() as folder:
        trainings = {
            "device": Training(count, device),
            "disk": Training(count, device, storage="disk", path=folder),
        }
        classifier = trainings["disk"].classifier
        fill(classifier._storage, count)
        records = calls_of_stores({"disk": classifier._storage}, count, rounds * 15)
        records += steps_that_read_ahead(trainings, device, rounds)
        classifier.close()
    return records


def kernels(device: str, rounds: int, copy_gb_s: float) -> list[dict[str, Any]]:
    """The two operators alone; `floor_ms` is what copying their bytes takes."""
    history = History()
    for _ in range(10_000):
        history.append(STEP)
    weight, momentum, grad = (torch.randn(ACTIVE, DIM, device=device) for _ in range(3))
    count = 16384
    rows = torch.randn(10 * count, 2, DIM, device=device)
    every = torch.randperm(10 * count, device=device)
    slots, incoming, outgoing = torch.randperm(ACTIVE, device=device)[:count], every[:count], every[-count:]
    steps = torch.randint(10_000, (count,)).numpy()
    coefficients = torch.from_numpy(history.coefficients(steps)).to(device)
    records = []
    for what, moved, run in (
        (
            "exchange and catch up 16,384 rows",
            4 * count * 2 * DIM * 4,
            lambda: _ops.exchange_rows_(
                weight, momentum, slots, rows, incoming, coefficients, rows, outgoing, None
            ),
        ),
        (
            "update 65,536 rows",
            5 * ACTIVE * DIM * 4,
            lambda: _ops.sgd_(weight, momentum, grad, 0.06, 0.9, 1e-4, False, None),
        ),
        ("coefficients of 16,384 rows", 0, lambda: history.coefficients(steps)),
    ):
        floor = moved / copy_gb_s / 1e6
        taken = milliseconds(seconds(run, rounds, device))
        records.append({"what": what, "floor_ms": round(floor, 4), **taken})
    return records


def milliseconds(taken: list[float]) -> dict[str, Any]:
    return {"ms": round(statistics.median(taken) * 1e3, 4), "ms_all": [round(s * 1e3, 4) for s in taken]}


def report(result: dict[str, Any]) -> str:
    machine, records = result["machine"], result["records"]
    steps = [r for r in records if r["what"] == "step"]
    dense = {r["N"]: r["ms"] for r in records if r["what"] == "dense update"}
    rows = [(r["tier"], f"{r['N']:,}", f"{r['ms']:.1f}", f"{dense[r['N']]:.1f}") for r in steps]
    active = [
        (r["tier"], r["what"].split()[1], f"{r['ms']:.2f}", f"{r['rows_s']:,}")
        for r in records
        if "rows_s" in r
    ]
    stores = [(r["store"], r["what"], f"{r['ms']:.2f}") for r in records if "store" in r]
    alone = [(r["what"], f"{r['ms']:.2f}", f"{r['floor_ms']:.2f}") for r in records if "floor_ms" in r]
    parts = [
        f"# A classifier of many instances on {machine['device']}",
        f"torch {machine['torch']}, Python {machine['python']}; {machine['date']}; "
        f"commit {machine['commit']}. D = {DIM}, {ACTIVE:,} active rows, float32; medians.",
        f"A training step on {BATCH} views: activation, loss, backward, update. Beside it the update alone "
        "of torch.optim.SGD, if all rows were parameters.",
        table(("storage", "instances", "step, ms", "dense update alone, ms"), rows),
        f"Activation of {BATCH} rows that are not active, of {result['activated_of']:,} instances: new "
        "rows have their initial value, old ones were evicted and are caught up. Files are in the system's "
        "cache.",
        table(("storage", "rows", "ms", "rows a second"), active),
        f"Rows on disk that were all kept before, {BATCH} at a time, and a training step that announces the "
        "next one's rows:",
        table(("storage", "call", "ms"), stores),
        "The kernels alone, and what copying as many bytes takes:",
        table(("kernel", "ms", "copy, ms"), alone),
    ]
    return "\n\n".join(parts) + "\n"


def readme_section(result: dict[str, Any]) -> str:
    """A step against the number of instances."""
    records, machine = result["records"], result["machine"]
    steps = {r["N"]: r["ms"] for r in records if r["what"] == "step" and r["tier"] == "device"}
    dense = {r["N"]: r["ms"] for r in records if r["what"] == "dense update"}
    rows = [(f"{n:,}", f"{steps[n]:.0f} ms", f"{dense[n]:,.0f} ms") for n in steps]
    return "\n\n".join(
        (
            table(("instances", "training step", "update alone of torch.optim.SGD on all rows"), rows),
            f"Activation, loss, backward and update for {BATCH} views, {ACTIVE:,} active rows of {DIM} "
            f"dimensions in float32. {machine['device']}, {machine['threads']} threads; torch "
            f"{machine['torch']}, Python {machine['python']}; {machine['date']}.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.instances", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file (default: bench/results/…)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put its table into README.md, and stop")
    arguments = parser.parse_args()
    if arguments.readme:
        replace_in_readme(
            "classifier", readme_section(json.loads(arguments.readme.read_text(encoding="utf-8")))
        )
        return
    device, rounds = arguments.device, arguments.rounds
    machine = describe(device)
    copy_gb_s = ceilings.copy_gb_s(device)
    result: dict[str, Any] = {
        "machine": machine,
        "ceilings": {"copy_gb_s": copy_gb_s},
        "activated_of": COUNTS[1],
        "records": kernels(device, rounds, copy_gb_s),
    }
    for tier in TIERS:
        result["records"] += activations(device, tier, COUNTS[1], rounds * 5)
    result["records"] += disk(device, COUNTS[1], rounds)
    for tier in ("device", "host") if device == "cuda" else ("device",):
        result["records"] += training_steps(device, tier, rounds)
    for count in COUNTS:
        result["records"].append(dense_update(count, device, max(3, rounds // 4)))
    output = arguments.output or result_file(machine, "-instances")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
