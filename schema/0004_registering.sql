-- Registering instances, and what a registration is refused for. The package refuses the same values before it sends them
-- (seedcore/core/limits.py).
--
-- These limits are not constraints of the table: a constraint is checked at every update, so a row that broke one would
-- refuse its beats, and with them all beats of the same batch.

create function name_problem(p_value text) returns text
language sql immutable parallel safe as $$
    select case
        -- Unicode's spaces, whatever the locale of the database
        when p_value !~ '[^ \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]' then 'must not be empty'
        when p_value ~ '[\u0001-\u001f\u007f]' then 'must not contain control characters'
    end
$$;
comment on function name_problem(text) is 'Why a text cannot be a name; null where it can.';

create function labels_problem(p_labels jsonb) returns text
language sql immutable parallel safe as $$
    select case
        when count(*) > 64 then format('labels must have at most 64 keys, not %s', count(*))
        else min(case
            when length(l.key) > 63 then format('a label''s key must have at most 63 characters, not %s', length(l.key))
            when name_problem(l.key) is not null then 'a label''s key ' || name_problem(l.key)
            when jsonb_typeof(l.value) <> 'string' then format('label "%s" must be text', l.key)
            when length(l.value #>> '{}') > 255 then format('label "%s" must have at most 255 characters', l.key)
            when l.value <> '""' then format('label "%s" ', l.key) || name_problem(l.value #>> '{}')
        end)
    end
      from jsonb_each(case when jsonb_typeof(p_labels) = 'object' then p_labels else '{}' end) as l (key, value)
$$;
comment on function labels_problem(jsonb) is 'Why labels cannot be stored; null where they can.';

create function metadata_problem(p_metadata jsonb) returns text
language sql stable parallel safe as $$
    select case
        -- 16 KiB of JSON take less than 128 KiB in the form in which the database stores them
        when pg_column_size(p_metadata) > 131072 then 'metadata must be at most 16384 bytes of JSON'
        -- Python cannot read deeper nesting or longer numbers
        when p_metadata @? 'strict $.**{32} ? (@.type() == "object" || @.type() == "array")' then
            'metadata must not be nested deeper than 32 levels'
        when p_metadata @? 'strict $.** ? (@.type() == "number" && (@ >= 1e4300 || @ <= -1e4300))' then
            'metadata must not hold numbers of more than 4300 digits'
    end
$$;
comment on function metadata_problem(jsonb) is 'Why metadata cannot be stored; null where it can.';

create function url_problem(p_url text) returns text
language sql immutable parallel safe as $$
    select case
        when length(p_url) > 2048 then format('must have at most 2048 characters, not %s', length(p_url))
        when name_problem(p_url) is not null then name_problem(p_url)
        when p_url ~ '^[^:/?#]*://[^/?#]*@' then 'must not contain a user or a password'
        -- a scheme, a host or an IPv6 address, a port, and the rest
        when p_url !~ ('^[A-Za-z][A-Za-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[^' || space || '/?#@:\[\]\\]+)(:[0-9]{1,5})?([/?#][^' || space || ']*)?$')
            then 'must be an absolute URL with a scheme and a host'
        when substring(p_url from '^[^/]*//(?:\[[^\]]*\]|[^/?#:]*):([0-9]+)')::integer > 65535 then 'must have a port of at most 65535'
    end
      from (select ' \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000' as space) as s
$$;
comment on function url_problem(text) is 'Why a text cannot be the URL of an endpoint; null where it can.';

create function endpoints_problem(p_endpoints jsonb) returns text
language sql immutable parallel safe as $$
    select case
        when count(*) > 16 then format('endpoints must be at most 16, not %s', count(*))
        else min(case
            when length(e.name) > 63 then format('an endpoint''s name must have at most 63 characters, not %s', length(e.name))
            when name_problem(e.name) is not null then 'an endpoint''s name ' || name_problem(e.name)
            when jsonb_typeof(e.url) <> 'string' then format('endpoint "%s" must be text', e.name)
            else format('endpoint "%s" ', e.name) || url_problem(e.url #>> '{}')
        end)
    end
      from jsonb_each(case when jsonb_typeof(p_endpoints) = 'object' then p_endpoints else '{}' end) as e (name, url)
$$;
comment on function endpoints_problem(jsonb) is 'Why endpoints cannot be stored; null where they can.';

create function dependencies_problem(p_dependencies jsonb) returns text
language sql immutable parallel safe as $$
    select case
        when count(*) > 8 then format('dependencies must be at most 8, not %s', count(*))
        when count(distinct d.value ->> 'name') < count(*) then 'dependencies must have different names'
        else min(case
            when jsonb_typeof(d.value) <> 'object'
              or d.value - array['name', 'pid', 'process_key', 'is_fatal', 'stderr_path'] <> '{}'
              or jsonb_typeof(d.value -> 'name') is distinct from 'string'
              or jsonb_typeof(d.value -> 'pid') is distinct from 'number'
              or jsonb_typeof(d.value -> 'process_key') is distinct from 'string'
              or jsonb_typeof(d.value -> 'is_fatal') is distinct from 'boolean'
              or jsonb_typeof(d.value -> 'stderr_path') not in ('string', 'null') then
                'a dependency must have a name, pid, process_key and is_fatal, and may have a stderr_path'
            when length(d.value ->> 'name') > 63 or length(d.value ->> 'process_key') > 255
              or length(d.value ->> 'stderr_path') > 1024 then 'a dependency has a text that is too long'
            else 'a dependency''s name ' || name_problem(d.value ->> 'name')
        end)
    end
      from jsonb_array_elements(case when jsonb_typeof(p_dependencies) = 'array' then p_dependencies else '[]' end) as d (value)
$$;
comment on function dependencies_problem(jsonb) is 'Why dependencies cannot be stored; null where they can.';

create function registration_problem(p_row registry_instance) returns text
language sql stable as $$
    select coalesce(
        'logical_id ' || name_problem(p_row.logical_id),
        'cluster_epoch ' || name_problem(p_row.cluster_epoch),
        'actor_name ' || name_problem(p_row.actor_name),
        'namespace ' || name_problem(p_row.namespace),
        'actor_id ' || name_problem(p_row.actor_id),
        'serve_route ' || name_problem(p_row.serve_route),
        'organ_id ' || name_problem(p_row.organ_id),
        'node_id ' || name_problem(p_row.node_id),
        'process_key ' || name_problem(p_row.process_key),
        case when p_row.seq < 0 then 'seq must not be negative' end,
        case when p_row.labels <> '{}' then labels_problem(p_row.labels) end,
        case when p_row.metadata <> '{}' then metadata_problem(p_row.metadata) end,
        case when p_row.endpoints <> '{}' then endpoints_problem(p_row.endpoints) end,
        case when p_row.dependencies <> '[]' then dependencies_problem(p_row.dependencies) end)
$$;
comment on function registration_problem(registry_instance) is
    'Why an instance cannot be registered; null where it can. Lengths are left to the constraints of the table.';

-- One statement for all, and not a loop: about twice as fast. The ordered rows drive nested loops, which these settings leave as
-- the only plan: rows are locked in the order of their keys, so that two batches cannot deadlock.
create function register_instances(p_rows jsonb) returns setof change_outcome
language plpgsql
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
as $$
declare
    checked      record;
    staged       text;
    current_name text;
    problems     jsonb := '{}';
    pending      bigint[];
    outcomes     change_outcome[];
begin
    select count(*) as rows,
           coalesce(bool_or(r.instance_id is null or r.logical_id is null), p_rows is null) as lacks_ids,
           (array_agg(format('instance %s: %s', r.instance_id, r.problem) order by r.ord) filter (where r.problem is not null))[1]
               as problem,
           array_remove(array_agg(distinct r.cluster_epoch), null) as epochs
      into checked
      from (select e.ord, d.instance_id, d.logical_id, d.cluster_epoch, registration_problem(d) as problem
              from jsonb_array_elements(p_rows) with ordinality as e (element, ord),
                   jsonb_populate_record(null::registry_instance, e.element) as d
            offset 0) as r;
    if checked.lacks_ids then
        raise exception 'instance_id and logical_id must be given' using errcode = '22004';
    elsif checked.problem is not null then
        raise exception '%', checked.problem using errcode = '22023';
    end if;
    -- staging an epoch takes this lock; taken after a row's it could deadlock with a beat or another batch
    if exists (select from unnest(checked.epochs) as g (epoch)
                where not exists (select from cluster_epoch c where c.epoch = g.epoch)) then
        perform 1 from cluster_metadata m where m.id = 1 for update;
    end if;
    select m.current_epoch into strict current_name from cluster_metadata m where m.id = 1;
    select array_agg(o.ord) into pending from generate_series(1, checked.rows) as o (ord);
    -- once, unless an instance comes more than once, or another session registers it now
    while cardinality(pending) > 0 loop
        for staged in
            select g.epoch
              from (select distinct on (d.instance_id) d.instance_id, d.cluster_epoch as epoch, e.element -> 'is_update' as is_update
                      from jsonb_array_elements(p_rows) with ordinality as e (element, ord),
                           jsonb_populate_record(null::registry_instance, e.element) as d
                     where not checked.epochs <@ array[current_name] and e.ord = any (pending)
                     order by d.instance_id, e.ord) as g
             where g.epoch <> current_name and g.is_update is distinct from 'true'
               and not exists (select from registry_instance i where i.instance_id = g.instance_id)
             order by g.instance_id
        loop
            if not problems ? staged then
                problems := problems || jsonb_build_object(staged, record_epoch(staged));
            end if;
        end loop;
        with given as materialized (
            select distinct on (d.instance_id)
                   e.ord, coalesce((e.element ->> 'is_update')::boolean, false) as is_update,
                   coalesce((e.element ->> 'is_alive')::boolean, false) as is_alive,
                   coalesce(d.cluster_epoch, current_name) as epoch,
                   now() - make_interval(secs => coalesce((e.element ->> 'age_s')::double precision, 0)) as since,
                   coalesce(d.seq, 0) as number, coalesce(d.labels, '{}') as labels_given,
                   coalesce(d.metadata, '{}') as metadata_given, coalesce(d.endpoints, '{}') as endpoints_given,
                   coalesce(d.dependencies, '[]') as dependencies_given, d.*
              from jsonb_array_elements(p_rows) with ordinality as e (element, ord),
                   jsonb_populate_record(null::registry_instance, e.element) as d
             where e.ord = any (pending)
             order by d.instance_id, e.ord
        ), known as materialized (
            select g.*, i as existing,
                   case
                       when i.logical_id <> g.logical_id then 'conflict'
                       when i.status = 'dead' then 'dead'
                       when g.number < i.seq or (g.is_alive and g.number = i.seq) then 'unchanged'
                       when g.is_alive and status_may_become(i.reported_status, 'alive')
                            and effective_status('alive', i.holds) <> i.status then 'applied'
                       else 'refreshed'
                   end as verdict
              from given g
              join registry_instance i on i.instance_id = g.instance_id
             order by g.instance_id
               for update of i
        ), refreshed as (
            update registry_instance i
               set seq = k.number, actor_name = k.actor_name, namespace = k.namespace, actor_id = k.actor_id,
                   serve_route = k.serve_route, organ_id = k.organ_id, labels = k.labels_given, metadata = k.metadata_given,
                   endpoints = k.endpoints_given, node_id = k.node_id, ip_address = k.ip_address, pid = k.pid,
                   process_key = k.process_key, dependencies = k.dependencies_given, last_heartbeat = now(),
                   reported_status = case when k.is_alive and status_may_become(i.reported_status, 'alive') then 'alive'
                                          else i.reported_status end,
                   status_changed_at = case when k.verdict = 'applied' then greatest(i.status_changed_at + interval '1 microsecond', now())
                                            else i.status_changed_at end,
                   cause_kind = case when k.verdict = 'refreshed' then i.cause_kind end,
                   cause_detail = case when k.verdict = 'refreshed' then i.cause_detail end,
                   cause_by = case when k.verdict = 'refreshed' then i.cause_by end,
                   version = case when i.endpoints = k.endpoints_given then i.version else nextval('registry_version') end
              from known k
             where k.verdict in ('applied', 'refreshed') and i.instance_id = k.instance_id
        ), newcomer as materialized (
            select g.*, case when g.is_update then 'unknown' else problems ->> g.epoch end as refusal
              from given g
             where not exists (select from registry_instance i where i.instance_id = g.instance_id)
        ), inserted as (
            insert into registry_instance (
                instance_id, logical_id, cluster_epoch, status, reported_status, actor_name, namespace, actor_id, serve_route,
                organ_id, labels, metadata, endpoints, node_id, ip_address, pid, process_key, dependencies, started_at,
                status_changed_at, seq)
            select n.instance_id, n.logical_id, n.epoch, s.status, s.status, n.actor_name, n.namespace, n.actor_id,
                   n.serve_route, n.organ_id, n.labels_given, n.metadata_given, n.endpoints_given, n.node_id, n.ip_address,
                   n.pid, n.process_key, n.dependencies_given, n.since, n.since, n.number
              from newcomer n,
                   lateral (select case when n.is_alive then 'alive' else 'starting' end::instancestatus as status) as s
             where n.refusal is null
                on conflict (instance_id) do nothing
            returning instance_id, status, cluster_epoch
        ), place as materialized (
            select jsonb_object_agg(n.instance_id, n.ord) as of from newcomer n
        ), answer as (
            select case
                       when k.verdict = 'applied' then
                           row(k.ord, 'applied', effective_status('alive', (k.existing).holds), (k.existing).cluster_epoch, null,
                               null, null)::change_outcome
                       else outcome_of(k.ord, case when k.verdict = 'refreshed' then 'unchanged' else k.verdict end, k.existing)
                   end as outcome
              from known k
            union all
            select row(n.ord, n.refusal, null, case when not n.is_update then n.epoch end, null, null, null)::change_outcome
              from newcomer n
             where n.refusal is not null
            union all
            select row((p.of ->> i.instance_id::text)::bigint, 'applied', i.status, i.cluster_epoch, null, null, null)::change_outcome
              from place p, inserted i
        )
        select array_agg(a.outcome) into outcomes from answer a;
        return query select o.* from unnest(outcomes) as o;
        pending := without_answered(pending, outcomes);
    end loop;
end
$$;
comment on function register_instances(jsonb) is
    'Registers a batch: a JSON array of objects with the names of the columns; instance_id and logical_id are required. Outcomes: '
    'applied, unchanged (was registered; its details are refreshed), dead, conflict, retired_epoch, epoch_limit, and unknown for '
    'is_update: true, which changes the details of a registered instance only. is_alive: true: it also reports alive. age_s: how '
    'many seconds ago it happened.';

create function register_instance(
    p_instance_id uuid, p_logical_id text, p_cluster_epoch text default null, p_actor_name text default null,
    p_serve_route text default null, p_node_id text default null, p_ip_address inet default null,
    p_pid integer default null, p_namespace text default null, p_actor_id text default null,
    p_organ_id text default null, p_labels jsonb default '{}', p_metadata jsonb default '{}',
    p_seq bigint default 0, p_endpoints jsonb default '{}')
returns text
language plpgsql as $$
declare
    r change_outcome;
begin
    if p_instance_id is null or p_logical_id is null then
        raise exception 'instance id and logical id must be given' using errcode = '22004';
    end if;
    select * into strict r from register_instances(jsonb_build_array(jsonb_build_object(
        'instance_id', p_instance_id, 'logical_id', p_logical_id, 'cluster_epoch', nullif(p_cluster_epoch, ''),
        'seq', p_seq, 'actor_name', nullif(p_actor_name, ''), 'namespace', nullif(p_namespace, ''),
        'actor_id', nullif(p_actor_id, ''), 'serve_route', nullif(p_serve_route, ''),
        'organ_id', nullif(p_organ_id, ''), 'labels', p_labels, 'metadata', p_metadata,
        'endpoints', p_endpoints, 'node_id', nullif(p_node_id, ''), 'ip_address', p_ip_address, 'pid', p_pid)));
    if r.outcome = 'dead' then
        raise exception 'instance % is dead; dead is final, register a new instance', p_instance_id using errcode = 'SC002';
    elsif r.outcome = 'conflict' then
        raise exception 'instance % already belongs to another agent than %', p_instance_id, p_logical_id
            using errcode = 'SC003';
    end if;
    perform raise_for_epoch(p_cluster_epoch, r.outcome);
    return r.cluster_epoch;
end
$$;
comment on function register_instance(
    uuid, text, text, text, text, text, inet, integer, text, text, text, jsonb, jsonb, bigint, jsonb) is
    'Registers one instance, for psql and other programs; an empty text is null. Returns its epoch. Raises SC002 to SC005.';
