"""One HTML page over finished runs, which opens from disk and loads nothing."""

from collections.abc import Sequence
from pathlib import Path

from core.errors import UsageError
from report.page.audit import audit_page
from report.page.load import load_runs
from report.page.render import details, headline, page
from utils.files import write_bytes

__all__ = ["audit_page", "write_page"]


def write_page(paths: Sequence[Path], output: Path, show_victims: bool = False) -> tuple[str, list[Path]]:
    """Write the page over all finished runs in these folders; its headline, and the folders that were left out.

    show_victims: whether the pictures of audits, which are private, are on the page. Other runs always show theirs.
    Raises UsageError if there is no finished run, OSError if the page cannot be written.
    """
    found, left_out = load_runs(paths)
    runs = {run: text for run in found if (text := details(run)) is not None}
    left_out += [run.folder for run in found if run not in runs]
    if not runs:
        raise UsageError(f"there is no finished run in {', '.join(map(str, paths))}")
    text = page(runs, left_out, show_victims)
    if not output.name:
        raise UsageError("`output`: name a file, such as report.html")
    if not output.parent.is_dir():
        raise UsageError(f"`output`: there is no folder {output.parent}")
    write_bytes(output, text.encode("utf-8", "replace"))
    return headline([*runs]), left_out
