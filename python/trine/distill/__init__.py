"""Training a small model to do what a large one does: see README.md in this folder."""

from trine.distill import balance, objectives, schedules
from trine.distill.augment import CropAndFlip, Mixup, ReplaceTokens, Several
from trine.distill.balance import Fixed, GradientNorm, Uncertainty, class_balanced_weights
from trine.distill.cache import CachedTeacher, Numbered, cache_teacher
from trine.distill.capture import Capture
from trine.distill.cohort import Cohort, Exits, LearnTogether
from trine.distill.data_free import DataFree
from trine.distill.distiller import Distiller
from trine.distill.losses import IGNORED_LABEL, distillation_loss
from trine.distill.ready_made import ReadyMade, Stage, distilbert, minilm, tinybert
from trine.distill.sequences import OnPolicy, sequence_targets, written_by
from trine.distill.settings import Training
from trine.distill.succession import student_from_teacher, succession
from trine.distill.teachers import Average, Ensemble, Frozen

__all__ = [
    "IGNORED_LABEL",
    "Average",
    "CachedTeacher",
    "Capture",
    "Cohort",
    "CropAndFlip",
    "DataFree",
    "DistillationTrainer",
    "Distiller",
    "Ensemble",
    "Exits",
    "Fixed",
    "Frozen",
    "GradientNorm",
    "LearnTogether",
    "Mixup",
    "Numbered",
    "OnPolicy",
    "ReadyMade",
    "ReplaceTokens",
    "Several",
    "Stage",
    "Training",
    "Uncertainty",
    "balance",
    "cache_teacher",
    "class_balanced_weights",
    "distilbert",
    "distillation_loss",
    "minilm",
    "objectives",
    "schedules",
    "sequence_targets",
    "student_from_teacher",
    "succession",
    "tinybert",
    "written_by",
]


def __getattr__(name: str):
    """DistillationTrainer when it is asked for: transformers takes seconds to import."""
    if name == "DistillationTrainer":
        from trine.distill.hugging_face import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
