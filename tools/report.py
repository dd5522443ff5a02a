"""Write the HTML report of one run, or of several side by side: `python tools/report.py RUN_DIR [RUN_DIR ...] [--out FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from opd_megatron.reporting.run_directory import given_path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=given_path, metavar="RUN_DIR")
    parser.add_argument("--out", type=given_path, help="the HTML file; default: report.html in RUN_DIR, of several runs comparison/report.html in the first")
    options = parser.parse_args(arguments)

    from opd_megatron.reporting.report import write_report

    try:
        # The first run's own report stays.
        folder = options.run_dirs[0] if len(options.run_dirs) == 1 else options.run_dirs[0] / "comparison"
        out = write_report(options.run_dirs, options.out or folder / "report.html")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {out}")
    print(f"summary: {out.parent / 'plots' / 'summary.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
