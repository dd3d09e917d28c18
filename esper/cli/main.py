"""The `esper` command.

Exit codes: 0 done; 1 it ran and found something wrong (`doctor`, `bench`, `simulate`, `library
check`, a failed run of `evaluate`), or a fault of esper's own, with a traceback; 2 wrong usage,
configuration, data or library, with one message; 130 interrupted by the user.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from esper.cli.parsers import (
    bench_parser,
    evaluate_parser,
    events_parser,
    library_parser,
    serve_parser,
    simic_parser,
    status_parser,
    worker_parser,
)
from esper.errors import EsperError

EXIT_CODES = """exit codes:
  0    done
  1    doctor, bench or library check found something wrong, a promise of simulate was broken,
       a run of evaluate failed, or esper itself failed (with a traceback)
  2    wrong usage, configuration, data or library; one message says which
  130  interrupted
"""


def _train(options: argparse.Namespace) -> int:
    from esper.cli.config import load_config
    from esper.cli.train import run

    path = Path(options.config)
    return run(load_config(path), path, Path(options.resume) if options.resume else None)


def _doctor(options: argparse.Namespace) -> int:
    from esper import doctor

    checks = doctor.collect()
    print(doctor.render(checks))
    return int(any(check.ok is False for check in checks))


def _report(options: argparse.Namespace) -> int:
    from esper.nissa.report import write_report

    print(write_report(Path(options.folder)))
    return 0


def _simulate(options: argparse.Namespace) -> int:
    from esper.cli.simulate import run

    path = Path(options.load)
    return run(path, Path(options.out) if options.out else Path("runs") / path.stem)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="esper", description="Neural networks that grow while they train.",
        epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_const", dest="run", const=_doctor,
                     help="print the versions of esper and of all it stands on, as doctor does")
    commands = top.add_subparsers(metavar="COMMAND")
    train = commands.add_parser("train", help="train a model as a YAML file says")
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument("--resume", metavar="RUN",
                       help="go on with an interrupted run from its newest checkpoint: the run's "
                       "folder, or one of its checkpoints")
    train.set_defaults(run=_train)
    doctor = commands.add_parser("doctor", help="what this machine has and what esper can do on it")
    doctor.set_defaults(run=_doctor)
    bench_parser(commands.add_parser(
        "bench", help="prove and measure kernels; writes a page, and JSON for pytest-benchmark"))
    evaluate_parser(commands.add_parser(
        "evaluate", help="what growth buys, beside everything that could explain it away"))
    library_parser(commands.add_parser("library", help="look at blueprints and kernels"))
    serve_parser(commands.add_parser(
        "serve", help="offer a library to workers and trainers elsewhere"))
    worker_parser(commands.add_parser(
        "worker", help="invent, compile or examine kernels for a library elsewhere"))
    status_parser(commands.add_parser(
        "status", help="queues, capacity, who works on what, and what came of it"))
    simic_parser(commands.add_parser(
        "simic", help="train the policy that learns from field reports, and look at its versions"))
    events_parser(commands.add_parser(
        "events", help="what happens in a library and in the runs that use it, as JSON"))
    simulate = commands.add_parser(
        "simulate", help="replay a load against the queue policy and check what it promises")
    simulate.add_argument("load", metavar="LOAD.yaml")
    simulate.add_argument("--out", metavar="FOLDER",
                          help="where load.html and load.json go; default: runs/<name of the file>")
    simulate.set_defaults(run=_simulate)
    report = commands.add_parser("report", help="write report.html for a run folder")
    report.add_argument("folder", metavar="RUN", help="the folder of a run")
    report.set_defaults(run=_report)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    top = parser()
    options = top.parse_args(arguments)
    if options.run is None:
        top.error("which command? see esper --help")
    try:
        return int(options.run(options))
    except EsperError as e:
        print(f"esper: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("esper: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `esper library ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
