"""The command line: exit codes, one sentence per fault, and no heavy imports for light verbs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_rows import HEAD, crystals, rows

import hpcgen
from hpcgen import cli
from hpcgen.errors import HpcgenError, StoppedEarly
from hpcgen.store.layout import Head
from hpcgen.store.rows import Rows
from hpcgen.store.write import write_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", HEAD, [("train", rows(20)), ("val", rows(3, first=20))], shard_rows=10)
    return tmp_path / "store"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcgen.cli", *map(str, words)], capture_output=True, text=True, timeout=60
    )


def test_info_for_people_and_machines(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["store", "info", str(store)]) == 0
    out = capsys.readouterr().out
    for word in (
        "23 in 3 shards",
        "train 20, val 3",
        "none kept",
        "band_gap",
        "eV",
        "missing",
        "  symprec  0.1\n",
    ):
        assert word in out
    assert cli.main(["store", "info", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"train": 20, "val": 3}


def test_info_flattens_settings_and_shortens_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {"input": {"files": [["a.csv", "0123456789abcdef" * 4]]}, "settings": {"cutoff": 6.0, "split": ""}}
    write_store(tmp_path, Head("x", made), [("all", Rows(crystals(1), ["a"]))])
    assert cli.main(["store", "info", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines if line.startswith("  ")] == [
        ["input.files", '[["a.csv", "0123456789ab…"]]'],
        ["settings.cutoff", "6.0"],
        ["settings.split", "–"],
    ]


def test_check_names_every_bad_shard(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["store", "check", str(store)]) == 0
    assert "all shards are good" in capsys.readouterr().out
    (store / "train-00000.h5").unlink()
    (store / "val-00000.h5").write_bytes(b"")
    assert cli.main(["store", "check", str(store)]) == 4
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    assert "train-00000.h5" in told.out and "val-00000.h5" in told.out
    assert told.err == f"hpcgen: {store}: faults found: 2\n"


def test_check_of_a_flipped_bit_and_of_another_version(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = store / "train-00000.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert cli.main(["store", "check", str(store)]) == 4
    assert "train-00000.h5" in capsys.readouterr().out
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    for action in ("info", "check"):
        assert cli.main(["store", action, str(store)]) == 4
        assert "format version 99 is newer than this hpcgen reads" in "".join(capsys.readouterr())


def test_check_of_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path, Head("nothing"), [])
    assert cli.main(["store", "info", str(tmp_path)]) == 0
    assert cli.main(["store", "check", str(tmp_path)]) == 4
    assert "no crystals" in capsys.readouterr().out


def test_merge(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "c"
    assert cli.main(["store", "merge", str(store), str(store), "--out", str(out)]) == 4
    assert "stands in" in capsys.readouterr().err and not out.exists()
    write_store(tmp_path / "b", HEAD, [("train", rows(5))])
    assert cli.main(["store", "merge", str(store), str(tmp_path / "b"), "--prefix-ids", "--out", str(out)]) == 0
    assert "28 crystals in 2 shards" in capsys.readouterr().out
    assert cli.main(["store", "merge", str(store), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["store", "info", "/nowhere"], 4, "hpcgen: /nowhere: is no folder\n"),
        (["stroe"], 2, "invalid choice: 'stroe'"),
        (["store", "merge", "a"], 2, "--out"),
        ([], 2, "VERB"),
    ],
)
def test_faults_are_one_sentence_and_a_code(
    words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == code
    told = capsys.readouterr()
    assert sentence in told.err and told.err.startswith("hpcgen: ") and told.err.count("\n") == 1
    assert told.out == ""


def _raising(fault: BaseException, resumable: bool = False):  # type: ignore[no-untyped-def]
    def parse(_: object) -> object:
        class Arguments:
            pass

        def go(_: object) -> int:
            raise fault

        arguments = Arguments()
        arguments.run, arguments.resumable = go, resumable  # type: ignore[attr-defined]
        return arguments

    return parse


@pytest.mark.parametrize(
    ("fault", "resumable", "code"),
    [
        (HpcgenError("x"), False, 70),
        (StoppedEarly("x"), False, 75),
        (KeyboardInterrupt(), False, 130),
        (KeyboardInterrupt(), True, 75),
        (ZeroDivisionError("x"), False, 70),
        (BrokenPipeError(), False, 141),
    ],
)
def test_every_way_to_end_has_its_code(
    fault: BaseException,
    resumable: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parse = _raising(fault, resumable)
    monkeypatch.setattr(cli.argparse.ArgumentParser, "parse_known_args", lambda self, argv: (parse(argv), []))
    monkeypatch.setattr(cli, "_leave_pipe", lambda: 141)
    assert cli.main([]) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) == isinstance(fault, ZeroDivisionError)


def test_a_closed_pipe_is_quiet(store: Path) -> None:
    command = f"{sys.executable} -m hpcgen.cli store info {store} | true; echo ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_version_and_help_are_light() -> None:
    assert run("--version").stdout == f"hpcgen {hpcgen.__version__}\n"
    times = []
    for words in (["--help"], ["store", "--help"], ["store", "merge", "--help"]):
        start = time.perf_counter()
        done = run(*words)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "usage: hpcgen" in done.stdout
    assert min(times) < 0.5


def test_light_verbs_import_nothing_heavy(store: Path) -> None:
    code = f"""
import sys; from hpcgen.cli import main
for words in (["--help"], ["store", "info", {str(store)!r}], ["store", "check", {str(store)!r}]):
    assert main(words) == 0
assert not {{"torch", "pymatgen", "mpi4py", "ase"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
