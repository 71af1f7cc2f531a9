"""What people said about images: one schema, and a file per public set; its name is its key."""
