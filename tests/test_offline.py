"""No network but loopback: every verb still works. Nothing is looked up, fetched or told to anyone."""

import argparse
import csv
import gzip
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpcgen.cli import parser
from hpcgen.launch.site import VERBS
from hpcgen.store.export import FORMATS

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "mp20_bt.csv.gz"
TINY = "batch.crystals=16 steps=2 autoperi.width=16 autoperi.heads=2 autoperi.layers=1 autoperi.pair_width=4"
TRAIN = f"train configs/autoperi_small.yaml store=prototypes device=cpu threads=1 {TINY}"

# Lines of one paragraph need not wait for each other.
SESSION = f"""
python preprocess/prototypes.py --n 24 --processes 1 --out prototypes
python preprocess/mp20.py few.csv --no-page --out mp20
hpcgen submit preprocess preprocess/prototypes.py --out prototypes --dry-run
hpcgen submit {TRAIN} out=alone --dry-run
hpcgen submit campaign --n 4 --out made --dry-run
hpcgen submit evaluate made --dry-run
hpcgen submit report made --out page.html --dry-run
hpcgen --help

torchrun --standalone --nproc-per-node=2 -m hpcgen.cli {TRAIN} out=ranks
hpcgen {TRAIN} out=alone
hpcgen campaign --n 4 --steps 2 --out made
hpcgen store info prototypes
hpcgen store check prototypes
hpcgen store merge prototypes mp20 --out both

mpiexec -n 2 hpcgen campaign --checkpoint ranks/best.pt --device cpu --n 32 --tile 8 --block 8 --steps 2 --out shared
hpcgen evaluate made
hpcgen export made --format cif --out cif
hpcgen export made --format poscar --out poscar
hpcgen export made --format extxyz --out extxyz
hpcgen export made --format json --out json
hpcgen export made --format csv --out csv
hpcgen export made --format zip --out zip
hpcgen export made --format cdvae --out cdvae
hpcgen export made --format diffcsp --out diffcsp
hpcgen export made --format store --out again
hpcgen report made alone --reference prototypes --sample 50 --top 1 --out page.html
hpcgen status alone
hpcgen status made
"""
DOCTOR = "hpcgen doctor --json"

# What runs in a network of its own: this starts it, with loopback up.
ALONE = """
import ctypes, fcntl, os, socket, struct, sys
NEW_NETWORK, SET_FLAGS, UP = 0x40000000, 0x8914, 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(NEW_NETWORK):
    sys.exit(os.strerror(ctypes.get_errno()))
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh22x", b"lo", UP))
os.execvp(sys.argv[1], sys.argv[1:])
"""
PROOF = """
import errno, pathlib, socket, sys
assert len(pathlib.Path("/proc/net/route").read_text().splitlines()) <= 1
for host in ("1.1.1.1", "10.0.0.1", "192.0.2.1"):
    with socket.socket() as far:
        far.settimeout(1)
        assert far.connect_ex((host, 443)) == errno.ENETUNREACH, host
with socket.socket() as outside:
    assert outside.connect_ex(("127.0.0.1", int(sys.argv[1]))) == errno.ECONNREFUSED
with socket.create_server(("127.0.0.1", 0)) as inside:
    socket.create_connection(inside.getsockname(), timeout=1).close()
"""


def isolated(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without network, and with nothing that an earlier one with network may have left at home."""
    home = cwd / "home"
    home.mkdir(exist_ok=True)
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, **own, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-S", "-c", ALONE, *words], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def lonely(tmp_path: Path) -> Path:
    """A folder to run isolated commands in."""
    if not sys.platform.startswith("linux"):
        pytest.skip("network namespaces are Linux's")
    if (tried := isolated("true", cwd=tmp_path)).returncode:
        pytest.skip(f"no network namespace here (needs root): {tried.stderr.strip()}")
    for folder in ("preprocess", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


def paragraphs() -> list[list[str]]:
    """Commands that may run at the same time, in the order of the session."""
    parts = [part.splitlines() for part in SESSION.strip().split("\n\n")]
    if REAL.exists():
        return parts
    return [[line.replace(" mp20 ", " ") for line in part if "mp20.py" not in line] for part in parts]


def leaves(verb: argparse.ArgumentParser, *before: str) -> Iterator[tuple[str, ...]]:
    """Every verb, and every action of a verb that has some."""
    groups = [action for action in verb._actions if isinstance(action, argparse._SubParsersAction)]
    for name, inner in ((name, inner) for group in groups for name, inner in group.choices.items()):
        yield from leaves(inner, *before, name)
    if not groups:
        yield before


def test_there_is_no_network_but_loopback(lonely: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address, timeout=5).close()
        proof = isolated(sys.executable, "-c", PROOF, str(address[1]), cwd=lonely)
    assert proof.returncode == 0, proof.stderr


def test_every_verb_is_run_without_network() -> None:
    lines = [*SESSION.splitlines(), DOCTOR]
    ran = [tuple(line.replace("-m hpcgen.cli", "hpcgen").partition("hpcgen ")[2].split()) for line in lines]
    wanted = [*leaves(parser()), *(("submit", verb) for verb in VERBS)]
    assert len(wanted) > 12
    assert [verb for verb in wanted if verb not in {words[: len(verb)] for words in ran}] == []
    assert [name for name in FORMATS if not any(words[2:4] == ("--format", name) for words in ran)] == []


@pytest.mark.slow
def test_a_whole_session_without_network(lonely: Path) -> None:
    if REAL.exists():
        with gzip.open(REAL, "rt", newline="") as source, (lonely / "few.csv").open("w", newline="") as few:
            csv.writer(few).writerows(row for row, _ in zip(csv.reader(source), range(6), strict=False))
    for commands in paragraphs():
        with ThreadPoolExecutor(2) as pool:
            ended = list(pool.map(lambda command: isolated(*shlex.split(command), cwd=lonely), commands))
        for command, done in zip(commands, ended, strict=True):
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert (lonely / "prototypes" / "summary.html").exists()
    assert len(list((lonely / "cif").glob("*.cif"))) == 4
    assert (lonely / "page.html").exists() and len(list((lonely / "page_files").glob("*.png"))) > 20
    assert (lonely / "ranks" / "last.pt").exists()
    assert json.loads((lonely / "shared" / "summary.json").read_text())["asked"] == 32


@pytest.mark.slow
def test_doctor_finds_nothing_worse_without_network(lonely: Path) -> None:
    """But for Slurm, whose controller may be elsewhere."""
    inside = isolated(*DOCTOR.split(), cwd=lonely)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hpcgen.cli", *DOCTOR.split()[1:]]
    outside = subprocess.run(command, cwd=lonely, env=env, capture_output=True, text=True)
    bad = [
        {(row["group"], row["name"]) for row in json.loads(done.stdout) if row["verdict"] == "bad"}
        for done in (inside, outside)
    ]
    assert [done.returncode for done in (inside, outside)] == [3 if found else 0 for found in bad]
    assert {group for group, _ in bad[0] - bad[1]} <= {"Slurm"}
