"""Reports what a run does: metrics on disk, trackers, progress lines, plots, timelines and warnings."""
