"""The interfaces that torch and torchao took away, over the one engine here."""
