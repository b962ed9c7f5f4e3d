"""What is promised of a classifier of many instances, measured.

python -m pytest bench/test_classifier_promises.py -s
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.instances import COUNTS, training_steps

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_does_not_grow_with_the_instances(device: str) -> None:
    """With 10,000,000 of them it takes at most 1.1 times as long as with 100,000."""
    records = {record["N"]: record["ms"] for record in training_steps(device, "device", rounds=20)}
    print("\n" + ", ".join(f"N = {count:,}: {records[count]:.1f} ms" for count in COUNTS))
    assert records[10_000_000] <= 1.1 * records[100_000]


BILLION = """
import os, sys, time, torch
from pathlib import Path
from train_ref.memory import resident_mib
from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss
start = time.perf_counter()
classifier = InstanceClassifier(10**9, 128, active=65536, storage="disk", path=sys.argv[1] + "/rows")
opened = time.perf_counter() - start
optimizer, file, losses = DelayedSGD(classifier), Path(sys.argv[1], "checkpoint.pt"), []
if file.exists():
    state = torch.load(file, weights_only=True)
    classifier.load_state_dict(state["classifier"])
    losses = state["losses"]
print("training", flush=True)
while len(losses) < int(sys.argv[2]):
    generator = torch.Generator().manual_seed(len(losses))
    target = classifier.activate(torch.randint(10**9, (512,), generator=generator))
    views = torch.randn(2, 512, 128, generator=generator)
    loss = conic_loss(views, classifier.weight, target, num_instances=10**9)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if len(losses) % 20 == 0:
        torch.save({"classifier": classifier.state_dict(), "losses": losses}, sys.argv[1] + "/new.pt")
        os.replace(sys.argv[1] + "/new.pt", file)
print(opened, resident_mib("VmHWM"))
"""


def test_a_billion_rows_on_disk(tmp_path: Path) -> None:
    """Opened within 5 s, trained for 200 steps of 512 instances in less than a GiB of memory, on no more disk
    than the written rows need, killed on the way, and resumed exactly."""
    steps = 200

    def command(folder: str) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return [sys.executable, "-c", BILLION, str(tmp_path / folder), str(steps)]

    whole = subprocess.run(command("whole"), capture_output=True, text=True, check=True)
    opened, memory_mib = map(float, whole.stdout.split()[1:])
    rows = list((tmp_path / "whole" / "rows").rglob("*"))
    on_disk = sum(file.stat().st_blocks * 512 for file in rows)
    apparent = sum(file.stat().st_size for file in rows)

    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(5, 25))
        if kills == 4 or process.poll() is not None:
            process.wait()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    losses = [torch.load(tmp_path / folder / "checkpoint.pt")["losses"] for folder in ("whole", "killed")]
    print(
        f"\nopened in {opened:.2f} s, {memory_mib:.0f} MiB of memory at the peak, "
        f"{on_disk / 2**20:.0f} MiB of disk for {apparent / 2**30:.0f} GiB of files, killed {kills} times"
    )
    assert opened < 5
    assert memory_mib < 1024
    assert on_disk <= 5 * steps * 512 * (8 + 8 * 128)  # the database at work, and its generations
    assert kills > 0
    assert len(losses[0]) == steps
    assert losses[0] == losses[1]
