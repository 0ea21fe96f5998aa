"""A model whose greedy text ends in a circle, for the examples of seeded negatives."""

from __future__ import annotations

import torch


def circling_model(make_model):
    """Each token depends on the last one alone."""
    model = make_model(num_hidden_layers=2, hidden_size=32, intermediate_size=48, initializer_range=0.3)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


@torch.no_grad()
def next_logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1]
