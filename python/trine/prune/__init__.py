"""Removing what a model needs least: see README.md in this folder."""

from trine.prune.budget import budget_ratios, latency_costs, mac_costs, size_costs
from trine.prune.criteria import (
    SNIP,
    Change,
    Criterion,
    Fisher,
    GraSP,
    Magnitude,
    Movement,
    Random,
    SparseGPT,
    Taylor,
    Wanda,
)
from trine.prune.curves import Sensitivity, sensitivity
from trine.prune.granularity import NM, Channel, Granularity, Head, Layer, Neuron, Weight
from trine.prune.hard_concrete import HardConcrete
from trine.prune.layers import prunable_layers
from trine.prune.one_shot import sparsegpt, wanda
from trine.prune.permute import (
    KeptMagnitude,
    attention_values,
    kept_magnitude,
    linked_channels,
    permute_for_24,
    search_permutation,
)
from trine.prune.pruner import Pruner
from trine.prune.report import PruningReport
from trine.prune.schedule import Cubic, Iterative, OneShot, RigL, Schedule
from trine.prune.scope import Global, PerLayer, Scope, Threshold
from trine.prune.sparse24 import as_sparse24, sr_ste
from trine.prune.structured import (
    drop_layers,
    hand_over,
    macs,
    prune_structured,
    remove,
    separate_attention,
    trace,
)

__all__ = [
    "NM",
    "SNIP",
    "Change",
    "Channel",
    "Criterion",
    "Cubic",
    "Fisher",
    "Global",
    "GraSP",
    "Granularity",
    "HardConcrete",
    "Head",
    "Iterative",
    "KeptMagnitude",
    "Layer",
    "Magnitude",
    "Movement",
    "Neuron",
    "OneShot",
    "PerLayer",
    "Pruner",
    "PruningReport",
    "Random",
    "RigL",
    "Schedule",
    "Scope",
    "Sensitivity",
    "SparseGPT",
    "Taylor",
    "Threshold",
    "Wanda",
    "Weight",
    "as_sparse24",
    "attention_values",
    "budget_ratios",
    "drop_layers",
    "hand_over",
    "kept_magnitude",
    "latency_costs",
    "linked_channels",
    "mac_costs",
    "macs",
    "permute_for_24",
    "prunable_layers",
    "prune_structured",
    "remove",
    "search_permutation",
    "sensitivity",
    "separate_attention",
    "size_costs",
    "sparsegpt",
    "sr_ste",
    "trace",
    "wanda",
]
