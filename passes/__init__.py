"""The passes, FX graph to FX graph, and the pipeline that lists them in order."""
