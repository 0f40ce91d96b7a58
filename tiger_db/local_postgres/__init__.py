"""What `tiger_db.embedded` is made of: folders, programs, processes and private files."""
