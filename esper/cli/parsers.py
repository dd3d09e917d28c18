"""The parsers of the larger commands: library, bench, evaluate, serve, worker, status, events,
simic.

What a command does is imported when it runs, so that `esper --help` stays quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.errors import ContractError
from esper.rpc.address import SOCKET

_LIBRARY = "default: $ESPER_LIBRARY, else ./library"


def _default_folder() -> str:
    return os.environ.get("ESPER_LIBRARY", "library")


def _access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token-file", metavar="FILE", type=Path,
                        help="for HOST:PORT, the file that holds the bearer token (chmod 600)")
    parser.add_argument("--tls-ca", metavar="PEM", type=Path,
                        help="for HOST:PORT, check the server's certificate against these "
                        "authorities (default: those that gRPC brings)")


def _console() -> Any:
    from rich.console import Console

    # In a pipe there is no width to fit into, and a cut-off id is of no use to anyone. Names and
    # reasons come from anywhere, and brackets in them are no markup.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)


def _library(options: argparse.Namespace) -> int:
    from esper.cli import curation, families, library, lineage
    from esper.cli.places import existing_folder, existing_library

    console = _console()
    if options.action == "check":
        return curation.check(existing_folder(options.library), console)
    held = existing_library(options.library, options.token_file, options.tls_ca)
    match options.action:
        case "ls":
            library.list_library(held, console, signature=options.signature,
                                 status=options.status, tag=options.tag,
                                 blueprints=options.blueprints)
        case "query":
            library.query(held, console, options.tag, options.signature, options.json)
        case "show":
            library.show(held, console, options.id, options.json)
        case "lineage":
            lineage.show_lineage(held, console, options.id)
        case "families":
            families.show_families(held, console, options.signature, options.html)
        case "archive":
            curation.archive(held, console, options.id, options.reason)
    return 0


def library_parser(parser: argparse.ArgumentParser) -> None:
    """`esper library ls | query | show | lineage | families | archive | check`."""
    from esper.leyline.lifecycle import BlueprintStatus, KernelStatus

    site = ('words of a site such as "map[8]" or "tokens float32 causal", or the start of a '
            "signature's id")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser("ls", help="list kernels, or blueprints")
    ls.add_argument("--signature", metavar="TEXT", help=site)
    ls.add_argument("--status", choices=[str(s) for s in (*KernelStatus, *BlueprintStatus)],
                    metavar="STATUS",
                    help=f"{', '.join(KernelStatus)}; or of blueprints: "
                    f"{', '.join(BlueprintStatus)}")
    ls.add_argument("--tag", help="only kernels with this tag")
    ls.add_argument("--blueprints", action="store_true", help="blueprints instead of kernels")
    query = actions.add_parser("query", help="VALIDATED kernels for a site, the fastest first")
    query.add_argument("--tag", action="append", default=[],
                       help="only kernels with this tag; given again, with all of them")
    query.add_argument("--signature", metavar="TEXT", help=site)
    query.add_argument("--json", action="store_true", help="the whole records, raw samples too")
    show = actions.add_parser("show", help="all that is known of one kernel or blueprint")
    show.add_argument("--json", action="store_true", help="the whole record, raw samples too")
    lineage = actions.add_parser("lineage", help="who descends from what, and how each fared")
    families = actions.add_parser(
        "families", help="Karn's report: what each family has earned and has on offer")
    families.add_argument("--signature", metavar="TEXT", help=site)
    families.add_argument("--html", metavar="FILE", type=Path,
                          help="write it as a page too, with every family's tree")
    archive = actions.add_parser(
        "archive", help="take a blueprint or a kernel out of use for good; nothing is deleted")
    archive.add_argument("--reason", default="archived by hand", help="kept in its history")
    for action in (show, lineage, archive):
        action.add_argument("id", metavar="ID", help="an id, or the start of one")
    check = actions.add_parser("check", help="read every artifact, look for damage and orphans")
    check.add_argument("--library", metavar="FOLDER", default=_default_folder(), help=_LIBRARY)
    for action in (ls, query, show, lineage, families, archive):
        action.add_argument("--library", metavar="WHERE", default=_default_folder(),
                            help=f"a folder, or the address of an esper serve; {_LIBRARY}")
        _access(action)
    parser.set_defaults(run=_library)


def _serve(options: argparse.Namespace) -> int:
    from esper.cli.serve import run

    return run(options)


def serve_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--library", metavar="FOLDER", default=_default_folder(),
                        help=f"created where missing; {_LIBRARY}")
    parser.add_argument("--listen", metavar="ADDRESS",
                        help="unix:/path/to.sock, open to its owner alone, or HOST:PORT; default: "
                        f"unix:FOLDER/{SOCKET}")
    parser.add_argument("--tls-cert", metavar="PEM", type=Path, help="for HOST:PORT, required")
    parser.add_argument("--tls-key", metavar="PEM", type=Path, help="for HOST:PORT, required")
    parser.add_argument("--tokens", metavar="FILE", type=Path,
                        help="for HOST:PORT, required: a YAML list of {name, token, roles}, roles "
                        "being reader, trainer, worker, admin (chmod 600)")
    parser.set_defaults(run=_serve)


def _up_to(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        given = int(text)
        if not 1 <= given <= most:
            raise argparse.ArgumentTypeError(f"between 1 and {most}, given {given}")
        return given

    return number


def _worker(options: argparse.Namespace) -> int:
    from esper.cli.worker import run

    given = [n for n in ("pipeline", "cuda_arch") if getattr(options, n) is not None]
    if given and options.role != "tezzeret":
        raise ContractError(f"--{given[0].replace('_', '-')} is for tezzeret, not {options.role}")
    return run(options)


def worker_parser(parser: argparse.ArgumentParser) -> None:
    from esper.leyline.artifact import Pipeline
    from esper.leyline.launch import SHARED_LIMITS

    parser.add_argument("role", choices=("karn", "tezzeret", "urabrask"), metavar="ROLE",
                        help="karn invents blueprints, tezzeret compiles them, urabrask proves "
                        "and measures kernels")
    parser.add_argument("--urza", metavar="ADDRESS", required=True,
                        help="where esper serve listens: unix:/path/to.sock or HOST:PORT")
    parser.add_argument("--concurrency", metavar="N", type=_up_to(256), default=1,
                        help="items at a time (default 1); measurements of urabrask disturb one "
                        "another where there are several")
    parser.add_argument("--pipeline", choices=[str(p) for p in Pipeline],
                        help="tezzeret: for all work, in place of its own choice")
    parser.add_argument("--cuda-arch", metavar="ARCH", choices=list(SHARED_LIMITS),
                        help="tezzeret: compile what Triton has a template for to this arch too, "
                        f"{' or '.join(SHARED_LIMITS)}, with a GPU or without; default: this "
                        "machine's GPU's, where there is one")
    _access(parser)
    parser.set_defaults(run=_worker)


def _status(options: argparse.Namespace) -> int:
    from esper.cli.places import existing_library
    from esper.cli.status import show

    held = existing_library(options.urza, options.token_file, options.tls_ca)
    show(held, _console(), options.urza)
    return 0


def status_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--urza", metavar="ADDRESS", default=_default_folder(),
                        help="where esper serve listens (unix:/path/to.sock or HOST:PORT), or a "
                        f"library's folder; {_LIBRARY}")
    _access(parser)
    parser.set_defaults(run=_status)


def _events(options: argparse.Namespace) -> int:
    from esper.cli.events import run

    return run(options)


def events_parser(parser: argparse.ArgumentParser) -> None:
    from esper.leyline.events import Topic

    parser.add_argument("--urza", metavar="ADDRESS", required=True,
                        help="where esper serve listens: unix:/path/to.sock or HOST:PORT")
    parser.add_argument("--name", required=True,
                        help="who listens: what happens while nobody does under this name is kept "
                        "for a day, and comes when it is used again")
    parser.add_argument("--topic", choices=[str(t) for t in Topic], metavar="TOPIC",
                        help=f"only events of this topic: {', '.join(Topic)}")
    _access(parser)
    parser.set_defaults(run=_events)


def _simic(options: argparse.Namespace) -> int:
    from esper.cli import simic
    from esper.cli.places import existing_folder

    held = existing_folder(options.library)
    (simic.train_policy if options.action == "train" else simic.status)(held, _console())
    return 0


def simic_parser(parser: argparse.ArgumentParser) -> None:
    """`esper simic train | status`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train", help="train the bandit from a library's field reports; promote it only where it "
        "beats the version before on held-out runs, outside the noise")
    status = actions.add_parser("status", help="what there is to learn from, and every version")
    for action in (train, status):
        action.add_argument("--library", metavar="FOLDER", default=_default_folder(),
                            help=_LIBRARY)
    parser.set_defaults(run=_simic)


