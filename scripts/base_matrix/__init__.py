"""The matrix of bases (docs/bases.md): every type of model is made small, trained, merged and served."""
