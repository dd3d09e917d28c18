"""The house holds: imports point where docs/architecture.md lets them, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# Room -> rooms it may import. Errors, files and version are free for all.
ROOMS = {
    "leyline": set(),
    "oona": {"leyline"},
    "sandbox": set(),
    "urza": {"leyline", "oona"},
    "karn": {"leyline"},
    "tezzeret": {"leyline", "oona", "sandbox", "triton_kernels"},
    "kasmina": {"leyline", "triton_kernels"},
    "urabrask": {"leyline", "oona", "sandbox", "kasmina.artifact", "kasmina.native"},
    "tamiyo": {"leyline"},
    "simic": {"leyline", "tamiyo.bandit", "tamiyo.features"},
    "tolaria": {"leyline", "kasmina", "tamiyo"},
    "data": {"leyline", "kasmina.probe", "kasmina.rng"},
    "evaluation": {"leyline", "data", "kasmina", "tamiyo", "tolaria", "karn", "tezzeret",
                   "urabrask", "urza.library"},
    "integrations": {"tolaria", "kasmina.output"},
    "nissa": {"leyline", "oona"},
    "nn": {"leyline", "kasmina", "tezzeret", "urabrask", "urza.library", "triton_kernels"},
    "rpc": {"leyline", "urza", "oona"},
    "doctor": {"kasmina.native", "sandbox", "_C"},
}
COMPOSITION = {"cli", "slowtrack", "__init__"}  # these put the rooms together
FREE = {"errors", "files", "version"}

GENERATED = ("_pb2.py", "_pb2_grpc.py")
PACKAGE = sorted(p for p in (ROOT / "esper").rglob("*.py") if not p.name.endswith(GENERATED))


def imported(path: Path) -> set[str]:
    """What of esper a file imports, as dotted names below `esper`, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return {n.partition(".")[2] for n in names if n.partition(".")[0] == "esper"}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_the_table(path: Path) -> None:
    room = path.relative_to(ROOT / "esper").parts[0].removesuffix(".py")
    if room in COMPOSITION or room in FREE:
        return
    assert room in ROOMS, f"{room} is not a room of docs/architecture.md"
    for name in imported(path):
        top = name.partition(".")[0]
        allowed = top in FREE or top == room or any(
            name == a or name.startswith(f"{a}.") for a in ROOMS[room])
        assert allowed, f"esper.{room} may not import esper.{name}"


@pytest.mark.parametrize("room", sorted(set(ROOMS) | {"cli"}))
def test_every_room_is_in_the_picture(room: str) -> None:
    assert f"esper/{room}" in (ROOT / "docs/architecture.md").read_text()


def test_no_file_is_two() -> None:
    sources = [*PACKAGE, *ROOT.glob("csrc/**/*.*"), *ROOT.glob("triton_kernels/*.py"),
               *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/**/*.py")]
    long = {str(p.relative_to(ROOT)): n for p in sources
            if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_nothing_is_pickled() -> None:
    for path in PACKAGE:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "cloudpickle"} & {a.name for a in node.names}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" for k in node.keywords), path


def test_frameworks_are_imported_by_the_file_of_their_name_only() -> None:
    frameworks = {"lightning", "pytorch_lightning", "transformers", "accelerate", "timm"}
    allowed = {"integrations/lightning.py", "integrations/transformers.py"}
    for path in PACKAGE:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        used = {n.partition(".")[0] for n in names} & frameworks
        assert not used or str(path.relative_to(ROOT / "esper")) in allowed, (path, used)


def test_the_contracts_need_no_torch() -> None:
    for path in sorted((ROOT / "esper/leyline").glob("*.py")):
        if path.name != "reference.py":
            assert "import torch" not in path.read_text(), path
