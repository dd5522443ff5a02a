"""Write the HTML report of one run, or of several side by side: `python tools/report.py RUN_DIR [RUN_DIR ...] [--out FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="the HTML file; default: report.html in the first RUN_DIR")
    options = parser.parse_args(arguments)

    from opd_megatron.reporting.report import write_report

    try:
        out = write_report(options.run_dirs, options.out or options.run_dirs[0] / "report.html")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {out}")
    print(f"summary: {out.parent / 'plots' / 'summary.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
