"""The experiments of the book, one file for each."""
