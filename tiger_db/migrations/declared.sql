-- The declared triggers and functions, in the output format of pg_get_triggerdef() and
-- pg_get_functiondef() in the schema public. Migrations do not read declared.sql. If a migration
-- changes a trigger or a function, change declared.sql too. declared.py declares a trigger
-- set_updated_at on each table with a column updated_at.

CREATE TRIGGER notify_update AFTER UPDATE ON public.api_keys FOR EACH ROW WHEN ((to_jsonb(old.*) - '{usage_count,last_used_at,updated_at}'::text[]) IS DISTINCT FROM (to_jsonb(new.*) - '{usage_count,last_used_at,updated_at}'::text[])) EXECUTE FUNCTION public.notify_api_key_change('key');
ALTER TABLE public.api_keys ENABLE ALWAYS TRIGGER notify_update;
CREATE TRIGGER notify_delete AFTER DELETE ON public.api_keys FOR EACH ROW EXECUTE FUNCTION public.notify_api_key_change('key');
ALTER TABLE public.api_keys ENABLE ALWAYS TRIGGER notify_delete;
CREATE TRIGGER notify_truncate AFTER TRUNCATE ON public.api_keys FOR EACH STATEMENT EXECUTE FUNCTION public.notify_api_key_change();
ALTER TABLE public.api_keys ENABLE ALWAYS TRIGGER notify_truncate;
CREATE TRIGGER notify_api_keys_update AFTER UPDATE ON public.tiger_accounts FOR EACH ROW WHEN (old.status IS DISTINCT FROM new.status) EXECUTE FUNCTION public.notify_api_key_change('account');
ALTER TABLE public.tiger_accounts ENABLE ALWAYS TRIGGER notify_api_keys_update;
CREATE TRIGGER notify_api_keys_delete AFTER DELETE ON public.tiger_accounts FOR EACH ROW EXECUTE FUNCTION public.notify_api_key_change('account');
ALTER TABLE public.tiger_accounts ENABLE ALWAYS TRIGGER notify_api_keys_delete;
CREATE TRIGGER notify_api_keys_truncate AFTER TRUNCATE ON public.tiger_accounts FOR EACH STATEMENT EXECUTE FUNCTION public.notify_api_key_change();
ALTER TABLE public.tiger_accounts ENABLE ALWAYS TRIGGER notify_api_keys_truncate;
CREATE TRIGGER end_auto_suspension BEFORE UPDATE OF status ON public.tiger_accounts FOR EACH ROW WHEN (new.auto_suspended AND (old.auto_suspended OR new.status <> 'suspended'::public.account_status)) EXECUTE FUNCTION public.end_auto_suspension();
CREATE TRIGGER notify_refresh AFTER INSERT OR UPDATE OF status, scheduled_at ON public.token_statuses FOR EACH ROW WHEN (new.status <> 'in_progress'::public.token_refresh_status) EXECUTE FUNCTION public.notify_refresh();
CREATE TRIGGER refuse_change BEFORE DELETE OR UPDATE ON public.audit_logs FOR EACH ROW EXECUTE FUNCTION public.refuse_audit_change(); -- also on each partition
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.audit_logs FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_audit_change(); -- also on each partition
CREATE TRIGGER notify_insert AFTER INSERT ON public.audit_logs FOR EACH STATEMENT EXECUTE FUNCTION public.notify_audit_event();
CREATE TRIGGER refuse_change BEFORE DELETE OR UPDATE OR TRUNCATE ON public.audit_seals FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_audit_change();

CREATE OR REPLACE FUNCTION public.end_auto_suspension()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
BEGIN
    NEW.auto_suspended := false;
    RETURN NEW;
END
$function$;

