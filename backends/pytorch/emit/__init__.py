"""A program as the text of ``model.py``: see ``module.py``."""
