"""Convert a Megatron checkpoint, of a run or of convert_hf_to_megatron.py, to a Hugging Face folder.

python tools/convert_megatron_to_hf.py --checkpoint DIR --out DIR [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import opd_megatron


def main() -> int:
    parser = argparse.ArgumentParser(description="Megatron distributed checkpoint -> Hugging Face folder.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="e.g. RUN_DIR/checkpoints/step_100")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as the checkpoint stores them")
    arguments = parser.parse_args()
    opd_megatron.import_megatron()
    import torch

    from opd_megatron.models.weights import export_hf, open_weights

    try:
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        export_hf(open_weights(checkpoint=str(arguments.checkpoint)), arguments.out, dtype=dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
