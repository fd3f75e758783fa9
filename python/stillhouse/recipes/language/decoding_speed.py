"""How long a first token takes, how fast the others follow, and what the cache holds."""

import time

import torch
from torch import Tensor, nn

from stillhouse.methods.language import EncoderDecoder
from stillhouse.methods.language.encoder_decoder_blocks import KeyValues
from stillhouse.recipes.language.decoder_only import DecoderOnly, parameters

BATCH, READ, WRITTEN, ROUNDS = 4, 512, 8, 3


def compare(student: EncoderDecoder, plain: DecoderOnly) -> list[dict[str, object]]:
    """A row of each: medians over rounds in which both take their turns."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(student.config.vocab_size, (BATCH, READ), generator=generator)
    runs = {"encoder-decoder": (student, _across), "decoder-only": (plain, _behind)}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    caches: dict[str, tuple[int, int]] = {}
    with torch.no_grad():
        for number in range(ROUNDS + 1):
            for name, (model, write) in runs.items():
                first, rest, *cache = write(model, ids)
                caches[name] = tuple(cache)
                seen[name] += [(first, rest)] if number else []  # the first round warms up
    return [_row(name, runs[name][0], seen[name], *caches[name]) for name in runs]


def _row(
    name: str, model: nn.Module, seen: list[tuple[float, float]], new: int, held: int
) -> dict[str, object]:
    first, rest = (sorted(each)[len(each) // 2] for each in zip(*seen, strict=True))
    return {
        "model": name,
        "parameters": parameters(model),
        "seconds to the first token": first,
        "tokens/s after the first": BATCH * (WRITTEN - 1) / rest,
        "tokens/s in all": BATCH * WRITTEN / (first + rest),
        "cache bytes a new token": new,
        "cache bytes of a source": held,
    }


def _across(model: EncoderDecoder, ids: Tensor) -> tuple[float, float, int, int]:
    since = time.perf_counter()
    cache = model.remember(model.encode(ids), None, room=WRITTEN)
    token = ids.new_full((BATCH, 1), model.config.decoder_start_token_id)
    token = model.head(model.decode(token, cache)[:, -1:]).argmax(-1)
    first = time.perf_counter()
    for _ in range(WRITTEN - 1):
        token = model.head(model.decode(token, cache)).argmax(-1)
    rest = time.perf_counter()
    held = sum(each.nbytes for pair in cache.memory for each in pair) // BATCH
    return first - since, rest - first, cache.bytes_per_token, held


def _behind(model: DecoderOnly, ids: Tensor) -> tuple[float, float, int, int]:
    since = time.perf_counter()
    past = [KeyValues(READ + WRITTEN - 1) for _ in model.blocks]
    token = model.head(model.read(ids, past)[:, -1:]).argmax(-1)
    first = time.perf_counter()
    for _ in range(WRITTEN - 1):
        token = model.head(model.read(token, past)).argmax(-1)
    rest = time.perf_counter()
    new = sum(each.bytes_per_token for each in past)
    return first - since, rest - first, new, new * READ
