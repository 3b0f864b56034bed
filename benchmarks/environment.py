"""Where numbers come from: versions, commit, the device and what it reaches at best."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from benchmarks._checkout import ROOT
from benchmarks.timing import Timing, time_variants
from sora_fast.ops._records import package_version


def environment(commit: str | None = None) -> dict[str, Any]:
    """A JSON-ready record. commit: what to record where the checkout carries no git data."""
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        **versions(),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        asked = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        record["device"] = device.name
        record["multiprocessors"] = device.multi_processor_count
        record["memory_bytes"] = device.total_memory
        record["nvidia_smi"] = _output("nvidia-smi", "-i", "0", f"--query-gpu={asked}", "--format=csv")
    else:
        record["device"] = _cpu()
        record["threads"] = torch.get_num_threads()
    return record


def versions() -> dict[str, str | None]:
    """Of what computes."""
    return {"torch": torch.__version__, "triton": package_version("triton"), "cuda": torch.version.cuda}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches when nothing is in its way."""

    gigabytes_per_second: float  # a copy, bytes read and written
    teraflops: float  # one large square matrix product on random data, bf16 on a GPU, fp32 on a CPU

    @staticmethod
    def measure(device: torch.device) -> "Ceilings":
        """Copy and multiply; on a GPU tensors of 2 GiB and 8192 × 8192, on a CPU of 64 MiB and 1024 × 1024."""
        on_gpu = device.type == "cuda"
        dtype, elements, side = (torch.bfloat16, 1 << 30, 8192) if on_gpu else (torch.float32, 1 << 24, 1024)
        source = torch.ones(elements, dtype=dtype, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        work = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
        rounds = time_variants(work, device=device, seconds=1.0, max_samples=20)
        times = {name: Timing.of(samples).median for name, samples in rounds.items()}
        return Ceilings(
            gigabytes_per_second=2 * source.nbytes / times["copy"] / 1e6,
            teraflops=2 * side**3 / times["product"] / 1e9,
        )


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if head and changed else head or "unknown"


def _output(*command: str) -> str:
    """What `command` prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
