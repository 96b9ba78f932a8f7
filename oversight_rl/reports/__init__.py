"""Reports: tables, statistics and figures from the run folders below a directory."""
