"""Tasks: the model, objective and evaluation of each `objective.name`; `table.py` lists them."""
