"""Measurement and comparison of models: scores, costs, the compute ledger, reports, searches and ablations."""
