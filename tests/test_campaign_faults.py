"""Campaigns stopped, short of something or badly asked for: one clear sentence, the right exit code, nothing lost."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign_jobs import Launch, content, litter, make_checkpoint, rejected, run

from hpcgen import cli
from hpcgen.campaign import generate
from hpcgen.campaign.blocks import MakeBlock, blocks_of
from hpcgen.campaign.config import CampaignConfig
from hpcgen.campaign.sampling import Sampler
from hpcgen.campaign.targets import targets_of
from hpcgen.errors import InputError, StoppedEarly, StorageError, TooManyFailed, UsageError
from hpcgen.files import read_json_lines
from hpcgen.models.autoperi import AutoPeri
from hpcgen.models.load import sampling_device
from hpcgen.runner.board import keep_of
from hpcgen.runner.worker import Cursor
from hpcgen.store.read import Store

pytestmark = pytest.mark.usefixtures("threads_restored")

SMALL_DISK = "80k"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_costs_the_piece_in_progress(
    checkpoint: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(checkpoint, tmp_path / "whole", n=60)
    steps = [0]
    read = AutoPeri.read

    def signalling(*arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 25:
            os.kill(os.getpid(), number)
        return read(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(AutoPeri, "read", signalling)
        with pytest.raises(StoppedEarly, match=number.name):
            run(checkpoint, tmp_path / "run", n=60)
    assert steps[0] == 25, "it left before the next step"
    assert [path.name for path in (tmp_path / "run").glob("*.part")] == ["all-00000.h5.part"]
    assert not list((tmp_path / "run").rglob("*.draft")) and not (tmp_path / "run" / "lease").exists()
    assert read_json_lines(tmp_path / "run" / "events.jsonl")[-1]["event"] == "stop"
    with pytest.raises(InputError, match="unfinished"):
        Store(tmp_path / "run")
    rest = run(checkpoint, tmp_path / "run", n=60)
    assert rest.sampled < 60 - 16, "finished pieces are kept"
    assert content(tmp_path / "run") == content(tmp_path / "whole") and litter(tmp_path / "run") == []


def test_the_command_stops_with_75_and_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"n": 240, "steps": 20, "num_atoms": "4"}
    run(checkpoint, tmp_path / "whole", **settings)
    launch = Launch(checkpoint, tmp_path / "run", **{**settings, "processes": 2})
    end = time.monotonic() + 60
    while not list((tmp_path / "run").glob("all-*.h5")):
        assert time.monotonic() < end and launch.process.poll() is None
        time.sleep(0.01)
    launch.process.send_signal(signal.SIGINT)
    code, said = launch.end(20)
    assert code == 75 and "the same command goes on from here" in said and "Traceback" not in said, said
    assert run(checkpoint, tmp_path / "run", **settings).sampled > 0
    assert content(tmp_path / "run") == content(tmp_path / "whole") and litter(tmp_path / "run") == []


# ---- crashes, memory -------------------------------------------------------------------------------------------------


def test_a_piece_that_kills_its_worker_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "whole", n=32)
    config = generate.read_config(tmp_path / "whole")
    block = blocks_of(tmp_path, 32, 32)[0]
    cursor = Cursor([0, 0, 0, 0], lambda: None, keep_of(block.path))
    items: list[int] = []
    cursor.at = lambda item: items.append(item)  # type: ignore[method-assign]
    MakeBlock(config, None, 0, "")(block, block.path, cursor)
    third = sorted(set(items))[2]
    keep_of(block.path).unlink()
    cursor.culprits = {third: "crash"}
    MakeBlock(config, None, 0, "")(block, block.path, cursor)
    lost = rejected(tmp_path)
    assert set(lost.values()) == {"crash"} and len(lost) == sorted(set(items))[3] - third
    assert len(lost) < 32


def test_a_folder_in_which_another_begins_at_this_moment_is_no_strange_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run(checkpoint, tmp_path / "whole", n=64)
    (tmp_path / "run").mkdir()
    iterdir = Path.iterdir

    def begun(self: Path) -> Any:
        """What is there once the other rank has put its settings into the folder."""
        if self == tmp_path / "run":
            (self / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
            (self / "all-00000.h5.0.claim").touch()
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", begun)
    assert run(checkpoint, tmp_path / "run", n=64).written == 64


def test_tiles_encoded_while_the_next_is_sampled_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "whole", n=64, tile=16, block=64)
    config = generate.read_config(tmp_path / "whole")
    block = blocks_of(tmp_path, 64, 64)[0]
    cursor = Cursor([0, 0, 0, 0], lambda: None, keep_of(block.path))
    MakeBlock(config, None, 0, "", overlapped=True)(block, block.path, cursor)
    assert block.path.read_bytes() == (tmp_path / "whole" / block.path.name).read_bytes()


def test_pieces_too_large_for_memory_are_halved(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run(checkpoint, tmp_path / "whole", n=48)
    sample = AutoPeri.sample

    def short(self: AutoPeri, request: Any, *rest: Any) -> Any:
        if len(request.index) > 2 or request.species.shape[1] == 20:
            torch.empty(2**60, dtype=torch.uint8)  # no machine has so much
        return sample(self, request, *rest)

    monkeypatch.setattr(AutoPeri, "sample", short)
    made = run(checkpoint, tmp_path / "run", n=48)
    assert made.rejected.keys() == {"out-of-memory"} and made.written + made.rejected["out-of-memory"] == 48
    store, whole = Store(tmp_path / "run"), Store(tmp_path / "whole")
    assert store.sizes().atoms.max() == 16 and store.column("halved").values.any()
    for at, index in enumerate(store.column("index").values.tolist()):
        torch.testing.assert_close(store[at].crystals.lattice, whole[index].crystals.lattice)


def test_another_fault_fails_its_block_alone(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    sample = Sampler.sample

    def odd(self: Sampler, piece: Any, *rest: Any) -> Any:
        if 40 in piece.index:
            raise RuntimeError("an odd kernel")
        return sample(self, piece, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "sample", odd)
        with pytest.raises(TooManyFailed, match="1 of 4 blocks failed.*all-00001.h5 .an odd kernel"):
            run(checkpoint, tmp_path, n=128)
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["all-00000.h5", "all-00002.h5", "all-00003.h5"]
    assert not (tmp_path / "manifest.json").exists()
    assert run(checkpoint, tmp_path, n=128).sampled <= 32 and len(Store(tmp_path)) == 128


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_with_7_and_more_room_finishes_it(checkpoint: Path, tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(StorageError, match="No space left"):
        run(checkpoint, small_disk / "run", n=400)
    assert list((small_disk / "run").glob("*.h5")), "some blocks are done"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run(checkpoint, small_disk / "run", n=400).sampled < 400
    run(checkpoint, tmp_path / "whole", n=400)
    assert content(small_disk / "run") == content(tmp_path / "whole") and litter(small_disk / "run") == []


def test_a_read_only_folder_ends_with_7(checkpoint: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError):
        run(checkpoint, small_disk / "run", n=10)


# ---- a run folder of something else ----------------------------------------------------------------------------------

CHANGES = [
    ({"seed": 1}, "seed = 0, now it is 1"),
    ({"steps": 4}, "steps = 3, now it is 4"),
    ({"churn": 0.5}, "churn = 1.0, now it is 0.5"),
    ({"guidance": 2.0, "conditions": {"band_gap": 1.0}}, "conditions = "),
    ({"tile": 32}, "tile = 16, now it is 32"),
    ({"block": 64}, "block = 32, now it is 64"),
    ({"formula": "NaCl"}, "formula = '', now it is 'NaCl'"),
    ({"num_atoms": "8"}, "num_atoms = '', now it is '8'"),
    ({"precision": "bf16"}, "precision = 'float32', now it is 'bf16'"),
    ({"n": 39}, "n = 40, now it is 39: it may only grow"),
]


@pytest.fixture(scope="module")
def there(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("there") / "run"
    run(checkpoint, out, n=40)
    return out


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[told for _, told in CHANGES])
def test_other_settings_are_refused(checkpoint: Path, there: Path, change: dict[str, Any], told: str) -> None:
    before = files(there)
    with pytest.raises(UsageError) as met:
        run(checkpoint, there, **{"n": 40, **change})
    assert told in str(met.value) and str(there) in str(met.value)
    assert files(there) == before


def test_another_checkpoint_is_refused_and_a_copy_is_not(there: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other.pt", seed=1)
    with pytest.raises(UsageError, match=r"checkpoint = .*model.pt \(sha256 .*now it is .*other.pt \(sha256"):
        run(other, there, n=40)
    (tmp_path / "copy.pt").write_bytes(checkpoint.read_bytes())
    assert run(tmp_path / "copy.pt", there, n=40).sampled == 0


def test_other_formulas_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "formulas.txt"
    file.write_text("NaCl\n")
    run(checkpoint, tmp_path / "run", formulas=str(file))
    file.write_text("NaCl\nKCl\n")
    with pytest.raises(UsageError, match="formulas = .*sha256"):
        run(checkpoint, tmp_path / "run", formulas=str(file))


def test_folders_of_something_else_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'a.txt' and no campaign"):
        run(checkpoint, tmp_path / "notes", n=4)
    with pytest.raises(UsageError, match="is a file"):
        run(checkpoint, tmp_path / "notes" / "a.txt", n=4)
    (tmp_path / "notes" / "config.yaml").write_text("lr: 0.1\n")
    with pytest.raises(InputError, match="unknown key lr"):
        run(checkpoint, tmp_path / "notes", n=4)


# ---- bad words -------------------------------------------------------------------------------------------------------

BAD = [
    ([], 2, "--n is not set"),
    (["--n", "0"], 2, "n = 0: want 1 or more"),
    (["--n", "-5"], 2, "n = -5"),
    (["--n", "many"], 2, "invalid int value: 'many'"),
    (["--n", "9", "--seed", "-1"], 2, "seed = -1"),
    (["--n", "9", "--formula", "Xx2"], 2, "'Xx' is no element"),
    (["--n", "9", "--formula", "Li0.5CoO2"], 2, "0.5 atoms"),
    (["--n", "9", "--formula", "Li0O"], 2, "0 atoms"),
    (["--n", "9", "--formula", "Fe99999999"], 2, "99,999,999 atoms"),
    (["--n", "9", "--formula", ""], 2, "argument --formula: is empty"),
    (["--n", "9", "--formulas", ""], 2, "argument --formulas: is empty"),
    (["--n", "9", "--elements", " "], 2, "argument --elements: is empty"),
    (["--n", "9", "--num-atoms", ""], 2, "argument --num-atoms: is empty"),
    (["--n", "9", "--num-atoms", "9" * 5000], 2, "want a number or a range"),
    (["--n", "9", "--formula", "Fe" + "9" * 5000], 2, "want whole numbers from 1 on"),
    (["--n", "9", "--out", "/proc/hpcgen"], 7, "/proc/hpcgen: no folder can be made there"),
    (["--n", "9", "--elements", "Li-Foo"], 2, "'Foo' is no element"),
    (["--n", "9", "--num-atoms", "9-3"], 2, "the lower number first"),
    (["--n", "9", "--num-atoms", "few"], 2, "want a number or a range"),
    (["--n", "9", "--formula", "NaCl", "--num-atoms", "9"], 2, "the formulas say it already"),
    (["--n", "9", "--split", "val"], 2, "belong to --formulas"),
    (["--n", "9", "--condition", "colour=3"], 2, "condition 'colour': the model of"),
    (["--n", "9", "--condition", "band_gap"], 2, "want NAME=NUMBER"),
    (["--n", "9", "--condition", "band_gap=nan"], 2, "want NAME=NUMBER"),
    (["--n", "9", "--steps", "0"], 2, "steps = 0"),
    (["--n", "9", "--tile", "16", "--block", "24"], 2, "a multiple of 16"),
    (["--n", "9", "--churn", "nan"], 2, "churn = nan"),
    (["--n", "9", "--device", "cuda"], 3, "no GPU is visible"),
    (["--n", "9", "--checkpoint", "nowhere.pt"], 4, "nowhere.pt: there is no such file"),
    (["--formulas", "nowhere.txt"], 4, "nowhere.txt: cannot read formulas"),
]


@pytest.mark.parametrize(("words", "code", "told"), BAD, ids=[" ".join(words)[:60] for words, _, _ in BAD])
def test_bad_words(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, words: list[str], code: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = ["campaign", "--checkpoint", str(checkpoint), "--processes", "0"]
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main([*before, *words]) == code
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert not list(tmp_path.iterdir()), "nothing was made"


LINES = [
    ("", "holds no formulas"),
    ("# nothing\n\n", "holds no formulas"),
    ("NaCl\nQq3\n", "line 2: formula 'Qq3': 'Qq' is no element"),
    ("NaCl\n\n# x\nNa1.5Cl\n", "line 4: formula 'Na1.5Cl': 1.5 atoms"),
    ("Na0Cl\n", "line 1: formula 'Na0Cl': 0 atoms"),
    ("NaCl,KCl\n", "line 1: "),
    ("id,formula\na,NaCl\na,KCl\n", "line 3: id 'a' stands twice"),
    ("id,formula\n,NaCl\n", "line 2: id '' is empty"),
    ("id,formula\na\n", "line 2: formula '': no atoms"),
    ("id,formula,num_atoms\na,Li3P,9\n", "line 2: num_atoms is '9'; want a multiple of the formula's 4"),
    ("id,formula,num_atoms\na,Li3P,8\nb,NaCl,0\n", "line 3: num_atoms is '0'; want"),
    ("id,formula,num_atoms\na,Li3P,many\n", "line 2: num_atoms is 'many'; want"),
    (f"id,formula\n{5000 * 'x'},NaCl\n", "5,000 bytes, want at most 4096"),
    ("\xff\xfe", "cannot read formulas"),
]


@pytest.mark.parametrize(("text", "told"), LINES, ids=[told for _, told in LINES])
def test_bad_files_of_formulas(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "formulas.txt"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as met:
        targets_of(CampaignConfig(formulas=str(file)))
    assert told in str(met.value) and str(file) in str(met.value)


def test_each_rank_of_a_node_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampling_device("cpu", {}).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        found = [sampling_device("auto", {"SLURM_LOCALID": "0", name: str(rank)}).index for rank in range(5)]
        assert found == [0, 1, 2, 3, 0], name
    assert sampling_device("cuda", {}).index == 0


def test_a_number_of_atoms_repeats_the_formula(tmp_path: Path) -> None:
    file = tmp_path / "formulas.csv"
    file.write_text("id,formula,num_atoms\na,Li3P,8\nb,NaCl,\nc,O2,1\nd,Na2O2,2\ne,O2,\nf,Qq,\n")
    made = targets_of(CampaignConfig(formulas=str(file), limit=5))  # line 6 is not looked at
    assert made is not None and made.ptr.tolist() == [0, 8, 10, 11, 13, 15]
    assert made.atomic_numbers.tolist() == [3] * 6 + [15] * 2 + [11, 17] + [8] + [8, 11] + [8, 8]


def test_n_and_formulas_must_agree(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "formulas.txt"
    file.write_text("NaCl\nKCl\n")
    with pytest.raises(UsageError, match="2 formulas, 3 of each, are 6 crystals"):
        run(checkpoint, tmp_path / "run", formulas=str(file), per_formula=3, n=7)
    assert run(checkpoint, tmp_path / "run", formulas=str(file), per_formula=3, n=6).asked == 6


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "other network", "a folder"])
def test_bad_checkpoints(checkpoint: Path, tmp_path: Path, damage: str, capsys: Any) -> None:
    bad = tmp_path / "bad.pt"
    if damage == "a folder":
        bad.mkdir()
    elif damage == "foreign":
        torch.save({"state_dict": {}}, bad)
    elif damage == "other network":
        content = torch.load(checkpoint, weights_only=True)
        content["config"]["width"] = 32
        torch.save(content, bad)
    else:
        bad.write_bytes(checkpoint.read_bytes()[: 0 if damage == "empty" else 5000])
    code = cli.main(["campaign", "--n", "9", "--checkpoint", str(bad), "--out", str(tmp_path / "run")])
    assert code == 4
    assert str(bad) in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_without_a_checkpoint_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PACKAGED", tmp_path / "none.pt")
    with pytest.raises(InputError, match="comes without a trained model"):
        run(tmp_path / "none.pt", tmp_path / "run", n=4)


def test_what_the_model_was_not_trained_for_is_warned_of_and_done(
    checkpoint: Path, tmp_path: Path, caplog: Any
) -> None:
    run(checkpoint, tmp_path / "far", n=4, conditions={"band_gap": 99.0})
    assert "band_gap = 99: training crystals had 0 to 6" in caplog.text
    caplog.clear()
    assert run(checkpoint, tmp_path / "large", n=4, formula="Fe30O40").asked == 4
    assert "up to 70 atoms asked for, the largest training crystal had 20" in caplog.text
    caplog.clear()
    run(checkpoint, tmp_path / "near", n=4, conditions={"band_gap": 1.0})
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
