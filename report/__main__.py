"""python -m report [--to FOLDER] RUN_FOLDER ...: one table over finished runs."""

import argparse
import sys
import textwrap
from pathlib import Path

from core.errors import UsageError
from report.compare import compare_folders
from report.tables import METRIC_HELP
from utils.flags import FlagError, Parser

WIDTH = 80


def parser() -> Parser:
    metrics = [
        textwrap.fill(f"{label}: {text}.", WIDTH, initial_indent="  ", subsequent_indent="    ")
        for label, text in METRIC_HELP.items()
    ]
    found = Parser(
        prog="python -m report",
        description="One table over finished runs: the settings in which they differ, then the metrics.",
        epilog="\n".join(["metrics:", *metrics]),
    )
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="folder of a run, or a folder above runs"
    )
    found.add_argument("--to", type=Path, metavar="FOLDER", help="folder for table.md, table.csv and plot.png")
    return found


def main() -> None:
    try:
        given = parser().parse(sys.argv[1:])
        comparison, unfinished = compare_folders(given.folders)
    except (UsageError, FlagError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for folder in unfinished:
        print(f"{folder} is not a finished run and is left out", file=sys.stderr)
    print(comparison.markdown())
    if given.to is not None:
        comparison.write(given.to)


if __name__ == "__main__":
    main()
