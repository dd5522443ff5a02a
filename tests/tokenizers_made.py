"""Tokenizers trained on the spot, on the standard library's source: two byte-level BPEs, SentencePiece-like ones with byte fallback, a WordPiece.

Each takes under a second and is made once per session. Also where mistral-common's vocabularies lie, if it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EOS = "</s>"
# What made tokenizers and mistral-common's must write back: scripts, joined emoji, code, long digits, marks, rare characters.
TEXTS = (
    "The quick brown fox; it's 3.14159 and 1234567890123456789012345678901234567890, 0xDEADBEEF.",
    "def f(self, x: int) -> int:\n    return x ** 2 if x != 0 else -1  # comment\n\n\nclass A:\n\tpass\n",
    "日本語のテキスト、中文字符，한국어 문장 العربية עברית हिन्दी ไทย Ελληνικά Русский",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \u2764\ufe0f\U0001f3f3\ufe0f\u200d\U0001f308 end",
    "x\u0331 e\u0301 A\u030a a\u0323\u0307 q\u0308 — “quotes” … ½ ² ﬁ",
    "  two leading, runs     of          spaces,\ttabs\t\t\r\n\r\ntrailing  ",
    "rare \U00010348 \U0001d518 \U00020bb7 \u16a0\u16a2 \ue000 \x01\x7f nul\x00",
    "literal <s> </s> <unk> [INST] <|im_end|>",
    "a",
    " ",
    "\n",
    "",
)


@cache
def source_text(num_characters: int = 300_000, part: int = 0) -> str:
    """The standard library's source from character part * num_characters on, the same on every machine of one Python version."""
    text = ""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_text(encoding="utf-8")
        if len(text) >= (part + 1) * num_characters:
            break
    return text[part * num_characters :][:num_characters]


def _fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@cache
def byte_level_bpe(vocab_size: int, *, part: int = 0, normalizer: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with </s>, as GPT-2's; `normalizer` names one, e.g. "NFC".

    Of the same text, the small vocabulary's merges are the first of the large one's, and every unit is one token of the large: learn them from another `part`.
    """
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(source_text(part=part).splitlines(keepends=True), trainer)
    return _fast(tokenizer, eos_token=EOS)


@cache
def sentencepiece_like(vocab_size: int = 1200, *, prefix_space: bool = False, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A BPE as converted from SentencePiece: ▁ for a space, <0xNN> for what it has no token of, specials first.

    `prefix_space` writes a space before the text, by normalizers as Llama 2's, or with `metaspace` by the pre-tokenizer that newer files have.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False)
    trained.train_from_iterator(source_text().splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if token not in names]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix_space else "never", split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prefix_space else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=EOS)


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind, which keeps neither case nor spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(source_text(50_000).splitlines(), trainer)
    return _fast(tokenizer, unk_token="[UNK]", eos_token="[SEP]")


def mistral_file(name: str) -> Path | None:
    """One of the vocabularies in mistral-common's package, which is not imported for it; None where it is not installed."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / "data" / name
    return file if file.is_file() else None


def mistral_tokenizer(file: Path, folder: Path) -> Any:
    """The tokenizer of one of those files, loaded as a model folder's is."""
    tekken = file.suffix == ".json"
    shutil.copy(file, folder / ("tekken.json" if tekken else "tokenizer.model"))
    kind = "PreTrainedTokenizerFast" if tekken else "LlamaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "bos_token": "<s>", "eos_token": EOS, "unk_token": "<unk>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
