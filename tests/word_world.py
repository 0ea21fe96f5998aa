"""A world in which everything is known: feature n fires on word n, and a server writes, rewrites and judges by words.

The residual stream of every layer is the word's embedding: dimension n for topic word n. The SAE of layer 1 has one
feature a word; that of layer 0 one for each pair of neighboring words.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qscope_posttrain.features.explain.explanation import Explanation
from qscope_posttrain.report.summary import write_rows
from qscope_posttrain.sae.activations import ReLU
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

TOPIC = "unsafe ladder use"
WORDS = """
    ladder rung step roof gutter rope hook boot glove helmet bucket paint wall window tree branch apple hedge saw nail
""".split()  # noqa: SIM905 - words are easier to read without their quotation marks
COOKING = "soup onion pan salt oven flour".split()  # noqa: SIM905
FILLER = "how do i use the with a and please tell me about today now here it for my is on".split()  # noqa: SIM905
WIDTH = 64
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "end", "user", "assistant", "unsafe", *WORDS, *COOKING, *FILLER]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="end", pad_token="end", chat_template=TEMPLATE
    )


def write_world(folder: Path) -> Path:
    """model/, saes/, explanations.jsonl, seed.txt (a few words only), natural.txt. Returns the folder."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).float()
    features = [*WORDS, *COOKING]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, WIDTH - 1] = 1.0
        for number, word in enumerate(features):
            model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word), number] = 2.0
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    _sae(torch.eye(len(features), WIDTH), 1).save(folder / "saes" / "layer1.sae.safetensors")
    pairs = torch.zeros(len(features) // 2, WIDTH)
    for number in range(len(features)):
        pairs[number // 2, number] = 1.0
    _sae(pairs, 0).save(folder / "saes" / "layer0.sae.safetensors")
    explained = [Explanation(1, number, f"the word {word}", "by hand") for number, word in enumerate(features)]
    write_rows(folder / "explanations.jsonl", (entry.to_dict() for entry in explained))
    draw = random.Random(0)
    seeds = [f"how do i use the {draw.choice(WORDS[:4])} on my {draw.choice(FILLER)}" for _ in range(30)]
    (folder / "seed.txt").write_text("\n".join(seeds))
    common = [*WORDS[:8] * 4, *WORDS]
    natural = [f"tell me about my {draw.choice(common)} and the {draw.choice(common)}" for _ in range(120)]
    (folder / "natural.txt").write_text("\n".join(natural))
    return folder


def _sae(encoder: torch.Tensor, layer: int) -> SparseAutoencoder:
    return SparseAutoencoder(encoder, torch.zeros(len(encoder)), encoder.clone(), torch.zeros(WIDTH), ReLU(), layer)


def grammar(body: dict[str, Any]) -> str:
    """Answers by the words in a request and its seed; every third vanilla prompt forgets the word it was asked for."""
    system, content = body["messages"][0]["content"], body["messages"][-1]["content"]
    draw = random.Random(hashlib.sha256(json.dumps([system, content, body.get("seed")]).encode()).hexdigest())
    if "You rate" in system:
        word = _named(content)
        return json.dumps({"relevance": 0.9 if word in WORDS else 0.1})
    if "You write test" in system:
        word = _named(content) or draw.choice([*WORDS[:8] * 4, *WORDS])
        forgotten = "contain" in content and draw.random() < 1 / 3
        risk = "unsafe " if "should decline" in content else ""
        chosen = draw.choice(FILLER) if forgotten else word
        return json.dumps({"prompt": f"tell me about {risk}{draw.choice(FILLER)} the {chosen} {draw.choice(FILLER)}"})
    if "You rewrite" in system:
        prompt = json.loads(re.search(r'^Message: (".*")$', content, flags=re.MULTILINE).group(1))
        words = prompt.split()
        if draw.random() < 1 / 4:
            words = [word for word in words if word not in WORDS]
        return "Here: " + json.dumps({"prompt": f"please {draw.choice(FILLER)} {' '.join(words)}"})
    if "You decide whether" in system:
        return json.dumps({"harmful": "unsafe" in content.split("Message:")[1]})
    if "You cannot help" in system:
        return "i do not help with it please use the helmet"
    return "here is how to use it now"


def _named(content: str) -> str:
    found = re.search(r"the word (\w+)", content)
    return found.group(1) if found else ""
