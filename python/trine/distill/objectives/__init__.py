"""What a student can have in common with its teacher: small modules with one signature."""

from trine.distill.objectives.attention import AttentionMaps, AttentionTransfer, SelfRelations
from trine.distill.objectives.base import Batch, Objective, Terms, Together, View
from trine.distill.objectives.contrastive import ContrastiveRepresentation
from trine.distill.objectives.features import (
    HiddenStates,
    Hint,
    MaskedGeneration,
    MultiScale,
    every_layer,
    last_layers,
    uniform_layers,
)
from trine.distill.objectives.logits import DecoupledTargets, Labels, LogitDistance, SoftTargets
from trine.distill.objectives.relations import (
    AngleRelations,
    CorrelationCongruence,
    DistanceRelations,
    SimilarityPreserving,
    SolutionFlow,
)

__all__ = [
    "AngleRelations",
    "AttentionMaps",
    "AttentionTransfer",
    "Batch",
    "ContrastiveRepresentation",
    "CorrelationCongruence",
    "DecoupledTargets",
    "DistanceRelations",
    "HiddenStates",
    "Hint",
    "Labels",
    "LogitDistance",
    "MaskedGeneration",
    "MultiScale",
    "Objective",
    "SelfRelations",
    "SimilarityPreserving",
    "SoftTargets",
    "SolutionFlow",
    "Terms",
    "Together",
    "View",
    "every_layer",
    "last_layers",
    "uniform_layers",
]
