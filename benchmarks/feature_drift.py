"""How far the residual stream moves from that of a FeatureSet's texts, against what an SAE can still reconstruct of it.

    PYTHONPATH=. python benchmarks/feature_drift.py [--cache FOLDER]

On the testbed's switching task: its model, fine-tuned copies of growing learning rate with and without SASFT, and a
model of another seed. `displacement` is the metric of `SASFTCallback` over held-out answers; `sft.watch.FAR` is the
limit of its warning.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from interleaved import write_report

from benchmarks.testbed.cache import Cache, default_cache_folder
from benchmarks.testbed.models import explained_variance
from benchmarks.testbed.switching.config import ARMS, SwitchingConfig
from benchmarks.testbed.switching.features import make_dictionaries, make_feature_sets
from benchmarks.testbed.switching.language_model import make_language_model
from benchmarks.testbed.switching.training import fine_tune
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.provenance import embedding_agreement
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.sft.callback import displacements, penalty_layers, shift
from qscope_posttrain.sft.config import SASFTConfig

HELD_OUT, SEED = 200, 99
TIMES = (1, 10, 30)  # The demo's learning rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=default_cache_folder(), help="folder of models (default: the demo's)"
    )
    parser.add_argument("--other-steps", type=int, default=1200, help="pretraining steps of the other seed's model")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "feature_drift.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config, cache = SwitchingConfig(), Cache(options.cache)
    language_model = make_language_model(config, cache)
    dictionaries = make_dictionaries(config, cache, language_model)
    features = make_feature_sets(config, cache, language_model, dictionaries).load("sae")
    (layer,) = penalty_layers(features, SASFTConfig(layers=(max(features.layers),)))
    held_out = language_model.maker.dialogue("val", HELD_OUT, SEED, 0.0)
    kept = torch.tensor([language != config.target for language in held_out.languages])
    languages = torch.tensor([features.languages.index(language) for language in held_out.languages])[kept]
    rows: list[list[Cell]] = []

    def measure(name: str, model: torch.nn.Module) -> None:
        hidden = forward_to_layer(model.eval(), [layer.layer], input_ids=held_out.input_ids[kept])[layer.layer]
        hidden = hidden[:, held_out.prompt_length - 1 : -1]
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        moved = shift(hidden, layer, mask, languages[:, None].expand(mask.shape))
        (displacement,) = displacements([layer], moved.tolist()).values()
        explained = explained_variance(dictionaries.saes[layer.layer], hidden.flatten(0, 1))
        agreement = embedding_agreement(features.model["embedding"], model)
        rows.append([name, displacement, 100 * explained, agreement])
        print(rows[-1], flush=True)

    measure("the features' own", language_model.model)
    for times in TIMES:
        faster = replace(config, sft_learning_rate=config.sft_learning_rate * times)
        for title, arm, weight in (("SFT", "sft", 0.0), ("SASFT, paper's form, weight 1", "sasft_paper", 1.0)):
            trained = fine_tune(language_model, ARMS[arm], weight, features if weight else None, faster, SEED)
            measure(f"{title}, learning rate {faster.sft_learning_rate:g}", trained.model)
    other = replace(config, model_seed=1, pretraining_steps=options.other_steps)
    measure("another seed", make_language_model(other, cache).model)
    table = Table(
        "Displacement of the residual stream, and what the SAE still explains",
        ["model", "displacement", "explained variance, %", "agreement of embeddings"],
        rows,
        f"Last layer of the switching task's model, {HELD_OUT} held-out windows.",
    )
    table.print()
    del options.cache
    write_report(options, "feature_drift", table=table.to_dict())


if __name__ == "__main__":
    main()
