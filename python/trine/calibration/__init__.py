"""What a model's layers are fed with: statistics of their inputs over calibration data.

`calibrate(model, data, SecondMoment)` gives one statistic for each layer, `in_turn` gives them
while the layers before are changed, `solve_columns` is the solver of SparseGPT and GPTQ.
"""

from trine.calibration.columns import from_matrix, is_calibrated, layer_rows, weight_matrix
from trine.calibration.run import calibrate, in_turn
from trine.calibration.second_order import (
    ColumnRule,
    inverse_factor,
    output_error,
    solve_columns,
)
from trine.calibration.statistics import (
    ColumnMean,
    ColumnNorm,
    ColumnRange,
    SecondMoment,
    Several,
    Statistic,
)

__all__ = [
    "ColumnMean",
    "ColumnNorm",
    "ColumnRange",
    "ColumnRule",
    "SecondMoment",
    "Several",
    "Statistic",
    "calibrate",
    "from_matrix",
    "in_turn",
    "inverse_factor",
    "is_calibrated",
    "layer_rows",
    "output_error",
    "solve_columns",
    "weight_matrix",
]
