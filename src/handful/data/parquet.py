"""Where `read_labelled` was; it reads more than parquet now (`handful.data.sources`)."""

from handful.data.sources import read_labelled as read_labelled
