"""A model that falls into endless repetition now and then, by construction: no training, everything known.

Words w0..w7 follow each other at random until the end token comes. Words c0 c1 c2 c3 follow each other for ever.
Layer 0 writes the share of c words in the context into dimension SHARE of the residual stream; the larger it is, the
likelier a w word is followed by c0. So the loop has a cause in the residual stream that grows in the loop, is zero in
ordinary text, and makes the model loop when it is added. Layer 1 does nothing.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

WIDTH = 64
SHARE = 40
"""Dimension of the residual stream that holds the share of c words in the context; also the feature that reads it."""
SHARE_GAIN = 1.0
D_SAE = 96
WORDS = ("<pad>", "<eos>", *(f"w{i}" for i in range(8)), *(f"c{i}" for i in range(4)))
END = 1
ORDINARY = tuple(range(2, 10))
CIRCLE = tuple(range(10, 14))

_STAY, _WANDER, _STOP, _ENTER, _PUSH, _NEVER = 16.0, 3.0, 2.0, 0.5, 8.0, -6.0


def looping_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def looping_model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    scale = WIDTH**-0.5  # RMSNorm makes a one-hot vector sqrt(WIDTH) long
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.self_attn.o_proj,
            ):
                weight.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), WIDTH))
        attention = model.model.layers[0].self_attn  # queries of zero: the plain mean over the context
        attention.v_proj.weight[0, list(CIRCLE)] = scale
        attention.o_proj.weight[SHARE, 0] = SHARE_GAIN
        head = model.lm_head.weight.zero_()
        for before in ORDINARY:
            head[:, before] = _NEVER
            head[list(ORDINARY), before] = _WANDER
            head[END, before] = _STOP
            head[CIRCLE[0], before] = _ENTER
        head[CIRCLE[0], SHARE] = _PUSH
        for before, after in zip(CIRCLE, (*CIRCLE[1:], CIRCLE[0]), strict=True):
            head[after, before] = _STAY
        head.mul_(scale)
    return model


def looping_sae(layer: int, blind: bool = False) -> SparseAutoencoder:
    """Feature i reads and writes dimension i of the residual stream; the rest are random. `blind`: without SHARE."""
    generator = torch.Generator().manual_seed(layer)
    rows = torch.randn(D_SAE, WIDTH, generator=generator) / WIDTH**0.5
    rows[:WIDTH] = torch.eye(WIDTH)
    if blind:
        rows[SHARE] = torch.randn(WIDTH, generator=generator) / WIDTH**0.5
        rows[:, SHARE] = 0
    bias = torch.full((D_SAE,), -0.05)
    bias[WIDTH:] = -0.3
    return SparseAutoencoder(rows, bias, rows.clone(), torch.zeros(WIDTH), TopK(4, "relu_after"), layer)


def looping_prompts(count: int = 40) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(len(ORDINARY), (count, 3), generator=generator)
    return [" ".join(WORDS[ORDINARY[i]] for i in row) for row in draws.tolist()]
