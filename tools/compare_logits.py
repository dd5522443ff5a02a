"""Compare transformers with a Megatron checkpoint on given text and in any layout: logits, and what leaves every layer, to find where two models part.

    python tools/compare_logits.py --hf DIR --checkpoint DIR
    torchrun --nproc-per-node 4 tools/compare_logits.py --hf DIR --checkpoint DIR --tensor 2 --pipeline 2

Prints the largest difference of logits for each text, and a table of the parts that text passes through, over all texts: `embedding` is what enters the first
layer, `layers.N` what leaves it, `norm` the final norm, and `logits`. A part's difference is relative to the largest absolute value of transformers' own. The
first one beyond what rounding explains is marked, and is `first_difference` in the last line, one JSON object; null if there is none.

Exit code 0 if the logits' largest difference stays below --tolerance, 1 if not, 2 for wrong input. In fp32 the tolerance is absolute, 1e-4 by default. In
bf16, in which both run, it is a part of the largest absolute logit of transformers: 0.05, and 0.25 for a mixture of experts, whose tokens visit another
expert where rounding decides between two. Measured on random models of 4 and 16 layers, each family tied and untied, on one rank and in TP2xPP2: at most
0.026 (of what passes between layers 0.032), with experts 0.12 (0.19); in fp32 at most 1e-6 of the largest logit, so that a difference of 1e-4 is no rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import opd_megatron
from opd_megatron.config import ParallelLayout
from opd_megatron.conversion.command_line import given_path

if TYPE_CHECKING:
    from opd_megatron.models.compare import Difference

DEFAULT_TEXT = ("The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b", "1 + 2 = 3; naïve 日本語 😀")
# Of logits absolute in fp32, and relative in bf16; of what passes between layers always relative.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
MIXTURE_TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}


class Found(NamedTuple):
    """How far each part is from transformers', and whether the model has experts."""

    differences: list[Difference]
    has_experts: bool


def main() -> int:
    arguments = _parse_arguments()
    opd_megatron.import_megatron()
    from opd_megatron.parallel.world import join_world, leave_world

    try:
        layout = ParallelLayout(tensor=arguments.tensor, pipeline=arguments.pipeline, expert=arguments.expert, expert_tensor=arguments.expert_tensor)
        join_world()
        found = _compare(arguments, layout)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        # Threads of a process group that outlive the interpreter abort it.
        leave_world()
        return 2
    leave_world()
    if found is None:
        return 0
    record = _verdict(found, arguments)
    _print_table(found.differences, record["first_difference"])
    print(json.dumps({**record, "layout": layout.describe()}))
    return 0 if record["equal"] else 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hugging Face logits against Megatron logits.")
    parser.add_argument("--hf", type=given_path, required=True)
    parser.add_argument("--checkpoint", type=given_path, required=True)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1, help="ranks that the experts of a mixture are spread over")
    parser.add_argument("--expert-tensor", type=int, default=1, help="parts that each expert is split into")
    parser.add_argument("--text", action="append", default=[], help="may be repeated; default: three short samples")
    parser.add_argument("--text-file", type=Path, help="a file with a text on each line")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both models")
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference of a logit allowed: in fp32 itself (default {TOLERANCE['fp32']}), in bf16 as a part of the largest absolute logit of "
        f"transformers (default {TOLERANCE['bf16']}, of a mixture of experts {MIXTURE_TOLERANCE['bf16']})",
    )
    return parser.parse_args()


