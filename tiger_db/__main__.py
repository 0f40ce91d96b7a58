"""`python -m tiger_db` is `tiger-db`."""

from tiger_db.cli import main

main()
