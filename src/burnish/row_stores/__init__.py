"""Single rows of JSON lines, Parquet and saved Arrow data sets by their number; the rest stays on
disk."""
