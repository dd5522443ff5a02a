"""Show on a terminal how a run stands, while it goes on or afterwards: `python tools/watch.py RUN_DIR [--once]`. Ctrl-C ends the view, not the run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from opd_megatron.reporting.run_directory import given_path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=given_path, metavar="RUN_DIR")
    parser.add_argument("--once", action="store_true", help="print one frame and stop, as is done where the output is no terminal")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often to look; default: %(default)s")
    options = parser.parse_args(arguments)
    if not 0.1 <= options.every <= 3600:
        parser.error(f"--every {options.every} must be between 0.1 and 3600 seconds")

    from rich.console import Console
    from rich.live import Live

    from opd_megatron.reporting.following import RunView
    from opd_megatron.reporting.run_directory import RunDirectory
    from opd_megatron.reporting.watch import frame

    console = Console(highlight=False, emoji=False, markup=False, width=None if sys.stdout.isatty() else 110)
    view = RunView(RunDirectory(options.run_dir))
    try:
        view.refresh()
        if options.once or not console.is_terminal:
            console.print(frame(view, time.time()))
            return 0
        with Live(frame(view, time.time()), console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                time.sleep(options.every)
                view.refresh()
                live.update(frame(view, time.time()), refresh=True)
    except KeyboardInterrupt:
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
