"""One file per algorithm; the file name is its key."""
