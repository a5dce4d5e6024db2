"""Side-by-side measurements. Every figure is a ratio, or a peak, taken within one run."""
