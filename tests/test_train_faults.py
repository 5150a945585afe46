"""Training stopped, killed, damaged or badly asked for: one clear sentence, the right exit code, nothing lost."""

import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from train_jobs import ENV, Toy, assert_same_run, ended, job, make_store, newest, numbers, run, start, tensors

from hpcgen import cli
from hpcgen.errors import (
    Diverged,
    HpcgenError,
    InputError,
    SiteError,
    StoppedEarly,
    StorageError,
    UsageError,
)
from hpcgen.files import read_json_lines
from hpcgen.launch.place import Place, find_place, first_host
from hpcgen.models.registry import MODELS
from hpcgen.models.saved import MODEL, read_saved
from hpcgen.runner.owners import read_record
from hpcgen.runner.stop import time_left
from hpcgen.train.clock import Clock
from hpcgen.train.config import TrainConfig, load
from hpcgen.train.dist import find_device
from hpcgen.train.state import KIND, read_checkpoint
from hpcgen.train.watch import Seen, name_late

pytestmark = pytest.mark.usefixtures("threads_restored")

SMALL_DISK = "200k"
TRAIN = str(Path(__file__).parent / "train_jobs.py")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("train") / "store")


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=str)
def test_every_config_of_the_package_is_whole(file: Path) -> None:
    assert load(TrainConfig, file, ["store=a", "out=b", "init=c"]).model in MODELS


# ---- stops, kills, broken files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_signals_save_and_stop(store: Path, tmp_path: Path, number: signal.Signals) -> None:
    with pytest.raises(StoppedEarly, match=number.name):
        run(store, tmp_path, toy={"signal_at": 4, "signal": int(number)})
    assert newest(tmp_path)["progress"]["step"] == 5
    assert read_json_lines(tmp_path / "events.jsonl")[-1]["event"] == "stop"
    assert not list(tmp_path.rglob("*.draft")) and not (tmp_path / "lease" / "owner-1.json").exists()


def test_the_clock_stops_a_run(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedEarly, match="time limit"):
        run(store, tmp_path, "time_limit_s=0.001")
    assert newest(tmp_path)["progress"]["step"] == 1


def until_it_trains(run: Path) -> None:
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_stops_before_the_end_of_its_job(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    assert run(store, tmp_path / "whole", "steps=3").step == 3
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 8))
    with pytest.raises(StoppedEarly, match="the time of the job is nearly up"):
        run(store, tmp_path / "parts", "steps=100000", toy={"step_s": 0.05})
    assert newest(tmp_path / "parts")["progress"]["step"] > 1


def test_the_lead_before_the_end_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hpcgen.train.clock.time.monotonic", lambda: now[0])
    clock = Clock(0, 0.0, {"SLURM_JOB_END_TIME": str(time.time() + 40)})
    for second in (300, 2, 5, 3):  # the first step compiles, and is not counted
        now[0] += second
        assert clock.reason() is None
    assert clock.lead_s == 15
    for what, seconds in (("saving", 6), ("saving", 1), ("validation", 8)):
        with clock.timing(what):
            now[0] += seconds
    assert clock.lead_s == 43
    now[0] += 1
    assert clock.reason() == "the time of the job is nearly up"
    assert clock.lead_s == 43, "what it takes to save and to validate is no part of the step"
    for _ in range(200):
        now[0] += 0.5
        clock.reason()
    assert clock.lead_s == 34, "long steps are forgotten"
    assert Clock(10, 0.0, {}).reason() == "time limit"


def test_the_end_of_a_job_as_slurm_tells_it() -> None:
    assert time_left({}) == time_left({"HPCGEN_JOB_END": ""}) == math.inf
    assert time_left({"SLURM_JOB_END_TIME": str(time.time() - 60)}) == math.inf, "put off since the job began"
    for name in ("SLURM_JOB_END_TIME", "HPCGEN_JOB_END"):
        assert 85 < time_left({name: str(int(time.time()) + 90)}) <= 90


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_rank_that_does_not_come_is_named(store: Path, tmp_path: Path, stopped: int) -> None:
    ranks = start(3, store, tmp_path, "timeout_s=8", "steps=100000", toy={"step_s": 0.01})
    try:
        until_it_trains(tmp_path)
        ranks[stopped].send_signal(signal.SIGSTOP)
        codes = [rank.wait(90) for rank in ranks if rank is not ranks[stopped]]
    finally:
        for rank in ranks:
            rank.kill()
    said = ended(ranks)[1]
    assert codes == [3, 3]
    if stopped:
        why = f"rank {stopped} of 3 on {os.uname().nodename} keeps the others waiting: no sign of life for"
        assert why in said and "Traceback" not in said
        error = read_json_lines(tmp_path / "events.jsonl")[-1]
        assert error["event"] == "error" and error["rank"] == stopped and why in error["message"]
    else:
        assert "rank 0 of 3 does not answer" in said


