"""Language features of all layers: one streaming pass against the published procedure.

The published procedure (SASFT, arXiv 2507.14894, code of 2026-04-10), written here from its description: for every
layer a forward of the WHOLE model, LM head included, over every text, one text at a time; the full [tokens, d_sae]
post-activations are made, moved to the CPU and summed per language. Then the same again for alpha, with all
pre-activations. First tokens are left out. This side is flattered a little: its activations are summed as they come
instead of being kept, and it works in memory, without reloading an SAE per pass.

Ours: `collect_statistics` and `language_feature_set`, which give the same numbers, and the second moments of the
residual stream besides.

Both sides run in one process, in turn, on the same random model, SAEs and text, and must agree. Run with

    python benchmarks/feature_pass.py [--layers 16] [--repeats 3] [--output benchmarks/results/feature_pass.json]
"""

from __future__ import annotations

import argparse
import json
import statistics as numbers
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.testbed.feature_sets import language_feature_set
from qscope_posttrain.features.build import monolinguality, top_features
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.statistics import PassStatistics, collect_statistics
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

ROOT = Path(__file__).resolve().parents[1]
TATOEBA = ROOT.parent / "shared" / "data" / "tatoeba"
LANGUAGES = ("en", "fr", "ko", "ru", "zh")
TOP = 2
TOLERANCE = 1e-3
"""Largest difference between the two sides, relative to the largest mean: rounding of fp32 forwards."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    texts, source = read_texts(options.texts_per_language)
    tokenizer = train_tokenizer(texts, options.vocabulary)
    model = build_model(options)
    saes = {layer: build_sae(layer, options) for layer in range(options.layers)}
    tokens = sum(len(tokenizer(line)["input_ids"]) for lines in texts.values() for line in lines)
    length = numbers.mean(len(line) for lines in texts.values() for line in lines)
    source = f"{source}, {len(texts) * options.texts_per_language} sentences of {length:.0f} characters on average"
    print(f"{options.layers} layers, d_model {options.hidden}, d_sae {16 * options.hidden}, {tokens} tokens: {source}")

    warm = {language: lines[:2] for language, lines in texts.items()}
    ours(model, tokenizer, warm, saes)
    published(model, tokenizer, warm, saes)
    repeats, agreement = [], {}
    for number in range(options.repeats):
        fast, (statistics, features) = timed(ours, model, tokenizer, texts, saes)
        slow, reference = timed(published, model, tokenizer, texts, saes)
        agreement = compare(statistics, features, reference, saes)
        repeats.append(
            {
                "ours_s": fast.wall,
                "published_s": slow.wall,
                "ratio": slow.wall / fast.wall,
                "ours_cpu_s": fast.cpu,
                "published_cpu_s": slow.cpu,
                "cpu_ratio": slow.cpu / fast.cpu,
            }
        )
        print(f"repeat {number + 1}: ours {fast.wall:.2f} s, published {slow.wall:.1f} s", flush=True)
    result = summarise(options, tokens, source, repeats, agreement)
    table(result).print()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")
    return 0 if agreement["agree"] else 1


def ours(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[str]], saes: Mapping[int, SparseAutoencoder]
) -> tuple[PassStatistics, FeatureSet]:
    statistics = collect_statistics(model, tokenizer, texts, saes, show_progress=False)
    return statistics, language_feature_set(statistics, saes, top=TOP)


@torch.no_grad()
def published(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[str]], saes: Mapping[int, SparseAutoencoder]
) -> dict[int, dict[str, Tensor]]:
    """{layer: mean activation [L, d_sae], alpha [L, d_sae], top feature ids [L, TOP]}."""
    found = {}
    for layer, sae in saes.items():
        mean = layer_means(model, tokenizer, texts, layer, lambda x, sae=sae: dense_activations(sae, x))
        alpha = layer_means(model, tokenizer, texts, layer, lambda x, sae=sae: x @ sae.W_enc.T + sae.b_enc)
        scores = monolinguality(mean)
        top = torch.stack([top_features(row, TOP) for row in scores])
        found[layer] = {"mean": mean, "alpha": alpha, "top": top, "scores": scores}
    return found


def layer_means(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[str]], layer: int, encode: Any
) -> Tensor:
    """Mean of `encode(residual)` over the tokens of each language, from one whole forward per text."""
    kept: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: kept.append(output))
    means = []
    for lines in texts.values():
        total, count = torch.zeros(()), 0
        for line in lines:
            kept.clear()
            model(input_ids=torch.tensor([tokenizer(line)["input_ids"]]), use_cache=False)
            activations = encode(kept[0][0, 1:]).to("cpu", copy=True)
            total = total + activations.double().sum(dim=0)
            count += len(activations)
        means.append(total / count)
    handle.remove()
    return torch.stack(means)


def dense_activations(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """[tokens, d_sae] with relu of the k largest pre-activations in their places and zeros elsewhere."""
    values, indices = (x @ sae.W_enc.T + sae.b_enc).topk(sae.activation.k, dim=-1)
    return torch.zeros(len(x), sae.d_sae).scatter_(1, indices, values.relu())


def compare(
    statistics: PassStatistics,
    features: FeatureSet,
    reference: Mapping[int, Mapping[str, Tensor]],
    saes: Mapping[int, SparseAutoencoder],
) -> dict[str, Any]:
    """Differences of the two sides, relative to the largest mean, and whether they chose the same features."""
    difference = {"mean": 0.0, "alpha": 0.0}
    chosen, same = 0, 0
    for layer, expected in reference.items():
        found = {
            "mean": statistics.layers[layer].mean_activation,
            "alpha": statistics.layers[layer].mean_residual @ saes[layer].W_enc.cpu().double().T
            + saes[layer].b_enc.cpu().double(),
        }
        for name, value in found.items():
            gap = (value - expected[name]).abs().max() / expected[name].abs().max()
            difference[name] = max(difference[name], float(gap))
        ids = features.layers[layer].feature_ids.view(len(LANGUAGES), TOP)
        chosen += ids.numel()
        same += int((ids == expected["top"]).sum())
    outliers = sum(int(layer.outliers.sum()) for layer in statistics.layers.values())
    return {
        "largest_difference_of_mean_activation": difference["mean"],
        "largest_difference_of_alpha": difference["alpha"],
        "chosen_features": chosen,
        "same_features": same,
        "norm_outliers_left_out_by_ours": outliers,
        "agree": max(difference.values()) < TOLERANCE and same == chosen and outliers == 0,
    }


def summarise(
    options: argparse.Namespace,
    tokens: int,
    source: str,
    repeats: list[dict[str, float]],
    agreement: Mapping[str, Any],
) -> dict[str, Any]:
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    return {
        "benchmark": "feature_pass",
        "settings": {**settings, "d_sae": 16 * options.hidden, "tokens": tokens, "text": source},
        "repeats": repeats,
        "ratio": spread([repeat["ratio"] for repeat in repeats]),
        "cpu_ratio": spread([repeat["cpu_ratio"] for repeat in repeats]),
        "agreement": dict(agreement),
        "machine": machine(),
        "versions": package_versions(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": numbers.median(values), "lowest": min(values), "highest": max(values)}


def table(result: Mapping[str, Any]) -> Table:
    keys = ("ours_s", "published_s", "ratio", "cpu_ratio")
    rows = [[number, *(repeat[key] for key in keys)] for number, repeat in enumerate(result["repeats"], start=1)]
    ratio, agreement = result["ratio"], result["agreement"]
    return Table(
        title=f"Feature pass, {result['settings']['layers']} layers: {ratio['median']:.1f} times faster "
        f"({ratio['lowest']:.1f} .. {ratio['highest']:.1f})",
        columns=["repeat", "ours, s", "published, s", "ratio", "ratio of CPU time"],
        rows=rows,
        caption=f"Largest relative difference of means {agreement['largest_difference_of_mean_activation']:.1e}, of "
        f"alpha {agreement['largest_difference_of_alpha']:.1e}; {agreement['same_features']} of "
        f"{agreement['chosen_features']} chosen features are the same.",
    )


class Seconds(NamedTuple):
    """Wall-clock time, and CPU time of this process, which other load on the machine disturbs less."""

    wall: float
    cpu: float


def timed(function: Any, *arguments: Any) -> tuple[Seconds, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def read_texts(per_language: int) -> tuple[dict[str, list[str]], str]:
    """The longest sentences of Tatoeba where the folder is there, else random words in five alphabets.

    The published data are sentences of 68 characters on average; the longest of Tatoeba come nearest to that.
    """
    if TATOEBA.is_dir():
        files = {language: TATOEBA / f"{language}.txt" for language in LANGUAGES}
        lines = {language: file.read_text(encoding="utf-8").splitlines() for language, file in files.items()}
        return {language: sorted(found, key=len)[-per_language:] for language, found in lines.items()}, "Tatoeba"
    generator = torch.Generator().manual_seed(0)
    letters = {"en": 0x61, "fr": 0xE0, "ko": 0xAC00, "ru": 0x430, "zh": 0x4E00}
    texts = {
        language: [
            " ".join(
                "".join(chr(first + int(i)) for i in torch.randint(24, (4,), generator=generator)) for _ in range(8)
            )
            for _ in range(per_language)
        ]
        for language, first in letters.items()
    }
    return texts, "random words"


def train_tokenizer(texts: Mapping[str, Sequence[str]], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4096),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([line for lines in texts.values() for line in lines], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")


def build_model(options: argparse.Namespace) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.hidden // 4,
        max_position_embeddings=512,
    )
    return Qwen3ForCausalLM(config).float().eval()


def build_sae(layer: int, options: argparse.Namespace) -> SparseAutoencoder:
    encoder = torch.randn(16 * options.hidden, options.hidden) / options.hidden**0.5
    return SparseAutoencoder(
        W_enc=encoder,
        b_enc=torch.randn(16 * options.hidden) / 10,
        W_dec=encoder.clone(),
        b_dec=torch.zeros(options.hidden),
        activation=TopK(options.k),
        layer=layer,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--texts-per-language", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "feature_pass.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
