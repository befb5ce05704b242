"""What a person looks at: tables, figures, and comparisons of runs. It reads summaries and rows, and computes no score.

`python -m report RUN_FOLDER ...` compares finished runs.
"""

from report import figures, records, text

__all__ = ["figures", "records", "text"]