HANGS = [(1, "sleep"), (1, "lock"), pytest.param(0, "sleep", marks=pytest.mark.bench)]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "hang"), HANGS)
def test_a_rank_that_hangs_shows_where(store: Path, tmp_path: Path, rank: int, hang: str) -> None:
    ranks = start(2, store, tmp_path, "timeout_s=8", toy={"hang_at": 3, "hang": hang, "rank": rank})
    try:
        assert ranks[0].wait(90) == 3
        if hang == "sleep":
            assert ranks[1].wait(20) == 3
    finally:
        for left in ranks:
            left.kill()
    said = [left.communicate()[1] for left in ranks]
    assert f"rank {rank} of 2 on {os.uname().nodename} keeps the others waiting" in said[0]
    assert "in _misbehave" in said[rank] and "in _misbehave" not in said[1 - rank]


def test_who_keeps_the_others_waiting() -> None:
    def seen(**doing: tuple[int, str]) -> dict[int, Seen]:
        return {int(rank[1:]): Seen(7, of, f"n{rank[1:]}", 95.0, 40.0) for rank, of in doing.items()}

    even = seen(r0=(5, "computing"), r1=(5, "computing"))
    assert name_late(even, 100.0, 60.0, 10.0) is None
    even[1].beat_at = 60.0
    assert name_late(even, 100.0, 60.0, 10.0) == (
        "rank 1 of 2 on n1 keeps the others waiting: no sign of life for 40 s; killed, stopped, or its node hangs", 1
    )  # fmt: skip
    behind = seen(r0=(5, "computing"), r1=(5, "reading"), r2=(5, "computing"), r3=(5, "reading"))
    assert name_late(behind, 100.0, 60.0, 10.0) == (
        "rank 1 of 4 on n1 keeps the others waiting: reading in step 5 for 60 s, and 1 more (3)", 1
    )  # fmt: skip
    within = seen(r0=(5, "summing"), r1=(5, "computing"))
    assert name_late(within, 100.0, 60.0, 10.0) == (
        "rank 1 of 2 on n1 keeps the others waiting: computing in step 5 for 60 s", 1
    )  # fmt: skip
    late = name_late(seen(r0=(5, "saving"), r1=(5, "reading")), 100.0, 60.0, 10.0)
    assert late == ("rank 0 of 2 on n0 keeps the others waiting: saving in step 5 for 60 s", 0)


@pytest.mark.slow
def test_a_job_that_is_suspended_and_resumed_goes_on(store: Path, tmp_path: Path) -> None:
    ranks = start(3, store, tmp_path, "timeout_s=8", "steps=1000", toy={"step_s": 0.01})
    until_it_trains(tmp_path)
    for number, pause in ((signal.SIGSTOP, 12.0), (signal.SIGCONT, 0.0)):
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(pause)
    codes, said = ended(ranks)
    assert codes == [0, 0, 0] and "waiting" not in said and "does not answer" not in said


