"""All generative models by name. A model is an nn.Module with these members:

    Model.Config                         dataclass of its settings, torch-free, in a module of its own; where it has
                                         `conditions`, those are the properties that a campaign may ask for
    Model.TABLES                         names of buffers that a training which begins with a trained model takes anew
    Model.RECTIFIES                      True where forward learns crystals with the noise of batch.origin, if any
    Model.INNER                          prefixes of the names of hidden layers' parameters, whose matrices `muon` moves
    Model.fitted(config, store) -> Model  a new one, its scales and tables taken from a training store
    model.size_counts                    buffer (M + 1,): how many training crystals had 0, 1, ... M atoms
    model.condition_range                buffer (conditions, 4): mean, deviation, least and most in training
    model(batch, draw) -> {"loss": ..., ...}  means over the batch's crystals; DDP hooks only forward
    model.sample(request, draw, go_on) -> Crystals  of a models.request.Request; go_on() before each step, it may raise

Checkpoints hold `config` as a dict, and the state dict; what `fitted` took from the store are buffers in it.
"""

from typing import Any

from torch import nn

from hpcgen.errors import UsageError
from hpcgen.models.autoperi import AutoPeri

MODELS: dict[str, Any] = {"autoperi": AutoPeri}


def model_named(name: str) -> type[nn.Module]:
    """The class of that name. Raises UsageError listing those there are."""
    if name not in MODELS:
        raise UsageError(f"model {name!r}: want one of {', '.join(MODELS)}")
    return MODELS[name]
