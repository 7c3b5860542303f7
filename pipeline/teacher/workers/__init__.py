"""Run a capture in parallel: Dask workers, devices, and the scheduling of segments."""
