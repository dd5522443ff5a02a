"""OPD-Megatron: on-policy distillation of language models on Megatron-Core."""

import os
import sys
import warnings

__version__ = "0.1.0"


def import_megatron() -> None:
    """Import Megatron-Core, before anything else does: without warnings that no user can act on, and without torch's compiler where no GPU is.

    From then on torch.load makes tensors and plain values only, whatever its caller asks for: a checkpoint may be somebody else's.

    Its decorators call torch.compile, which loads the compiler: a third of a process's start, and on the CPU none of what they decorate is called.
    Its own switch (`megatron.core.jit.disable_jit_fuser`) is inside what it is for; use that once it can be set before.
    """
    for message in (
        ".*Apex (is|are) not installed.*",
        "full scope is deprecated.*",
        # Its gradient hooks look at `.grad` of views, and its collectives have newer names in torch.
        "The .grad attribute of a Tensor that is not a leaf.*",
        "`torch.distributed.* is deprecated.*",
        # Advice for GPUs of one generation; where it applies, the launcher sets the variable.
        "When using async grad allreduce it is recommended.*",
        # Parts of 0.17 and newer that only come along.
        ".*is experimental and still under active development.*",
        # A checkpoint is read by one process on purpose.
        "torch.distributed is disabled, unavailable or uninitialized.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Containers set the second, and torch refuses to have both.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    from opd_megatron.driver import hide_gpus_if_asked

    try:
        hide_gpus_if_asked()
    except ValueError as error:
        # A mistake in the environment, whichever program this is.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    import torch

    from opd_megatron.packages import hide_all, probe_all

    # Megatron-Core imports these packages itself, and one that is broken would break it.
    if torch.cuda.is_available():
        probe_all()
    else:
        hide_all()
    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compiler
