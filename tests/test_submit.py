"""Batch scripts: the text for clusters that differ, what is refused before a job is queued, and doubtful answers."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hpcgen.cli import main
from hpcgen.config import load_config
from hpcgen.files import read_json_lines
from hpcgen.launch.sbatch import ENDING, OPENING, Job, render
from hpcgen.launch.site import Site, read_site
from hpcgen.runner.events import EVENTS, code_digest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "data" / "sbatch"
# four kinds of sites, after the public pages of real ones, and one without GPUs
SITES = {
    "gres": ["account=abc", "partition=booster", "gpu_type=a100", "train.nodes=4", "train.tasks_per_node=8",
             "train.gpus_per_node=8", "train.cpus_per_task=8", "interface=ib0", "master_suffix=i"],
    "gpus-per-node": ["account=m1234_g", "qos=regular", "constraint=gpu&hbm80g", "gpu_flag=gpus-per-node",
                      "train.nodes=2", "train.tasks_per_node=4", "train.gpus_per_node=4", "train.cpus_per_task=32",
                      "train.minutes=360", "extra.licenses=scratch", "setup=[module load python cudatoolkit]"],
    "container": ["account=project_1", "partition=standard-g", "gpu_flag=gpus-per-task", "exclusive=true",
                  "train.nodes=2", "train.tasks_per_node=8", "train.gpus_per_node=8", "train.mem=480G",
                  "container=apptainer exec --rocm /images/hpcgen.sif", "python=/opt/venv/bin/python",
                  "srun=[--gpu-bind=none]"],
    "by-share": ["partition=gpu", "reservation=school", "gpu_flag=none", "signal_s=0", "train.tasks_per_node=2",
                 "train.gpus_per_node=2", "extra.gpus=2"],
}  # fmt: skip


def job(site: Site, verb: str = "train", after: str = "") -> Job:
    command = [site.python or "/venv/bin/python", "-u", "-m", "hpcgen.cli", verb, "my config.yaml", "steps=10"]
    return Job(verb, f"hpcgen-{verb}-0123abcd", Path("/scratch/me/my run"), command, site, after)


@pytest.mark.parametrize("name", SITES)
def test_the_script_of_a_site(name: str) -> None:
    assert render(job(read_site(None, SITES[name]))) == (GOLDEN / f"{name}.sh").read_text()


def test_the_script_of_a_job_under_mpi_behind_others() -> None:
    words = ["mpi=pmi2", "campaign.nodes=4", "campaign.tasks_per_node=32", "campaign.mem=0", "env.TMPDIR=/scratch/t m"]
    script = render(job(read_site(None, words), "campaign", after="17:18"))
    assert script == (GOLDEN / "mpi.sh").read_text()


def test_all_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    scripts = [*map(str, GOLDEN.glob("*.sh")), *map(str, (ROOT / "slurm").glob("*.sh"))]
    assert len(scripts) >= 8
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_for_people_begin_and_end_as_rendered_ones_do(script: Path) -> None:
    text = script.read_text()
    assert OPENING in text and text.endswith(ENDING) and os.access(script, os.X_OK)


def test_the_profile_that_comes_along_is_whole() -> None:
    site = load_config(Site, ROOT / "slurm" / "site.yaml").checked()
    assert site.train.tasks == 32
    keys = {line.lstrip("# ").split(":")[0] for line in (ROOT / "slurm" / "site.yaml").read_text().splitlines()}
    assert set(vars(Site())) <= keys, "every key is shown"


BAD = [
    (["gpu_flag=gpu"], "gpu_flag = 'gpu': want one of gres"),
    (["train.nods=2"], "did you mean train.nodes"),
    (["train.nodes=0"], "train.nodes = 0: want at least 1"),
    (["train.nodes=many"], "train.nodes"),
    (["train.tasks_per_node=9", "train.gpus_per_node=8"], "want one task for each GPU"),
    (["train.tasks_per_node=4", "train.gpus_per_node=8"], "a task for each GPU"),
    (["report.tasks_per_node=2"], "one process draws the page"),
    (["gpu_flag=gpus-per-task", "campaign.tasks_per_node=2", "campaign.gpus_per_node=4"], "wants as many"),
    (["signal_s=-1"], "signal_s = -1"),
    (["signal_s=120", "campaign.minutes=2"], "the job would hear of its end before it begins"),
    (["extra.job-name=mine"], "extra.job-name: the batch script sets --job-name itself"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), BAD, ids=[said for _, said in BAD])
def test_profiles_that_cannot_be(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [part for word in words for part in ("--set", word)]
    assert main(["submit", "campaign", "--n", "10", *flags, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


WORDS = [
    (["train", "nowhere.yaml"], "nowhere.yaml: cannot read"),
    (["campaign", "--n", "0"], "n = 0"),
    (["campaign", "--nn", "3"], "unrecognized arguments: --nn"),
    (["preprocess", "--out", "store"], "want a script"),
    (["preprocess", str(ROOT / "preprocess" / "mp20.py"), "a.csv"], "--out"),
    (["export", "run"], "invalid choice: 'export'"),
    (["campaign", "--n", "3", "--after", "soon"], "--after soon: want the number of a job"),
    (["campaign", "--n", "3", "--site", "nowhere.yaml"], "nowhere.yaml"),
]


@pytest.mark.parametrize(("words", "said"), WORDS, ids=[said for _, said in WORDS])
def test_commands_that_would_fail_are_not_queued(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_the_command_is_what_was_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["submit", "campaign", "--n", "20", "--dry-run", "--out", str(run), "--set", "campaign.nodes=2",
                 "--condition", "band_gap=1.5"]) == 0  # fmt: skip
    script = capsys.readouterr().out
    words = f"-m hpcgen.cli campaign --n 20 --out {run} --condition band_gap=1.5\n"
    assert words in script and sys.executable in script and "#SBATCH --nodes=2" in script
    assert not run.exists(), "a dry run leaves nothing behind"


def test_a_dry_run_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.monotonic(); from hpcgen.cli import main; "
        "main(['submit', 'campaign', '--n', '9', '--dry-run']); "
        "assert not {'torch', 'pymatgen', 'mpi4py'} & set(sys.modules); "
        "print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stderr) < 2 and done.stdout.startswith("#!/bin/bash")


def test_flags_of_several_words_are_quoted() -> None:
    assert '#SBATCH --comment="two words"\n' in render(job(read_site(None, ["extra.comment=two words"])))


# ---- how a batch script ends: what a real Slurm says in these cases is in test_slurm*.py -----------------------------

RUNNING, PREEMPTED = "JobState=RUNNING PreemptTime=None", "JobState=RUNNING PreemptTime=2026-11-21T23:00:00"
ENDS = [  # code of srun, what a task left (None: nothing), answers of scontrol show, code of the job, queued again?
    (0, None, [RUNNING], 0, False),
    (4, None, [RUNNING], 4, False),
    (137, None, [RUNNING], 137, False),
    (143, "4", [RUNNING], 4, False),
    (75, "", [RUNNING], 7, False),  # a task could not even write its code: no space
    (75, None, [RUNNING], 75, True),
    (75, None, ["", "", RUNNING], 75, True),  # the controller was away
    (140, None, [RUNNING], 140, True),
    (143, None, [RUNNING], 143, False),  # ended by TERM, but not by Slurm
    (143, None, [PREEMPTED], 143, True),
    (75, None, ["JobState=COMPLETING"], 75, False),
    (75, None, ["JobState=COMPLETING Reason=TimeLimit"], 75, True),
    (75, None, [""], 75, False),
]


@pytest.mark.parametrize(("code", "told", "shows", "ends", "queued"), ENDS)
def test_how_the_script_ends(
    tmp_path: Path, code: int, told: str | None, shows: list[str], ends: int, queued: bool
) -> None:
    if told is not None:
        (tmp_path / "failed").write_text(told)
    for number, state in enumerate(shows):
        (tmp_path / f"show-{number}").write_text(state)
    slurm = """
        show() { # the next answer; an empty one is none
            file=$(ls show-* | head -n 1)
            if [ -s "$file" ]; then cat "$file"; return 0; fi
            if [ "$(ls show-* | wc -l)" -gt 1 ]; then rm "$file"; fi
            return 1
        }
        requeue() { echo "$1" >> asked; [ "$(wc -l < asked)" -gt 1 ] && touch queued; } # not at the first time
        scontrol() { if [ "$1" = show ]; then show; else requeue "$2"; fi; }
        sleep() { if [ -e queued ]; then exit 99; fi; } # Slurm ends the script
    """
    text = f"HPCGEN_FAILED=failed; job=17_4; code={code}\n{slurm}\n{ENDING}"
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    asked = (tmp_path / "asked").read_text().split() if (tmp_path / "asked").exists() else []
    assert (done.returncode, asked) == ((99, ["17_4"] * 2) if queued else (ends, [])), done.stdout + done.stderr


def test_where_there_is_no_scontrol_the_log_says_what_that_means(tmp_path: Path) -> None:
    (tmp_path / "seq").symlink_to(shutil.which("seq") or "")
    text = f'PATH={tmp_path}; HPCGEN_FAILED=failed; job=17; code=75; sleep() {{ echo "waits $1"; }}\n{ENDING}'
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 75 and done.stderr.count("scontrol: command not found") == 1
    said = done.stdout.splitlines()
    assert said[0] == "hpcgen: scontrol does not answer, so job 17 cannot ask to be queued again"
    assert said[1].endswith("the same command goes on from here") and said[2:] == ["waits 300"], "Slurm may preempt it"


def test_a_job_without_a_log_says_so_where_it_can(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "made" / "submit" / "train-17.log").mkdir(parents=True)  # a name that cannot be opened
    rendered = tmp_path / "rendered.sh"
    rendered.write_text(render(Job("train", "name", tmp_path / "file" / "run", ["true"], read_site(None, []))))
    env = {**os.environ, "SLURM_JOB_ID": "17", "HOME": str(tmp_path)}
    for script, run in ((rendered, "file/run"), (ROOT / "slurm" / "train_mp20.sh", "made")):
        told = {**env, "HPCGEN_RUN": str(tmp_path / run)}
        done = subprocess.run(["bash", str(script)], env=told, capture_output=True, text=True, timeout=20)
        sentence = done.stderr.splitlines()[-1]
        assert done.returncode == 7 and f"{run}/submit/train-17.log cannot be written on" in sentence
        assert sentence in (tmp_path / "hpcgen-17.log").read_text().splitlines()


# ---- a scheduler that answers strangely: only a stand-in does -----------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for commands of Slurm; srun is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cp", "dirname", "touch"):
        (folder / tool).symlink_to(shutil.which(tool) or "")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(tmp_path)
    say(folder, "srun", "exit 0")
    return folder


def say(folder: Path, command: str, lines: str) -> None:
    file = folder / command
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


def submit(*words: str) -> int:
    return main(["submit", "campaign", "--n", "8", "--out", "run", *words])


def test_a_job_is_queued_and_recorded(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(slurm, "squeue", "exit 0")
    say(slurm, "sbatch", 'cp "$2" "$(dirname "$0")/queued.sh"; echo "41;cluster"')
    assert submit() == 0 and capsys.readouterr().out == "41\n"
    folder = tmp_path / "run" / "submit"
    record = json.loads((folder / "campaign.json").read_text())
    assert record["job"] == "41" and record["verb"] == "campaign" and record["name"].startswith("hpcgen-campaign-")
    assert record["command"][:4] == [sys.executable, "-u", "-m", "hpcgen.cli"]
    assert sorted(file.name for file in folder.iterdir()) == ["41_submission.sh", "41_submitted.pkl", "campaign.json"]
    script = (slurm / "queued.sh").read_text()
    assert f"-m submitit.core._submit {folder}" in script and "wckey" not in script
    assert (folder / "41_submitted.pkl").stat().st_size < 1000


def test_what_changed_in_the_queue_is_told_and_kept(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(slurm, "squeue", "exit 0")
    say(slurm, "sbatch", "echo 41")
    config, record = tmp_path / "c.yaml", tmp_path / "run" / "submit" / "train.json"
    config.write_text("steps: 5\n")
    (tmp_path / "store").mkdir()
    assert main(["submit", "train", str(config), "store=store", "out=run"]) == 0
    told = json.loads(record.read_text())
    assert told["code"] == code_digest() and list(told["files"]) == [str(config)]
    told["command"] = [sys.executable, "-c", "print('begun')"]

    def begin(**more: str) -> str:
        """What a task says, started as the batch script does it."""
        place = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
                 "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}  # fmt: skip
        env = {**os.environ, "SUBMITIT_EXECUTOR": "slurm", "PYTHONPATH": str(ROOT), **place, **more}
        start = [sys.executable, "-m", "submitit.core._submit", str(record.parent)]
        done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "begun" in done.stdout, done.stderr
        return done.stderr

    record.write_text(json.dumps(told))
    assert begin() == "" and [event["event"] for event in read_json_lines(tmp_path / "run" / EVENTS)] == ["submit"]
    config.write_text("steps: 6\n")
    record.write_text(json.dumps({**told, "code": "0123456789ab"}))
    assert begin(SLURM_PROCID="1") == "", "the first task says it for all"
    said = begin()
    assert f"the code of hpcgen is not as it was at `hpcgen submit` (0123456789ab, now {code_digest()})" in said
    assert f"{config} is not as it was at `hpcgen submit` ({told['files'][str(config)]}, now " in said
    changes = read_json_lines(tmp_path / "run" / EVENTS)[1:]
    assert [(event["event"], event["what"]) for event in changes] == [
        ("changed", "the code of hpcgen"), ("changed", str(config))
    ]  # fmt: skip


@pytest.mark.parametrize(("words", "known"), [((), True), (("--set", "python=/opt/python"), False)])
def test_a_run_folder_that_other_nodes_do_not_see_is_told(
    slurm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, words: tuple[str, ...], known: bool
) -> None:
    say(slurm, "squeue", "exit 0")
    say(slurm, "sbatch", "echo 41")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert main(["submit", "campaign", "--n", "8", "--out", f"{folder}/run", *words]) == 0
        (told,) = [line for line in caplog.messages if "nodes" in line]
        assert told.startswith(f"{folder}/run is on ") and "of this node alone: want a run folder that" in told
        record = json.loads(Path(f"{folder}/run/submit/campaign.json").read_text())
        assert bool(record["code"]) == known, "the code of another interpreter is not known here"


def test_a_job_that_was_queued_in_spite_of_an_error_is_found(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(slurm, "squeue", 'test -e "$(dirname "$0")/queued" && echo 42; exit 0')
    say(slurm, "sbatch", 'touch "$(dirname "$0")/queued"; echo "sbatch: error: Socket timed out" >&2; exit 1')
    assert submit() == 0 and capsys.readouterr().out == "42\n"
    assert json.loads((tmp_path / "run" / "submit" / "campaign.json").read_text())["job"] == "42"
    assert submit() == 2, "it is queued already"
    assert "is job 42 already" in capsys.readouterr().err


def test_a_job_of_which_nobody_knows_keeps_its_record(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcgen.launch.submit._LOOK_S", 0.1)
    say(slurm, "squeue", 'test -e "$(dirname "$0")/seen" && echo 42; exit 0')
    say(slurm, "sbatch", 'echo "sbatch: error: Unable to contact slurm controller" >&2; exit 1')
    assert submit() == 3
    name = json.loads((tmp_path / "run" / "submit" / "campaign.json").read_text())["name"]
    assert f"squeue --name={name}" in capsys.readouterr().err
    (slurm / "seen").touch()
    assert submit() == 2 and "is job 42 already" in capsys.readouterr().err


def test_a_partition_that_does_not_exist_names_those_that_do(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(slurm, "squeue", "exit 0")
    say(slurm, "sinfo", "echo gpu; echo 'cpu*'")
    say(slurm, "sbatch", "echo 'sbatch: error: invalid partition specified: gup' >&2; exit 1")
    for words in ([], ["--test-only"]):
        assert submit("--set", "partition=gup", *words) == 2
        said = capsys.readouterr().err
        assert "invalid partition specified: gup" in said and "the partitions here are cpu*, gpu" in said
        assert not (tmp_path / "run").exists(), "nothing is left of a job that is none"


def test_what_is_needed_is_there_or_is_made_by_another_job(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(slurm, "squeue", "exit 0")
    say(slurm, "sbatch", "echo 43")
    assert submit("--checkpoint", "best.pt") == 4
    assert "best.pt: does not exist, want it now, or --after the job" in capsys.readouterr().err
    assert submit("--checkpoint", "best.pt", "--after", "42") == 0


def test_nothing_is_queued_where_there_is_no_slurm(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm / "srun").unlink()
    for words in ([], ["--test-only"]):
        assert submit(*words) == 3
        assert "--dry-run" in capsys.readouterr().err
