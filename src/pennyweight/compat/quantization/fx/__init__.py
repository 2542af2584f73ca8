"""Names of the FX face that lived in a package of their own."""
