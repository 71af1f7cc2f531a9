"""HTML pages, each one file that opens offline, and the pictures and curves in them."""
