"""What `hpcgen status` says of runs that run, were killed, stopped, failed or are done, and of what Slurm answers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import campaign_jobs
import pytest
import runner_jobs
import train_jobs
from runner_jobs import wait_for
from store_rows import crystals

from hpcgen.errors import Diverged, InputError, StoppedEarly
from hpcgen.launch.status import STATES, Status, describe, render
from hpcgen.models.autoperi import AutoPeri
from hpcgen.runner.owners import Life
from hpcgen.runner.team import Team
from hpcgen.store.build import build
from hpcgen.store.settings import BuildSettings
from hpcgen.store.source import Parsed, Raw

pytestmark = pytest.mark.usefixtures("threads_restored", "no_slurm")
ROOT = Path(__file__).resolve().parent.parent
CAMPAIGN = {"n": 48, "tile": 16, "block": 16}


@pytest.fixture
def no_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one empty folder, for scripts that answer as squeue and sacct, asked every time."""
    tools = tmp_path_factory.mktemp("tools")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tools / "cache"))
    monkeypatch.setattr("hpcgen.launch.slurm._KEPT_S", 0.0)
    return tools


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_jobs.make_store(tmp_path_factory.mktemp("train") / "store")


def answer(tools: Path, name: str, out: str = "", *, err: str = "", code: int = 0) -> None:
    """A command of Slurm that says the same every time, and notes how it was called."""
    tool = tools / name
    tool.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tools}/{name}.asked\nprintf "%s" "{out}"\n'
        f'printf "%s" "{err}" >&2\nexit {code}\n'
    )
    tool.chmod(0o755)


def asked(tools: Path, name: str) -> list[str]:
    file = tools / f"{name}.asked"
    return file.read_text().splitlines() if file.exists() else []


def log(folder: Path, *records: dict[str, Any], name: str = "events.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def trained(folder: Path, *records: dict[str, Any], steps: int = 100) -> Path:
    """The folder of a training with these events."""
    log(folder, *records)
    (folder / "config.yaml").write_text(f"store: /s\nbatch:\n  crystals: 8\nsteps: {steps}\n")
    return folder


def began(at: float, job: str = "17", restart: int = 0, token: str = "") -> dict[str, Any]:
    told = {"device": "cuda", "token": token or f"t{at}", "job": job, "restart": restart, "host": "n3"}
    return {"time": at, "event": "start", **told}


def stopped(at: float, why: str = "stopped early (SIGTERM) at step 7; the same command goes on from here") -> dict:
    return {"time": at, "event": "stop", "step": 7, "reason": why}


def held(folder: Path, age_s: float, life: dict[str, Any] | None = None, **told: Any) -> None:
    """A lease and a heartbeat, of a process on another machine unless told otherwise."""
    life = life or {"host": "n3", "machine": "another one", "pid": 4242, "started": 1}
    moment = time.time() - age_s
    both = {"token": "t", "beat_s": 5.0, **life}
    for name, record in (
        ("lease/owner-2.json", {**both, "size": 4}),
        ("heartbeat/0.json", {**both, "rank": 0, **told}),
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**record, "time": moment}))
        os.utime(file, (moment, moment))


def submitted(folder: Path, verb: str, job: str) -> None:
    (folder / "submit").mkdir(parents=True, exist_ok=True)
    (folder / "submit" / f"{verb}.json").write_text(json.dumps({"verb": verb, "job": job, "name": f"hpcgen-{verb}-0"}))


