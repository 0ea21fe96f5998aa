"""Study 2: does SASFT keep Gemma 3 270M from switching language, and is an SAE what it takes?

The training data hold the habit: half of the completions in other languages go on in the target after a sentence. Every
arm is `qscope sft` with recipes/real/sft_gemma3.yaml and a few words; it is scored on held-out text, teacher forced.
Weights are chosen on validation rows with seed 0: the lowest hazard at a cost of at most 1 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.real.fine_tuning.arms import ARMS, ARMS_OF, BEFORE, FEATURES, SAMPLED, SEEDS, SETTINGS, Arm
from benchmarks.real.fine_tuning.capability import capability_table
from benchmarks.real.fine_tuning.parts import scored_rows, training_rows
from benchmarks.real.fine_tuning.tables import Key, Scores, chosen, summary
from benchmarks.real.steps import ROOT, run_step
from benchmarks.real.texts import paragraphs
from qscope_posttrain.report.summary import write_rows, write_text

RECIPE = "recipes/real/sft_gemma3.yaml"
LAST, SAE_STEPS = 17, 160
"""The last layer, and the updates of its SAE"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    study = Study(options.model, options.saes, options.work)
    if options.quick:
        return measured(study, {"zh": ("sft", "sasft")}, seeds=1)
    return measured(study, ARMS_OF, SEEDS, asked=("zh",))


def measured(study: Study, arms: Mapping[str, Sequence[str]], seeds: int, asked: Sequence[str] = ()) -> dict[str, Any]:
    """Every weight of every arm with seed 0, then the chosen weights with other seeds, then sampled answers, and
    questions in the settings `asked`."""
    found: dict[Key, Scores] = {}
    sampled = {}
    answered: dict[str, dict[str, Any]] = {name: {} for name in asked}
    for name, own in arms.items():
        found[name, BEFORE, 0.0, 0] = study.scores(name, BEFORE, 0.0, 0)
        if name in asked:
            answered[name][BEFORE] = study.answered(name, BEFORE, 0.0, 0)
        for arm in own:
            for weight in ARMS[arm].weights:
                found[name, arm, weight, 0] = study.scores(name, arm, weight, 0)
        for arm in own:
            weight = chosen(found, name, arm)
            for seed in range(1, seeds):
                found[name, arm, weight, seed] = study.scores(name, arm, weight, seed)
            if arm in SAMPLED:
                sampled[name, arm, weight, 0] = study.sampled(name, arm, weight, 0)
                if name in asked:
                    answered[name][arm] = study.answered(name, arm, weight, 0)
    logs = {key: study.log(*key) for key in found if key[1] != BEFORE}
    result = summary(found, study.took, sampled, logs) | {"vocabulary": study.compared()}
    for name, scored in answered.items():
        result["tables"][f"{name}_questions"] = capability_table(scored, name).to_dict()
    return result


