"""The README says what tiger_db is, and shows how to begin, in at most 150 lines."""

from tests.docs.pages import PAGES, ROOT, blocks

README = PAGES["README.md"]
BLOCKS = blocks("README.md")
MOST_LINES = 150


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_it_says_what_the_package_is_before_it_shows_a_command() -> None:
    assert README.split("\n\n")[1].startswith("tiger_db is the database package of")
    assert README.index("\n## Problems it solves\n") < README.index("```")


def test_the_first_commands_are_the_two_that_ci_runs_on_a_fresh_clone() -> None:
    commands = ["make demo", "make test"]
    assert BLOCKS[0] == ("sh", "".join(f"{command}\n" for command in commands))
    run = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert set(commands) <= set(run)


def test_it_shows_25_lines_of_python_and_six_commands() -> None:
    (python,) = (text for language, text in BLOCKS if language == "python")
    assert len(python.splitlines()) <= 25
    assert BLOCKS[-1][0] == "sh"
    commands = BLOCKS[-1][1].splitlines()
    assert len(commands) == 6
    assert all(command.startswith("tiger-db ") for command in commands)
