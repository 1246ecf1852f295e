"""One RunConfig from layers of files, with the origin of every value."""
