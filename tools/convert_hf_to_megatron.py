"""Convert a Hugging Face folder to a Megatron distributed checkpoint that loads under any layout.

python tools/convert_hf_to_megatron.py --hf DIR --out DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import opd_megatron


def main() -> int:
    parser = argparse.ArgumentParser(description="Hugging Face folder -> Megatron distributed checkpoint.")
    parser.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors files")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to create")
    arguments = parser.parse_args()
    opd_megatron.import_megatron()
    from opd_megatron.models.convert import write_checkpoint
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.world import join_world, leave_world

    try:
        source = open_weights(hf=str(arguments.hf))
        join_world()
        write_checkpoint(source, arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        # Threads of a process group that outlive the interpreter abort it.
        leave_world()
        return 2
    leave_world()
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
