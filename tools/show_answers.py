"""Load a finished run's exported student with transformers and let it answer held-out prompts, beside what it answered before training.

python tools/show_answers.py RUN_DIR [--prompts 5]

Every recorded answer is compared. Exit code 0 if at least 99 % of the tokens equal those of the Megatron student, 1 if not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from opd_megatron.data.tokenizer import load_tokenizer
from opd_megatron.reporting.metrics import read_history
from opd_megatron.reporting.run_directory import RunDirectory

_LEAST_AGREEMENT = 0.99


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a run's exported student by transformers.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--prompts", type=int, default=5)
    arguments = parser.parse_args()
    try:
        agreement = _show(arguments.run_dir, arguments.prompts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if agreement >= _LEAST_AGREEMENT else 1


def _show(run_dir: Path, num_prompts: int) -> float:
    """Print some answers; return the share of tokens on which transformers and Megatron agree, of all recorded answers."""
    directory = RunDirectory(run_dir)
    history = read_history(run_dir)
    evaluations = history.evaluations_of("student")
    if not directory.hf.is_dir() or not evaluations:
        raise ValueError(f"{run_dir} has no exported student with evaluations; let the run finish first")
    before = {example["prompt"]: example["response"] for example in evaluations[0]["examples"]}
    examples = evaluations[-1]["examples"]
    tokenizer = load_tokenizer(directory.hf)
    template_kwargs = history.setting("data.chat_template_kwargs") or {}
    answers = _answers(directory.hf, tokenizer, [example["prompt"] for example in examples], template_kwargs, _budget(history))
    print(f"\n{directory.hf} by transformers, greedy, on held-out prompts:")
    for example, answer in list(zip(examples, answers, strict=True))[:num_prompts]:
        print(f"  {example['prompt']}\n    before {before.get(example['prompt'], '?')!r}, now {answer!r}, right is {example['answer']!r}")
    equal, total = _equal_tokens(tokenizer, answers, [example["response"] for example in examples])
    print(f"{equal} of {total} tokens in {len(examples)} answers equal those of the Megatron student.")
    print(f"\nreport  {directory.report_path}\nplots   {directory.path / 'plots'}\nmodel   {directory.hf}")
    return equal / max(1, total)


def _equal_tokens(tokenizer: Any, ours: list[str], theirs: list[str]) -> tuple[int, int]:
    """Return how many tokens of `theirs` stand at the same place in `ours`, and how many there are."""
    pairs = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in zip(ours, theirs, strict=True)]
    equal = sum(one == other for mine, given in pairs for one, other in zip(mine, given, strict=False))
    return equal, sum(max(len(mine), len(given)) for mine, given in pairs)


def _budget(history: Any) -> int:
    return int(history.setting("evaluation.max_response_tokens") or history.setting("rollout.max_response_tokens") or 256)


def _answers(folder: Path, tokenizer: Any, prompts: list[str], template_kwargs: dict[str, Any], max_new_tokens: int) -> list[str]:
    """Return transformers' greedy responses."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    answers = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template_kwargs)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    sys.exit(main())
