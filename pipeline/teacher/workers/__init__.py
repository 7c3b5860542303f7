"""Captures in parallel: Dask workers, devices, and the scheduling of segments."""
