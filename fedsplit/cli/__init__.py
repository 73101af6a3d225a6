"""The command line: what each command takes, asks for and says."""
