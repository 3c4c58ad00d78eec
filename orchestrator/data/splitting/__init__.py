"""Which example goes to which split: equal questions and groups together, near-duplicates, mixed sources, labels."""
