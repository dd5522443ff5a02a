"""Compare our weight map with another library's: what each makes of a Hugging Face folder's tensors, bit for bit. For developers of new families.

    python tools/cross_check.py --hf DIR [--with mbridge]
    python tools/cross_check.py --hf DIR --with megatron-bridge

mbridge 0.15.1 needs no GPU and no Transformer Engine for this (`pip install --no-deps mbridge` into an environment of its own, or `pip install --no-deps
--target FOLDER mbridge` and PYTHONPATH=FOLDER). Megatron Bridge 0.3.1 imports Transformer Engine and asks for transformers below 5: use a container that
has them. Neither is needed for anything else, and a folder is checked in a process of its own: mbridge keeps what it did for a tied model.

Exit code 0 if every tensor is the same, 1 if not, 2 if the library is not there or does not know the model. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import opd_megatron

_SHOWN = 10


def main() -> int:
    parser = argparse.ArgumentParser(description="Our weight map beside another library's.")
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--with", dest="library", choices=("mbridge", "megatron-bridge"), default="mbridge")
    parser.add_argument("--all", action="store_true", help=f"print every difference, not {_SHOWN}")
    arguments = parser.parse_args()
    opd_megatron.import_megatron()
    from opd_megatron.conversion.cross_check import cross_check, open_mapping, version_of

    num_compared, num_different = 0, 0
    try:
        for compared in cross_check(arguments.hf, open_mapping(arguments.hf, arguments.library)):
            num_compared += 1
            if compared.difference is not None:
                num_different += 1
                if arguments.all or num_different <= _SHOWN:
                    print(f"{compared.name}: {compared.difference}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if num_different > _SHOWN and not arguments.all:
        print(f"and {num_different - _SHOWN} more (--all)")
    library = f"{arguments.library} {version_of(arguments.library)}"
    print(json.dumps({"with": library, "tensors": num_compared, "different": num_different}))
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
