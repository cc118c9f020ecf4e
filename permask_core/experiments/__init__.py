"""The experiments of the book, one file each."""