CREATE OR REPLACE FUNCTION public.make_audit_months(ahead integer)
 RETURNS integer
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
    this_month timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
    oldest uuid := uuid7_floor((this_month - interval '10 years') AT TIME ZONE 'UTC');
    newest uuid := uuid7_floor((this_month + make_interval(months => ahead + 1))
        AT TIME ZONE 'UTC');
    missing timestamp[];
    strays boolean;
    month timestamp;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext(
        pg_catalog.concat('make_audit_months', nullif(current_schema(), 'public'))));
    missing := ARRAY(SELECT m
        FROM generate_series(this_month, this_month + make_interval(months => ahead), '1 month')
        AS m WHERE to_regclass('audit_logs_' || to_char(m, 'YYYY_MM')) IS NULL);
    IF cardinality(missing) > 0 THEN
        LOCK TABLE audit_logs_default IN SHARE ROW EXCLUSIVE MODE;
    END IF;
    strays := EXISTS (SELECT FROM audit_logs_default WHERE id >= oldest AND id < newest);
    IF strays THEN
        LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE audit_logs DETACH PARTITION audit_logs_default;
        ALTER TABLE audit_logs_default RENAME TO audit_logs_strays;
        CREATE TABLE audit_logs_default PARTITION OF audit_logs DEFAULT;
        CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON audit_logs_default
            FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change();
        missing := ARRAY(SELECT DISTINCT m FROM (
            SELECT unnest(missing)
            UNION SELECT date_trunc('month', uuid7_time(id) AT TIME ZONE 'UTC')
            FROM audit_logs_strays WHERE id >= oldest AND id < newest) AS months (m)
            WHERE to_regclass('audit_logs_' || to_char(m, 'YYYY_MM')) IS NULL ORDER BY m);
    END IF;
    FOREACH month IN ARRAY missing LOOP
        PERFORM make_audit_partition(month);
    END LOOP;
    IF strays THEN
        INSERT INTO audit_logs SELECT * FROM audit_logs_strays;
        DROP TABLE audit_logs_strays;
    END IF;
    RETURN cardinality(missing);
END
$function$;

CREATE OR REPLACE FUNCTION public.make_audit_partition(month timestamp without time zone)
 RETURNS void
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
    partition text := 'audit_logs_' || to_char(month, 'YYYY_MM');
BEGIN
    EXECUTE format('CREATE TABLE %I (LIKE audit_logs INCLUDING ALL)', partition);
    EXECUTE format('CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON %I'
        ' FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()', partition);
    EXECUTE format(
        'ALTER TABLE audit_logs ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', partition,
        uuid7_floor(month AT TIME ZONE 'UTC'),
        uuid7_floor((month + interval '1 month') AT TIME ZONE 'UTC'));
END
$function$;

CREATE OR REPLACE FUNCTION public.notify_api_key_change()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_api_keys', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify(channel, 'all');
    ELSE
        PERFORM pg_notify(channel, pg_catalog.concat(TG_ARGV[0], ' ', OLD.id));
    END IF;
    RETURN NULL;
END
$function$;

CREATE OR REPLACE FUNCTION public.notify_audit_event()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_audit_logs', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    IF pg_try_advisory_xact_lock(hashtext(channel)) THEN
        PERFORM pg_notify(channel, '');
    END IF;
    RETURN NULL;
END
$function$;

CREATE OR REPLACE FUNCTION public.notify_refresh()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
DECLARE
    channel CONSTANT text := pg_catalog.concat('tiger_db_refreshes', '_' ||
        left(encode(sha256(convert_to(nullif(TG_TABLE_SCHEMA, 'public'), 'UTF8')), 'hex'), 16));
BEGIN
    PERFORM pg_notify(channel, CASE WHEN NEW.status = 'pending' THEN '' ELSE NEW.id::text END);
    RETURN NULL;
END
$function$;

CREATE OR REPLACE FUNCTION public.refuse_audit_change()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege', HINT = 'An audit trail that can be changed proves'
            ' nothing. Whole months leave it by tiger-db maintain-audit, when they are sealed.';
END
$function$;

CREATE OR REPLACE FUNCTION public.set_updated_at()
 RETURNS trigger
 LANGUAGE plpgsql
 SET search_path TO 'public', 'pg_temp'
AS $function$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$function$;

CREATE OR REPLACE FUNCTION public.uuid7_floor(at timestamp with time zone)
 RETURNS uuid
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
BEGIN ATOMIC
 SELECT (rpad(lpad(to_hex(milliseconds.milliseconds), 12, '0'::text), 32, '0'::text))::uuid AS rpad
    FROM CAST((floor(LEAST(GREATEST((EXTRACT(epoch FROM uuid7_floor.at) * (1000)::numeric), (0)::numeric), ('281474976710655'::bigint)::numeric)))::bigint AS bigint) milliseconds(milliseconds);
END;

CREATE OR REPLACE FUNCTION public.uuid7_time(id uuid)
 RETURNS timestamp with time zone
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
BEGIN ATOMIC
 SELECT to_timestamp((((((('x'::text || "left"(replace((id)::text, '-'::text, ''::text), 12)))::bit(48))::bigint)::numeric / 1000.0))::double precision) AS to_timestamp;
END;
