"""Write what the CPU recipes' models are made from: untrained Hugging Face folders of the Qwen3 architecture, a teacher, two smaller students, one of them
deep, and a teacher with another tokenizer, and the warm-up of a student that can teach itself.

    python tools/make_tiny_models.py --out runs/tiny

The tokenizers are byte level, so any text round-trips; the fixed words of the demonstration task are single tokens, which keeps its prompts at about 14
tokens. That of teacher and student has no merges; the other teacher's has those that its words' commonest pieces need, other special tokens, ids and
chat template. `make models` trains all (recipes tiny_teacher, tiny_student, tiny_deep_student, tiny_reader and tiny_merged_teacher).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_megatron.config import DataConfig
from opd_megatron.data.sources import read_rows
from opd_megatron.data.templates import PromptTemplate

SOLUTION_SHOWN = Path(__file__).parents[1] / "recipes" / "prompts" / "spelling_with_solution.jinja"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PHRASES = ("Spell this word backward (example: sun -> nus): ", "user\n", "assistant\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of the teacher with a tokenizer of its own: nothing but the text itself is as above.
NUM_MERGES = 64
MERGED_SPECIAL = ("<pad>", "<s>", "</turn>")
MERGED_PHRASES = ("Spell this word backward ", "(example: sun -> nus): ", "Question: ", "\nAnswer: ")
MERGED_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '\\nAnswer: ' + message['content'] + '</turn>' }}"
    "{% else %}{{ '<s>Question: ' + message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\nAnswer: ' }}{% endif %}"
)
SIZES: dict[str, dict[str, Any]] = {
    "teacher": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32, "tie_word_embeddings": False},
    "student": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 24, "tie_word_embeddings": True},
    # Deep enough to have a middle, in less than a megabyte.
    "deep_student": {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8, "head_dim": 16, "tie_word_embeddings": True},
    "merged_teacher": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32, "tie_word_embeddings": False},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer with the ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _byte_level({symbol: index for index, symbol in enumerate(alphabet)}, [], SPECIAL, PHRASES)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def merged_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that has the commonest pieces of these texts. Ids: special tokens, pieces, then bytes from the last to the first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = _byte_level({symbol: index for index, symbol in enumerate(alphabet)}, [], (), ())
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=len(alphabet) + NUM_MERGES, initial_alphabet=alphabet, show_progress=False))
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*MERGED_SPECIAL, *(left + right for left, right in merges), *reversed(alphabet)])
    tokenizer = _byte_level({token: index for index, token in enumerate(tokens)}, merges, MERGED_SPECIAL, MERGED_PHRASES)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</turn>", pad_token="<pad>", clean_up_tokenization_spaces=False)
    wrapped.chat_template = MERGED_CHAT_TEMPLATE
    return wrapped


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: Sequence[str], phrases: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def spelling_texts() -> list[str]:
    """Return words of the demonstration task and their answers: what the other teacher reads and writes."""
    rows = read_rows(DataConfig(prompts="reasoning_gym:spell_backward", task_size=20_000, task_options={"min_word_len": 3, "max_word_len": 7}))
    answers = [row.answer for row in rows if row.answer]
    return [text for answer in answers for text in (answer, answer[::-1])]


def write_model(out: Path, role: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Write one randomly initialized model with its tokenizer."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **SIZES[role],
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")


def write_warm_up(file: Path) -> None:
    """Write problems of the demonstration task: half of them short words as they are, half of them any words together with their solution.

    A model that learns them spells short words by itself, and any word that it is shown the solution of: it has something to tell itself.
    """
    template = PromptTemplate(str(SOLUTION_SHOWN), "template", ("problem", "solution", "answer"))
    short, any_length = (
        list(read_rows(DataConfig(prompts="reasoning_gym:spell_backward", task_size=10_000, task_options={"min_word_len": 3, "max_word_len": longest})))
        for longest in (5, 7)
    )
    with file.open("w", encoding="utf-8") as out:
        for plain, shown in zip(short, any_length, strict=True):
            values = {"problem": shown.messages[-1]["content"], "solution": shown.solution, "answer": shown.answer}
            for prompt, answer in ((plain.messages[-1]["content"], plain.answer), (template.render(values, shown.where), shown.answer)):
                out.write(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write untrained tiny Qwen3 models, one of them with another tokenizer, and the data of a warm-up.")
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/, student/, deep_student/, merged_teacher/ and warm_up.jsonl")
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    tokenizers = {role: tiny_tokenizer() for role in ("teacher", "student", "deep_student")} | {"merged_teacher": merged_tokenizer(spelling_texts())}
    for role, tokenizer in tokenizers.items():
        write_model(arguments.out / role, role, tokenizer, arguments.seed)
    write_warm_up(arguments.out / "warm_up.jsonl")


if __name__ == "__main__":
    main()
