"""handful: turn a handful of real images into a training set."""

__version__ = "0.1.0"
