"""Few rows times weights: what a decode step does around its attention."""
