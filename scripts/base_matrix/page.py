from pathlib import Path
PAGE = Path(__file__).resolve().parents[2] / "docs" / "bases.md"
def page(rows): return ""
