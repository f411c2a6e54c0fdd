"""Where a rollout first goes wrong, and which idea it lacks (ROSD, arXiv 2605.28014)."""
