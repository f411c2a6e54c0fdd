"""Who samples: engines, what guards them, and how good the samples are."""
