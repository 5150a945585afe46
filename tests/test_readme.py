"""What the README tells a user to type works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def shell_lines() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line] + re.findall(r"^\| `([^`]+)` \|", README, flags=re.M)


def sh(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_first_store_its_verbs_and_the_snippet(tmp_path: Path) -> None:
    for folder in ("preprocess", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    make = "python preprocess/prototypes.py --out stores/prototypes"
    assert make in shell_lines()
    made = sh(f"{make} --n 60", tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "stores/prototypes/summary.html").exists()
    for line in shell_lines():
        if line.startswith("hpcgen store"):
            done = sh(line.replace("STORE", "stores/prototypes"), tmp_path)
            assert done.returncode == 0, done.stderr
    train = next(line for line in shell_lines() if line.startswith("hpcgen train configs/autoperi_small.yaml"))
    done = sh(f"{train} steps=2 batch.crystals=16 autoperi.layers=1 autoperi.width=32 autoperi.heads=4", tmp_path)
    assert done.returncode == 0 and (tmp_path / "runs/small/last.pt").exists(), done.stderr
    for snippet in blocks("python"):
        done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_first_campaign(tmp_path: Path) -> None:
    lines = shell_lines()
    make = lines.index("hpcgen campaign --n 1000")
    small = [lines[make].replace("1000", "12") + " --steps 3", *lines[make + 1 : make + 4]]
    assert [line.split()[1] for line in small] == ["campaign", "evaluate", "export", "report"]
    for line in small:
        done = sh(line, tmp_path)
        assert done.returncode == 0, done.stderr
        assert line.split()[1] != "evaluate" or "valid" in done.stdout
    assert list((tmp_path / "campaign-cifs").glob("*.cif"))


def test_every_command_of_hpcgen_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hpcgen.cli import main, parser

    monkeypatch.chdir(ROOT)
    known = {"$HPCGEN_STORE": "store", "$job": "17"}
    lines = [re.sub("|".join(map(re.escape, known)), lambda met: known[met[0]], line) for line in shell_lines()]
    commands = [found[1] for line in lines if (found := re.match(r"(?:job=\$\()?(hpcgen [^)]*)", line))]
    assert len(commands) > 12
    for words in (shlex.split(command)[1:] for command in commands):
        if words[0] == "submit":  # reads the command of its verb itself
            assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err
        else:
            parser().parse_args(words)


def scripts() -> list[str]:
    return sorted({match for line in shell_lines() for match in re.findall(r"preprocess/\w+\.py", line)})


@pytest.mark.parametrize("script", scripts())
def test_scripts_and_their_flags_exist(script: str) -> None:
    told = subprocess.run([sys.executable, ROOT / script, "--help"], env=ENV, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    for line in shell_lines():
        if script in line:
            flags = [word for word in shlex.split(line) if word.startswith("--") and word != "--"]
            assert all(flag in told.stdout for flag in flags if not line.startswith("mpiexec")), line


def test_every_script_stands_in_the_readme() -> None:
    there = {f"preprocess/{file.name}" for file in (ROOT / "preprocess").glob("*.py")} - {"preprocess/drive.py"}
    assert there == set(scripts())