def told(run: Path) -> Status:
    """What is said of a run; it can be said as JSON and to people."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    status = describe(run)
    assert status.state in STATES and json.loads(json.dumps(asdict(status), allow_nan=False))
    assert status.state in render(status) and str(run) in render(status)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert before.keys() == after.keys() or status.state == "running", "it leaves nothing behind"
    return status


# ---- real runs -------------------------------------------------------------------------------------------------------


def test_a_training_from_running_to_killed_to_done(store: Path, tmp_path: Path) -> None:
    words = ("steps=60", "log_every=2", "validate_every=10", "save_every_steps=5")
    (rank,) = train_jobs.start(1, store, tmp_path, *words, toy={"step_s": 0.1})
    try:
        wait_for(lambda: len((tmp_path / "metrics.jsonl").read_text().split("validation")) > 1
                 if (tmp_path / "metrics.jsonl").exists() else False, 90)  # fmt: skip
        running = told(tmp_path)
    finally:
        rank.kill()
        rank.communicate()
    killed = told(tmp_path)
    assert (running.state, running.verb, running.beating, running.size) == ("running", "train", 1, 1)
    assert running.beat_age_s is not None and running.beat_age_s < 15 and running.hosts == [Life.own().host]
    assert running.progress is not None and running.progress.total == 60 and running.progress.unit == "steps"
    rate = running.progress.rate
    assert rate is not None and 1 < rate < 11 and running.progress.done >= 10
    assert running.progress.left_s == pytest.approx((60 - running.progress.done) / rate, abs=0.1)
    assert running.losses is not None and running.losses.loss is not None and running.losses.step is not None
    assert running.losses.validation_step is not None and running.losses.validation_step % 10 == 0

    assert killed.state == "silent" and f"killed: pid {rank.pid}" in killed.why
    assert killed.beating == 0 and killed.progress is not None and killed.progress.left_s is None
    assert killed.progress.saved is not None and killed.progress.saved % 5 == 0

    train_jobs.run(store, tmp_path, *words)
    done = told(tmp_path)
    assert (done.state, done.beat_age_s, done.last_error) == ("done", None, None)
    assert done.progress is not None and done.progress.done == done.progress.saved == 60
    assert [restart.why for restart in done.restarts] == ["no last words: killed, or its node lost"]
    assert done.restarts[0].host == Life.own().host and time.time() - done.restarts[0].time < 100


def test_a_training_that_is_stopped_and_one_that_fails(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedEarly):
        train_jobs.run(store, tmp_path, toy={"signal_at": 4})
    status = told(tmp_path)
    assert (status.state, status.why) == ("stopped", "stopped early (SIGTERM) at step 5")
    assert status.progress is not None and (status.progress.done, status.progress.saved) == (5, 5)
    assert status.last_error is None

    with pytest.raises(InputError):
        train_jobs.run(store, tmp_path, toy={"broken_at": 8})
    status = told(tmp_path)
    assert status.state == "failed" and "a broken shard" in status.why
    assert status.last_error is not None and "a broken shard" in status.last_error.message
    assert [restart.why for restart in status.restarts] == ["stopped early (SIGTERM) at step 5"]

    with pytest.raises(Diverged):
        train_jobs.run(store, tmp_path, "bad_steps=2", "accept=[bad_steps]", toy={"bad_from": 6, "bad_to": 12})
    assert told(tmp_path).state == "failed" and "not finite" in told(tmp_path).why
    train_jobs.run(store, tmp_path)
    status = told(tmp_path)
    assert status.state == "done" and len(status.restarts) == 3 and "not finite" in status.restarts[2].why


def test_a_campaign_from_running_to_killed_to_done(checkpoint: Path, tmp_path: Path) -> None:
    launch = campaign_jobs.Launch(checkpoint, tmp_path, n=4096, steps=20, block=16)
    try:
        wait_for(lambda: len(list(tmp_path.glob("all-*.h5"))) > 1, 90)
        running = told(tmp_path)
    finally:
        launch.kill()
    killed = told(tmp_path)
    assert (running.state, running.verb, running.beating) == ("running", "campaign", 1)
    assert running.progress is not None and (running.progress.total, running.progress.unit) == (4096, "crystals")
    assert killed.state == "silent" and "is gone" in killed.why
    assert killed.progress is not None and killed.progress.left_s is None and killed.progress.total == 4096

    for path in tmp_path.iterdir():
        if path.is_file() and path.name != "events.jsonl":  # a smaller campaign takes over from it
            path.unlink()
    campaign_jobs.run(checkpoint, tmp_path, **CAMPAIGN)
    done = told(tmp_path)
    assert done.state == "done" and done.progress is not None and (done.progress.done, done.progress.total) == (48, 48)
    assert [restart.why for restart in done.restarts] == ["no last words: killed, or its node lost"]


def test_a_campaign_that_is_stopped_then_grows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, steps = AutoPeri.read, iter(range(10**6))

    def signalling(*arguments: Any) -> Any:
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments)

    campaign_jobs.run(checkpoint, tmp_path, **{**CAMPAIGN, "n": 40})
    assert told(tmp_path).state == "done"
    with monkeypatch.context() as patched:
        patched.setattr(AutoPeri, "read", signalling)
        with pytest.raises(StoppedEarly):
            campaign_jobs.run(checkpoint, tmp_path, **{**CAMPAIGN, "n": 80})
    status = told(tmp_path)
    assert (status.state, status.why) == ("stopped", "stopped early (SIGTERM)")
    assert status.progress is not None and status.progress.total == 80 and 40 <= status.progress.done < 80
    assert [restart.why for restart in status.restarts] == ["done"]
    campaign_jobs.run(checkpoint, tmp_path, **{**CAMPAIGN, "n": 80})
    assert told(tmp_path).state == "done" and len(told(tmp_path).restarts) == 2


@dataclass
class Few:
    """Thirty crystals; a signal on the way, if there is to be one."""

    signal_at: int = -1
    name: str = "few"
    columns: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        return {}

    def size(self) -> int:
        return 30

    def rows(self, start: int, stop: int) -> Iterator[Raw]:
        for row in range(start, stop):
            yield Raw(f"c{row}", row)

    def parse(self, raw: Raw) -> list[Parsed]:
        if raw.body == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return [Parsed(raw.id, crystals(1, raw.body))]


def test_a_store_that_is_being_built(tmp_path: Path) -> None:
    settings = BuildSettings(duplicates="ignore", edges="none", purify=False, niggli=False, min_distance=0.0,
                             block_rows=8)  # fmt: skip
    team = Team("alone", 0, 1, "first")
    with pytest.raises(StoppedEarly):
        build(Few(signal_at=20), settings, tmp_path, team, processes=0)
    status = told(tmp_path)
    assert (status.state, status.verb) == ("stopped", "preprocess")
    assert status.progress is not None and status.progress.phase == "reading structures"
    assert (status.progress.done, status.progress.total, status.progress.unit) == (2, 4, "blocks")
    build(Few(), settings, tmp_path, Team("alone", 0, 1, "second"), processes=0)
    status = told(tmp_path)
    assert status.state == "done" and status.progress is not None and status.progress.done == 30
    assert [restart.why for restart in status.restarts] == ["stopped early (SIGTERM)"], "two passes are one launch"


def test_an_evaluation_with_a_bad_block(tmp_path: Path) -> None:
    work = tmp_path / "evaluate" / "generate.abc.work"
    launch = runner_jobs.Launch(work, "n=30", "item_s=0.05", "beat_s=0.2", "bad=" + json.dumps({"12": "raise"}))
    try:
        wait_for(lambda: any(work.glob("events.jsonl")) and '"failed"' in (work / "events.jsonl").read_text())
        time.sleep(0.5)
        status = told(work)
    finally:
        launch.process.terminate()
        launch.end()
    assert (status.state, status.verb, status.progress and status.progress.unit) == ("running", "evaluate", "items")
    assert status.progress is not None and status.progress.total == 150 and 0 < status.progress.done < 150
    assert status.progress.rate is not None and 0 < status.progress.rate <= 60 and status.progress.left_s
    error = status.last_error
    assert error is not None and (error.kind, error.message, error.rank) == ("ValueError", "an odd crystal", 0)
    assert error.where.startswith("00002.txt, ")
    assert told(work).state == "stopped"

    code, _ = runner_jobs.Launch(work, "n=3", "bad=" + json.dumps({"12": "raise"})).end()
    status = told(work)
    assert code == 0 and status.state == "failed" and status.why == "ValueError: an odd crystal on rank 0"
    (work / "done.json").write_text("{}")
    assert told(work).state == "done"


# ---- hand-made folders: other machines, Slurm's answers, damage ------------------------------------------------------


def test_holders_on_other_machines_are_judged_by_their_beats(tmp_path: Path) -> None:
    trained(tmp_path, began(100.0))
    held(tmp_path, 9.0, step=40, steps=100)
    status = told(tmp_path)
    assert (status.state, status.hosts, status.beating, status.size) == ("running", ["n3"], 1, 4)
    assert status.progress is not None and (status.progress.done, status.progress.rate) == (40, None)
    held(tmp_path, 16.0)
    status = told(tmp_path)
    assert (
        status.state == "silent"
        and "from pid 4242 on n3" in status.why
        and status.beat_age_s == pytest.approx(16, abs=1)
    )


def test_a_suspended_process_of_this_machine_is_silent(tmp_path: Path) -> None:
    trained(tmp_path, began(100.0))
    held(tmp_path, 60.0, Life.own().record())
    assert told(tmp_path).state == "silent" and "lives: suspended" in told(tmp_path).why


def test_beats_of_another_launch_do_not_count(tmp_path: Path) -> None:
    trained(tmp_path, began(100.0))
    held(tmp_path, 60.0)
    other = {"token": "other", "beat_s": 5.0, "time": time.time()}
    (tmp_path / "heartbeat" / "1.json").write_text(json.dumps(other))
    assert told(tmp_path).state == "silent"


def test_a_requeued_job_that_waits_is_queued(tmp_path: Path, no_slurm: Path) -> None:
    trained(tmp_path, began(100.0), stopped(200.0), began(300.0, restart=1))
    held(tmp_path, 60.0)
    submitted(tmp_path, "train", "18")
    answer(no_slurm, "squeue", "17|PENDING|2026-11-21T15:00:00|BeginTime\n")
    answer(no_slurm, "sacct", "2026-11-20T15:00:00|17|NODE_FAIL|0:0\n")
    status = told(tmp_path)
    assert (status.state, status.why) == ("queued", "job 17 PENDING (BeginTime)")
    assert [(job.job, job.state, job.reason) for job in status.jobs] == [("17", "PENDING", "BeginTime")]
    assert (status.squeue, status.sacct) == ("asked", "unneeded")
    (question,) = asked(no_slurm, "squeue")
    assert "--jobs=17,18" in question and not asked(no_slurm, "sacct")
    assert status.restarts[0].count == 1 and status.restarts[0].job == "17"


def test_slurm_is_not_asked_while_somebody_beats(tmp_path: Path, no_slurm: Path) -> None:
    trained(tmp_path, began(100.0))
    held(tmp_path, 1.0)
    for name in ("squeue", "sacct"):
        answer(no_slurm, name)
    status = told(tmp_path)
    assert (status.state, status.squeue, status.sacct) == ("running", "unneeded", "unneeded")
    assert not asked(no_slurm, "squeue") and not asked(no_slurm, "sacct")


@pytest.mark.parametrize("cache", ["cache", "file/cache"], ids=["kept", "no place to keep it"])
def test_slurm_is_asked_once_by_those_who_watch(
    tmp_path: Path, no_slurm: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setattr("hpcgen.launch.slurm._KEPT_S", 30.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_slurm / cache))
    (no_slurm / "file").touch()
    trained(tmp_path, began(100.0), began(200.0, restart=1), stopped(300.0))
    answer(no_slurm, "sacct", "2026-11-20T15:00:00|17|NODE_FAIL|0:0\n")

    def questions(says: str, state: str) -> int:
        """Those to squeue when status is asked three times."""
        before = len(asked(no_slurm, "squeue"))
        answer(no_slurm, "squeue", says)
        assert [told(tmp_path).state for _ in range(3)] == [state] * 3
        return len(asked(no_slurm, "squeue")) - before

    keeps = cache == "cache"
    assert questions("17|RUNNING|2026-11-20T15:00:00|None\n", "running") == 3, "that will change soon"
    assert questions("17|PENDING|2026-11-21T15:00:00|BeginTime\n", "queued") == (1 if keeps else 3)
    assert len(asked(no_slurm, "sacct")) == (1 if keeps else 6)
    log(tmp_path, {"time": time.time() + 1, "event": "submit", "verb": "train", "job": "17"})
    assert questions("17|RUNNING|2026-11-20T15:00:00|None\n", "running") == 3, "the run has told more since"
    assert len(list(no_slurm.rglob("slurm.json*"))) == keeps


def test_sacct_says_how_silent_launches_ended(tmp_path: Path, no_slurm: Path) -> None:
    local = [time.mktime(time.strptime(f"2026-11-20 1{hour}:00:00", "%Y-%m-%d %H:%M:%S")) for hour in range(3)]
    trained(tmp_path, began(local[0] + 20), began(local[1] + 20, restart=1), began(local[2] + 20, job="19"))
    rows = ["2026-11-20T10:00:00|17|NODE_FAIL|0:0", "2026-11-20T11:00:00|17|TIMEOUT|0:0",
            "2026-11-20T12:00:00|19|OUT_OF_MEMORY|0:125"]  # fmt: skip
    answer(no_slurm, "squeue", err="slurm_load_jobs error: Invalid job id specified", code=1)
    answer(no_slurm, "sacct", "\n".join(rows))
    held(tmp_path, 100.0)
    status = told(tmp_path)
    assert [restart.why for restart in status.restarts] == [
        "Slurm: NODE_FAIL, exit code 0:0", "Slurm: TIMEOUT, exit code 0:0"
    ]  # fmt: skip
    assert status.state == "silent" and status.why.endswith("Slurm: job 19 OUT_OF_MEMORY, exit code 0:125")
    assert (status.squeue, status.sacct, status.jobs) == ("asked", "asked", [])
    (question,) = asked(no_slurm, "sacct")
    assert "--jobs=19,17" in question


@pytest.mark.parametrize("tools", [(), ("squeue", "sacct")], ids=["absent", "broken"])
def test_no_slurm_is_no_error(tmp_path: Path, no_slurm: Path, tools: tuple[str, ...]) -> None:
    for name in tools:
        answer(no_slurm, name, err="Slurm accounting storage is disabled", code=1)
    trained(tmp_path, began(100.0), began(200.0))
    held(tmp_path, 60.0)
    status = told(tmp_path)
    assert (status.state, status.squeue, status.sacct) == ("silent", "unavailable", "unavailable")
    assert status.restarts[0].why == "no last words; Slurm started the job again: preempted, or its node lost"
    assert "squeue unavailable" in render(status)


def test_a_job_that_has_not_begun_the_run_yet(tmp_path: Path, no_slurm: Path) -> None:
    submitted(tmp_path, "campaign", "21")
    assert told(tmp_path).state == "queued" and "cannot be asked" in told(tmp_path).why
    answer(no_slurm, "squeue", "21_[0-7%4]|PENDING|N/A|Priority\n")
    status = told(tmp_path)
    assert (status.state, status.verb, status.why) == ("queued", "campaign", "job 21_[0-7%4] PENDING (Priority)")
    assert [(job.verb, job.start) for job in status.jobs] == [("campaign", None)]
    answer(no_slurm, "squeue", "21_0|RUNNING|2026-11-20T15:00:00|None\n")
    assert told(tmp_path).state == "running" and "no sign of life yet" in told(tmp_path).why
    answer(no_slurm, "squeue")
    assert (told(tmp_path).state, told(tmp_path).why) == ("failed", "job 21 ended before the run began")


def test_a_job_that_starts_again_and_one_that_goes_on_with_other_things(tmp_path: Path, no_slurm: Path) -> None:
    trained(tmp_path, began(100.0), stopped(200.0))
    answer(no_slurm, "squeue", "17|RUNNING|2026-11-20T15:00:00|None\n")
    assert told(tmp_path).state == "running"
    answer(no_slurm, "squeue", "17|RUNNING|1970-01-02T00:00:00|None\n")
    log(tmp_path, stopped(2e5))
    assert told(tmp_path).state == "stopped"


def test_a_queued_page_is_not_the_run(tmp_path: Path, no_slurm: Path) -> None:
    submitted(tmp_path, "train", "29")
    submitted(tmp_path, "report", "30")
    answer(no_slurm, "squeue", "29|PENDING|N/A|Priority\n30|PENDING|N/A|Dependency\n")
    status = told(tmp_path)
    assert (status.verb, status.state, len(status.jobs)) == ("train", "queued", 2)


def test_jobs_of_other_verbs_are_shown_and_decide_nothing(tmp_path: Path, no_slurm: Path) -> None:
    trained(tmp_path, began(100.0), {"time": 300.0, "event": "done", "step": 100})
    submitted(tmp_path, "evaluate", "30")
    log(tmp_path, {"time": 400.0, "event": "submit", "verb": "evaluate", "job": "30"})
    answer(no_slurm, "squeue", "30|PENDING|N/A|Dependency\n")
    status = told(tmp_path)
    assert status.state == "done" and [(job.verb, job.reason) for job in status.jobs] == [("evaluate", "Dependency")]
    assert "30 evaluate PENDING (Dependency)" in render(status)
    work = tmp_path / "evaluate" / "generate.0.work"
    log(work, {**began(500.0, job=""), "label": "evaluating", "blocks": 4}, {"time": 600.0, **stopped(600.0)})
    (work / "rows-000000.csv").touch()
    (work / "rows-000001.csv.t.draft").touch()
    status = told(work)
    assert status.state == "queued", "the job is that of the evaluation"
    assert status.progress is not None and (status.progress.done, status.progress.total) == (1, 4)
    log(work, {**began(700.0, job=""), "label": "comparing crystals", "blocks": 3})
    for name in ("same-00000.npz", "same-00001.npz", "cells-00000.h5", "same.npz"):
        (work / name).touch()
    status = told(work)
    assert status.progress is not None and (status.progress.done, status.progress.total) == (2, 3)


def test_errors_of_any_rank_are_told(tmp_path: Path) -> None:
    ended = {"time": 200.0, "event": "error", "kind": "InputError", "message": "shard 3 is broken", "rank": 5}
    trained(tmp_path, began(100.0), ended)
    status = told(tmp_path)
    assert (status.state, status.why) == ("failed", "InputError: shard 3 is broken on rank 5")
    assert status.last_error is not None and status.last_error.time == 200.0
    log(tmp_path, began(300.0))
    assert (told(tmp_path).state, told(tmp_path).why) == ("failed", "ended without last words")
    mark = tmp_path / "marked" / "all-00003.h5.failed"
    trained(tmp_path / "marked", began(100.0))
    mark.write_text(json.dumps({"kind": "crash", "reason": "worker died of SIGSEGV", "rank": 2}))
    error = told(tmp_path / "marked").last_error
    assert error is not None and (error.kind, error.rank, error.where) == ("crash", 2, "all-00003.h5")


def test_torn_lines_and_files_are_no_error(tmp_path: Path) -> None:
    trained(tmp_path, began(100.0), stopped(200.0))
    log(tmp_path, {"time": 150.0, "kind": "train", "step": 6, "loss": None}, name="metrics.jsonl")
    for name in ("events.jsonl", "metrics.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"time": 300.0, "event": "st\xff')
    status = told(tmp_path)
    assert status.state == "stopped" and status.losses is not None and status.losses.loss is None
    assert "not finite at step 6" in render(status)
    held(tmp_path, 1.0)
    for name in ("lease/owner-2.json", "heartbeat/0.json"):
        (tmp_path / name).write_bytes(b'{"token": "t\xff')
    assert told(tmp_path).state == "running", "they are new"
    (tmp_path / "events.jsonl").write_bytes(b"\n[1]\nnull\n\x00\x00\n")
    assert told(tmp_path).state == "running"


@pytest.mark.parametrize("make", ["missing", "file", "empty", "foreign"])
def test_what_is_no_run_is_one_sentence(tmp_path: Path, make: str) -> None:
    run = tmp_path / "run"
    if make == "file":
        run.write_text("x")
    elif make != "missing":
        (run / "work").mkdir(parents=True)
    if make == "foreign":
        (run / "config.yaml").write_text("store: a\nname: other\n")
    with pytest.raises(InputError, match=str(run)) as met:
        describe(run)
    assert "\n" not in str(met.value) and met.value.exit_code == 4


@pytest.mark.parametrize("closed", [".", "events.jsonl", "lease", "heartbeat/0.json"])
def test_no_permission_to_read_is_one_sentence(closed: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        run = trained(Path(name) / "run", began(100.0))
        held(run, 1.0)
        (run / closed).chmod(0)
        code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from hpcgen.errors import InputError
from hpcgen.launch.status import describe
from pathlib import Path
if os.geteuid() == 0:
    os.setuid(65534)
try:
    print(describe(Path({str(run)!r})))
except InputError as fault:
    print("InputError", fault)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        (run / closed).chmod(0o755)
    assert done.stdout.startswith("InputError") and "Permission denied" in done.stdout, done.stdout + done.stderr
    assert str(run / closed) in done.stdout


def test_it_is_quick_and_light_whatever_lies_there(tmp_path: Path) -> None:
    trained(tmp_path, began(time.time() - 3000), steps=10**6)
    now, line = time.time(), {"kind": "train", "loss": 0.5, "sites": 0.25, "lattice": 0.125, "gradient": 1.0}
    old = json.dumps({**line, "time": now - 2000, "step": 0}).encode() + b"\n"
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.writelines([old * 10_000] * (100 * 2**20 // len(old) // 10_000))
    log(tmp_path, *({**line, "time": now - 1000 + i, "step": i} for i in range(1000)), name="metrics.jsonl")
    held(tmp_path, 1.0)
    code = f"""
