"""The comparison: systems in processes of their own, measured in turns on one checkpoint."""