@pytest.mark.slow
def test_a_first_rank_that_stops_under_torchrun_is_named(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", TRAIN, f"store={store}"]
    words = [f"out={tmp_path}", "timeout_s=8", "steps=100000"]
    launch = subprocess.Popen([*command, *words], env=ENV, stderr=subprocess.PIPE, text=True)
    until_it_trains(tmp_path)
    beat = read_record(tmp_path / "heartbeat" / "0.json") or {}
    os.kill(beat["pid"], signal.SIGSTOP)
    began = time.monotonic()
    try:
        said = launch.communicate(timeout=120)[1]
    finally:
        launch.kill()
    assert "rank 0 of 2 does not answer" in said and time.monotonic() - began < 60 and launch.returncode


@pytest.mark.slow
def test_the_command_ends_with_75_and_goes_on_after_a_kill(store: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert job(1, store, whole)[0] == [0]
    for code, number in ((75, signal.SIGTERM), (-9, signal.SIGKILL)):
        at = 3 if code == 75 else 9
        toy = {"signal_at": at, "signal": int(number)}
        assert job(1, store, parts, "save_every_steps=2", toy=toy)[0] == [code]
        assert newest(parts)["progress"]["step"] == {75: 4, -9: 8}[code]
    codes, said = job(1, store, parts)
    assert codes == [0] and "going on from step 8" in said and "taking over from a dead run" in said
    assert_same_run(whole, parts)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_a_rank_with_workers(store: Path, tmp_path: Path, number: signal.Signals) -> None:
    with pytest.raises(StoppedEarly, match=number.name):
        run(store, tmp_path / "parts", "workers=2", toy={"signal_at": 4, "signal": int(number)})
    assert multiprocessing.active_children() == []
    run(store, tmp_path / "parts", "workers=2")
    run(store, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_signal_to_ranks_and_their_workers(store: Path, tmp_path: Path) -> None:
    """As Slurm sends it: to every process of the step."""
    parts = tmp_path / "parts"
    ranks = start(2, store, parts, "workers=2", toy={"step_s": 0.2})
    until_it_trains(parts)
    workers: list[psutil.Process] = []
    while len(workers) < 4:  # each epoch has its own
        workers = [child for rank in ranks for child in psutil.Process(rank.pid).children()]
    for process in [*ranks, *workers]:
        process.send_signal(signal.SIGTERM)
    assert [rank.wait(60) for rank in ranks] == [75, 75]
    assert psutil.wait_procs(workers, timeout=4)[1] == [], "they live on"
    assert "Traceback" not in ended(ranks)[1]
    assert job(2, store, parts, "workers=2")[0] == job(2, store, tmp_path / "whole")[0] == [0, 0]
    assert_same_run(tmp_path / "whole", parts)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "toy", "code"), [(2, {"broken_at": 3}, 4), (0, {"broken_at": 3}, 4),
                                                   (1, {"signal_at": 3, "signal": 9}, 3)])  # fmt: skip
def test_no_rank_is_left_behind_when_one_fails(store: Path, tmp_path: Path, rank: int, toy: dict, code: int) -> None:
    began = time.monotonic()
    codes, said = job(3, store, tmp_path, toy={**toy, "rank": rank})
    assert all(met == (code if code == 4 or number != rank else -9) for number, met in enumerate(codes)), codes
    assert time.monotonic() - began < 60
    if code == 3:
        error = [event for event in read_json_lines(tmp_path / "events.jsonl") if event["event"] == "error"]
        assert error and all("another rank ended without a word" in told["message"] for told in error)
    if code == 4:
        error = [event for event in read_json_lines(tmp_path / "events.jsonl") if event["event"] == "error"]
        assert [(told["rank"], told["kind"], told["message"]) for told in error] == [
            (rank, "InputError", "a broken shard")
        ]
        assert said.count("a broken shard") == 1 and f"rank {rank} of 3" in said and "Traceback" not in said


def damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        data[max(archive.infolist(), key=lambda part: part.file_size).header_offset + 400] ^= 1
    file.write_bytes(data)


def damage_foreign(file: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, file)


def damage_object(file: Path) -> None:
    torch.save({"kind": KIND, "model": Path}, file)


def damage_model(file: Path) -> None:
    file.write_bytes((file.parent.parent / "last.pt").read_bytes())


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_cut, "not a whole checkpoint"),
        (damage_empty, "not a whole checkpoint"),
        (damage_bit, "does not match its checksum"),
        (damage_foreign, "holds None, want 'hpcgen training'|holds 'something else', want"),
        (damage_object, "not a checkpoint of hpcgen"),
        (damage_model, "holds 'hpcgen model', want 'hpcgen training'"),
    ],
)
def test_a_bad_checkpoint_is_named_and_the_one_before_is_taken(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, words: str
) -> None:
    with pytest.raises(StoppedEarly):
        run(store, tmp_path / "parts", "save_every_steps=3", toy={"signal_at": 5})
    file = tmp_path / "parts" / "checkpoints" / "step-00000006.pt"
    damage(file)
    with pytest.raises(InputError, match=words):
        read_checkpoint(file)
    caplog.clear()
    run(store, tmp_path / "parts", "save_every_steps=3")
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(file) in told and told.endswith("the next older checkpoint is taken") and "\n" not in told
    assert "step-00000003.pt" in read_json_lines(tmp_path / "parts" / "events.jsonl")[-2]["resumed"]
    run(store, tmp_path / "whole", "save_every_steps=3")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_without_a_good_checkpoint_it_begins_anew_and_says_so(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StoppedEarly):
        run(store, tmp_path, toy={"signal_at": 5})
    damage_cut(tmp_path / "checkpoints" / "step-00000006.pt")
    assert run(store, tmp_path).step == 12
    assert "starting from the beginning" in caplog.text


