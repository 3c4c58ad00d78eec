"""Measurements on the base that train nothing: block scores, domain shift, Fisher information."""
