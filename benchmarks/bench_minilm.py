"""MiniLM-L6 on 128 tokens, all its linear layers INT8, against the float model and ONNX Runtime.

The error column is 1 - cosine between the sentence embeddings of the model and the float one.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import trine
from torch import nn
from trine.demo.sentences import embed, load_encoder, load_sentences
from trine.nn import pack_linear

from benchmarks.case import Comparison, Contestant, hot, sentence
from benchmarks.ceilings import Work
from benchmarks.peers.onnx import onnx_encoder

TOKENS = 128


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    encoder = load_encoder()
    tokens = encoder.tokenize([" ".join(load_sentences(40))])
    tokens = {name: ids[:, :TOKENS].contiguous() for name, ids in tokens.items()}
    small = _in_int8(encoder.model)
    fused = trine.fuse_activations(small, tokens)
    expected = embed(encoder.model, tokens)
    contestants, failures = [], {}

    def enter(name: str, make: Callable[[], Callable[..., object]], **about) -> None:
        try:
            model = make()
            error = 1 - (embed(model, tokens) @ expected.T).item()
            timed = hot([partial(model, **tokens)])
            contestants.append(Contestant(name, timed, Work(), error, **about))
        except Exception as reason:  # a peer's trouble of any kind is a row of the table
            failures[name] = sentence(reason)

    enter("fp32 eager", lambda: encoder.model)
    enter("ONNX Runtime INT8", lambda: onnx_encoder(encoder.model, tokens, threads))
    rivals = ("fp32 eager", "fp32 compiled", "ONNX Runtime INT8")
    ours = dict(op="minilm", rivals=rivals, baseline="fp32 eager")
    enter("INT8 eager", lambda: small, **ours)
    enter("INT8 eager, GELU in the layers", lambda: fused, **ours)
    if quick:
        reason = "left out: compiling it takes too long for --quick"
        failures |= {"fp32 compiled": reason, "INT8 compiled": reason}
    else:
        enter("fp32 compiled", lambda: torch.compile(encoder.model, dynamic=False))
        enter("INT8 compiled", lambda: torch.compile(small, dynamic=False), **ours)
    yield Comparison({"tokens": TOKENS}, "hot", contestants, failures=failures)


def _in_int8(model: nn.Module) -> nn.Module:
    """Every linear layer, whatever it gains: this measures, `trine.compress` would choose."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, pack_linear(module, "int8"))
    return model
