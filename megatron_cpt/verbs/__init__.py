"""One module per command-line verb: arguments in, one library call out."""
