"""Operations on a batch, computed on its device."""
