"""Accuracy and pass@k of a Hugging Face folder or a Megatron checkpoint on a file of prompts with answers.

    python tools/evaluate.py --hf DIR --data prompts.jsonl
    torchrun --nproc-per-node 4 tools/evaluate.py --checkpoint DIR --data reasoning_gym:spell_backward --tensor 2 --samples 4 --temperature 1
    torchrun --nproc-per-node 2 tools/evaluate.py --hf MIXTURE_DIR --data prompts.jsonl --expert 2

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from typing import Any

import opd_megatron
from opd_megatron.config import DataConfig, ParallelLayout
from opd_megatron.config.overrides import apply_overrides


def main() -> int:
    arguments = _parse_arguments()
    opd_megatron.import_megatron()
    from opd_megatron.parallel.world import join_world, leave_world

    try:
        data = apply_overrides(DataConfig(prompts=arguments.data), arguments.overrides)
        if bool(arguments.hf) == bool(arguments.checkpoint):
            raise ValueError("name the model once: --hf or --checkpoint")
        _check_numbers(arguments)
        if arguments.samples > 1 and arguments.temperature == 0:
            raise ValueError(f"--samples {arguments.samples} greedy samples would all be equal; set --temperature")
        join_world()
        record = _evaluate(arguments, data)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        # Threads of a process group that outlive the interpreter abort it.
        leave_world()
        return 2
    leave_world()
    if record is not None:
        for example in record.pop("examples"):
            verdict = "right" if example["score"] >= 1 else "wrong"
            print(f"{verdict}  {example['prompt']!r:.90} -> {example['response']!r:.60} (answer {example['answer']!r:.60})")
        print(json.dumps(record))
    return 0


def _evaluate(arguments: argparse.Namespace, data: DataConfig) -> dict[str, Any] | None:
    """Load the model under the asked layout and grade its responses; the record is on rank 0."""
    import torch
    import torch.distributed as dist

    from opd_megatron.data.prompts import load_prompts
    from opd_megatron.data.tokenizer import load_tokenizer
    from opd_megatron.evaluation.accuracy import evaluate
    from opd_megatron.evaluation.graders import check_gradable, make_grader
    from opd_megatron.models.gpt import build_gpt
    from opd_megatron.models.hf_folder import stop_token_ids
    from opd_megatron.models.weights import load_model, open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.parallel.world import shared_errors
    from opd_megatron.rollout.engine import Sampler
    from opd_megatron.rollout.sampling import SamplingSettings

    layout = ParallelLayout(tensor=arguments.tensor, pipeline=arguments.pipeline, expert=arguments.expert, expert_tensor=arguments.expert_tensor)
    with shared_errors():
        layout.data_size(dist.get_world_size())
        source = open_weights(hf=arguments.hf, checkpoint=arguments.checkpoint)
        source.architecture.check_layout("model", layout)
        tokenizer = load_tokenizer(source.assets)
        prompt_tokens, response_tokens = _budgets(arguments, source.architecture.max_positions)
        data = replace(data, max_prompt_tokens=prompt_tokens)
        prompts = load_prompts(data, tokenizer, part=arguments.part, limit=arguments.prompts).prompts
        grader = make_grader(data)
        check_gradable(prompts, data)
    groups = student_groups(layout, seed=arguments.seed)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = build_gpt(source.architecture, groups, precision=arguments.precision, vocab_multiple=1).to(device)
    with shared_errors():
        load_model(model, groups, source, vocab_multiple=1)
    eos_ids = {tokenizer.eos_token_id, *stop_token_ids(source.assets)}
    sampler = Sampler(model, groups, vocab_size=source.architecture.vocab_size, eos_ids=sorted(eos_ids), batch_sequences=arguments.batch_sequences)
    settings = SamplingSettings(max_response_tokens=response_tokens, temperature=arguments.temperature)
    return evaluate(sampler, groups, prompts, tokenizer, grader, settings, samples_per_prompt=arguments.samples, seed=arguments.seed)


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("samples", "prompts", "max_prompt_tokens", "max_response_tokens", "batch_sequences", "tensor", "pipeline", "expert", "expert_tensor"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature {arguments.temperature} must be 0, for greedy, or positive")


def _budgets(arguments: argparse.Namespace, positions: int) -> tuple[int, int]:
    """Return the longest prompt and response, by default together what the model's positions hold; ValueError if they exceed them."""
    response = arguments.max_response_tokens or min(1024, positions // 2)
    prompt = arguments.max_prompt_tokens or max(1, positions - response)
    if prompt + response > positions:
        raise ValueError(f"--max-prompt-tokens + --max-response-tokens = {prompt + response} exceed the model's {positions} positions; lower one of them")
    return prompt, response


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy and pass@k of a model.")
    parser.add_argument("--hf", help="Hugging Face folder")
    parser.add_argument("--checkpoint", help="Megatron checkpoint folder")
    parser.add_argument("--data", required=True, help=".jsonl, .parquet, reasoning_gym:TASK, or a Hugging Face dataset name")
    parser.add_argument("--part", choices=("all", "evaluation", "train"), default="all", help="evaluation: the share a training run holds out")
    parser.add_argument("--prompts", type=int, help="the first N prompts only")
    parser.add_argument("--samples", type=int, default=1, help="samples per prompt, for pass@k")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-prompt-tokens", type=int, help="longer prompts are dropped; default: what the response leaves of the model's positions")
    parser.add_argument("--max-response-tokens", type=int, help="default: half of the model's positions, at most 1024")
    parser.add_argument("--batch-sequences", type=int, default=256)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1, help="ranks that the experts of a mixture are spread over")
    parser.add_argument("--expert-tensor", type=int, default=1, help="parts that each expert is split into")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="data settings, e.g. answer_key=solution task_options.max_word_len=7")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
