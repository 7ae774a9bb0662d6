"""Benchmarks per configuration: a matrix of cells, each trained for some steps in processes of its own."""
