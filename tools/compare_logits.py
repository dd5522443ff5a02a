"""Compare logits of transformers with those of a Megatron checkpoint, on given text and in any layout.

    python tools/compare_logits.py --hf DIR --checkpoint DIR
    torchrun --nproc-per-node 4 tools/compare_logits.py --hf DIR --checkpoint DIR --tensor 2 --pipeline 2

Exit code 0 if the largest difference stays below --tolerance, 1 if not, 2 for wrong input. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import opd_megatron
from opd_megatron.config import ParallelLayout

DEFAULT_TEXT = ("The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b", "1 + 2 = 3; naïve 日本語 😀")


def main() -> int:
    parser = argparse.ArgumentParser(description="Hugging Face logits against Megatron logits.")
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1, help="ranks that the experts of a mixture are spread over")
    parser.add_argument("--expert-tensor", type=int, default=1, help="parts that each expert is split into")
    parser.add_argument("--text", action="append", help="may be repeated; default: three short samples")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tolerance", type=float, help="largest difference allowed (default 1e-4 in fp32, 0.5 in bf16)")
    arguments = parser.parse_args()
    opd_megatron.import_megatron()
    from opd_megatron.parallel.world import join_world, leave_world

    try:
        layout = ParallelLayout(tensor=arguments.tensor, pipeline=arguments.pipeline, expert=arguments.expert, expert_tensor=arguments.expert_tensor)
        join_world()
        difference = _largest_difference(arguments, layout)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        # Threads of a process group that outlive the interpreter abort it.
        leave_world()
        return 2
    leave_world()
    tolerance = arguments.tolerance if arguments.tolerance is not None else {"fp32": 1e-4, "bf16": 0.5}[arguments.precision]
    if difference is not None:
        print(json.dumps({"max_difference": difference, "tolerance": tolerance, "equal": difference <= tolerance, "layout": layout.describe()}))
    return 0 if difference is None or difference <= tolerance else 1


def _largest_difference(arguments: argparse.Namespace, layout: ParallelLayout) -> float | None:
    """Return the largest absolute difference on the last rank of the world (the last stage holds the logits), None elsewhere."""
    import torch
    import torch.distributed as dist

    from opd_megatron.data.tokenizer import load_tokenizer
    from opd_megatron.models.compare import megatron_logits, transformers_logits
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
            raise ValueError(f"{arguments.checkpoint} is another architecture than {arguments.hf}: {source.architecture} instead of {reference}")
        tokenizer = load_tokenizer(arguments.hf)
    groups = student_groups(layout, seed=0)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = build_gpt(source.architecture, groups, precision=arguments.precision, vocab_multiple=1).to(device)
    with shared_errors():
        load_model(model, groups, source, vocab_multiple=1)
    sequences = [torch.tensor(tokenizer(text)["input_ids"]) for text in arguments.text or DEFAULT_TEXT]
    ours = [megatron_logits(model, groups, sequence[None].to(device), source.architecture.vocab_size) for sequence in sequences]
    difference = None
    if dist.get_rank() == dist.get_world_size() - 1:
        theirs = transformers_logits(arguments.hf, sequences, DTYPES[arguments.precision])
        differences = [float((one[0].cpu() - other).abs().max()) for one, other in zip(ours, theirs, strict=True) if one is not None]
        for text, value in zip(arguments.text or DEFAULT_TEXT, differences, strict=True):
            print(f"{value:.3e}  {text!r:.70}")
        difference = max(differences)
    dist.barrier()
    return difference


if __name__ == "__main__":
    sys.exit(main())
