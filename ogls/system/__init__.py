"""This package has a run's seeds, processes, clocks, locks and exits."""
