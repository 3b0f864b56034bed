"""What each scope of torch.compile costs at the start of a training run, and gives a step: `TrainConfig.compile_scope`.

    python -m benchmarks.compile_scope --out benchmarks/results/cpu/compile_scope.json

The demo's model on the demo's digits; forward, backward and update. Every scope in a process of its own with an empty
cache. `nested`: the whole graph, in which torch.compiler.nested_compile_region holds the blocks; not offered, measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from sora_fast.demo.digits import MovingDigits
from sora_fast.demo.run import FULL, run_config
from sora_fast.training import optim
from sora_fast.training.compiling import compile_loss
from sora_fast.training.data.batches import Batches
from sora_fast.training.run import Networks
from sora_fast.training.step import PackLoss, drawn, take_gradients, update

SCOPES = ("eager", "blocks", "nested", "model")
STEPS = 24


def measure(scope: str) -> dict[str, object]:
    """Seconds of the first step and of those after it."""
    config = run_config(FULL)
    networks, generator = Networks(config), torch.Generator()
    source = MovingDigits(seed=0)
    batches = Batches(
        source, config.train.batch, patch_size=networks.patch_size, codec=networks.codec, text=networks.text
    )
    packs = [drawn(batch, config.path, generator, (0, n, 0), 0.3) for n, batch in enumerate(islice(iter(batches), 6))]
    loss_of, blocks = PackLoss(networks, "float32"), networks.model.blocks
    if scope == "nested":
        _mark(type(blocks[0]))
    if scope != "eager":
        whole = "model" if scope == "nested" else scope
        compile_loss(loss_of, blocks, backend="inductor", scope=whole, device=torch.device("cpu"))
    parameters = networks.trained()
    optimizers = optim.build_optimizers(parameters, "muon", lr=1e-3)
    average = optim.WeightAverage(parameters, 0.99)
    seconds = []
    for step in range(1 + STEPS):
        began = time.perf_counter()
        loss = take_gradients(loss_of, [packs[step % len(packs)]], list(parameters.values()))
        average.set_step(step)
        update(parameters, optimizers, average, loss, clip_norm=1.0)
        seconds.append(time.perf_counter() - began)
    steps = seconds[1:]
    return {"scope": scope, "first": seconds[0], "step": statistics.median(steps), "steps": steps, "loss": loss.item()}


def _mark(kind: type[nn.Module]) -> None:
    """Hold the blocks to be one region, compiled once. It takes no arguments that are views of one tensor."""
    region = torch.compiler.nested_compile_region(kind.forward)

    def forward(self: nn.Module, x: Tensor, h: Tensor, *tables_and_shared: Any) -> tuple[Tensor, Tensor]:
        modulation, following, shared = tables_and_shared
        copies = [tuple(table.clone() for table in tables) for tables in (modulation, following)]
        return region(self, x, h, *copies, shared)

    kind.forward = forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--scope", choices=SCOPES, help="this one, here, in this process")
    arguments = parser.parse_args()
    if arguments.scope is not None:
        print(json.dumps(measure(arguments.scope)))
        return
    results = []
    for scope in SCOPES:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "benchmarks.compile_scope", "--scope", scope]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            )
        failed = {"scope": scope, "failed": done.stderr.strip().splitlines()[-1:]}
        results.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed)
        print({name: value for name, value in results[-1].items() if name != "steps"}, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"environment": environment(), "scopes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
