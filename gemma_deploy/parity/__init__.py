"""What every proof is made of: cases, sources, metrics, gates, and the search of the first module that differs."""
