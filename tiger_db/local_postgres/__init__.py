"""What `tiger_db.embedded` is made of: folders, programs, processes, lock and private files."""