def test_newest_k_are_kept_and_the_best(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path, "save_every_steps=2", "keep=2", "validate_every=1")
    kept = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000010.pt", "step-00000012.pt"]
    losses = {line["step"]: line["loss"] for line in numbers(tmp_path) if line["kind"] == "validation"}
    best = min(losses, key=lambda step: losses[step])
    exported = read_saved(tmp_path / "best.pt", MODEL)
    assert exported["facts"]["step"] == best and exported["facts"]["validation_loss"] == losses[best]
    config = Toy.Config(**exported["config"])
    model = Toy(config)
    model.load_state_dict(exported["weights"])
    last = read_saved(tmp_path / "last.pt", MODEL)
    averaged = newest(tmp_path)["ema"]
    assert last["model"] == "toy" and all(torch.equal(last["weights"][name], averaged[name]) for name in averaged)


def test_a_finished_run_has_nothing_to_do(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")}
    assert run(store, tmp_path).step == 12
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")}


def test_saves_by_time(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path, "save_every_s=0.0001", "keep=100", "validate_every=0")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 13


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["autoperi.widht=3"], r"unknown key autoperi.widht; did you mean autoperi.width\?"),
        (["step=3"], r"unknown key step; did you mean steps\?"),
        (["steps=many"], "steps"),
        (["steps=0"], "steps = 0: want at least 1"),
        (["lr=nan"], "lr = nan: want more than 0"),
        (["ema=1"], "ema = 1.0: want at least 0 and less than 1"),
        (["betas=[0.9]"], "betas"),
        (["muon=-1"], "muon = -1.0: want at least 0"),
        (["precision=fp8"], "precision = 'fp8': want one of float32, bf16, fp16"),
        (["model=gan"], "model = 'gan': want one of autoperi"),
        (["device=tpu"], "device = 'tpu': want one of auto, cpu, cuda"),
        (["batch.crystals=null"], "no limit of a batch is set"),
        (["batch.crystals=0"], "batch.crystals = 0: want at least 1"),
        (["autoperi.width=33"], "autoperi.width = 33: want a multiple"),
        (["conditions=[band_gap,band_gap]"], "want each column once"),
        (["conditions=[a]", "autoperi.conditions=[b]"], "set conditions, not the model's own"),
        (["store=''"], "store is not set: want store=FOLDER"),
    ],
)
def test_bad_settings_end_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"store": "somewhere", "out": str(tmp_path / "run")}))
    assert cli.main(["train", str(tmp_path / "config.yaml"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_settings_of_the_model_follow_and_come_back(tmp_path: Path) -> None:
    from hpcgen.config import to_yaml

    config = load(TrainConfig, None, ["store=s", "out=o", "conditions=[band_gap]", "batch.padded_atoms=2048"])
    assert config.settings.conditions == ["band_gap"]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(TrainConfig, tmp_path / "config.yaml") == config


def test_bad_stores_end_with_4(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"store: {store}\nout: {tmp_path / 'run'}\n")
    for words, message in (
        ([f"store={tmp_path}/nothing"], "nothing"),
        (["conditions=[e_above_hull]"], "no column 'e_above_hull'; the store has: band_gap"),
        (["conditions=[formula]"], "column 'formula' holds text"),
        (["split=test"], "split 'test' is not in the store; it has: train, val"),
        (["validation_split=test"], "none is validate_every=0"),
        (["autoperi.max_atoms=2"], "want autoperi.max_atoms"),
    ):
        assert cli.main(["train", str(tmp_path / "c.yaml"), *words]) == 4
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_crystals_larger_than_a_batch_are_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="padded_atoms of a batch is 5, but"):
        run(store, tmp_path, "batch.padded_atoms=5")


def test_changed_settings_are_refused_and_may_be_accepted(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedEarly):
        run(store, tmp_path, toy={"signal_at": 5})
    with pytest.raises(UsageError, match=r"made with lr = 0.01, now 0.02: take another out .* accept=\[lr\]"):
        run(store, tmp_path, "lr=0.02")
    for words, name in ((["seed=1"], "seed"), (["toy.width=8"], "toy.width"), (["batch.crystals=4"], "batch.crystals")):
        with pytest.raises(UsageError, match=f"made with {name} = "):
            run(store, tmp_path, *words)
    other = make_store(tmp_path / "other", 61)
    with pytest.raises(UsageError, match="made with store = .*hash of its training crystals"):
        run(other, tmp_path)
    with pytest.raises(InputError, match="net.0.weight is"):
        run(store, tmp_path, "toy.width=8", "accept=[toy.width]")
    assert run(store, tmp_path, "steps=14", "accept=[steps]", "validate_every=3", "keep=9").step == 14
    assert read_json_lines(tmp_path / "events.jsonl")[-2]["accepted"] == ["steps: 12 -> 14"]


def test_a_run_may_begin_with_a_trained_model(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "first")
    first = tmp_path / "first" / "last.pt"
    other = make_store(tmp_path / "other", 31)
    words = [f"init={first}", "lr=1e-9"]
    with pytest.raises(StoppedEarly):
        run(other, tmp_path / "second", *words, toy={"signal_at": 5})
    shutil.move(first, tmp_path / "kept.pt")  # no longer needed: the run goes on from its own checkpoint
    run(other, tmp_path / "second", *words)
    kept, now = (read_saved(path, MODEL)["weights"] for path in (tmp_path / "kept.pt", tmp_path / "second" / "last.pt"))
    assert torch.equal(kept["mean"], now["mean"]) and kept.keys() == now.keys()
    assert all(torch.allclose(kept[name], now[name], atol=1e-6) for name in kept)

    def refused(kind: type[HpcgenError], match: str, *more: str) -> None:
        with pytest.raises(kind, match=match):
            run(other, tmp_path / f"{len(list(tmp_path.iterdir()))}", *more)

    refused(InputError, "first/last.pt: there is no such file", *words)
    kept_init = f"init={tmp_path / 'kept.pt'}"
    refused(UsageError, r"made with toy.width = 24, now 8: add accept=\[toy.width\]", kept_init, "toy.width=8")
    refused(InputError, "net.0.weight is", kept_init, "toy.width=8", "accept=[toy.width]")
    refused(InputError, "holds 'hpcgen training', want 'hpcgen model'",
            f"init={sorted((tmp_path / 'second' / 'checkpoints').iterdir())[0]}")  # fmt: skip


def test_a_run_has_one_owner(store: Path, tmp_path: Path) -> None:
    from hpcgen.runner.lease import Lease
    from hpcgen.runner.team import Team

    with Lease.take(tmp_path, Team("alone", 0, 1, "another")), pytest.raises(StorageError, match="belongs to another"):
        run(store, tmp_path)


def test_bad_numbers_are_left_out_and_counted(store: Path, tmp_path: Path) -> None:
    progress = run(store, tmp_path, "bad_steps=3", toy={"bad_from": 4, "bad_to": 6})
    assert (progress.bad, progress.bad_in_row) == (2, 0)
    assert all(value.isfinite().all() for value in tensors(newest(tmp_path)).values())
    assert [line["bad"] for line in numbers(tmp_path) if line["kind"] == "train"] == [1, 2, 2]


def test_many_bad_steps_in_a_row_end_with_6(store: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="5 steps in a row, up to step 8, had a loss or gradient that is not finite"):
        run(store, tmp_path, "bad_steps=5", "save_every_steps=2", toy={"bad_from": 3, "bad_to": 12})
    assert all(value.isfinite().all() for value in tensors(newest(tmp_path)).values())
    assert Diverged.exit_code == 6


@pytest.mark.slow
def test_all_ranks_agree_on_bad_numbers_of_one(store: Path, tmp_path: Path) -> None:
    toy = {"bad_from": 3, "bad_to": 9, "bad_sample": 17}
    codes, said = job(3, store, tmp_path / "one", toy=toy)
    assert codes == [0, 0, 0], said
    progress = newest(tmp_path / "one")["progress"]
    assert progress["bad"] == 1 and progress["step"] == 12
    codes, said = job(3, store, tmp_path / "all", "bad_steps=4", toy={"bad_from": 3, "bad_to": 12})
    assert codes == [6, 6, 6] and said.count("4 steps in a row") == 1


def test_a_full_disk_ends_with_7_and_more_room_finishes_it(store: Path, tmp_path: Path, small_disk: Path) -> None:
    words = ("save_every_steps=1", "keep=9")
    with pytest.raises(StorageError, match="step-.*cannot write .No space left") as fault:
        run(store, small_disk / "run", *words)
    assert fault.value.exit_code == 7
    left = sorted((small_disk / "run" / "checkpoints").iterdir())
    assert left and all(read_checkpoint(file) for file in left)  # whole, and no draft
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run(store, small_disk / "run", *words)
    run(store, tmp_path / "whole", *words)
    assert_same_run(tmp_path / "whole", small_disk / "run")


def test_too_little_room_for_the_next_checkpoint_leaves_the_last_one(
    store: Path, tmp_path: Path, small_disk: Path
) -> None:
    out, words = small_disk / "run", ("save_every_steps=5", "keep=1")
    with pytest.raises(StoppedEarly):
        run(store, out, *words, toy={"signal_at": 4})
    (file,) = (out / "checkpoints").iterdir()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - file.stat().st_size + 4096))
    with pytest.raises(StorageError, match="step-00000010.pt: cannot write .No space left"):
        run(store, out, *words)
    assert list((out / "checkpoints").iterdir()) == [file] and not list(out.rglob("*.draft"))
    filler.unlink()
    run(store, out, *words)
    assert "step-00000005.pt" in read_json_lines(out / "events.jsonl")[-2]["resumed"]
    run(store, tmp_path, *words)
    assert_same_run(tmp_path, out)


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_with_7(store: Path, small_disk: Path) -> None:
    codes, said = job(2, store, small_disk / "run", "save_every_steps=1", "keep=9")
    assert codes == [7, 7] and "No space left" in said and "Traceback" not in said


