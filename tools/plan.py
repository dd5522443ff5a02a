"""What a recipe will need, without a GPU and without weights: memory of each kind of rank, and messages per step. Planned, not measured.

    python tools/plan.py NAME [KEY=VALUE ...] [--nodes N --gpus-per-node G] [--gpu-memory GIB] [--json]

Models that are not downloaded yet are planned from recipes/architectures/NAME/config.json.
Exit code 0 if every rank fits into --gpu-memory; 2 if not, with what each part needs, and changes and recipes that fit, and for wrong input: of layouts
with the nearest that work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace

import opd_megatron
from opd_megatron.config import RunConfig, apply_overrides
from recipes.run import PUBLISHED, all_recipes, find_recipe

GPUS_PER_NODE = 8


def main() -> int:
    arguments = _parse_arguments()
    # The plan is the same on a machine with GPUs, and takes none of them.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        config = _config(arguments)
        if not 0 < arguments.gpu_memory < math.inf:
            raise ValueError(f"--gpu-memory {arguments.gpu_memory} must be positive and not infinite, in GiB")
        opd_megatron.import_megatron()
        from opd_megatron.planning import as_json, as_text, make_plan, shortfall
        from opd_megatron.training.free_memory import make_catalogue

        refuse_what_a_run_would(config)
        plan = make_plan(config, PUBLISHED)
        gpu_memory_bytes = round(arguments.gpu_memory * 2**30)
        # Shown before changes that would help are planned too.
        if arguments.json:
            print(json.dumps(as_json(plan, gpu_memory_bytes)), flush=True)
        else:
            print(as_text(plan, gpu_memory_bytes, arguments.gpus_per_node or GPUS_PER_NODE), flush=True)
        missing = shortfall(config, plan.largest, gpu_memory_bytes, make_catalogue(PUBLISHED, all_recipes()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if missing is not None:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    return 0


def _config(arguments: argparse.Namespace) -> RunConfig:
    """Return the recipe with its overrides, on as many ranks as were asked for."""
    for option, value in (("--nodes", arguments.nodes), ("--gpus-per-node", arguments.gpus_per_node)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} must be at least 1")
    config = apply_overrides(find_recipe(arguments.name)(), arguments.overrides)
    if arguments.nodes is not None or arguments.gpus_per_node is not None:
        config = replace(config, world_size=(arguments.nodes or 1) * (arguments.gpus_per_node or GPUS_PER_NODE))
    return config


def refuse_what_a_run_would(config: RunConfig) -> None:
    """Raise ValueError, with the nearest layouts that do, where a run would refuse those of `config`."""
    from opd_megatron.training.free_memory import refuse_layouts

    refuse_layouts(config, PUBLISHED)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory and messages of a recipe, without GPUs or weights.")
    parser.add_argument("name", help="recipe name")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, e.g. student.layout.tensor=4")
    parser.add_argument("--nodes", type=int, help="nodes of the job; default: the recipe's world size")
    parser.add_argument("--gpus-per-node", type=int, help=f"default {GPUS_PER_NODE}")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="memory of one GPU in GiB, default 80")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
