"""Pruning that leaves smaller tensors: neurons, channels, heads, the hidden width, whole layers."""

from trine.prune.structured.groups import Group, Groups, Slice
from trine.prune.structured.layers import drop_layers
from trine.prune.structured.optimizer import hand_over
from trine.prune.structured.prune import prune_structured, remove
from trine.prune.structured.report import GroupReport, RemovalReport, macs
from trine.prune.structured.separate import separate_attention
from trine.prune.structured.trace import trace

__all__ = [
    "Group",
    "GroupReport",
    "Groups",
    "RemovalReport",
    "Slice",
    "drop_layers",
    "hand_over",
    "macs",
    "prune_structured",
    "remove",
    "separate_attention",
    "trace",
]
