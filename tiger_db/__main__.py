"""Run the command line `tiger-db` as `python -m tiger_db`."""

from tiger_db.cli import main

main()
