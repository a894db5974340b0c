"""A text and image matcher whose forward takes keyword arguments only, as Hugging Face models do.

edgecompile build examples/keyword_inputs.py --target ort
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class MatcherConfig:
    vocab_size: int = 500
    hidden_size: int = 64
    num_heads: int = 4
    max_length: int = 16


@dataclass
class MatcherOutput:
    similarity: torch.Tensor
    text_embeds: torch.Tensor
    image_embeds: torch.Tensor
    hidden_states: tuple | None = None


class TextEncoder(nn.Module):
    def __init__(self, config: MatcherConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, config.max_length, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        intermediate_size = 2 * config.hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, intermediate_size),
            nn.GELU(),
            nn.Linear(intermediate_size, config.hidden_size),
        )

    def forward(self, input_ids, attention_mask):
        x = self.token_embedding(input_ids) + self.position_embedding[:, : input_ids.shape[1]]
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, key_padding_mask=attention_mask == 0, need_weights=False)
        x = x + y
        x = x + self.mlp(self.norm2(x))
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class ImageEncoder(nn.Module):
    def __init__(self, config: MatcherConfig):
        super().__init__()
        widths = [3, 16, 32, config.hidden_size]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.Hardswish())
            for i, o in itertools.pairwise(widths)
        )

    def forward(self, pixel_values):
        for stage in self.stages:
            pixel_values = stage(pixel_values)
        return pixel_values.mean((2, 3))


class Matcher(nn.Module):
    def __init__(self, config: MatcherConfig):
        super().__init__()
        self.config = config
        self.text_model = TextEncoder(config)
        self.vision_model = ImageEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, *, pixel_values=None, input_ids=None, attention_mask=None, return_dict=True):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        text = F.normalize(self.text_model(input_ids, attention_mask), dim=-1)
        image = F.normalize(self.vision_model(pixel_values), dim=-1)
        similarity = self.logit_scale.exp() * text @ image.t()
        if not return_dict:
            return similarity, text, image
        return MatcherOutput(similarity=similarity, text_embeds=text, image_embeds=image)


def model():
    return Matcher(MatcherConfig())


def example_inputs():
    return {
        "input_ids": torch.randint(1, 500, (1, 16)),
        "attention_mask": torch.tensor([[1] * 11 + [0] * 5]),
        "pixel_values": torch.rand(1, 3, 64, 64),
    }
