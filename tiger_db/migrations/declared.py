"""The declared triggers and functions of the schema.

The text has the form in which PostgreSQL prints definitions if the search path has pg_catalog only;
{schema} stands for the name of the schema. A migration that changes a trigger or a function must
change the declaration too. The owner of the tables can disable triggers, also by accident (an
interrupted `pg_restore --disable-triggers`); `find_differences` detects this.
"""

from dataclasses import dataclass
from pathlib import Path

from tiger_db.models import metadata


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger: the parts that `pg_get_triggerdef` prints, and `pg_trigger.tgenabled`."""

    table: str
    name: str
    events: str
    action: str
    enabled: str = "O"  # A (ENABLE ALWAYS): fires for replication and restores too
    partitions: bool = False  # whether each partition has the trigger too

    def definition(self, table: str, schema: str | None = None) -> str:
        """Return the SQL that creates the trigger on the table or on one of its partitions.

        With a schema, names are qualified.
        """
        action = self.action.replace("{schema}.", f"{schema}." if schema else "")
        return f"CREATE TRIGGER {self.name} {self.events} ON {table} {action}"


_NOTIFY_KEYS = "EXECUTE FUNCTION {schema}.notify_api_key_change()"
_NOTIFY_KEYS_ROW = f"FOR EACH ROW {_NOTIFY_KEYS}"
_NOTIFY_KEYS_STATEMENT = f"FOR EACH STATEMENT {_NOTIFY_KEYS}"
_REFUSE = "EXECUTE FUNCTION {schema}.refuse_audit_change()"
_USE = "'{usage_count,last_used_at,updated_at}'::text[]"  # columns that every use of a key changes
TRIGGERS = (
    Trigger(
        "api_keys",
        "notify_update",
        "AFTER UPDATE",
        f"FOR EACH ROW WHEN ((to_jsonb(old.*) - {_USE})"
        f" IS DISTINCT FROM (to_jsonb(new.*) - {_USE})) {_NOTIFY_KEYS}",
        "A",
    ),
    Trigger("api_keys", "notify_delete", "AFTER DELETE", _NOTIFY_KEYS_ROW, "A"),
    Trigger("api_keys", "notify_truncate", "AFTER TRUNCATE", _NOTIFY_KEYS_STATEMENT, "A"),
    Trigger(
        "tiger_accounts",
        "notify_api_keys_update",
        "AFTER UPDATE",
        f"FOR EACH ROW WHEN (old.status IS DISTINCT FROM new.status) {_NOTIFY_KEYS}",
        "A",
    ),
    Trigger("tiger_accounts", "notify_api_keys_delete", "AFTER DELETE", _NOTIFY_KEYS_ROW, "A"),
    Trigger(
        "tiger_accounts", "notify_api_keys_truncate", "AFTER TRUNCATE", _NOTIFY_KEYS_STATEMENT, "A"
    ),
    Trigger(
        "tiger_accounts",
        "end_auto_suspension",
        "BEFORE UPDATE OF status",
        "FOR EACH ROW WHEN (new.auto_suspended AND (old.auto_suspended"
        " OR new.status <> 'suspended'::{schema}.account_status))"
        " EXECUTE FUNCTION {schema}.end_auto_suspension()",
    ),
    Trigger(
        "token_statuses",
        "notify_refresh",
        "AFTER INSERT OR UPDATE OF status",
        "FOR EACH ROW WHEN (new.status = 'pending'::{schema}.token_refresh_status)"
        " EXECUTE FUNCTION {schema}.notify_refresh()",
    ),
    *(
        Trigger("audit_logs", name, events, f"FOR EACH {level} {_REFUSE}", partitions=True)
        for name, events, level in (
            ("refuse_change", "BEFORE DELETE OR UPDATE", "ROW"),
            ("refuse_truncate", "BEFORE TRUNCATE", "STATEMENT"),
        )
    ),
    Trigger(
        "audit_logs",
        "notify_insert",
        "AFTER INSERT",
        "FOR EACH STATEMENT EXECUTE FUNCTION {schema}.notify_audit_event()",
    ),
    Trigger(
        "audit_seals",
        "refuse_change",
        "BEFORE DELETE OR UPDATE OR TRUNCATE",
        f"FOR EACH STATEMENT {_REFUSE}",
    ),
    *(
        Trigger(
            table.name,
            "set_updated_at",
            "BEFORE UPDATE",
            "FOR EACH ROW EXECUTE FUNCTION {schema}.set_updated_at()",
        )
        for table in metadata.sorted_tables
        if "updated_at" in table.c
    ),
)


def _read_functions() -> dict[str, str]:
    sql = Path(__file__).with_name("functions.sql").read_text(encoding="utf-8")
    sql = sql.replace("SET search_path TO 'public',", "SET search_path TO {schema},")
    functions = {}
    for definition in sql.split("CREATE OR REPLACE FUNCTION public.")[1:]:
        signature, _, rest = definition.partition("\n")
        functions[signature] = f"{rest.rstrip().removesuffix(';')}\n"
    return functions


# By signature: what `pg_get_functiondef` prints after the first line. {schema} is a literal here.
FUNCTIONS = _read_functions()
