"""OPD-Megatron: on-policy distillation of language models on Megatron-Core."""

import warnings

__version__ = "0.1.0"


def silence_known_warnings() -> None:
    """Drop warnings that Megatron-Core raises in normal use and no user can act on; call before importing it."""
    for message in (
        ".*Apex (is|are) not installed.*",
        "full scope is deprecated.*",
        # Its gradient hooks look at `.grad` of views, and its collectives have newer names in torch.
        "The .grad attribute of a Tensor that is not a leaf.*",
        "`torch.distributed.* is deprecated.*",
        # Advice for GPUs of one generation; where it applies, the launcher sets the variable.
        "When using async grad allreduce it is recommended.*",
        # A checkpoint is read by one process on purpose.
        "torch.distributed is disabled, unavailable or uninitialized.*",
    ):
        warnings.filterwarnings("ignore", message=message)
