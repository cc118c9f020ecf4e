"""What a run leaves on disk and prints: results that are found again, tables, progress, checks, processes."""
