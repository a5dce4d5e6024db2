"""As on a machine for data preparation that has no torch."""

raise ImportError("torch is not for data_prep")
