"""Data sets to calibrate on: each a file that reads rows and says what text a row is, and a row in the table here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy import paths
from gemma_deploy.calibration.sources import alpaca, c4, ceval
from gemma_deploy.calibration.sources.hub import HubSet
from gemma_deploy.calibration.sources.reading import Row, Turns


@dataclass(frozen=True)
class DataSource:
    """One data set.

    Args:
        rows: yields the rows of a file, in the file's order; raises CalibrationError for a damaged one.
        text: a row as plain text, for a model that continues text.
        turns: a row as a conversation, for a model with a chat template; None where rows are no conversations.
        fields: what `text` and `turns` need to be text in a row from the hub.
        bundled: the sample's name in calib/.
        hub: where the real one lies.
    """

    rows: Callable[[Path], Iterator[Row]]
    text: Callable[[Row], str]
    fields: tuple[str, ...]
    bundled: str
    hub: HubSet
    turns: Callable[[Row], Turns] | None = None

    @property
    def sample(self) -> Path:
        """The path of the bundled sample."""
        return paths.calib_dir() / self.bundled

    def texts(self, path: Path) -> Iterator[str]:
        """The texts of a file, row by row."""
        return map(self.text, self.rows(path))


# In the order and by the names of calibration/mix.py's DATASETS.
SOURCES = {
    "c4": DataSource(c4.rows, c4.text, c4.KEYS, "c4_sample.json.gz", HubSet("allenai/c4", "en")),
    "ceval": DataSource(
        ceval.rows,
        ceval.text,
        ceval.COLUMNS[1:],
        "ceval_sample.zip",
        HubSet("ceval/ceval-exam", None, ("dev", "test"), every_config=True),
    ),
    "alpaca": DataSource(
        alpaca.rows, alpaca.text, alpaca.KEYS, "alpaca_sample.json", HubSet("yahma/alpaca-cleaned"), alpaca.turns
    ),
}
