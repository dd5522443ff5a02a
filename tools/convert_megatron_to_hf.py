"""Convert a Megatron checkpoint, of a run, of convert_hf_to_megatron.py or of Megatron-LM, to a Hugging Face folder.

python tools/convert_megatron_to_hf.py --checkpoint DIR --out DIR [--dtype bfloat16] [--hf DIR] [--max-shard-gb GB] [--workers N] [--no-verify] [--dry-run]
"""

from __future__ import annotations

import argparse
import math
import sys

import opd_megatron
from opd_megatron.conversion.command_line import add_options, given_path, prepare_torch, run, settings_of


def main() -> int:
    parser = argparse.ArgumentParser(description="Megatron distributed checkpoint -> Hugging Face folder.")
    parser.add_argument("--checkpoint", type=given_path, required=True, metavar="DIR", help="e.g. RUN_DIR/checkpoints/step_100")
    parser.add_argument("--out", type=given_path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--hf", type=given_path, metavar="DIR", help="configuration and tokenizer of a checkpoint that has none in it, such as Megatron-LM's")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as the checkpoint stores them")
    parser.add_argument("--max-shard-gb", type=float, metavar="GB", help="size of a safetensors file (a 16th of the model, at least 1, at most 5)")
    add_options(parser)
    arguments = parser.parse_args()
    return run(lambda: _convert(arguments))


def _convert(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    if arguments.max_shard_gb is not None and not 0 < arguments.max_shard_gb < math.inf:
        raise ValueError(f"--max-shard-gb {arguments.max_shard_gb:g} must be above 0, and a number")
    opd_megatron.import_megatron()
    import torch

    from opd_megatron.conversion.mapping import mapping
    from opd_megatron.conversion.to_hf import ToHF, export_hf
    from opd_megatron.models.checkpoint_weights import CheckpointWeights

    prepare_torch()
    source = CheckpointWeights(arguments.checkpoint, arguments.hf)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    max_shard_bytes = int(arguments.max_shard_gb * 10**9) or 1 if arguments.max_shard_gb else None
    if arguments.dry_run:
        print("\n".join(mapping(ToHF(source, dtype, max_shard_bytes), settings.workers)))
        return
    export_hf(source, arguments.out, settings, dtype=dtype, max_shard_bytes=max_shard_bytes)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
