"""After the run: metrics, the exported classifier, the report, comparison of runs."""
