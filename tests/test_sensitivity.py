"""The objective around the truth: zero there, and larger the more noise there is."""

import csv
from pathlib import Path

from experiments import sensitivity


def test_the_objective_grows_with_noise_and_is_zero_at_the_truth(tmp_path: Path) -> None:
    settings = {"settings": ("0.01:1", "0.05:3"), "noise": (60.0, 20.0), "clients": 1, "client_images": 2}
    sensitivity.main(sensitivity.Flags(dataset="photos", model="lenet", image_size=8, out=tmp_path, **settings))
    with (tmp_path / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["rate"], row["steps"]) for row in rows] == [("0.01", "1"), ("0.05", "3")]
    for row in rows:
        truth, little, much, grey = (float(row[key]) for key in ("truth", "60 dB", "20 dB", "grey"))
        assert truth < 1e-6
        assert truth <= little < much < grey
