"""What was released: the tables behind `catalog`. Facts only, each with where it was read."""

from __future__ import annotations

from collections.abc import Iterator

from qscope_posttrain.sae.catalog_entry import CatalogEntry
from qscope_posttrain.sae.gemma_scope_l0 import L0_BY_LAYER

WIDTHS = {
    "16k": 1 << 14,
    "32k": 1 << 15,
    "65k": 1 << 16,
    "131k": 1 << 17,
    "262k": 1 << 18,
    "524k": 1 << 19,
    "1m": 1 << 20,
}
"""Latents behind the rounded names of Gemma Scope."""

_REGISTRY = "SAELens 6.54.12's registry"
_SHAPES = "shapes of the model: transformers' conversion scripts"

_QWEN_LICENCE = (
    "other (qwen): research use; the card forbids using it to interfere with model capabilities for non-scientific "
    "purposes, and harmful content"
)
_QWEN = (
    # backbone, model type, layers, d_model, (thousands of latents, k)
    ("Qwen3-1.7B-Base", "qwen3", 28, 2048, ((32, 50), (32, 100))),
    ("Qwen3-8B-Base", "qwen3", 36, 4096, ((64, 50), (64, 100))),
    ("Qwen3-30B-A3B-Base", "qwen3_moe", 48, 2048, ((32, 50), (128, 100))),
    ("Qwen3.5-2B-Base", "qwen3_5_text", 24, 2048, ((32, 50), (32, 100))),
    ("Qwen3.5-9B-Base", "qwen3_5_text", 32, 4096, ((64, 50), (64, 100))),
    ("Qwen3.5-27B", "qwen3_5_text", 64, 5120, ((80, 50), (80, 100))),
    ("Qwen3.5-35B-A3B-Base", "qwen3_5_moe_text", 40, 2048, ((32, 50), (128, 100))),
)


def qwen_scope() -> Iterator[CatalogEntry]:
    for backbone, model_type, depth, d_model, releases in _QWEN:
        base = backbone.endswith("-Base")
        doubt = "" if base else "; that the model is the instruct one: report and name, one third-party note says base"
        for thousands, k in releases:
            yield CatalogEntry(
                name=f"{backbone.lower()}-{thousands}k-l0-{k}",
                family="Qwen-Scope",
                repository=f"Qwen/SAE-Res-{backbone}-W{thousands}K-L0_{k}",
                backbone=f"Qwen/{backbone}",
                model_type=model_type,
                tuning="base" if base else "instruct",
                model_layers=depth,
                layers=tuple(range(depth)),
                d_model=d_model,
                d_sae=1024 * thousands,
                k=k,
                format="qwen_scope",
                file="layer{layer}.sae.pt",
                licence=_QWEN_LICENCE,
                verified_by=f"arXiv 2605.11887, table 1; {_REGISTRY}{doubt}",
            )


_GEMMA_2 = {
    # repository: model, tuning, layers, d_model
    "gemma-scope-2b-pt-res": ("gemma-2-2b", "base", 26, 2304),
    "gemma-scope-9b-pt-res": ("gemma-2-9b", "base", 42, 3584),
    "gemma-scope-9b-it-res": ("gemma-2-9b-it", "instruct", 42, 3584),
    "gemma-scope-27b-pt-res": ("gemma-2-27b", "base", 46, 4608),
}


def gemma_scope() -> Iterator[CatalogEntry]:
    for (repository, width), numbers in L0_BY_LAYER.items():
        backbone, tuning, depth, d_model = _GEMMA_2[repository]
        by_layer = (row.split(": ") for row in numbers.split("; "))
        choices = {int(layer): tuple(l0s.split()) for layer, l0s in by_layer}
        yield CatalogEntry(
            name=f"{repository.removesuffix('-res')}-{width}",
            family="Gemma Scope",
            repository=f"google/{repository}",
            backbone=f"google/{backbone}",
            model_type="gemma2",
            tuning=tuning,
            model_layers=depth,
            layers=tuple(choices),
            d_model=d_model,
            d_sae=WIDTHS[width],
            k=None,
            format="gemma_scope",
            file=f"layer_{{layer}}/width_{width}/average_l0_{{l0}}/params.npz",
            licence="cc-by-4.0",
            verified_by=f"{_REGISTRY}; {_SHAPES}; licence on the hub pages of the 2b and 27b repositories",
            choices=choices,
        )


