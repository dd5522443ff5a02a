"""Parts of a model as people name them, attention, MLP, router, ...: which train (`modules.train`), which an extrapolation moves (`effopd.modules`).

Everything here is about the rows of the weight map, so that a choice means the same in every layout.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from opd_megatron.models.weight_map import EMBEDDING, HEAD, MappedTensor

ModuleKind = Literal["embedding", "attention", "mlp", "router", "norm", "head"]

# EffOPD's released code moves whatever has one of these in its Hugging Face name: `post_attention_layernorm` and q_norm among them, and a router's mlp.gate.
# https://github.com/caiyuchen-ustc/EffOPD at ff75ade, fsdp_workers.py
_RELEASED = (
    *("attn", "self_attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("mlp", "feed_forward", "ffn", "gate_proj", "up_proj", "down_proj"),
)
_NORM = re.compile(r"layer_?norm(\.|_)weight$")


def module_kind(row: MappedTensor) -> ModuleKind:
    """Return what a tensor is part of. Norms are norms wherever Transformer Engine fuses them; biases belong to their matrices, experts to the MLPs."""
    name = row.megatron
    if name in (EMBEDDING, HEAD):
        return "embedding" if name == EMBEDDING else "head"
    if _NORM.search(name):
        return "norm"
    if ".mlp.router." in name:
        return "router"
    return "attention" if ".self_attention." in name else "mlp"


def layer_of(row: MappedTensor) -> int | None:
    """Return the layer of a tensor, counted from 0; None for the embedding, the last norm and the head."""
    found = re.match(r"decoder\.layers\.(\d+)\.", row.megatron)
    return int(found[1]) if found else None


def module_of(row: MappedTensor) -> str:
    """Return the module of a tensor, one kind in one layer, as choices name it: `layers.3.mlp`, `embedding`."""
    layer = layer_of(row)
    return module_kind(row) if layer is None else f"layers.{layer}.{module_kind(row)}"


def chosen_rows(choice: str, rows: Sequence[MappedTensor]) -> list[MappedTensor]:
    """Return the rows that a choice names, in order; ValueError for a word that names nothing, and for half of a tensor.

    A choice is words with commas between. A word is `all`, `paper` (attention and MLP matrices with their biases: what EffOPD describes), `released` (what
    its published code matches), a kind (`attention`, `mlp`, `embedding`, `norm`, `router`, `head`), a kind in one layer (`layers.3.mlp`), or a pattern with *
    of Megatron-Core or Hugging Face names. Words with ! in front take away; where the first one does, the choice begins with all.
    """
    words = [word.strip() for word in choice.split(",")]
    chosen = {row.name for row in rows} if words[0].startswith("!") else set()
    # Of tensors that Megatron-Core fuses, the parts that words have named so far: those that add, and those that take away.
    parts: dict[tuple[bool, str], set[str]] = {}
    for word in words:
        takes_away, pattern = word.startswith("!"), word.removeprefix("!")
        named: set[str] = set()
        is_known = False
        for row in rows:
            if _is_named(pattern, row):
                named.add(row.name)
            elif halves := {name for name in row.hf if fnmatchcase(name, pattern)}:
                found = parts.setdefault((takes_away, row.name), set())
                found |= halves
                is_known = True
                if found == set(row.hf):
                    named.add(row.name)
        if not named and not is_known:
            raise ValueError(f"{word!r} names no tensor of this model; {_close(pattern, rows)}")
        chosen = chosen - named if takes_away else chosen | named
    by_name = {row.name: row for row in rows}
    for (_, name), found in parts.items():
        row = by_name[name]
        if found != set(row.hf):
            raise ValueError(f"{choice!r} names {len(found)} of {', '.join(row.hf)}, which Megatron-Core keeps in one tensor, {row.megatron}; name all of them")
    return [row for row in rows if row.name in chosen]


def _is_named(word: str, row: MappedTensor) -> bool:
    if word in ("all", "paper", "released"):
        return word == "all" or (module_kind(row) in ("attention", "mlp") if word == "paper" else any(part in name for name in row.hf for part in _RELEASED))
    if word in (module_kind(row), module_of(row)):
        return True
    if word in get_args(ModuleKind):
        return False
    return fnmatchcase(row.name, word) or fnmatchcase(row.megatron, word) or all(fnmatchcase(name, word) for name in row.hf)


def _close(word: str, rows: Sequence[MappedTensor]) -> str:
    kinds = list(dict.fromkeys(module_kind(row) for row in rows))
    names = [name for row in rows for name in (row.megatron, *row.hf)]
    close = difflib.get_close_matches(word, [*kinds, *(module_of(row) for row in rows), *names], n=3, cutoff=0.5)
    # Rows of one module, and experts of one tensor, have the same names.
    close = list(dict.fromkeys(close))
    return f"did you mean {', '.join(close)}?" if close else f"use all, paper, released, one of {', '.join(kinds)}, or a pattern such as {names[1]}"
