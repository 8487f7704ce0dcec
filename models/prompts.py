"""Prompts to what the UNet reads: tokens in chunks, through both text encoders, and a cache."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from models.weights import WeightStore

CACHED = 1024  # prompts; one chunk of SDXL's takes 318 KB in fp16 (77 x 2048 + 1280), so 0.3 GB in all, or 0.9
CHUNKS = 3  # of one prompt at the most; what follows is cut

TextFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # as models.modules.TextEncoders


@dataclass(frozen=True)
class Conditioning:
    """One prompt as the UNet reads it. prompt_embeds: (chunks x L, C), pooled: (P,), both in the model's dtype.

    tokens: of the prompt, without those that begin and end a chunk. truncated: its end was cut. away: what guidance
    moves away from, as long as the prompt; None where a picture is not guided. guidance: how far, above 1.
    """

    prompt_embeds: Tensor
    pooled: Tensor
    tokens: int
    truncated: bool
    away: "Conditioning | None" = None
    guidance: float = 1.0


class Prompts:
    """Encodes prompts in chunks of as many tokens as the text encoders take, less the two that begin and end each: the
    embeddings of the chunks follow each other, the pooled one is the first chunk's (as compel, and the web UIs)."""

    def __init__(self, store: WeightStore, text: TextFunction) -> None:
        self._text = text
        self._zeros = store.zeros_for_empty_prompt
        self._tokenizers = [
            CLIPTokenizer.from_pretrained(store.component_folder(part), local_files_only=True)
            for part in ("tokenizer", "tokenizer_2")
        ]
        # Not what a tokenizer's own folder says: a number above this has no embedding. 77 is CLIP's default.
        self._lengths = [
            store.config(part).get("max_position_embeddings", 77) for part in ("text_encoder", "text_encoder_2")
        ]
        self._room = min(self._lengths) - 2  # tokens of a prompt in a chunk
        self._known: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], owners: Sequence[str] | None = None) -> list[Conditioning]:
        """Conditioning of each prompt; new ones go through the text encoders in one batch, known ones are cached.
        owners: who asks for each. They share no cache, for the time that a prompt takes tells whether it is known."""
        asked = list(zip(owners or [""] * len(prompts), prompts, strict=True))
        new = [each for each in dict.fromkeys(asked) if each not in self._known]
        if new:
            self._encode(new)
        found = []
        for each in asked:
            self._known.move_to_end(each)
            found.append(self._known[each])
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return found

    @torch.inference_mode()
    def guide(self, row: Conditioning, negative: Conditioning | None, guidance: float) -> Conditioning:
        """The row guided away from a negative prompt; from None, as the model was trained to be unconditional. The
        shorter of the two is filled up with chunks of the empty prompt (compel's rule)."""
        (empty,) = self.encode([""])
        if negative is None and self._zeros:
            away = replace(row, prompt_embeds=torch.zeros_like(row.prompt_embeds), pooled=torch.zeros_like(row.pooled))
        else:
            away = negative or empty
        length = max(len(row.prompt_embeds), len(away.prompt_embeds))
        away = _filled(away, length, empty)
        return replace(_filled(row, length, empty), away=away, guidance=guidance)

    def forget(self) -> None:
        """Encode every prompt anew from now on."""
        self._known.clear()

    def _encode(self, new: list[tuple[str, str]]) -> None:
        """Put these, by owner and prompt, into the cache."""
        tokens = [
            tokenizer([prompt for _, prompt in new], add_special_tokens=False, verbose=False).input_ids
            for tokenizer in self._tokenizers
        ]
        counts = [max(map(len, ids)) for ids in zip(*tokens, strict=True)]
        chunks = [min(CHUNKS, max(1, -(-count // self._room))) for count in counts]
        ids = [
            torch.tensor(
                [chunk for each, few in zip(per, chunks, strict=True) for chunk in self._chunks(which, each, few)]
            )
            for which, per in enumerate(tokens)
        ]
        embeds, pooled = self._text(ids[0], ids[1])
        start = 0
        for key, count, few in zip(new, counts, chunks, strict=True):
            rows = embeds[start : start + few].flatten(0, 1).clone()
            self._known[key] = Conditioning(rows, pooled[start].clone(), count, truncated=count > few * self._room)
            start += few

    def _chunks(self, which: int, ids: list[int], few: int) -> list[list[int]]:
        """`few` rows of as many tokens as an encoder takes, with what begins, ends and fills each."""
        tokenizer, length = self._tokenizers[which], self._lengths[which]
        room = self._room
        parts = [ids[start : start + room] for start in range(0, few * room, room)]
        rows = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
        return [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]


def _filled(row: Conditioning, length: int, empty: Conditioning) -> Conditioning:
    missing = (length - len(row.prompt_embeds)) // len(empty.prompt_embeds)
    return replace(row, prompt_embeds=torch.cat([row.prompt_embeds, *[empty.prompt_embeds] * missing]))
