"""Convert a Hugging Face folder to a Megatron distributed checkpoint that loads under any layout. `opd_megatron/conversion/README.md` has the rest.

python tools/convert_hf_to_megatron.py --hf DIR --out DIR [--workers N] [--sha256 FILE] [--no-verify] [--allow-pickle] [--dry-run]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import opd_megatron
from opd_megatron.conversion.command_line import add_options, given_path, prepare_torch, run, settings_of

if TYPE_CHECKING:
    from opd_megatron.models.weights import StoredWeights


def main() -> int:
    parser = argparse.ArgumentParser(description="Hugging Face folder -> Megatron distributed checkpoint.")
    parser.add_argument("--hf", type=given_path, required=True, metavar="DIR", help="folder with config.json and safetensors files")
    parser.add_argument("--out", type=given_path, required=True, metavar="DIR", help="checkpoint folder to create")
    parser.add_argument("--sha256", type=given_path, metavar="FILE", help="what sha256sum says of the weight files, where nothing beside them does")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin where there is no safetensors: tensors alone, no code of it is run")
    parser.add_argument("--max-part-gb", type=float, metavar="GB", help="size of the checkpoint's files (a 64th of the model, at least 0.25, at most 2)")
    add_options(parser)
    arguments = parser.parse_args()
    return run(lambda: _convert(arguments))


def _convert(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    if arguments.max_part_gb is not None and not 0 < arguments.max_part_gb < math.inf:
        raise ValueError(f"--max-part-gb {arguments.max_part_gb:g} must be above 0, and a number")
    opd_megatron.import_megatron()
    from opd_megatron.conversion.mapping import mapping
    from opd_megatron.conversion.to_megatron import ToMegatron, write_checkpoint

    prepare_torch()
    source = _open(arguments.hf, allow_pickle=arguments.allow_pickle)
    max_part_bytes = int(arguments.max_part_gb * 10**9) or 1 if arguments.max_part_gb else None
    if arguments.dry_run:
        print("\n".join(mapping(ToMegatron(source, max_part_bytes), settings.workers)))
        return
    write_checkpoint(source, arguments.out, settings, max_part_bytes=max_part_bytes)
    print(f"wrote {arguments.out}")


def _open(folder: Path, *, allow_pickle: bool) -> StoredWeights:
    from opd_megatron.models.hf_folder import open_hf_folder
    from opd_megatron.models.hf_weights import HFWeights
    from opd_megatron.models.pickled_weights import has_pickles_alone, open_pickled_folder

    return HFWeights(open_pickled_folder(folder) if allow_pickle and has_pickles_alone(folder) else open_hf_folder(folder))


if __name__ == "__main__":
    sys.exit(main())
