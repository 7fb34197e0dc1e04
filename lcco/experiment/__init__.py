"""Experiments: frozen features, training, runs, evaluation, tables and figures."""
