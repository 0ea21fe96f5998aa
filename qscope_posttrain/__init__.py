"""Sparse autoencoder features as training signals for TRL post-training jobs.

Names are loaded on first use, so that `import qscope_posttrain` is quick and pulls in neither TRL nor a plotting
library. The usual way in is `import qscope_posttrain as qp`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SparseAutoencoder": "qscope_posttrain.sae.autoencoder",
    "FeatureSet": "qscope_posttrain.features.feature_set",
    "SAETrainingConfig": "qscope_posttrain.sae.training",
    "train_saes": "qscope_posttrain.sae.training",
    "train_saes_on_text": "qscope_posttrain.sae.training.run",
    "find_language_features": "qscope_posttrain.features.find.contrast",
    "find_repetition_features": "qscope_posttrain.features.find.repetition",
    "measure_sae": "qscope_posttrain.sae.quality",
    "SASFTCallback": "qscope_posttrain.sft.callback",
    "TokenPenaltyCallback": "qscope_posttrain.sft.baselines",
    "KLAnchorCallback": "qscope_posttrain.sft.baselines",
    "SteeredGRPOConfig": "qscope_posttrain.rl.config",
    "SteeredGRPOTrainer": "qscope_posttrain.rl.trainer",
    "pack_with_languages": "qscope_posttrain.sft.data.packing",
    "sasft_loss": "qscope_posttrain.sft.loss",
    "Steering": "qscope_posttrain.models.steering",
    "Window": "qscope_posttrain.models.positions",
    "steer": "qscope_posttrain.models.steering",
    "evaluate_code_switching": "qscope_posttrain.evaluation.code_switching",
    "evaluate_repetition": "qscope_posttrain.evaluation.repetition",
}

__all__ = ["__version__", *_HOME]

# For type checkers, to whom `as` says that a name is public; a test compares it with _HOME.
if TYPE_CHECKING:
    from qscope_posttrain.evaluation.code_switching import evaluate_code_switching as evaluate_code_switching
    from qscope_posttrain.evaluation.repetition import evaluate_repetition as evaluate_repetition
    from qscope_posttrain.features.feature_set import FeatureSet as FeatureSet
    from qscope_posttrain.features.find.contrast import find_language_features as find_language_features
    from qscope_posttrain.features.find.repetition import find_repetition_features as find_repetition_features
    from qscope_posttrain.models.positions import Window as Window
    from qscope_posttrain.models.steering import Steering as Steering
    from qscope_posttrain.models.steering import steer as steer
    from qscope_posttrain.rl.config import SteeredGRPOConfig as SteeredGRPOConfig
    from qscope_posttrain.rl.trainer import SteeredGRPOTrainer as SteeredGRPOTrainer
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder as SparseAutoencoder
    from qscope_posttrain.sae.quality import measure_sae as measure_sae
    from qscope_posttrain.sae.training import SAETrainingConfig as SAETrainingConfig
    from qscope_posttrain.sae.training import train_saes as train_saes
    from qscope_posttrain.sae.training.run import train_saes_on_text as train_saes_on_text
    from qscope_posttrain.sft.baselines import KLAnchorCallback as KLAnchorCallback
    from qscope_posttrain.sft.baselines import TokenPenaltyCallback as TokenPenaltyCallback
    from qscope_posttrain.sft.callback import SASFTCallback as SASFTCallback
    from qscope_posttrain.sft.data.packing import pack_with_languages as pack_with_languages
    from qscope_posttrain.sft.loss import sasft_loss as sasft_loss


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        offered = ", ".join(sorted(_HOME))
        raise AttributeError(f"module 'qscope_posttrain' has no attribute {name!r}; it offers {offered}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
