"""Studies: ways to unlearn one model, compared at equal forgetting."""

TABLE_FILE = "study.parquet"
SUMMARY_FILE = "study.json"
