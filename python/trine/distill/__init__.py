"""Training a small model to do what a large one does."""

from trine.distill.losses import IGNORED_LABEL, distillation_loss

__all__ = ["IGNORED_LABEL", "distillation_loss"]
