"""Shared fixtures: tiny random models and tokenizers built on the spot, so that no test needs the network."""

from __future__ import annotations

import gc
import os
import random
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["QSCOPE_QUIET"] = "1"  # no progress between the results; tests of it ask for it

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# A shell runs what is behind `&` with SIGINT ignored, which all processes from here on would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# No test has a time limit: the first call of an operator imports a compiler, and CI's cores are shared. Nor does its
# verdict depend on luck: the same examples are drawn in every run. `make fuzz` draws others.
settings.register_profile("same examples", deadline=None, derandomize=True)
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1000")), print_blob=True
)
settings.load_profile("same examples")
if not torch.cuda.is_available():
    # Read when triton is first imported, which any test may do, for example by compiling something.
    os.environ["TRITON_INTERPRET"] = "1"

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TEXTS: dict[str, list[str]] = {
    "en": [
        "The river runs past the old mill and into the valley.",
        "She reads a book every evening before she goes to sleep.",
        "We bought bread, milk and three apples at the market.",
        "Nobody knew why the clock had stopped at noon.",
    ],
    "fr": [
        "La rivière passe devant le vieux moulin et descend dans la vallée.",
        "Elle lit un livre chaque soir avant de s'endormir.",
        "Nous avons acheté du pain, du lait et trois pommes au marché.",
        "Personne ne savait pourquoi l'horloge s'était arrêtée à midi.",
    ],
    "zh": [
        "河水流过旧磨坊，流进山谷。",
        "她每天晚上睡觉以前都要看一本书。",
        "我们在市场上买了面包、牛奶和三个苹果。",
        "没有人知道钟为什么在中午停了下来。",
    ],
    "ru": [
        "Река течёт мимо старой мельницы и уходит в долину.",
        "Каждый вечер перед сном она читает книгу.",
        "Мы купили на рынке хлеб, молоко и три яблока.",
        "Никто не знал, почему часы остановились в полдень.",
    ],
    "ko": [
        "강물은 오래된 방앗간을 지나 골짜기로 흘러간다.",
        "그녀는 매일 저녁 자기 전에 책을 읽는다.",
        "우리는 시장에서 빵과 우유와 사과 세 개를 샀다.",
        "시계가 왜 정오에 멈췄는지 아무도 몰랐다.",
    ],
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays until the end: a million objects of torch, transformers and the tests.

    accelerate collects garbage in each training and after it; over all of these objects that takes longer than the
    training itself. What tests create is collected as ever.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # triton's bindings report what the interpreter does not free at its end


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """No test depends on the random numbers of others: each one, fixtures included, starts from the same state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 entries trained on `TEXTS`, with chat template, end-of-sequence and padding tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([line for lines in TEXTS.values() for line in lines], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


_SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}
_ARCHITECTURES = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "granite": ("GraniteConfig", "GraniteForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
}
_EXTRA = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen3_5_text": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}


def build_model(architecture: str = "qwen3", seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A random model of about 100k parameters; the same seed gives the same weights."""
    config_name, model_name = _ARCHITECTURES[architecture]
    config = getattr(transformers, config_name)(**{**_SMALL, **_EXTRA.get(architecture, {}), **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, model_name)(config).float().eval()


@pytest.fixture(scope="session")
def make_model():
    """Factory `make_model(architecture="qwen3", seed=0, **config_overrides)`."""
    return build_model


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Four parallel sentences in each of five languages."""
    return {language: list(lines) for language, lines in TEXTS.items()}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the repository; the test is skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real text is not there: {SHARED_DATA} does not exist")
    return SHARED_DATA
