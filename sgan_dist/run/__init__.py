"""Operations: the training loop, its state, checks before it, stopping, tracking."""
