"""The command line, one file a command. Roof: may reach both wings, but only when a command runs.

Importing this package must stay quick (no torch, no numpy): `holdfast --help` is read by people.
"""
