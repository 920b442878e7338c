"""What each objective means: its model, its loss, its evaluation. One table names them, see `table.py`."""
