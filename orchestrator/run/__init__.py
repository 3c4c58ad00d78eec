"""A run on disk: its folder, its ledger of trials, its records, scores and hours. No Ray in here."""
