"""What a number must carry to be read later: the machine, the software and the day."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version

import torch

from stillhouse import ops

LEVELS = ("baseline", "avx2", "avx512")  # by the number that ops.cpu_level() returns


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return name


def describe(device: str = "cpu") -> dict[str, str]:
    """The columns that every row of the CSV has, whatever was measured."""
    if device != "cpu":
        return describe() | {"cpu": torch.cuda.get_device_name(), "level": device}
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu_name(),
        "level": LEVELS[ops.cpu_level()],
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "stillhouse": version("stillhouse"),
        "date": datetime.date.today().isoformat(),
    }
