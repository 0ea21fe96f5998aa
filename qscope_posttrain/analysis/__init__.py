"""What data are, by their features: benchmarks and a classifier."""

from qscope_posttrain.errors import require_extra

require_extra("analysis")
