"""`torch.ao.nn` as it was, where it was more than an implementation."""
