"""`handful calibrate`: which pre-conditioning suits a classifier that shall guide."""

from handful.calibrate.calibrating import MEASURED, CalibrateJob, CalibrateRequest, CalibrateSummary, calibrate, prepare

__all__ = ["MEASURED", "CalibrateJob", "CalibrateRequest", "CalibrateSummary", "calibrate", "prepare"]
