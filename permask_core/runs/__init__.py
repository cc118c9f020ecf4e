"""What a run writes to disk and prints: stored results, tables, progress, checks, processes."""
