"""The method: the (N+1)-class losses, the steps of D and G, augmentation, networks."""
