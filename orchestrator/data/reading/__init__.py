"""Read examples from files: find files, recognise formats and layouts, read rows with their places.

    files (find) -> formats (rows of one kind of file) -> layouts (columns to parts) -> examples -> gather (all splits)

`measure` and `guess` read only the first rows: for a plan, and to write a first spec.
"""
