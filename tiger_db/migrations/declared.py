"""The declared triggers and functions of the schema, read from `declared.sql`.

`find_differences` compares a database with the declared triggers and functions. A database can
differ from the declaration by accident. If `pg_restore --disable-triggers` is interrupted, for
example, the triggers of the database stay disabled.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tiger_db.models import TABLES, metadata


@dataclass(frozen=True, slots=True)
class Trigger:
    """A declared trigger, with the parts of its SQL in the format of `pg_get_triggerdef`.

    In the SQL of `action`, `{schema}.` precedes the name of each table and each function.
    """

    table: str
    name: str
    events: str
    action: str
    enabled: str = "O"  # Value of pg_trigger.tgenabled, O (ENABLE) or A (ENABLE ALWAYS).
    partitions: bool = False  # True if all partitions of the table also have the trigger.

    def definition(self, table: str, schema: str | None = None) -> str:
        """Return the SQL that creates the trigger on its table, or on a partition of the table.

        If `schema` is given, the names in the SQL are qualified with the schema's name.
        """
        action = self.action.replace("{schema}.", f"{schema}." if schema else "")
        return f"CREATE TRIGGER {self.name} {self.events} ON {table} {action}"


_SQL = Path(__file__).with_name("declared.sql").read_text(encoding="utf-8")
_TRIGGER = re.compile(r"CREATE TRIGGER (\w+) (.+) ON public\.(\w+) (FOR EACH .+);(.*)")


def _read_triggers() -> list[Trigger]:
    triggers = []
    for name, events, table, printed, comment in _TRIGGER.findall(_SQL):
        action = printed.replace("public.", "{schema}.")
        enabled = "A" if f"{table} ENABLE ALWAYS TRIGGER {name};" in _SQL else "O"
        triggers.append(Trigger(table, name, events, action, enabled, "partition" in comment))
    action = "FOR EACH ROW EXECUTE FUNCTION {schema}.set_updated_at()"
    tables = [name for name in sorted(TABLES) if "updated_at" in metadata.tables[name].c]
    return triggers + [Trigger(t, "set_updated_at", "BEFORE UPDATE", action) for t in tables]


def _read_functions() -> dict[str, str]:
    sql = _SQL.replace("SET search_path TO 'public',", "SET search_path TO {schema},")
    functions = {}
    for definition in sql.split("CREATE OR REPLACE FUNCTION public.")[1:]:
        signature, _, rest = definition.partition("\n")
        functions[signature] = f"{rest.rstrip().removesuffix(';')}\n"
    return functions


TRIGGERS = _read_triggers()
# FUNCTIONS maps the signature of each SQL function to the output of `pg_get_functiondef` without
# the first line. In the SQL, the placeholder {schema} stands for the schema's name in quotes.
FUNCTIONS = _read_functions()
