"""Muon: the matrices of hidden layers move by it as by torch's own, all else by AdamW; a resumed run is the same."""

import math
from pathlib import Path

import pytest
import torch
from test_train import TINY
from torch import nn
from train_jobs import Toy, assert_same_run, job, make_store, newest, run

from hpcgen.errors import StoppedEarly, UsageError
from hpcgen.models.autoperi import AutoPeri
from hpcgen.models.autoperi_config import AutoPeriConfig
from hpcgen.train.muon import optimiser_for, orthogonal


class Layered(nn.Module):
    INNER = ("inner.",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 24)
        self.inner = nn.ModuleList([nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 40)])
        self.table = nn.Parameter(torch.zeros(4, 24))


def with_grads(seed: int) -> Layered:
    make = torch.Generator().manual_seed(seed)
    model = Layered()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=make)
        parameter.grad = torch.randn(parameter.shape, generator=make)
    return model


@pytest.mark.parametrize("shape", [(3, 160, 640), (2, 96, 16), (1, 48, 48)])
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ orthogonal(matrices).float() @ vh.mT  # diagonal, were half precision exact
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.25
    assert (inside - torch.diag_embed(values)).abs().max() < 0.05
    assert orthogonal(torch.zeros(shape)).abs().max() == 0


def test_hidden_matrices_of_autoperi() -> None:
    """All of them: a layer by another name would silently be AdamW's."""
    model = AutoPeri(AutoPeriConfig())
    optimiser = optimiser_for(model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, muon=1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    (hidden,) = [group["params"] for group in optimiser.param_groups if "muon" in group]
    others = {name for p, name in names.items() if p.ndim > 1 and not any(p is each for each in hidden)}
    ends = ("element.0", "element.2", "pair_in", "pair_told", "pair_ends", "pair_out.1",
            "sites", "species", "lattice.0", "lattice.2")  # fmt: skip
    assert others == {f"network.{name}.weight" for name in ends} | {f"network.layers.{k}.shift" for k in range(6)}
    assert len(hidden) == 3 + 6 * 8


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_hidden_matrices_move_as_by_torchs_muon_and_the_rest_as_by_adamw() -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.3}
    mine, theirs = with_grads(0), with_grads(0)
    both = optimiser_for(mine, **settings, muon=1.0)
    inner = [p for name, p in theirs.named_parameters() if name.startswith("inner.") and p.ndim == 2]
    muon = torch.optim.Muon(inner, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = optimiser_for(theirs, **settings, muon=0.0)
    assert type(adamw) is torch.optim.AdamW
    for step in range(5):
        for a, b, new in zip(mine.parameters(), theirs.parameters(), with_grads(step).parameters(), strict=True):
            a.grad, b.grad = new.grad.clone(), new.grad.clone()
        both.step()
        muon.step()
        for matrix in inner:
            matrix.grad = None
        adamw.step()
    begun = with_grads(0).parameters()
    for (name, a), b, start in zip(mine.named_parameters(), theirs.parameters(), begun, strict=True):
        if b.ndim == 2 and "inner" in name:  # theirs in half precision
            assert (a - b).norm() < 0.02 * (b - start).norm(), name
        else:
            assert torch.equal(a, b), name


def test_steps_are_in_units_of_lr() -> None:
    moved = {}
    for muon in (1.0, 3.0):
        model = with_grads(0)
        before = [layer.weight.detach().clone() for layer in model.inner]
        optimiser_for(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0, muon=muon).step()
        moved[muon] = [layer.weight.detach() - old for layer, old in zip(model.inner, before, strict=True)]
    for one, three in zip(moved[1.0], moved[3.0], strict=True):
        assert torch.allclose(3 * one, three, atol=1e-6)
        assert 0.15e-2 < one.square().mean().sqrt() < 0.22e-2, "about 0.2 lr: an update by AdamW"


def test_a_matrix_without_a_gradient_stays() -> None:
    model = with_grads(0)
    model.inner[0].weight.grad = None
    before = model.inner[0].weight.detach().clone()
    optimiser_for(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.3, muon=1.0).step()
    assert torch.equal(model.inner[0].weight, before)


def test_a_step_that_is_not_finite_is_left_out_whole() -> None:
    model, before = with_grads(0), with_grads(0)
    optimiser = optimiser_for(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.3, muon=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    model.inner[1].weight.grad[0, 0] = math.inf
    scaler.step(optimiser)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_model_that_names_no_hidden_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path / "store")
    with pytest.raises(UsageError, match=r"muon = 2: Toy names no hidden layers \(INNER\); want muon=0"):
        run(path, tmp_path / "run", "muon=2")
    monkeypatch.setattr(Toy, "INNER", ("net.2.", "net.9."), raising=False)
    with pytest.raises(UsageError, match=r"muon = 2: Toy has no matrix net.9.… \(INNER\); want muon=0"):
        run(path, tmp_path / "run", "muon=2")


def test_a_resumed_run_keeps_to_muon_or_to_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path / "store")
    monkeypatch.setattr(Toy, "INNER", ("net.2.",), raising=False)
    for muon, other in (("0", "2"), ("2", "0")):
        with pytest.raises(StoppedEarly):
            run(path, tmp_path / muon, f"muon={muon}", toy={"signal_at": 5})
        with pytest.raises(UsageError, match=rf"made with muon = {muon}, now {other}: its optimiser remembers other"):
            run(path, tmp_path / muon, f"muon={other}", "accept=[muon]")
    words = ("muon=3", "weight_decay=0.5", "betas=[0.8,0.9]", "accept=[muon,weight_decay,betas]")
    assert run(path, tmp_path / "2", *words).step == 12
    hidden = newest(tmp_path / "2")["optimiser"]["param_groups"][-1]
    assert (hidden["muon"], hidden["weight_decay"], tuple(hidden["betas"])) == (3.0, 0.5, (0.8, 0.9))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    path, words = make_store(tmp_path / "store"), ("muon=2", f"precision={precision}", "steps=30")
    monkeypatch.setattr(Toy, "INNER", ("net.2.",), raising=False)
    run(path, tmp_path / "whole", *words)
    with pytest.raises(StoppedEarly):
        run(path, tmp_path / "parts", *words, toy={"signal_at": 15})
    run(path, tmp_path / "parts", *words)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_stopped_and_resumed_is_not_stopped(tmp_path: Path, world: int) -> None:
    path = make_store(tmp_path / "store")
    words = (*TINY, "muon=2")
    assert job(world, path, tmp_path / "whole", *words)[0] == [0] * world
    assert job(world, path, tmp_path / "parts", *words, "time_limit_s=0.001")[0] == [75] * world
    assert newest(tmp_path / "parts")["progress"]["step"] == 1
    assert job(world, path, tmp_path / "parts", *words)[0] == [0] * world
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    moved = newest(tmp_path / "whole")["optimiser"]["state"].values()
    assert sum("momentum" in state for state in moved) > 10 and sum("exp_avg" in state for state in moved) > 10
