"""The study of what sharing costs in accuracy: agents run freely, modes compared, results kept cell by cell."""
