"""Prompts to conditioning: a small tokenizer and SDXL's two CLIP text encoders in miniature."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill import data

LENGTH = 24  # tokens: captions fit; SDXL's 77 would cost three times the encoders' time
VOCABULARY = 1500
WIDTHS = (64, 96)  # SDXL's are 768 and 1280


@dataclass(frozen=True)
class Text:
    """What the UNet is told. context: (B, LENGTH, 160); pooled: (B, 96); time_ids: (B, 6)."""

    context: Tensor
    pooled: Tensor
    time_ids: Tensor

    @property
    def added(self) -> dict[str, Tensor]:
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}


def captions(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [data.paraphrase(rng.choice(data.objects()), rng.choice(list(data.BACKGROUNDS)), rng) for _ in range(count)]


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's layout: bytes (so any text can be written), their `</w>` twins, merges, two marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    clip = CLIPTokenizer().backend_tokenizer  # for CLIP's own normaliser and word splitting
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions(20_000), trainer)
    merges: list[Any] = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*list(dict.fromkeys(tokens)), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=LENGTH)
    write_clip_files(tokenizer, folder)
    return tokenizer


def write_clip_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """transformers 5 writes one tokenizer.json; SDXL's layout, and older readers, have vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [" ".join(pair) for pair in bpe["merges"]]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer.json").unlink()


def build_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair. The marks' ids go into the configs: pooling looks for the end mark that is named there."""
    common = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    one, two = WIDTHS
    small = CLIPTextConfig(
        hidden_size=one, intermediate_size=4 * one, num_hidden_layers=2, num_attention_heads=4, **common
    )
    large = CLIPTextConfig(
        hidden_size=two,
        intermediate_size=4 * two,
        num_hidden_layers=3,
        num_attention_heads=6,
        projection_dim=two,
        hidden_act="gelu",
        **common,
    )
    return CLIPTextModel(small), CLIPTextModelWithProjection(large)


class TextEncoders(nn.Module):
    """Both encoders as one module: token ids to Text, as StableDiffusionXLPipeline.encode_prompt does it."""

    def __init__(self, one: CLIPTextModel, two: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, ids: Tensor) -> Text:
        """ids: (B, LENGTH) int64. The context is each encoder's last hidden state but one."""
        one = self.one(ids, output_hidden_states=True)
        two = self.two(ids, output_hidden_states=True)
        context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        time_ids = torch.tensor([data.SIZE, data.SIZE, 0, 0, data.SIZE, data.SIZE], device=ids.device)
        return Text(context, two.text_embeds, time_ids.to(context.dtype).expand(len(ids), 6))


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """(B, LENGTH) int64, padded and cut as the pipeline does."""
    found = tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids
