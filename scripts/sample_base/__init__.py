"""Scripts that made the embedded sample: its text (`corpus`, `household`), the base (`pretrain`), the task (`task`).

Nothing here is imported by the product; it exists so that the sample can be made again and be judged.
"""
