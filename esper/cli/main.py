"""The `esper` command.

Exit codes: 0 done; 1 it ran and found something wrong (`doctor`, `bench`, `simulate`), or a
fault of esper's own, with a traceback; 2 wrong usage, configuration, data or library, with
one message; 130 interrupted by the user.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from esper.errors import ContractError, EsperError

EXIT_CODES = """exit codes:
  0    done
  1    doctor or bench found something wrong, a promise of simulate was broken, or esper
       itself failed (with a traceback)
  2    wrong usage, configuration, data or library; one message says which
  130  interrupted
"""


def _train(options: argparse.Namespace) -> int:
    from esper.cli.config import load_config
    from esper.cli.train import run

    path = Path(options.config)
    return run(load_config(path), path)


def _doctor(options: argparse.Namespace) -> int:
    from esper import doctor

    checks = doctor.collect()
    print(doctor.render(checks))
    return int(any(check.ok is False for check in checks))


def _library(options: argparse.Namespace) -> int:
    from rich.console import Console

    from esper.cli.library import list_library, open_library, show

    # In a pipe there is no width to fit into, and a cut-off id is of no use to anyone.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    library = open_library(options.library)
    if options.action == "show":
        show(library, console, options.id, options.json)
    else:
        list_library(library, console, signature=options.signature, status=options.status,
                     tag=options.tag, blueprints=options.blueprints)
    return 0


def _report(options: argparse.Namespace) -> int:
    from esper.nissa.report import write_report

    print(write_report(Path(options.folder)))
    return 0


def _simulate(options: argparse.Namespace) -> int:
    from esper.cli.simulate import run

    path = Path(options.load)
    return run(path, Path(options.out) if options.out else Path("runs") / path.stem)


def _bench(options: argparse.Namespace) -> int:
    from rich.console import Console

    from esper.cli import bench

    console = Console()
    if options.self_test:
        return bench.self_test(console, options.self_test)
    if not options.kernels:
        raise ContractError("which kernels? give ids from `esper library ls`, or artifact files")
    found = bench.bench(
        options.kernels, library=options.library, folder=options.out, thorough=not options.quick,
        tell=lambda line: console.print(line, highlight=False, markup=False),
    )
    console.print(found.page, found.data, sep="\n", highlight=False, soft_wrap=True)
    return int(not all(r.accepted for r in found.reports))


def _bench_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kernels", nargs="*", metavar="KERNEL",
                        help="an id in the library, or the start of one, or an artifact file")
    parser.add_argument("--library", metavar="FOLDER",
                        default=os.environ.get("ESPER_LIBRARY", "library"),
                        help="default: $ESPER_LIBRARY, else ./library")
    parser.add_argument("--out", metavar="FOLDER", default="bench",
                        help="where bench.html and bench.json go; default: ./bench")
    parser.add_argument("--quick", action="store_true",
                        help="two batch sizes and no torch.compile: ten seconds a kernel instead "
                        "of minutes")
    parser.add_argument("--self-test", type=int, nargs="?", const=100, metavar="RUNS",
                        help="compare one thing with itself, 100 times by default, and print how "
                        "often the bench calls that a difference")
    parser.set_defaults(run=_bench)


def _library_parser(parser: argparse.ArgumentParser) -> None:
    from esper.leyline.lifecycle import BlueprintStatus, KernelStatus

    actions = parser.add_subparsers(dest="action", required=True, metavar="ls | show")
    ls = actions.add_parser("ls", help="list kernels, or blueprints")
    ls.add_argument("--signature", metavar="TEXT",
                    help='words of a site such as "map[8]" or "tokens float32 causal", or the '
                    "start of a signature's id")
    ls.add_argument("--status", choices=[str(s) for s in (*KernelStatus, *BlueprintStatus)],
                    metavar="STATUS",
                    help=f"{', '.join(KernelStatus)}; or of blueprints: "
                    f"{', '.join(BlueprintStatus)}")
    ls.add_argument("--tag", help="only kernels with this tag")
    ls.add_argument("--blueprints", action="store_true", help="blueprints instead of kernels")
    show = actions.add_parser("show", help="all that is known of one kernel or blueprint")
    show.add_argument("id", metavar="ID", help="an id, or the start of one")
    show.add_argument("--json", action="store_true", help="the whole record, raw samples too")
    for action in (ls, show):
        action.add_argument("--library", metavar="FOLDER",
                            default=os.environ.get("ESPER_LIBRARY", "library"),
                            help="default: $ESPER_LIBRARY, else ./library")
        action.set_defaults(run=_library)


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
    train.set_defaults(run=_train)
    doctor = commands.add_parser("doctor", help="what this machine has and what esper can do on it")
    doctor.set_defaults(run=_doctor)
    _bench_parser(commands.add_parser(
        "bench", help="prove and measure kernels; writes a page, and JSON for pytest-benchmark"))
    _library_parser(commands.add_parser("library", help="look at blueprints and kernels"))
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