@dataclass
class Study:
    """The steps of the study, each run once, in the folder `work`."""

    model: Path
    saes: Path
    work: Path
    took: dict[str, Any] = field(default_factory=dict)

    def step(self, name: str, words: Sequence[object], reads: Sequence[Path]) -> None:
        if name not in self.took:  # asked for by every arm
            self.took[name] = run_step(name, list(map(str, words)), reads, self.work)

    def trimmed(self) -> Path:
        """The model with the vocabulary of the texts."""
        folder = self.work / "model"
        self.step("trimmed", ["benchmarks.real.fine_tuning.parts", "trim", self.model, folder], [self.model])
        return folder

    def compared(self) -> dict[str, Any]:
        """What the trimmed vocabulary leaves out."""
        output = self.work / "compared.json"
        words = ["benchmarks.real.fine_tuning.parts", "compare", self.model, self.trimmed(), output]
        self.step("compared", words, [self.model])
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found

    def dictionaries(self) -> Path:
        """A folder with an SAE of the last layer, trained as the others, and that of layer 13."""
        folder, texts = self.work / "saes", self.model.parents[1] / "texts" / "gemma3.jsonl"
        recipe = "recipes/real/train_sae_gemma3.yaml"
        words = ["qscope_posttrain", "sae", "train", "--config", recipe, "--model", self.model, "--texts", texts]
        self.step(
            "last_layer_sae", [*words, "--output", folder, "--layers", LAST, "--steps", SAE_STEPS], [self.model, texts]
        )
        other = "layer13.sae.safetensors"
        if not (folder / other).exists():
            (folder / other).symlink_to((self.saes / other).resolve())
        return folder

    def start(self, name: str) -> Path:
        """The model that the arms of a setting train."""
        if not SETTINGS[name].start:
            return self.trimmed()
        adapter, folder = self.work / "runs" / SETTINGS[name].start, self.work / f"{name}-model"
        words = ["benchmarks.real.fine_tuning.parts", "merge", self.trimmed(), adapter, folder]
        self.step(f"{name}-model", words, [adapter / "adapter_model.safetensors"])
        return folder

    def data(self, name: str) -> Path:
        """The rows to train on, those to score, prompts, and the texts in which features are found."""
        setting, folder = SETTINGS[name], self.work / "data"
        words = folder / f"{name}-words"  # from which languages are identified
        for part in (folder / f"{name}-texts", words):
            part.mkdir(parents=True, exist_ok=True)
        dirty, clean = training_rows(setting)
        for kind, rows in (("", dirty), ("-clean", clean)):
            found = [{key: asdict(row)[key] for key in ("prompt", "completion", "language")} for row in rows]
            write_rows(folder / f"{name}{kind}.jsonl", found)
        several = len(setting.sources) > 1
        parts = scored_rows(setting, 24 if several else 60, 8 if several else 40)
        kept = {part: [asdict(row) for row in rows] for part, rows in parts.items()}
        write_text(folder / f"{name}-scored.json", json.dumps(kept, ensure_ascii=False) + "\n")
        prompts = [row for row in parts["test"] if row.language != setting.target and row.switch is None]
        asked = [{"prompt": row.prompt, "language": row.language} for row in prompts]
        write_rows(folder / f"{name}-prompts.jsonl", asked)
        for language in (*setting.sources, setting.target):
            own = [text for text in paragraphs(language, held_out=False) if len(text) < 400]
            write_text(folder / f"{name}-texts" / f"{language}.txt", "\n".join(own[:: len(own) // 80][:80]) + "\n")
            write_text(words / f"{language}.txt", "\n".join(paragraphs(language, held_out=False)) + "\n")
        return folder

    def features(self, name: str) -> Path:
        """The folder of the FeatureSets of a setting, found on the model that it starts from."""
        folder, saes, texts = self.work / "features" / name, self.dictionaries(), self.data(name) / f"{name}-texts"
        model, target = self.start(name), SETTINGS[name].target
        find = ["qscope_posttrain", "features", "find", "--model", model, "--sae", saes, "--layers", 13, LAST]
        find += ["--texts", texts, "--top", 32, "--max-length", 96, "--output", folder]
        self.step(f"{name}_features", find, [model, saes / f"layer{LAST}.sae.safetensors", texts])
        words = ["benchmarks.real.fine_tuning.parts", "controls", model, saes, texts, folder, target]
        self.step(f"{name}_controls", words, [folder / FEATURES])
        return folder

    def scores(self, name: str, arm: str, weight: float, seed: int) -> Scores:
        """Train one arm and score it; `base` is the model before training."""
        run, model = f"{name}-{arm}-{weight:g}-{seed}", self.start(name)
        rows, output = self.data(name) / f"{name}-scored.json", self.work / "scores" / f"{run}.json"
        adapter: Path | str = "-"
        reads = [rows]
        if arm != BEFORE:
            adapter = self.work / "runs" / run
            self.train(name, ARMS[arm], weight, seed, adapter)
            reads.append(adapter / "adapter_model.safetensors")
        output.parent.mkdir(parents=True, exist_ok=True)
        words = ["benchmarks.real.fine_tuning.parts", "score", model, adapter, rows, SETTINGS[name].target, output]
        self.step(f"score-{run}", words, reads)
        found: Scores = json.loads(output.read_text(encoding="utf-8"))
        return found

    def train(self, name: str, arm: Arm, weight: float, seed: int, output: Path) -> None:
        """`qscope sft` of one arm."""
        rows = self.data(name) / f"{name}{'-clean' if arm.clean else ''}.jsonl"
        file = self.features(name) / arm.features.format(seed=seed) if arm.features else None
        words: list[object] = ["qscope_posttrain", "sft", "--config", RECIPE, "--model_name_or_path", self.start(name)]
        words += ["--dataset_name", rows, "--output_dir", output, "--seed", seed]
        words += arm_words(arm, SETTINGS[name].target, weight, file)
        self.step(f"train-{output.name}", words, [rows, ROOT / RECIPE, *([file] if file else [])])

    def log(self, name: str, arm: str, weight: float, seed: int) -> list[dict[str, Any]]:
        """What the training of an arm logged."""
        summary = self.work / "runs" / f"{name}-{arm}-{weight:g}-{seed}" / "summary.json"
        found: list[dict[str, Any]] = json.loads(summary.read_text(encoding="utf-8"))["results"]["log"]
        return found

    def answered(self, name: str, arm: str, weight: float, seed: int) -> dict[str, Any]:
        """Score the answers to questions by the whole model, with the adapter of an arm."""
        run, output = f"{name}-{arm}-{weight:g}-{seed}", self.work / "answered" / f"{name}-{arm}.json"
        adapter = None if arm == BEFORE else self.work / "runs" / run
        output.parent.mkdir(parents=True, exist_ok=True)
        words = ["benchmarks.real.fine_tuning.capability", self.model, adapter or "-", output]
        self.step(f"answered-{run}", words, [self.model, *([adapter / "adapter_model.safetensors"] if adapter else [])])
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found

    def sampled(self, name: str, arm: str, weight: float, seed: int) -> dict[str, Any]:
        """Let an arm that was trained answer the prompts of the test rows: `qscope evaluate code-switching`."""
        run, prompts = f"{name}-{arm}-{weight:g}-{seed}", self.data(name) / f"{name}-prompts.jsonl"
        model, output = self.start(name) if arm == BEFORE else self.work / "runs" / run, self.work / "sampled" / run
        words: list[object] = ["qscope_posttrain", "evaluate", "code-switching", "--model", model]
        words += ["--prompts", prompts, "--target", SETTINGS[name].target, "--samples", 2, "--max_new_tokens", 48]
        words += ["--top_p", 1.0, "--batch_size", 48, "--output", output]
        if SETTINGS[name].target == "fr":
            words += ["--identify", "words", "--identify-texts", self.data(name) / f"{name}-words"]
        self.step(f"sampled-{run}", words, [prompts, *model.glob("adapter_model.safetensors")])
        found: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))["results"]
        return found


def arm_words(arm: Arm, target: str, weight: float, features: Path | None) -> list[object]:
    """The words of an arm's method for `qscope sft`."""
    words: list[object] = [*arm.words]
    if arm.weight:
        words += [f"--{arm.weight}", weight]
    if features:
        words += ["--features", features, "--sasft_target", target]
    elif arm.weight.startswith("token_penalty"):
        words += ["--token_penalty_target", target]
    return words
