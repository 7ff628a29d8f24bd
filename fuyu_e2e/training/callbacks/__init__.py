"""Lightning callbacks that monitor, report and guard a run."""
