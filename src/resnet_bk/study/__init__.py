"""Everything that compares: scores, costs, reports, searches, ablations, the compute ledger."""
