"""Entry point of `python -m tiger_db`, which runs the program `tiger-db`."""

from tiger_db.cli import main

main()