def _verdict(found: Found, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the last line says. Whatever is not a number is no small difference."""
    differences, logits = found.differences, found.differences[-1]
    usual = (MIXTURE_TOLERANCE if found.has_experts else TOLERANCE)[arguments.precision]
    tolerance = arguments.tolerance if arguments.tolerance is not None else usual
    kind = {"fp32": "absolute", "bf16": "relative"}[arguments.precision]
    equal = (logits.absolute if kind == "absolute" else logits.relative) <= tolerance
    beyond = [part.name for part in differences[:-1] if not part.relative <= usual]
    if not equal:
        beyond.append(logits.name)
    return {
        "max_difference": logits.absolute,
        "relative_difference": logits.relative,
        "tolerance": tolerance,
        "tolerance_kind": kind,
        "equal": equal,
        "first_difference": beyond[0] if beyond else None,
        "parts": {part.name: {"absolute": part.absolute, "relative": part.relative} for part in differences},
    }


def _print_table(differences: Sequence[Difference], first: str | None) -> None:
    width = max(len(part.name) for part in differences)
    print(f"{'part':{width}}  largest difference  relative")
    for part in differences:
        mark = "  <- parts here" if part.name == first else ""
        print(f"{part.name:{width}}  {part.absolute:18.3e}  {part.relative:.3e}{mark}")


def _compare(arguments: argparse.Namespace, layout: ParallelLayout) -> Found | None:
    """Return what was found on the last rank of the world (the last stage holds the logits); None elsewhere."""
    import torch
    import torch.distributed as dist

    from opd_megatron.data.tokenizer import load_tokenizer
    from opd_megatron.models.compare import difference_of_parts, largest, load_transformers, megatron_parts, transformers_parts
    from opd_megatron.models.gpt import DTYPES, build_gpt
    from opd_megatron.models.weights import load_model, open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.parallel.world import shared_errors

    with shared_errors():
        source = open_weights(checkpoint=str(arguments.checkpoint))
        layout.data_size(dist.get_world_size())
        source.architecture.check_layout("model", layout)
        reference = open_weights(hf=str(arguments.hf)).architecture
        if reference != source.architecture:
            differing = [
                f"{field.name} {getattr(source.architecture, field.name)!r:.60} instead of {getattr(reference, field.name)!r:.60}"
                for field in fields(reference)
                if getattr(source.architecture, field.name) != getattr(reference, field.name)
            ]
            raise ValueError(f"{arguments.checkpoint} is another architecture than {arguments.hf}: {', '.join(differing)}")
        tokenizer = load_tokenizer(arguments.hf)
        texts = _texts(arguments)
        sequences = [torch.tensor(_token_ids(tokenizer, text, source.architecture.max_positions)) for text in texts]
    groups = student_groups(layout, seed=0)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = build_gpt(source.architecture, groups, precision=arguments.precision, vocab_multiple=1).to(device)
    with shared_errors():
        load_model(model, groups, source, vocab_multiple=1)
    is_judge = dist.get_rank() == dist.get_world_size() - 1
    with shared_errors():
        theirs = load_transformers(arguments.hf, DTYPES[arguments.precision]) if is_judge else None
    differences = []
    for text, sequence in zip(texts, sequences, strict=True):
        ours = megatron_parts(model, groups, sequence.to(device), source.architecture.vocab_size)
        if is_judge:
            assert ours is not None
            differences.append(difference_of_parts(ours, transformers_parts(theirs, sequence)))
            print(f"{differences[-1][-1].absolute:.3e}  {text!r:.70}")
    dist.barrier()
    return Found(largest(differences), source.architecture.experts is not None) if is_judge else None


def _texts(arguments: argparse.Namespace) -> list[str]:
    texts = list(arguments.text)
    if arguments.text_file is not None:
        try:
            lines = arguments.text_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text-file {arguments.text_file} cannot be read: {error}") from None
        texts += [line for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"--text-file {arguments.text_file} has no text")
    return texts or list(DEFAULT_TEXT)


def _token_ids(tokenizer: Any, text: str, max_positions: int) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    if not 0 < len(ids) <= max_positions:
        raise ValueError(f"the text {text!r:.70} is {len(ids)} tokens long, and the model has positions for 1 to {max_positions}")
    return ids


if __name__ == "__main__":
    sys.exit(main())
