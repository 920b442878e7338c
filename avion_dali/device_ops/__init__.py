"""Work done on a batch on its device."""