import sys, time
from pathlib import Path
from hpcgen.launch.status import describe, render
begin = time.process_time()
print(render(describe(Path({str(tmp_path)!r}))))
heavy = {{"torch", "numpy", "pymatgen", "mpi4py", "h5py", "omegaconf", "submitit"}} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() - begin < 0.5
"""
    begin = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    used = os.times()
    assert done.returncode == 0 and "1 step" in done.stdout, done.stdout + done.stderr
    assert used.children_user + used.children_system - begin.children_user - begin.children_system < 2


def test_the_rate_is_that_of_the_last_stretch_of_this_launch(tmp_path: Path) -> None:
    now = time.time()

    def lines(first: float, last: float, step: int, rate: float) -> list[dict[str, Any]]:
        times = range(int(first), int(last), 50)
        return [{"kind": "train", "time": now + at, "step": step + round(rate * (at - first))} for at in times]

    trained(tmp_path, began(now - 2000), steps=10_000)
    log(tmp_path, *lines(-1900, -650, 0, 0.1), *lines(-600, 0, 1900, 2.0), name="metrics.jsonl")
    held(tmp_path, 0.0, step=3100, steps=10_000)
    progress = told(tmp_path).progress
    assert progress is not None and progress.rate == pytest.approx(2.0, rel=0.01)
    assert progress.left_s == pytest.approx(6900 / 2, rel=0.01) and progress.done == 3100

    again = trained(tmp_path / "again", began(now - 700), began(now - 220), steps=10_000)
    log(again, *lines(-550, -250, 2800, 1.0), *lines(-200, 0, 3100, 5.0), name="metrics.jsonl")
    held(again, 0.0)
    progress = told(again).progress
    assert progress is not None and progress.rate == pytest.approx(5.0, rel=0.01) and progress.done == 3850