def _bench(options: argparse.Namespace) -> int:
    from esper.cli import bench

    console = _console()
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


def bench_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `esper bench`."""
    parser.add_argument("kernels", nargs="*", metavar="KERNEL",
                        help="an id in the library, or the start of one, or an artifact file")
    parser.add_argument("--library", metavar="FOLDER",
                        default=_default_folder(), help=_LIBRARY)
    parser.add_argument("--out", metavar="FOLDER", default="bench",
                        help="where bench.html and bench.json go; default: ./bench")
    parser.add_argument("--quick", action="store_true",
                        help="two batch sizes and no torch.compile: ten seconds a kernel instead "
                        "of minutes")
    parser.add_argument("--self-test", type=_up_to(100_000), nargs="?", const=100, metavar="RUNS",
                        help="compare one thing with itself, 100 times by default, and print how "
                        "often the bench calls that a difference")
    parser.set_defaults(run=_bench)


def _evaluate(options: argparse.Namespace) -> int:
    from esper.cli.evaluate import run

    if options.arms and not options.tuning:
        raise ContractError("--arms goes with --tuning; what is reported has all arms")
    return run(options.configs, out=options.out, tuning=options.tuning, jobs=options.jobs,
               arms=options.arms.split(",") if options.arms else None)


def evaluate_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `esper evaluate`."""
    parser.add_argument("configs", metavar="CONFIG.yaml", nargs="+", type=Path,
                        help="what is evaluated, such as examples/evaluate/mnist1d.yaml")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("results"),
                        help="where FOLDER/NAME/report.html and results.json go; default: "
                        "./results. What is finished there is not run again")
    parser.add_argument("--jobs", metavar="N", type=_up_to(256),
                        help="runs at a time, on one core each; default: one for each core")
    parser.add_argument("--tuning", action="store_true",
                        help="on the tuning_seeds instead of the seeds, into FOLDER/NAME-tuning")
    parser.add_argument("--arms", metavar="ARM,ARM", help="with --tuning, only these arms")
    parser.set_defaults(run=_evaluate)
