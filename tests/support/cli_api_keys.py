"""API keys for tests of the command line."""

from typing import Any

from tests.support.command_line import CommandLine


def create(cli: CommandLine, *options: str) -> dict[str, Any]:
    if "--scopes" not in options:
        options = (*options, "--scopes", "mcp:read")
    row: dict[str, Any] = cli.ok("create-api-key", "--name", "assistant", *options, "--json").json
    return row


def refusal(cli: CommandLine, key: str, *options: str) -> str:
    result = cli("verify-api-key", "-", *options, stdin=key)
    assert (result.code, result.out) == (1, "")
    return result.err
