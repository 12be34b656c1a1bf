"""Reports of a run: metrics on disk, copies for trackers, progress, plots, profiles and warnings."""
