"""The plan of the house: imports go down, never up or sideways, and importing starts nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"errors"},
    {"config", "files"},
    {"crystal", "runner"},
    {"store"},
    {"diffusion", "nn", "metrics", "launch"},
    {"models", "screen"},
    {"campaign", "train", "report"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = [
    "hpcgen",
    "hpcgen.cli",
    "hpcgen.config",
    "hpcgen.files",
    "hpcgen.errors",
    "hpcgen.runner.blocks",
    "hpcgen.train.config",
    "hpcgen.campaign.config",
    "hpcgen.models.autoperi_config",
    "hpcgen.launch.status",
    "hpcgen.launch.submit",
    "hpcgen.launch.place",
    "hpcgen.launch.hello",
    "hpcgen.launch.doctor",
]


def modules() -> list[str]:
    files = sorted((ROOT / "hpcgen").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def imported(source: str) -> list[tuple[str, int]]:
    """Every hpcgen module named in an import, also inside functions, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("hpcgen.relative.import", node.lineno))
    return [(name, line) for name, line in found if name.split(".")[0] == "hpcgen"]


def climbs(room: str, source: str) -> list[str]:
    """The imports of a module in `room` that go up or sideways."""
    faults = []
    for name, line in imported(source):
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 else ""
        if target in ("", room, "__version__"):
            continue
        if target not in FLOOR:
            faults.append(f"line {line}: {name} is in no room of the house")
        elif FLOOR[target] >= FLOOR[room]:
            faults.append(f"line {line}: {room} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[target]})")
    return faults


@pytest.mark.parametrize("file", sorted((ROOT / "hpcgen").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    room = file.relative_to(ROOT / "hpcgen").parts[0].removesuffix(".py")
    if room == "__init__":
        assert not imported(file.read_text())
        return
    assert room in FLOOR, f"{room} is in no floor of the house"
    assert not climbs(room, file.read_text())


def test_the_rule_is_able_to_fail() -> None:
    assert climbs("crystal", "from hpcgen.store.read import Store")
    assert climbs("crystal", "def f():\n    import hpcgen.runner.blocks")
    assert climbs("files", "from hpcgen import config")
    assert climbs("crystal", "from hpcgen.nowhere import thing")
    assert not climbs("store", "from hpcgen.crystal.crystals import Crystals")


def test_importing_every_module_starts_nothing(tmp_path: Path) -> None:
    code = f"""
import importlib, signal, socket, sys, threading
def closed(*args, **kwargs):
    raise AssertionError("an import opened a socket")
socket.socket.connect = closed
before = {{number: signal.getsignal(number) for number in signal.valid_signals()}}
for name in {modules()!r}:
    importlib.import_module(name)
import torch
assert "mpi4py.MPI" not in sys.modules, "MPI was started"
assert torch.get_default_dtype() == torch.float32
assert threading.active_count() == 1, threading.enumerate()
assert before == {{number: signal.getsignal(number) for number in signal.valid_signals()}}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "an import made files"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_light_modules_stay_light(name: str) -> None:
    heavy = {"torch", "pymatgen", "mpi4py", "h5py"}
    code = f"import sys, {name}; met = {heavy!r} & set(sys.modules); assert not met, met"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_build_that_only_hands_out_blocks_needs_no_torch() -> None:
    code = "import sys, hpcgen.store.build; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_print_in_the_library() -> None:
    for file in sorted((ROOT / "hpcgen").rglob("*.py")):
        if file.name != "cli.py":
            calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], file


def test_no_rooms_without_a_meaning() -> None:
    vague = {"utils.py", "util.py", "common.py", "base.py", "helpers.py", "misc.py"}
    assert not [file for file in (ROOT / "hpcgen").rglob("*.py") if file.name in vague]