def test_a_read_only_folder_ends_with_7(store: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only"):
        run(store, small_disk / "run")


# ---- ranks -----------------------------------------------------------------------------------------------------------

SRUN = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "4", "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[003-005,9]"}  # fmt: skip
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "gpu003", "MASTER_PORT": "1234"}  # fmt: skip


def test_places() -> None:
    assert find_place({}) == Place()
    found = find_place(SRUN)
    assert (found.kind, found.rank, found.world, found.local_rank, found.nodes) == ("srun", 9, 16, 1, 4)
    assert found.address == "gpu003" and all(20000 <= port <= 32767 for port in found.ports)
    assert len(set(found.ports)) > 4 and found.ports == find_place({**SRUN, "SLURM_PROCID": "0"}).ports
    assert found.ports != find_place({**SRUN, "SLURM_JOB_ID": "4712"}).ports
    assert find_place({**SRUN, "HPCGEN_MASTER_SUFFIX": "-ib"}).address == "gpu003-ib"
    assert find_place({**SRUN, "SLURM_STEP_NUM_NODES": "1"}).address == "localhost"
    found = find_place({**TORCHRUN, **SRUN})  # torchrun inside of srun
    assert (found.kind, found.rank, found.world, found.local_rank, found.nodes) == ("torchrun", 3, 4, 1, 2)
    assert find_place({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}) == Place()
    one = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "1"}
    assert find_place({**one, "SLURM_PROCID": "0"}) == Place()
    assert find_place({**one, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "8"}) == Place()


