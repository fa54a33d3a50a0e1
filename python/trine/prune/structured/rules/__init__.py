"""What each operator of aten does to the labels of its tensors: one rule per family of operators.

An operator without a rule freezes what goes into it: the tracer says which.
"""

from trine.prune.structured.rules import arithmetic, layers, shapes  # noqa: F401 - they register
from trine.prune.structured.rules.table import NoRule, Step, rule_for

__all__ = ["NoRule", "Step", "rule_for"]
