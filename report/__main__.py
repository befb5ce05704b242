"""python -m report [--to FOLDER] [-o PAGE] RUN_FOLDER ...: one table, or one HTML page, over finished runs."""

from utils.interrupt import die_of_sigint

if __name__ == "__main__":
    die_of_sigint()  # files are replaced whole: there is nothing to tidy up

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from core.errors import UsageError
from report.compare import compare_folders
from report.page import write_page
from report.tables import METRIC_HELP
from utils.flags import FlagError, Parser, as_flags
from utils.terminal import prepare_streams, printable

WIDTH = 80
LONGEST = 400  # characters of an error


def parser() -> Parser:
    metrics = [
        textwrap.fill(f"{label}: {text}.", WIDTH, initial_indent="  ", subsequent_indent="    ")
        for label, text in METRIC_HELP.items()
    ]
    found = Parser(
        prog="python -m report",
        description="One table over finished runs: the settings in which they differ, then the metrics; or a page.",
        epilog="\n".join(["metrics:", *metrics]),
    )
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="folder of a run, or a folder above runs"
    )
    found.add_argument("--to", type=Path, metavar="FOLDER", help="folder for table.md, table.csv and plot.png")
    found.add_argument("-o", "--output", type=Path, metavar="PAGE", help="HTML file of a page over the runs")
    found.add_argument("--show-victims", action="store_true", help="private pictures of audits on the page")
    return found


def main() -> None:
    """Print the table; exit code 2 and one line for a mistake."""
    prepare_streams()
    try:
        given = parser().parse(sys.argv[1:])
        shown = []
        if given.output is not None:
            headline, unfinished = write_page(given.folders, given.output, given.show_victims)
            shown.append(f"{headline}: {printable(str(given.output))}")
        if given.output is None or given.to is not None:
            comparison, unfinished = compare_folders(given.folders)
            shown.append(comparison.markdown())
            if given.to is not None:
                comparison.write(given.to)
    except (UsageError, FlagError) as error:
        _fail(as_flags(str(error)))
    except OSError as error:
        _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}")
    for folder in unfinished:
        print(printable(f"{folder} is not a finished run and is left out"), file=sys.stderr)
    print("\n".join(shown))


def _fail(message: str) -> NoReturn:
    line = printable(message)
    print(f"error: {line if len(line) <= LONGEST else line[:LONGEST] + '...'}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
