"""Results: metrics, rows, tables and the report."""
