"""On a GPU: the same crystals every time, the CPU's crystals to the matcher's eye, training under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from campaign_jobs import content, run
from train_jobs import ENV, make_store

from hpcgen.campaign.config import PACKAGED
from hpcgen.campaign.sampling import Sampler
from hpcgen.diffusion.draw import Draw
from hpcgen.errors import StoppedEarly
from hpcgen.files import read_json_lines
from hpcgen.metrics.match import Comparison
from hpcgen.models.load import load_model
from hpcgen.models.request import Request
from hpcgen.store.read import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = {"device": "cuda", "tile": 64, "block": 64, "steps": 10}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_block_size_and_a_growing_n_change_no_byte(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    run(checkpoint, tmp_path / "one", n=150, precision=precision, **CUDA)
    run(checkpoint, tmp_path / "two", n=70, precision=precision, **{**CUDA, "block": 128})
    run(checkpoint, tmp_path / "two", n=150, precision=precision, **{**CUDA, "block": 128})
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.skipif(not PACKAGED.exists(), reason="no trained checkpoint in the package")
def test_cuda_agrees_with_the_cpu_by_matching(tmp_path: Path) -> None:
    count = 200
    for device in ("cpu", "cuda"):
        run(PACKAGED, tmp_path / device, n=count, **{**CUDA, "device": device, "steps": 20})
    one, other = (Store(tmp_path / device) for device in ("cpu", "cuda"))
    places = {id: at for at, id in enumerate(other.ids)}
    matched = sum(
        Comparison().match(one[at].crystals, other[places[id]].crystals) is not None
        for at, id in enumerate(one.ids)
        if id in places
    )
    print(f"{matched} of {count} crystals of CPU and CUDA match")
    assert matched >= 0.99 * count


def test_out_of_memory_halves_the_batch(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Sampler._crystals

    def greedy(self: Sampler, index, *others):  # a batch of more than 8 crystals asks for more than there is
        if len(index) > 8:
            torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
        return plain(self, index, *others)

    monkeypatch.setattr(Sampler, "_crystals", greedy)
    made = run(checkpoint, tmp_path / "run", n=64, **CUDA)
    assert made.written + sum(made.rejected.values()) == 64
    assert Store(tmp_path / "run").column("halved").values.any()


@pytest.mark.skipif(not PACKAGED.exists(), reason="no trained checkpoint in the package")
def test_no_sampling_step_waits_for_the_gpu() -> None:
    model, _ = load_model(PACKAGED, "cuda")
    begun: list[int] = []

    def go_on() -> None:
        begun.append(0)
        if len(begun) == 3:  # libraries have been set up, what is done once is done
            torch.cuda.set_sync_debug_mode("error")
        if len(begun) == 7:
            raise StoppedEarly("enough")

    shape = {"device": "cuda", "dtype": torch.int64}
    request = Request(torch.arange(64, device="cuda"), torch.full((64,), 12, **shape), torch.zeros(64, 12, **shape),
                      steps=16, churn=1.0, speed=10.0)  # fmt: skip
    try:
        with pytest.raises(StoppedEarly):
            model.sample(request, Draw(0), go_on)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "how",
    [
        ["precision=float32"],
        ["precision=bf16"],
        ["precision=fp16"],
        ["precision=bf16", "compile=true"],
        ["precision=bf16", "muon=2"],
        ["precision=fp16", "muon=2"],
    ],
    ids=str,
)
def test_training_under_torchrun_stops_and_goes_on(tmp_path: Path, how: list[str]) -> None:
    store = make_store(tmp_path / "store")
    words = [f"store={store}", "model=autoperi", "autoperi.width=32", "autoperi.layers=2", "autoperi.heads=4",
             "batch.crystals=16", "device=cuda", "tensorboard=false", "validate_every=10", "save_every_steps=5",
             "log_every=5", *how]  # fmt: skip
    config = tmp_path / "empty.yaml"
    config.write_text("{}\n")

    def train(out: str, steps: int, *more: str) -> Path:
        torchrun = Path(sys.executable).parent / "torchrun"
        command = [torchrun, "--nproc-per-node", "1", "-m", "hpcgen.cli", "train"]
        told = [*words, f"out={tmp_path / out}", f"steps={steps}", *more]
        done = subprocess.run([*command, config, *told], env=ENV, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return tmp_path / out

    train("parts", 10)
    parts, whole = train("parts", 20, "accept=[steps]"), train("whole", 20)
    last = [read_json_lines(out / "metrics.jsonl")[-1] for out in (parts, whole)]
    assert all(line["step"] == 20 for line in last)
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=0.05)
