"""From files to examples: files found, kinds and layouts recognised, rows read with their places.

    files (find) -> formats (rows of one kind of file) -> layouts (columns to parts) -> examples -> gather (all splits)

`measure` and `looking` read the first rows alone: for a plan, and to write a first spec.
"""
