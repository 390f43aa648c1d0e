"""The report of models and studies: reads results, draws figures, fills templates."""
