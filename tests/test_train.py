"""Training: a run that was stopped is the run that was not, on any number of ranks; and bad input costs nothing."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from store_rows import read
from train_jobs import (
    ENV,
    HERE,
    Toy,
    ToyTrainConfig,
    assert_same_run,
    job,
    make_store,
    newest,
    numbers,
    run,
    tensors,
)

from hpcgen.diffusion.draw import Draw
from hpcgen.errors import (
    HpcgenError,
    StoppedEarly,
)
from hpcgen.files import read_json_lines
from hpcgen.launch.place import Place
from hpcgen.models.batch import Batch
from hpcgen.models.saved import MODEL, read_saved
from hpcgen.train import loop
from hpcgen.train.config import TrainConfig, load
from hpcgen.train.data import Group, groups, open_data
from hpcgen.train.dist import Ranks
from hpcgen.train.loop import backward, learning_rate, train
from hpcgen.train.state import State, average

pytestmark = pytest.mark.usefixtures("threads_restored")

TINY = ("model=autoperi", "batch.crystals=8", "steps=12", "lr=1e-3", "warmup=2", "log_every=1", "validate_every=4",
        "save_every_s=0", "bucket_cap_mb=0.01", "tensorboard=false", "threads=1", "timeout_s=120", "autoperi.width=32",
        "autoperi.heads=2", "autoperi.layers=2", "autoperi.pair_width=8", "autoperi.radial=4")  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("train") / "store")


# ---- the same run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_stopped_and_resumed_is_not_stopped(store: Path, tmp_path: Path, accumulate: int, at: int) -> None:
    words = (f"accumulate={accumulate}", "conditions=[band_gap,spacegroup]")
    run(store, tmp_path / "whole", *words)
    with pytest.raises(StoppedEarly, match=rf"SIGTERM\) at step {at + 1}; the same command goes on"):
        run(store, tmp_path / "parts", *words, toy={"signal_at": at})
    assert run(store, tmp_path / "parts", *words).step == 12
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_comparison_can_fail(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "one")
    run(store, tmp_path / "two", "seed=1")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "one", tmp_path / "two")


def test_loading_in_other_processes_changes_nothing(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "one")
    run(store, tmp_path / "two", "workers=1")
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_autoperi_stopped_and_resumed_is_not_stopped(store: Path, tmp_path: Path, world: int) -> None:
    """Several buckets: 0.01 MB each, of 0.1 MB of gradients."""
    assert job(world, store, tmp_path / "whole", *TINY)[0] == [0] * world
    assert job(world, store, tmp_path / "parts", *TINY, "time_limit_s=0.001")[0] == [75] * world
    assert newest(tmp_path / "parts")["progress"]["step"] == 1
    assert job(world, store, tmp_path / "parts", *TINY)[0] == [0] * world
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_two_passes_before_the_first_step_are_needed(store: Path, tmp_path: Path) -> None:
    """Else DDP has other buckets in the first step after a resume. If this fails torch has mended it."""
    assert job(4, store, tmp_path / "whole", *TINY, UNSETTLED="1")[0] == [0] * 4
    assert job(4, store, tmp_path / "parts", *TINY, "time_limit_s=0.001", UNSETTLED="1")[0] == [75] * 4
    assert job(4, store, tmp_path / "parts", *TINY, UNSETTLED="1")[0] == [0] * 4
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_ranks_are_one_to_float_tolerance(store: Path, tmp_path: Path) -> None:
    """Of AutoPeri losses and gradients: Adam makes large steps of gradients that are nothing but rounding."""
    for model, words in (("toy", ("accumulate=2", "log_every=1")), ("autoperi", (*TINY, "lr=1e-5", "steps=5"))):
        for world in (1, 2):
            assert job(world, store, tmp_path / f"{model}{world}", *words)[0] == [0] * world
        pairs = list(zip(numbers(tmp_path / f"{model}1"), numbers(tmp_path / f"{model}2"), strict=True))
        assert len(pairs) > 5
        for one, two in pairs:
            assert one.pop("kind") == two.pop("kind")
            assert one == pytest.approx(two, rel=2e-5), model
    one, two = (newest(tmp_path / f"toy{world}")["model"] for world in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_and_sees_every_crystal_once(store: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", []
    batches = len(open_data(load(ToyTrainConfig, None, [f"store={store}", f"out={out}"]), 0, 1).plan.epoch(0))
    for number, (world, at) in enumerate([(3, 2), (1, 5), (2, -1)]):
        trace = tmp_path / f"trace{number}"
        trace.mkdir()
        toy = {"signal_at": at, "rank": world - 1, "trace": str(trace)}
        code = 75 if at >= 0 else 0
        words = (f"steps={2 * batches}", "save_every_steps=1")
        assert job(world, store, out, *words, toy=toy)[0] == [code] * world
        for file in trace.glob("*.jsonl"):
            lines = read_json_lines(file)
            steps += lines[2 if world > 1 else 0 :]  # without the two passes before the first step
    seen = [Counter(k for line in steps if line["step"] // batches == epoch for k in line["index"]) for epoch in (0, 1)]
    lent = sum((count - Counter(range(60)) for count in seen), Counter())
    assert all(set(count) == set(range(60)) for count in seen)
    assert sum(lent.values()) == 0  # batches of 8 and 4 leave none of 3 ranks without a crystal
    assert newest(out)["progress"]["crystals"] == 120


@pytest.mark.slow
def test_under_torchrun_a_signal_to_one_rank_stops_all(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "train_jobs.py"), f"store={store}"]
    stopped = {**ENV, "TOY": json.dumps({"signal_at": 5, "rank": 1})}
    done = subprocess.run([*command, f"out={tmp_path / 'a'}"], env=stopped, capture_output=True, text=True)
    assert "exitcode  : 75" in done.stderr and "stopped early" in done.stderr
    assert newest(tmp_path / "a")["progress"]["step"] == 6
    for out in ("a", "b"):
        done = subprocess.run([*command, f"out={tmp_path / out}"], env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ---- the mathematics of a step ---------------------------------------------------------------------------------------


def _parts(store: Path, out: Path, *words: str) -> tuple[ToyTrainConfig, Any, State]:
    config = load(ToyTrainConfig, None, [f"store={store}", f"out={out}", *words])
    data = open_data(config, 0, 1)
    torch.manual_seed(0)
    return config, data, loop._fresh(config, Toy, data, torch.device("cpu"))


def test_a_step_is_the_gradient_of_the_mean_over_all_its_crystals(store: Path, tmp_path: Path) -> None:
    config, data, state = _parts(store, tmp_path, "batch.crystals=null", "batch.padded_atoms=40")
    ranks, draw = Ranks(Place(), torch.device("cpu")), Draw(3)
    feed = groups(data, config, 0, 1, 0, 0)
    shares = [next(feed).shares[0] for _ in range(3)]
    assert len({share.crystals for share in shares}) > 1  # of unequal size, or this shows little
    total = sum(share.crystals for share in shares)
    told = backward(config, ranks, Group(shares, total, 0, 3), 7, state, state.model, draw)
    found = [p.grad.clone() for p in state.model.parameters()]
    state.optimiser.zero_grad()
    places = torch.cat([torch.from_numpy(share.index) for share in shares])
    loss = state.model(Batch.of(data.store.rows(places), places, 7), draw)["loss"]
    loss.backward()
    torch.testing.assert_close(told["loss"], loss.detach())
    torch.testing.assert_close(found, [p.grad for p in state.model.parameters()], rtol=1e-4, atol=1e-6)


def test_a_group_ends_with_its_epoch(store: Path, tmp_path: Path) -> None:
    config, data, _ = _parts(store, tmp_path, "accumulate=3")
    batches, feed = len(data.plan.epoch(0)), groups(data, config, 0, 1, 0, 0)
    seen: list[int] = []
    while True:
        group = next(feed)
        seen += [k for share in group.shares for k in share.index.tolist()]
        assert 1 <= len(group.shares) <= 3 and group.crystals == sum(len(share.index) for share in group.shares)
        if group.epoch:
            break
        assert group.offset < batches
    assert sorted(seen) == list(range(60)) and group.offset == 0


def test_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(steps=1000, warmup=100, lr=2e-3, lr_floor=0.1)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5) and rates[99] == pytest.approx(2e-3) == rates[100]
    assert rates[550] == pytest.approx(2e-3 * 0.55) and rates[-1] == pytest.approx(2e-4, rel=0.01)
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e9])
def test_gradients_are_clipped_and_told_as_they_were(store: Path, tmp_path: Path, clip: float) -> None:
    """After one step the first moment of AdamW is a tenth of the gradient that it was given."""
    run(store, tmp_path, "steps=1", "log_every=1", "validate_every=0", f"clip={clip}")
    (line,) = numbers(tmp_path)
    moments = [moment["exp_avg"].flatten() for moment in newest(tmp_path)["optimiser"]["state"].values()]
    given = float(torch.cat(moments).norm()) / 0.1
    assert line["gradient"] > 1e-2
    assert given == pytest.approx(clip if clip == 1e-3 else line["gradient"], rel=1e-3)


def test_averaged_weights() -> None:
    one, two = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        two.weight += 1
        two.running_mean += 5
    average(one, two, 0.75)
    assert one.weight.tolist() == [1.25] * 3 and one.running_mean.tolist() == [5.0] * 3


def test_training_learns_and_validation_has_the_same_noise_every_time(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path, "steps=200", "validate_every=50", "log_every=50")
    losses = [line["loss"] for line in numbers(tmp_path) if line["kind"] == "train"]
    assert losses[-1] < 0.6 * losses[0]
    config, data, state = _parts(store, tmp_path)
    state.load(newest(tmp_path))
    ranks = Ranks(Place(), torch.device("cpu"))
    once, again = (loop.validate(config, ranks, data, state.ema) for _ in range(2))
    assert once == again == {k: v for k, v in numbers(tmp_path)[-1].items() if k in once}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_and_resumes(store: Path, tmp_path: Path, precision: str) -> None:
    words = (f"precision={precision}", "steps=60", "validate_every=0")
    run(store, tmp_path / "whole", *words)
    with pytest.raises(StoppedEarly):
        run(store, tmp_path / "parts", *words, toy={"signal_at": 30})
    run(store, tmp_path / "parts", *words)
    a, b = tensors(newest(tmp_path / "whole")), tensors(newest(tmp_path / "parts"))
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == torch.float32 for name in a)
    losses = [line["loss"] for line in numbers(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    assert bool(newest(tmp_path / "whole")["scaler"]) == (precision == "fp16")


@pytest.mark.bench
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_a_compiled_training_is_the_plain_one_to_float_tolerance(store: Path, tmp_path: Path) -> None:
    """It takes minutes to compile. What was begun compiled goes on without."""
    small = ("autoperi.layers=1", "autoperi.width=16", "autoperi.pair_width=4", "steps=6", "validate_every=3")
    words = [f"store={store}", *TINY, *small]
    for compiled in ("true", "false"):
        train(load(TrainConfig, None, [*words, f"out={tmp_path / compiled}", f"compile={compiled}"]))
    mine, plain = numbers(tmp_path / "true"), numbers(tmp_path / "false")
    assert len(mine) == len(plain) == 8
    for one, other in zip(mine, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    more = ["steps=8", "accept=[steps]", "compile=false", f"out={tmp_path / 'true'}"]
    assert train(load(TrainConfig, None, [*words, *more])).step == 8


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_the_run_folder(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path)
    assert load(ToyTrainConfig, tmp_path / "config.yaml").steps == 12
    begin, end = read_json_lines(tmp_path / "events.jsonl")
    assert begin["event"] == "start" and begin["torch"] == torch.__version__ and begin["resumed"] is None
    assert end["event"] == "done" and end["step"] == 12
    train_lines = [line for line in read_json_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == [5, 10, 12]
    assert {"loss", "first", "gradient", "lr", "epoch", "crystals", "bad", "crystals_per_s"} <= train_lines[0].keys()


def test_progress_on_a_terminal_and_off_it(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(store, tmp_path / "a")
    assert "it/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(store, tmp_path / "b")
    assert "structures/s" in capsys.readouterr().err


def test_lines_without_a_terminal(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcgen.train.journal.LINE_S", 0.0)
    with caplog.at_level("INFO"):
        run(store, tmp_path)
    assert "step 6 of 12 (50.0 %), loss " in caplog.text and "structures/s, 0 min left" in caplog.text


def test_tensorboard_files_where_the_package_is(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(StoppedEarly):
        run(store, tmp_path, "tensorboard=true", toy={"signal_at": 5})
    run(store, tmp_path, "tensorboard=true")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [5, 10, 12]


def test_without_tensorboard_the_json_lines_are_there(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level("INFO"):
        run(store, tmp_path, "tensorboard=true")
    assert "the package tensorboard is not installed" in caplog.text
    assert numbers(tmp_path) and not (tmp_path / "tensorboard").exists()


def test_light_imports() -> None:
    code = (
        "import sys, hpcgen.train.config; met = {'torch', 'h5py', 'pymatgen'} & set(sys.modules); assert not met, met"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_running_out_of_gpu_memory_says_what_to_do(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Toy, batch: Batch, draw: Draw) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Toy, "forward", full)
    with pytest.raises(HpcgenError, match="8 crystals of up to .* lower batch.padded_atoms"):
        run(store, tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_autoperi_learns(store: Path, tmp_path: Path, precision: str) -> None:
    words = ["steps=30", "validate_every=0", "log_every=10", "conditions=[band_gap]", f"precision={precision}"]
    train(load(TrainConfig, None, [f"store={store}", f"out={tmp_path}", *TINY, *words]))
    losses = [line["loss"] for line in numbers(tmp_path)]
    assert losses[-1] < losses[0] and newest(tmp_path)["progress"]["bad"] == 0
    exported = read_saved(tmp_path / "last.pt", MODEL)
    assert exported["model"] == "autoperi" and exported["config"]["conditions"] == ["band_gap"]
    assert len(read(store, split="train")) == 60
