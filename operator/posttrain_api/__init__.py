"""The contract between operator, trainer and command line: frozen records and names; pydantic only, no I/O."""