@pytest.mark.parametrize(
    "more",
    [
        {"SLURM_NTASKS": "16", "SLURM_NNODES": "4", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "4"},  # srun
        {"SLURM_NTASKS": "16", "SLURM_NNODES": "4", "SLURM_JOB_NUM_NODES": "8", "SLURM_NTASKS_PER_NODE": "8"},  # -N4
        {"SLURM_NTASKS": "16", "SLURM_NNODES": "4", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "1"},  # -n16
        {"PMI_SIZE": "16", "PMI_RANK": "9"},  # --mpi=pmi2
    ],
)
def test_steps_that_may_be(more: dict[str, str]) -> None:
    assert find_place({**SRUN, **more}) == find_place(SRUN)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({**SRUN, "MASTER_ADDR": "localhost"}, "to be met at localhost, but there are 4 nodes"),
        ({**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}, "to be met at 127.0.0.1, but there are 2 nodes"),
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({**TORCHRUN, "RANK": "x"}, "RANK='x': want a whole number"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "started by an MPI launcher"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "32"}, "outside of srun"),
        ({**SRUN, "SLURM_NTASKS": "32"}, "SLURM_NTASKS=32, but this step has 16 .*: start it with `srun hpcgen train"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "32"}, "=32, but this step has 1 "),
        ({**SRUN, "SLURM_PROCID": "16"}, "this is number 16"),  # one part of a heterogeneous job
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "8"}, "16 tasks, but 4 nodes .* make 32: .*`srun --ntasks=32`"),
        ({**SRUN, "PMI_SIZE": "32", "PMI_RANK": "1"}, "started by an MPI launcher"),  # mpiexec starts its own by srun
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}, "where does rank 0 run"),
    ],
)
def test_places_that_cannot_be_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        find_place(env)


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("node7", "node7"), ("a,b", "a"), ("gpu[003-007,9]-ib,login", "gpu003-ib"), ("r[1-2]n[04-05],x", "r1n04"),
        ("gpu[9]", "gpu9"), ("a-b.c[1,3]", "a-b.c1"),
    ],
)  # fmt: skip
def test_first_host(listed: str, first: str) -> None:
    assert first_host(listed) == first
    with pytest.raises(SiteError):
        first_host("")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("srun", 5, 8, 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto", place).type == "cpu"
    with pytest.raises(SiteError, match="no GPU is visible"):
        find_device("cuda", place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, at in ((1, 0), (4, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert find_device("auto", place) == torch.device("cuda", at)
    with pytest.raises(SiteError, match="rank 5 is number 6 on its node, which shows 4 GPUs"):
        find_device("auto", Place("srun", 5, 8, 6, 1))
    assert find_device("cpu", place).type == "cpu"


@pytest.mark.slow
def test_a_taken_port_is_passed_over_and_lost_ranks_are_named(store: Path, tmp_path: Path) -> None:
    import socket

    env = {"SLURM_JOB_ID": str(random.SystemRandom().randrange(10**7))}
    first = find_place({**SRUN, **env, "SLURM_STEP_NUM_NODES": "1"}).ports[0]
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert job(2, store, tmp_path / "a", "steps=2", **env)[0] == [0, 0]
    first_rank, second_rank = start(2, store, tmp_path / "b", "timeout_s=5")
    second_rank.kill()
    codes, said = ended([first_rank, second_rank])
    assert codes == [3, -9] and "could not meet the others" in said and "ranks that have not come: 1" in said


@pytest.mark.slow
def test_a_rank_that_ends_while_they_meet_is_for_srun_to_tell_of(store: Path, tmp_path: Path) -> None:
    """A preemption may reach one rank a moment before the other: the batch script must not take that for a failure."""
    ranks = start(3, store, tmp_path / "run", HPCGEN_FAILED=str(tmp_path / "failed"))
    ranks[2].kill()  # so the others wait
    second = psutil.Process(ranks[1].pid)
    while not any(link.status == "ESTABLISHED" for link in second.net_connections()):
        time.sleep(0.1)
    ranks[0].terminate()  # there is no handler yet
    codes, said = ended(ranks)
    assert codes == [-15, 3, -9] and "rank 1 of 3: another rank ended while they met" in said
    assert not (tmp_path / "failed").exists()
