"""Compile every Triton kernel of the losses for a GPU that need not be there: `python -m tests.compile_kernels 90`.

Prints one JSON line per variant: kernel, kind, clipped, and per thread the registers, and the bytes of stack
and local memory that spilled registers would take. Run it without TRITON_INTERPRET.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opd_megatron.losses import triton_kernels
from opd_megatron.losses.full_divergence import FULL_KINDS
from opd_megatron.losses.triton_divergence import launch_options

NUM_COLUMNS = 151_936
TYPES = {
    **dict.fromkeys(("student", "teacher", "norms", "out", "product", "damping"), "*fp32"),
    **dict.fromkeys(("share", "clip", "softcap", "largest"), "fp32"),
    **dict.fromkeys(("num_rows", "num_columns"), "i32"),
}


def main(capability: int) -> None:
    variants = [("soft_cap_kernel", "", False), ("row_statistics_kernel", "", False)]
    variants += [(kernel, kind, clipped) for kernel, kind, clipped in itertools.product(("term_sums_kernel", "gradient_kernel"), FULL_KINDS, (False, True))]
    for name, kind, clipped in variants:
        compiled = _compile(getattr(triton_kernels, name), {"KIND": kind, "CLIPPED": clipped}, capability)
        print(json.dumps({"kernel": name, "kind": kind, "clipped": clipped, **_resources(compiled.asm["cubin"])}))


def _compile(kernel: triton.JITFunction, settings: dict[str, object], capability: int) -> triton.compiler.CompiledKernel:
    options = launch_options(NUM_COLUMNS)
    constants = {"BLOCK": options.pop("BLOCK"), **settings}
    signature = {argument: TYPES.get(argument, "constexpr") for argument in kernel.arg_names}
    places = {(place,): constants[argument] for place, argument in enumerate(kernel.arg_names) if argument in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _resources(cubin: bytes) -> dict[str, int]:
    """Return the registers a thread needs and the bytes of its stack, where registers are spilled, as the tool in Triton's wheel reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    main(int(sys.argv[1]))
