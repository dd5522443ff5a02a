"""What a run leaves behind: its directory, its metrics, its progress lines and its report. Importing this costs no torch and no Matplotlib."""

from opd_megatron.reporting.metrics import MetricsWriter, RunHistory, read_history
from opd_megatron.reporting.progress import Progress
from opd_megatron.reporting.run_directory import RunDirectory

__all__ = ["MetricsWriter", "Progress", "RunDirectory", "RunHistory", "read_history"]
