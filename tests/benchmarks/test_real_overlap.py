"""Items with answers to choose from: chance is exact; likelihoods of answers are those of plain forward passes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.real import texts
from benchmarks.real.panel import agreement, features, items, likelihoods, tables
from benchmarks.real.panel.items import Item
from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
from qscope_posttrain.analysis.benchmarks.overlap import measure_overlap
from qscope_posttrain.features.text_features import collect_text_features
from qscope_posttrain.models.scoring import response_losses
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

with_data = pytest.mark.skipif(not texts.DATA.is_dir(), reason=f"real text is not at {texts.DATA}")


def numbers(count):
    return [Item(f"question {n}", str(n), (str(n % 7),)) for n in range(count)]


class TestItems:
    def test_four_items_share_four_different_answers(self):
        found = list(items.grouped(numbers(30), 20))
        assert len(found) == 20
        assert len({item.unit for item in found}) == 20
        for start in range(0, 20, 4):
            group = found[start : start + 4]
            assert len({item.options for item in group}) == 1
            assert len(set(group[0].options)) == 4
            assert [item.options[item.right] for item in group] == [str(int(item.unit) % 7) for item in group]

    def test_no_group_without_four_answers(self):
        assert list(items.grouped([Item("q", str(n), (str(n % 3),)) for n in range(9)], 8)) == []

    def test_whoever_does_not_read_the_question_is_right_once_in_four(self):
        found = list(items.grouped(numbers(30), 20))
        liked = {str(n): -float(n) for n in range(7)}
        scores = {
            "with": [[liked[option] for option in item.options] for item in found],
            "without": [[0.0] * 4 for _ in found],
        }
        assert likelihoods.hits(scores, [item.right for item in found]).mean() == 0.25

    @pytest.mark.parametrize(
        ("name", "question", "answer", "stem", "options"),
        [
            ("aqua", "How old?\nA)A)59\nB)B)69\nC)79\nD)89\nE)99", "B", "How old?", ("59", "69", "79", "89", "99")),
            ("sat_math", "Solve $x$.\nA) -1 B) 0 C) 3 D) 4", "C", "Solve $x$.", ("-1", "0", "3", "4")),
            (
                "gaokao_math_qa",
                "则 $a=( )\n(A) $-1$\n(B) 1\n(C) $-3$\n(D) 3",
                "D",
                "则 $a=( )",
                ("$-1$", "1", "$-3$", "3"),
            ),
        ],
    )
    def test_options_are_taken_apart(self, name, question, answer, stem, options):
        found = items.split_options(name, question, answer)
        assert (found.question, found.options) == (stem, options)
        assert found.options[found.right] == options["ABCDE".index(answer)]

    @pytest.mark.parametrize(
        ("question", "answer"), [("Which?\nA) 1\nB) 2\nC) 3", "A"), ("Which?\nA) 1\nB) 1\nC) 2\nD) 3", "A")]
    )
    def test_items_with_missing_or_equal_options_are_left_out(self, question, answer):
        assert items.split_options("mmlu_physics", question, answer) is None

    @with_data
    def test_every_benchmark_has_its_items_once_and_no_answer_twice(self):
        sets = items.benchmark_sets()
        assert len(sets) == 21
        for name, found in sets.items():
            assert len({item.unit for item in found}) == len(found) >= 20
            for item in found:
                assert len({option.casefold() for option in item.options}) == len(item.options)
            if name != "minerva_math":
                rights = Counter(item.right for item in found)
                assert set(rights.values()) == {len(found) / 4}
        units = {name: [item.unit for item in sets[f"mgsm_{name}"]] for name in items.LANGUAGES}
        assert units["en"] == units["fr"] == units["ru"] == units["zh"]
        assert not {item.unit for item in sets["gsm8k"]} & set(units["en"])

    @with_data
    def test_who_reads_fewer_items_reads_the_first_ones(self):
        fewer = items.benchmark_sets(28)
        assert {name: found[:28] for name, found in items.benchmark_sets(40).items()} == fewer

    @with_data
    def test_no_sae_learned_from_an_item(self):
        learned = {text.rpartition("\n")[0].strip() for text in texts.sae_texts("gemma3")}
        sets = items.benchmark_sets()
        for name in ("gsm8k", "college_math", "mawps", "mgsm_en"):
            assert not [item for item in sets[name] if item.question in learned]

    @with_data
    def test_nothing_scored_is_trained_on(self):
        trained = " ".join(likelihoods.training_texts("mathematics", 0))
        for name in ("gsm8k", "mgsm_en"):
            assert not [item for item in items.benchmark_sets()[name] if item.question in trained]


class TestLikelihoods:
    @pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
    def test_answers_behind_one_question_are_read_as_if_alone(self, make_model, kind):
        model, draw = make_model(kind), np.random.default_rng(0)
        choices = [
            likelihoods.Choice(
                tuple(draw.integers(512, size=draw.integers(1, 9)).tolist()),
                tuple(tuple(draw.integers(512, size=size).tolist()) for size in draw.integers(1, 6, size=4)),
            )
            for _ in range(5)
        ]
        found = likelihoods.answer_likelihoods(model, choices)
        for choice, read in zip(choices, found, strict=True):
            losses, _ = response_losses(model, [choice.question] * 4, choice.answers)
            assert read == pytest.approx((-losses).tolist(), abs=1e-4)

    def test_a_better_scorer_is_above_chance(self):
        found = list(items.grouped(numbers(30), 20))
        scores = {
            "with": [[2.0 * (number == item.right) for number in range(4)] for item in found],
            "without": [[0.5, 0.0, 0.0, 0.0]] * 20,
        }
        right = [item.right for item in found]
        assert likelihoods.hits(scores, right).mean() == 1
        assert 0.25 < likelihoods.probabilities(scores, right).mean() < 1


class TestVariants:
    @pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
    def test_layers_left_out_add_nothing(self, make_model, kind):
        model = make_model(kind)
        likelihoods.alter(model, None, "skip:0-3")
        ids = torch.tensor([[1, 2, 3]])
        embedded = model.base_model.norm(model.base_model.embed_tokens(ids))
        torch.testing.assert_close(model.base_model(input_ids=ids)[0], embedded)

    def test_pruning_zeroes_the_smallest_weights_of_each_layer(self, make_model):
        model, before = make_model("llama"), make_model("llama")
        likelihoods.alter(model, None, "prune:0.25")
        old, new = (one.base_model.layers[1].mlp.up_proj.weight for one in (before, model))
        gone = new == 0
        assert gone.float().mean() == pytest.approx(0.25, abs=0.01)
        assert old[gone].abs().max() <= old[~gone].abs().min()
        torch.testing.assert_close(new[~gone], old[~gone])
        torch.testing.assert_close(model.lm_head.weight, before.lm_head.weight)


def test_features_of_three_forms_are_those_of_the_product(make_model, tiny_tokenizer):
    model = make_model("llama")
    rows = torch.nn.functional.normalize(torch.randn(192, 64), dim=1)
    sae = SparseAutoencoder(rows, torch.zeros(192), rows.clone(), torch.zeros(64), TopK(12), layer=2)
    questions = ["The river runs past the old mill.", "She reads a book every evening.", "Nobody knew why."]
    sets = {"set": [Item(question, question) for question in questions]}
    found = features.read_features(model, tiny_tokenizer, sets["set"], {2: sae})
    for form, texts_read, pooling in (
        ("last", questions, "last"),
        ("ending", [question + items.ENDING for question in questions], "last"),
        ("any", questions, "max"),
    ):
        ids = [tiny_tokenizer(text)["input_ids"] for text in texts_read]
        known = collect_text_features(model, tiny_tokenizer, ids, {2: sae}, pooling=pooling)[2].matrix
        read = [found[f"2/{form}/{what}"] for what in ("sizes", "indices", "width")]
        fired = features.by_benchmark(sets, *read)["set"]
        for row in range(len(questions)):
            assert set(fired.item(row)) == set(known[[row]].indices)


class TestAgreement:
    def test_overlap_is_that_of_the_product(self):
        draw = np.random.default_rng(0)
        sets = [
            ItemFeatures.from_sets(str(n), [draw.integers(40, size=4).tolist() for _ in range(8 + n)], 40)
            for n in range(4)
        ]
        np.testing.assert_allclose(agreement.overlap_min(sets), measure_overlap(sets).values("overlap_min"))

    def test_a_ranking_that_all_items_agree_on_is_reliable(self):
        models = np.linspace(0, 1, 6)
        draw = np.random.default_rng(0)
        assert agreement.ranking_reliability(models + 0.01 * draw.normal(size=(40, 6))) > 0.99
        assert agreement.ranking_reliability(draw.normal(size=(40, 6))) < 0.7

    def test_what_the_control_explains_is_taken_off(self):
        draw = np.random.default_rng(0)
        control, own = (one + one.T for one in draw.normal(size=(2, 12, 12)))
        same = agreement.given_pairs(control + own, control + own + 0.1 * (own @ own), control, 100, 100)
        explained = agreement.given_pairs(control + own, control, control + 1e-3 * (own @ own), 100, 100)
        assert same.value > 0.8
        assert same.p < 0.05
        assert abs(explained.value) < 0.5

    def test_likeness_given_all_others_has_nothing_of_what_all_share(self):
        draw = np.random.default_rng(0)
        general, shared = draw.normal(size=(2, 200, 1))
        scores = 3 * general + draw.normal(size=(200, 6))
        assert np.corrcoef(scores.T)[0, 1] > 0.8
        assert abs(agreement.leave_two_out(scores)[0, 1]) < 0.4
        scores[:, :2] += shared
        found = agreement.leave_two_out(scores)
        assert found[0, 1] == np.max(found[np.triu_indices(6, 1)])


@pytest.fixture(scope="module")
def toy():
    """Six models of rising skill, eight benchmarks of 16 items, and features of eight families."""
    draw = np.random.default_rng(0)
    names = [*(f"set{number}" for number in range(6)), tables.CONTROL, "mgsm_ru"]
    sets = {name: list(items.grouped(numbers(30), 16)) for name in names}
    sets["features_only"] = [Item(item.question, item.unit) for item in numbers(16)]

    def file(skill, own):
        scores = {
            name: {
                "with": [(skill * (np.arange(4) == item.right) + draw.normal(size=4)).tolist() for item in found],
                "without": [[0.0] * 4 for _ in found],
            }
            for name, found in sets.items()
            if name in names
        }
        return {"scores": scores, **({"own_options": {"set0": scores["set0"]}} if own else {})}

    files = {f"model {'base' if n == 5 else n}": file(n / 2, n == 5) for n in range(6)}
    total = sum(map(len, sets.values()))
    read = {}
    for layer in (1, 2, 3):
        for form in features.FORMS:
            fired = [draw.choice(60, size=5, replace=False) for _ in range(total)]
            read |= {f"{layer}/{form}/sizes": np.full(total, 5), f"{layer}/{form}/indices": np.concatenate(fired)}
            read |= {f"{layer}/{form}/width": 60, f"{layer}/{form}/residual": draw.normal(size=(total, 8))}
    tokens = {name: [draw.integers(30, size=6).tolist() for _ in found] for name, found in sets.items()}
    panel = tables.read_panel(files, sets, {"set0": sets["set0"]}, 12)
    cells = tables.by_cell(sets, read, (1, 2, 3), 12)
    return panel, tables.study(panel, cells, {name: found[:12] for name, found in tokens.items()}, (1, 2, 3))


class TestTables:
    def test_models_are_compared_on_the_items_that_all_read(self, toy):
        assert {len(found) for found in toy[0].scores["accuracy"].values()} == {12}
        assert {len(found) for found in toy[0].pretrained["model base"].values()} == {16}

    def test_better_models_score_higher(self, toy):
        means = toy[0].means("accuracy", ["set0", "set1", "set2"]).mean(axis=1)
        assert means[5] > 0.5 > means[0]

    def test_every_benchmark_and_predictor_has_its_row(self, toy):
        shown = toy[1]["tables"]
        assert [row[0] for row in shown["panel"]["rows"]] == list(toy[0].scores["accuracy"])
        assert [row[0] for row in shown["scores"]["rows"]] == list(agreement.SCORES)
        assert len(shown["redundancy"]["rows"]) == 9 + 2
        assert len(shown["overlap"]["rows"]) == len(shown["english"]["rows"]) == 9 + 3
        marked = [row[0] for row in shown["overlap"]["rows"] if "beforehand" in row[0]]
        assert marked == ["overlap, layer 2, last (chosen beforehand)"]

    def test_the_control_is_no_benchmark_of_a_pair(self, toy):
        assert tables.CONTROL not in toy[1]["similarity"]["benchmarks"]
        assert "7 benchmarks" in toy[1]["tables"]["overlap"]["caption"]
        assert "6 benchmarks" in toy[1]["tables"]["english"]["caption"]

    def test_the_score_is_the_one_that_ranks_most_reliably(self, toy):
        mean = {kind: np.mean(list(found.values())) for kind, found in toy[1]["reliability"].items()}
        assert toy[1]["score"] == max(mean, key=mean.get)
