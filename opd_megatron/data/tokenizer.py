"""The tokenizer of a model folder, and whether two models really share one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_WAY_OUT = "alignment.kind=identity needs equal token ids, choose a teacher with the student's tokenizer, or set alignment.kind=strict or simct"

# Text in which tokenizers of equal vocabularies still differ: normalization, digit grouping, whitespace runs, contractions, bytes, prefixes.
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog.",
    " leading space, trailing space ",
    "I'll say it's DON'T, they'VE; O’Neill’s “quotes” — and…",
    "0 7 42 365 1024 65536 1234567890 3.14159 1e-6 0xDEADBEEF 1,000,000",
    "two  three   four    eight        spaces\ttab\t\ttabs",
    "line\n\nparagraph\r\nwindows\n\n\n   indented\n",
    "def f(x: int) -> int:\n    return x ** 2 if x != 0 else -1  # comment\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] && !c; }",
    "\\frac{1}{2} + \\sqrt{x^2} = $\\boxed{\\tfrac{3}{4}}$",
    "naïve café Ångström ﬁ ½ ² Straße İstanbul",
    "e\u0301 versus \u00e9, A\u030a versus \u00c5",
    "日本語のテキスト、中文字符，한국어 문장 العربية עברית हिन्दी ไทย",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f zero\u200bwidth nbsp\u00a0end",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa================--------________",
    "<b>tag</b> [INST] <s> </s> <|im_start|>user\nhi<|im_end|> <think>",
)


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a local Hugging Face folder; ValueError if it has none, or one without an end-of-sequence token."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer folder {str(folder)!r} does not exist (working directory {Path.cwd()}); name a local Hugging Face folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{str(folder)!r} has no loadable tokenizer ({error}); copy tokenizer.json and tokenizer_config.json into it") from None
    if not tokenizer.get_vocab():
        raise ValueError(f"{str(folder)!r} has a tokenizer with an empty vocabulary; copy tokenizer.json and tokenizer_config.json into it")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {str(folder)!r} names no end-of-sequence token, so no response would end; set eos_token in tokenizer_config.json")
    return tokenizer


def check_same_tokenizer(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raise ValueError naming the first difference, unless both map text to the same ids.

    Compared: vocabularies, added tokens with the flags that steer encoding, and the ids of a varied sample, every added token in it.
    Which token *plays* end-of-sequence or padding may differ, as between a base model and its chat version: the ids mean the same, so it is
    only logged.
    """
    _check_equal_maps("token", student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab())
    added = _added_tokens(student_tokenizer)
    _check_equal_maps("added token", added, _added_tokens(teacher_tokenizer))
    for text in (*_SAMPLE, *(f"a {content} b{content}c" for content in added)):
        student_ids, teacher_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (student_tokenizer, teacher_tokenizer))
        if student_ids != teacher_ids:
            raise ValueError(f"student and teacher encode {text!r} differently, as {student_ids} and {teacher_ids}; {_WAY_OUT}")
    if student_tokenizer.eos_token_id != teacher_tokenizer.eos_token_id:
        logger.warning(
            "the student ends with %r, the teacher with %r: the teacher scores the student's last token as it would any other",
            student_tokenizer.eos_token,
            teacher_tokenizer.eos_token,
        )


def _added_tokens(tokenizer: Any) -> dict[str, tuple[Any, ...]]:
    return {
        token.content: (index, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized)
        for index, token in tokenizer.added_tokens_decoder.items()
    }


def _check_equal_maps(what: str, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    if student == teacher:
        return
    name = min(name for name in {*student, *teacher} if student.get(name) != teacher.get(name))
    raise ValueError(
        f"student and teacher tokenizers differ: {what} {name!r} is {student.get(name, 'absent')} for the student and {teacher.get(name, 'absent')} "
        f"for the teacher ({len(student)} and {len(teacher)} in all); {_WAY_OUT}"
    )
