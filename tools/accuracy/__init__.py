"""The rows of docs/accuracy.md: one module a row, run by tools/accuracy_table.py."""
