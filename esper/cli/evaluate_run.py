"""`python -m esper.cli.evaluate_run`: one run of `esper evaluate`, in a process of its own."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import esper
from esper.cli.evaluate_config import experiment_of, load
from esper.errors import EsperError
from esper.evaluation.arms import train
from esper.evaluation.kernels import copy_library
from esper.evaluation.store import Store
from esper.slowtrack import end_with
from esper.urabrask.machine import hardware


def result(config: Path, arm: str, seed: int, kernels: Path | None, work: Path) -> dict[str, Any]:
    """What the run left behind; a failure is one of its possible results."""
    torch.set_num_threads(1)
    made: dict[str, Any] = {
        "versions": {"esper": esper.__version__, "torch": str(torch.__version__),
                     "numpy": version("numpy"), "python": sys.version.partition(" ")[0]},
        "hardware": hardware().model_dump(mode="json"), "started": time.time(),
    }
    try:
        experiment = experiment_of(load(config), config)
        library = None if kernels is None else copy_library(kernels, work)
        return {**made, "failure": None, **train(experiment, arm, seed, library)}
    except EsperError as e:
        return {**made, "failure": str(e)}
    except Exception:
        return {**made, "failure": traceback.format_exc()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m esper.cli.evaluate_run")
    parser.add_argument("config", type=Path)
    parser.add_argument("arm")
    parser.add_argument("seed", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--identity", required=True)
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    end_with(options.parent)
    # On the file system of the library, so that its blobs can be linked.
    work = options.folder / "work" / f"{options.arm}-{options.seed}"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    made = result(options.config, options.arm, options.seed, options.kernels, work)
    shutil.rmtree(work, ignore_errors=True)
    Store(options.folder).write(options.arm, options.seed,
                                {"identity": json.loads(options.identity), **made})


if __name__ == "__main__":
    main()