_GEMMA_3 = (
    # size, layers, d_model, layers of the suite with every width
    ("270m", 18, 640, (5, 9, 12, 15)),
    ("1b", 26, 1152, (7, 13, 17, 22)),
    ("4b", 34, 2560, (9, 17, 22, 29)),
    ("12b", 48, 3840, (12, 24, 31, 41)),
    ("27b", 62, 5376, (16, 31, 40, 53)),
)
_TARGET_L0 = {
    "resid_post": {"small": 20, "medium": 60, "big": 150},
    "resid_post_all": {"small": 20, "big": 120},
}
"""Target L0 of Gemma Scope 2 in the upper two thirds of the layers."""


def gemma_scope_2() -> Iterator[CatalogEntry]:
    for size, depth, d_model, some in _GEMMA_3:
        for tuning in ("pt", "it"):
            suites: list[tuple[str, str, tuple[int, ...]]]
            suites = [("resid_post", width, some) for width in ("16k", "65k", "262k", "1m")]
            suites += [("resid_post_all", width, tuple(range(depth))) for width in ("16k", "262k")]
            for site, width, layers in suites:
                targets = dict(_TARGET_L0[site])
                if (site, width) == ("resid_post", "262k"):
                    targets["medium_seed_1"] = targets["medium"]
                folder = f"{site}/layer_{{layer}}_width_{width}_l0_{{l0}}"
                yield CatalogEntry(
                    name=f"gemma-scope-2-{size}-{tuning}-{width}{'-all' if site == 'resid_post_all' else ''}",
                    family="Gemma Scope 2",
                    repository=f"google/gemma-scope-2-{size}-{tuning}",
                    backbone=f"google/gemma-3-{size}" + ("" if (size, tuning) == ("270m", "pt") else f"-{tuning}"),
                    model_type="gemma3_text",
                    tuning="base" if tuning == "pt" else "instruct",
                    model_layers=depth,
                    layers=layers,
                    d_model=d_model,
                    d_sae=WIDTHS[width],
                    k=None,
                    format="gemma_scope_2",
                    file=f"{folder}/params.safetensors",
                    companions=(f"{folder}/config.json",),
                    licence="not verified: read the card",
                    verified_by=f"{_REGISTRY}; {_SHAPES}; target L0s fitted to it; not verified: licence, dtype",
                    choices=dict.fromkeys(layers, tuple(targets)),
                    targets=targets,
                )


_R1_MIXTURES = {
    "text": "800M-Slimpajama-0-OpenR1-Math-220k",
    "mixed": "400M-Slimpajama-400M-OpenR1-Math-220k",
    "reasoning": "0-Slimpajama-800M-OpenR1-Math-220k",
}
"""Share of reasoning in the training text -> folder."""


def llama_scope() -> Iterator[CatalogEntry]:
    for times in (8, 32):
        folder = f"Llama3_1-8B-Base-L{{layer}}R-{times}x"
        yield CatalogEntry(
            name=f"llama-scope-{times}x",
            family="Llama Scope",
            repository=f"fnlp/Llama3_1-8B-Base-LXR-{times}x",
            backbone="meta-llama/Llama-3.1-8B",
            model_type="llama",
            tuning="base",
            model_layers=32,
            layers=tuple(range(32)),
            d_model=4096,
            d_sae=4096 * times,
            k=None,
            format="llama_scope",
            file=f"{folder}/checkpoints/final.safetensors",
            companions=(f"{folder}/hyperparams.json",),
            licence="apache-2.0 (card of fnlp/Llama-Scope)",
            verified_by=f"{_REGISTRY}; hub listing; only the residual (R) SAEs: A and M read other sites",
            bytes_per_weight=2,
            mean_l0=50,
        )
    for share, mixture in _R1_MIXTURES.items():
        yield CatalogEntry(
            name=f"llama-scope-r1-distill-{share}",
            family="Llama Scope",
            repository="fnlp/Llama-Scope-R1-Distill",
            backbone="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            model_type="llama",
            tuning="instruct",
            model_layers=32,
            layers=tuple(range(32)),
            d_model=4096,
            d_sae=4096 * 8,
            k=None,
            format="lm_saes",
            file=f"{mixture}/L{{layer}}R/sae_weights.safetensors",
            companions=(f"{mixture}/L{{layer}}R/config.json",),
            licence="apache-2.0",
            verified_by=f"{_REGISTRY}; card; not verified: L0, dtype",
        )
