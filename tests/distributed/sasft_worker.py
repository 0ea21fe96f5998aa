"""Both ranks of the two-process run of `test_sasft_two_processes.py`; writes what rank 0 saw."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import build_model
from datasets import Dataset
from integrations.transformers.plain import make_plain
from ranks import run_two_ranks
from sft.cases import KeepGradients, case_model, make_features, make_trainer, paper_callback
from transformers import AutoTokenizer, DataCollatorWithFlattening

from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.data.packing import pack_with_languages


def main(folder: Path) -> None:
    job = torch.load(folder / "job.pt", weights_only=False)
    model = case_model(build_model)
    features = make_features(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    for name, case in job["cases"].items():
        dataset = Dataset.from_list(job["rows"])
        if case["packed"]:
            dataset = pack_with_languages(dataset, tokenizer, max_length=30)
        options = dict(case["options"])
        if options.pop("token_penalty", False):
            callback = TokenPenaltyCallback("zh", languages=features.languages, **options)
        else:
            callback = paper_callback(features, **options)
        keep = KeepGradients()
        arguments = {"ddp_backend": "gloo", **case["arguments"]}
        if case["plain"]:
            collator = DataCollatorWithFlattening() if case["padding_free"] else None
            trainer = make_plain(
                copy.deepcopy(model), dataset, [callback, keep], tokenizer=tokenizer, collator=collator, **arguments
            )
        else:
            trainer = make_trainer(
                copy.deepcopy(model),
                dataset,
                [callback, keep],
                processing_class=tokenizer,
                padding_free=case["padding_free"],
                **arguments,
            )
        labels = []
        inner = trainer.training_step

        def training_step(model, inputs, *args, inner=inner, labels=labels, **kwargs):
            labels.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return inner(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        trainer.train()
        counts = [None] * trainer.args.world_size
        torch.distributed.all_gather_object(counts, sum(labels))
        results[name] = {
            "gradients": keep.gradients,
            "logs": trainer.state.log_history[0],
            "label_counts": counts,
            "left_over": sorted({"compute_loss", "get_batch_samples", "get_train_dataloader"} & vars(trainer).keys()),
        }
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_two_ranks(main, Path(sys.argv[1]))
