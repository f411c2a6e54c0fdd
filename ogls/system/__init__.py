"""The machine around a run: seeds, processes, clocks, locks, exits."""
