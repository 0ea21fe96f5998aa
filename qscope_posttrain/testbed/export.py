"""The testbed as files that the other commands read: model, SAEs, features, texts, SFT data, prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qscope_posttrain.testbed.experiment import Experiment
from qscope_posttrain.testbed.language_model import save_model
from qscope_posttrain.testbed.tokenizer import decode

_TEXTS_SEED = 41
_SFT_SEED = 42
_PROMPTS_SEED = 43


def export_testbed(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """Write everything that `qscope features find`, `qscope sft` and `qscope evaluate` need, and return where it lies.

    `model/` (with tokenizer), `sae/layer{n}.sae.pt`, `features.safetensors`, `texts/<language>.txt` (windows of the
    sft split, one a line), `sft.jsonl` (prompt, completion, language), `prompts.jsonl` (prompt, language; test
    split). Prompts and completions begin at character boundaries and end at the last whole character.
    """
    model = experiment.language_model
    config = experiment.config
    places = {
        "model": folder / "model",
        "sae": folder / "sae",
        "features": folder / "features.safetensors",
        "texts": folder / "texts",
        "sft": folder / "sft.jsonl",
        "prompts": folder / "prompts.jsonl",
    }
    save_model(model.model, model.tokenizer, places["model"])
    for name in ("sae", "texts"):
        places[name].mkdir(parents=True, exist_ok=True)
    for layer in config.tapped_layers:
        shutil.copyfile(experiment.dictionaries.folder / f"layer{layer}.sae.pt", places["sae"] / f"layer{layer}.sae.pt")
    shutil.copyfile(experiment.feature_sets.folder / "sae.safetensors", places["features"])
    for language, texts in model.texts("sft", config.feature_windows, _TEXTS_SEED).items():
        lines = [" ".join(text.split()) for text in texts]
        (places["texts"] / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    windows = model.maker.dialogue("sft", config.sft_windows, _SFT_SEED, config.sft_switch)
    cut = windows.prompt_length
    _write_lines(
        places["sft"],
        [
            {
                "prompt": _text(experiment, row[:cut].tolist()),
                "completion": _text(experiment, row[cut:].tolist()),
                "language": language,
            }
            for language, row in zip(windows.languages, windows.input_ids, strict=True)
        ],
    )
    windows = model.maker.dialogue("test", config.sampled_prompts, _PROMPTS_SEED, languages=model.sources)
    _write_lines(
        places["prompts"],
        [
            {"prompt": _text(experiment, row.tolist()), "language": language}
            for language, row in zip(windows.languages, windows.prompts, strict=True)
        ],
    )
    return places


def _text(experiment: Experiment, tokens: list[int]) -> str:
    """Decoded, without the halves of characters at a cut."""
    return decode(experiment.language_model.tokenizer, tokens).replace("\N{REPLACEMENT CHARACTER}", "")


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
