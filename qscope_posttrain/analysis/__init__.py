"""Analysis of data by the features that they fire: benchmarks and a text classifier."""

from qscope_posttrain.errors import require_extra

require_extra("analysis")
