"""One file per reward; the file name is its key."""
