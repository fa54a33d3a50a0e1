"""Training a small model to do what a large one does: see README.md in this folder."""

from trine.distill import balance, objectives, schedules
from trine.distill.balance import Fixed, GradientNorm, Uncertainty, class_balanced_weights
from trine.distill.cache import CachedTeacher, Numbered, cache_teacher
from trine.distill.capture import Capture
from trine.distill.cohort import Cohort, Exits, LearnTogether
from trine.distill.distiller import Distiller
from trine.distill.losses import IGNORED_LABEL, distillation_loss
from trine.distill.settings import Training
from trine.distill.teachers import Average, Ensemble, Frozen

__all__ = [
    "IGNORED_LABEL",
    "Average",
    "CachedTeacher",
    "Capture",
    "Cohort",
    "Distiller",
    "Ensemble",
    "Exits",
    "Fixed",
    "Frozen",
    "GradientNorm",
    "LearnTogether",
    "Numbered",
    "Training",
    "Uncertainty",
    "balance",
    "cache_teacher",
    "class_balanced_weights",
    "distillation_loss",
    "objectives",
    "schedules",
]
