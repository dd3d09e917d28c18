"""The command line: train, look at the library, report, examine the machine."""
