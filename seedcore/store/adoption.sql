-- The statements that adopt a database of the earlier SeedCore, one name each. seedcore/store/queries.py parses them,
-- seedcore/store/adoption/adopt.py executes them. The search path is the schema of the old tables ("home"). Two more schemas exist
-- during the adoption. seedcore_adopting contains the new tables until the swap. seedcore_adopted contains the adoption's own
-- tables, and after the swap the old tables until they are dropped.

-- traces: the objects in the home schema that have a name of ours or of the earlier SeedCore
select case c.relkind when 'r' then 'table' when 'v' then 'view' else 'relation' end, c.relname::text,
       case when c.relkind = 'r' then
           (select string_agg(format('%s %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' order by a.attnum)
              from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) end
  from pg_class c
 where c.relnamespace = current_schema()::regnamespace
   and c.relname in ('cluster_metadata', 'cluster_epoch', 'registry_instance', 'registry_transition', 'superseded_cluster',
                     'active_instances', 'active_instance', 'instance_row', 'fleet', 'registry_version', 'schema_migration')
union all
select 'function', format('%s(%s)', p.proname, oidvectortypes(p.proargtypes)), pg_get_function_result(p.oid)
  from pg_proc p
 where p.pronamespace = current_schema()::regnamespace
   and p.proname in ('set_current_epoch', 'register_instance', 'set_instance_status', 'beat', 'expire_stale_instances',
                     'expire_old_epoch_instances')
union all
select 'type', t.typname::text, (select string_agg(e.enumlabel, ', ' order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid)
  from pg_type t
 where t.typnamespace = current_schema()::regnamespace and t.typname = 'instancestatus';

-- foreign_dependents: other objects that depend on the old tables and views; the swap would not move them
with ours as (
    select c.oid from pg_class c
     where c.relnamespace = current_schema()::regnamespace
       and c.relname in ('cluster_metadata', 'registry_instance', 'active_instances', 'active_instance'))
select format('view %s', w.ev_class::regclass)
  from pg_depend d join pg_rewrite w on w.oid = d.objid
 where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass
   and d.refobjid in (select oid from ours) and w.ev_class not in (select oid from ours)
   and w.ev_class is distinct from to_regclass('seedcore_adopted.converted')
union
select format('foreign key %I of %s', k.conname, k.conrelid::regclass)
  from pg_constraint k
 where k.contype = 'f' and (k.conrelid in (select oid from ours) or k.confrelid in (select oid from ours))
union
select format('trigger %I of %s', t.tgname, t.tgrelid::regclass)
  from pg_trigger t
 where not t.tgisinternal and t.tgrelid in (select oid from ours) and t.tgname <> 'seedcore_adoption'
union
select format('row security of %s', c.oid::regclass)
  from pg_class c where c.relrowsecurity and c.oid in (select oid from ours)
union
select format('publication of %s', p.prrelid::regclass)
  from pg_publication_rel p where p.prrelid in (select oid from ours)
union
select format('inheritance between %s and %s', h.inhrelid::regclass, h.inhparent::regclass)
  from pg_inherits h where h.inhrelid in (select oid from ours) or h.inhparent in (select oid from ours)
order by 1;

-- has_key: whether a unique index on instance_id exists, which also gives the order of the copy
select exists (
    select from pg_index x join pg_attribute a on a.attrelid = x.indrelid and a.attnum = x.indkey[0]
     where x.indrelid = 'registry_instance'::regclass and x.indisunique and x.indisvalid and x.indnkeyatts = 1
       and x.indpred is null and a.attname = 'instance_id');

-- unfit_rows: rows that cannot be kept, by problem: the problem, the number of rows, and one of their ids
select w.problem, count(*), min(r.instance_id::text)
  from registry_instance r,
       lateral (values
           (case when r.instance_id is null then 'no instance_id' end),
           (case when coalesce(r.logical_id, '') = '' then 'an empty logical_id' end),
           (case when length(r.logical_id) > 255 then 'a logical_id of more than 255 characters' end),
           (case when r.cluster_epoch is null then 'no cluster_epoch' end),
           (case when r.status is null then 'no status' end)) as w (problem)
 where w.problem is not null
 group by w.problem
 order by w.problem;

-- sizes: the number of rows in cluster_metadata, and of instances
select (select count(*) from cluster_metadata), (select count(*) from registry_instance);

-- prepare_shape: create the schema for the new tables
create schema seedcore_adopting;

-- prepare: create the adoption's own tables
create schema seedcore_adopted;
create table seedcore_adopted.changed (
    number       bigint generated always as identity primary key,
    instance_id  uuid not null
);
create table seedcore_adopted.progress (
    copied_to  uuid,
    copied     bigint not null default 0,
    is_copied  boolean not null default false,
    is_written    boolean not null default false
);
insert into seedcore_adopted.progress default values;

-- the trigger only inserts into a table that no other statement locks, so old clients never wait for the adoption
create function seedcore_adopted.note_change() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    insert into seedcore_adopted.changed (instance_id)
    values (case when tg_op = 'DELETE' then old.instance_id else new.instance_id end);
    return null;
end
$$;

-- converts an old row to a new one. A value that violates a rule of the new table goes to the metadata instead
create view seedcore_adopted.converted as
select o.instance_id, o.logical_id, o.cluster_epoch::text as cluster_epoch, o.status,
       case when length(o.actor_name) between 1 and 255 then o.actor_name end as actor_name,
       case when length(o.serve_route) <= 1024 then o.serve_route end as serve_route,
       case when length(o.node_id) between 1 and 255 then o.node_id end as node_id,
       o.ip_address,
       case when o.pid > 0 then o.pid end as pid,
       case when length(o.actor_name) not between 1 and 255 or length(o.serve_route) > 1024
                 or length(o.node_id) not between 1 and 255 or o.pid <= 0
                 or (o.stopped_at is not null and o.status <> 'dead')
                 or not isfinite(o.started_at) or not isfinite(o.last_heartbeat) or not isfinite(o.stopped_at)
            then jsonb_build_object('adopted', jsonb_strip_nulls(jsonb_build_object(
                'actor_name', case when length(o.actor_name) not between 1 and 255 then o.actor_name end,
                'serve_route', case when length(o.serve_route) > 1024 then o.serve_route end,
                'node_id', case when length(o.node_id) not between 1 and 255 then o.node_id end,
                'pid', case when o.pid <= 0 then o.pid end,
                'started_at', case when not isfinite(o.started_at) then o.started_at end,
                'last_heartbeat', case when not isfinite(o.last_heartbeat) then o.last_heartbeat end,
                'stopped_at', case when o.status <> 'dead' or not isfinite(o.stopped_at) then o.stopped_at end)))
            else '{}' end as metadata,
       s.started_at,
       case when o.status = 'dead' then coalesce(t.stopped_at, t.last_heartbeat, s.started_at) else s.started_at
       end as status_changed_at,
       coalesce(t.last_heartbeat, s.started_at) as last_heartbeat,
       case when o.status = 'dead' then coalesce(t.stopped_at, t.last_heartbeat, s.started_at) end as stopped_at
  from registry_instance o,
       lateral (select case when isfinite(o.started_at) then o.started_at end as started_at,
                       case when isfinite(o.last_heartbeat) then o.last_heartbeat end as last_heartbeat,
                       case when isfinite(o.stopped_at) then o.stopped_at end as stopped_at) as t,
       lateral (select coalesce(t.started_at, t.last_heartbeat, t.stopped_at, now()) as started_at) as s;

-- note_changes: create the trigger that records changed rows
create trigger seedcore_adoption after insert or update or delete on registry_instance
    for each row execute function seedcore_adopted.note_change();

-- quiet: disable the triggers of the new table, so that rows are copied unchecked and without history
alter table seedcore_adopting.registry_instance disable trigger user;
-- delete the first epoch of a new database if the old one has its own. Later this would read all rows
delete from seedcore_adopting.cluster_epoch where exists (select from cluster_metadata m where m.current_epoch is not null);

-- progress: the progress of an earlier attempt, and whether the trigger exists
select p.copied_to, p.copied, p.is_copied, p.is_written,
       exists (select from pg_trigger t where t.tgrelid = to_regclass('registry_instance') and t.tgname = 'seedcore_adoption')
  from seedcore_adopted.progress p;

-- copy_batch: copy the next rows in the order of their ids; returns the last id and the number of rows
with batch as materialized (
    select c.* from seedcore_adopted.converted c
     where %(after)s::uuid is null or c.instance_id > %(after)s::uuid
     order by c.instance_id
     limit %(limit)s
), epochs as (
    insert into seedcore_adopting.cluster_epoch (epoch, number, staged_at)
    select f.cluster_epoch,
           (select coalesce(max(e.number), 0) from seedcore_adopting.cluster_epoch e) + row_number() over (order by f.first),
           f.first
      from (select b.cluster_epoch, min(b.started_at) as first from batch b group by b.cluster_epoch) as f
     where not exists (select from seedcore_adopting.cluster_epoch e where e.epoch = f.cluster_epoch)
), copied as (
    insert into seedcore_adopting.registry_instance (
        instance_id, logical_id, cluster_epoch, status, reported_status, actor_name, serve_route, node_id, ip_address, pid,
        metadata, started_at, status_changed_at, last_heartbeat, stopped_at)
    select b.instance_id, b.logical_id, b.cluster_epoch, b.status, b.status, b.actor_name, b.serve_route, b.node_id,
           b.ip_address, b.pid, b.metadata, b.started_at, b.status_changed_at, b.last_heartbeat, b.stopped_at
      from batch b
     order by b.instance_id
    on conflict (instance_id) do nothing
), last as (
    select b.instance_id from batch b order by b.instance_id desc limit 1
), noted as (
    update seedcore_adopted.progress p
       set copied_to = coalesce((select l.instance_id from last l), p.copied_to),
           copied = p.copied + (select count(*) from batch),
           is_copied = (select count(*) from batch) < %(limit)s
)
select (select l.instance_id from last l), (select count(*) from batch);

-- take_changes: remove and return the oldest recorded changes, whose rows must be copied again
with taken as (
    delete from seedcore_adopted.changed c
     where c.number in (select o.number from seedcore_adopted.changed o order by o.number limit %(limit)s)
    returning c.instance_id)
select array_agg(distinct t.instance_id), count(*) from taken t;

-- forget_deleted: delete the rows that are no longer in the old table
delete from seedcore_adopting.registry_instance n
 where n.instance_id = any(%(ids)s::uuid[])
   and not exists (select from registry_instance o where o.instance_id = n.instance_id);

-- copy_again: copy the current rows; a changed status adds a transition, once the history is written
with now_so as materialized (
    select c.* from seedcore_adopted.converted c where c.instance_id = any(%(ids)s::uuid[])
), epochs as (
    insert into seedcore_adopting.cluster_epoch (epoch, number, staged_at)
    select f.cluster_epoch,
           (select coalesce(max(e.number), 0) from seedcore_adopting.cluster_epoch e) + row_number() over (order by f.first),
           f.first
      from (select b.cluster_epoch, min(b.started_at) as first from now_so b group by b.cluster_epoch) as f
     where not exists (select from seedcore_adopting.cluster_epoch e where e.epoch = f.cluster_epoch)
), steps as (
    insert into seedcore_adopting.registry_transition (instance_id, logical_id, from_status, to_status)
    select b.instance_id, b.logical_id, n.status, b.status
      from now_so b
      left join seedcore_adopting.registry_instance n on n.instance_id = b.instance_id
     where n.status is distinct from b.status
       and (select p.is_written from seedcore_adopted.progress p)
     order by b.status_changed_at, b.instance_id
)
insert into seedcore_adopting.registry_instance as n (
    instance_id, logical_id, cluster_epoch, status, reported_status, actor_name, serve_route, node_id, ip_address, pid,
    metadata, started_at, status_changed_at, last_heartbeat, stopped_at)
select b.instance_id, b.logical_id, b.cluster_epoch, b.status, b.status, b.actor_name, b.serve_route, b.node_id,
       b.ip_address, b.pid, b.metadata, b.started_at, b.status_changed_at, b.last_heartbeat, b.stopped_at
  from now_so b
 order by b.instance_id
on conflict (instance_id) do update
   set logical_id = excluded.logical_id, cluster_epoch = excluded.cluster_epoch, status = excluded.status,
       reported_status = excluded.reported_status, actor_name = excluded.actor_name, serve_route = excluded.serve_route, node_id = excluded.node_id,
       ip_address = excluded.ip_address, pid = excluded.pid, metadata = excluded.metadata,
       started_at = excluded.started_at,
       status_changed_at = case when n.status = excluded.status then n.status_changed_at
                                when excluded.status = 'dead' then excluded.stopped_at
                                else now() end,
       last_heartbeat = excluded.last_heartbeat, stopped_at = excluded.stopped_at;

-- write_history: write one transition per instance, to its current status
with written as (
    insert into seedcore_adopting.registry_transition (instance_id, logical_id, to_status, at)
    select r.instance_id, r.logical_id, r.status, r.status_changed_at
      from seedcore_adopting.registry_instance r
     order by r.status_changed_at, r.instance_id)
update seedcore_adopted.progress set is_written = true;

-- date_epochs: an epoch was staged when its first instance started
update seedcore_adopting.cluster_epoch e
   set staged_at = f.first
  from (select r.cluster_epoch, min(r.started_at) as first
          from seedcore_adopting.registry_instance r group by r.cluster_epoch) as f
 where f.cluster_epoch = e.epoch and f.first <> e.staged_at;

-- analyze: collect statistics of the new tables before they are queried
analyze seedcore_adopting.registry_instance, seedcore_adopting.registry_transition, seedcore_adopting.cluster_epoch;

-- differences: the number of ids that only one table has, except those with a recorded change
select count(*)
  from registry_instance o
  full join seedcore_adopting.registry_instance n on n.instance_id = o.instance_id
 where (o.instance_id is null or n.instance_id is null)
   and not exists (select from seedcore_adopted.changed c
                    where c.instance_id = coalesce(o.instance_id, n.instance_id));

-- waiting: the number of recorded changes, up to a limit
select count(*) from (select from seedcore_adopted.changed limit %(limit)s) as c;

-- holders: the processes that hold locks on the old tables
select coalesce(string_agg(distinct l.pid::text, ', '), '(none any more)')
  from pg_locks l
 where l.granted and l.pid <> pg_backend_pid() and l.database = (select d.oid from pg_database d where d.datname = current_database())
   and l.relation in (
       select c.oid from pg_class c
        where c.relnamespace = current_schema()::regnamespace
          and c.relname in ('cluster_metadata', 'registry_instance', 'active_instances', 'active_instance'));

-- lock_new: only autovacuum uses these tables, and it gives way within a second
lock table seedcore_adopting.registry_instance, seedcore_adopting.registry_transition, seedcore_adopting.cluster_epoch,
           seedcore_adopting.cluster_metadata in access exclusive mode;

-- lock_instances: wait for running transactions, up to lock_timeout
lock table registry_instance in access exclusive mode;

-- lock_others: nowait, because a session that waits while it holds a lock can deadlock
lock table cluster_metadata, active_instances, active_instance in access exclusive mode nowait;

-- settle_epochs: classify the epochs as current, retired or staged. An epoch is staged if it has live instances and all its
-- instances started after the current epoch became current
do $$
declare
    old_name text;
    old_at   timestamptz;
begin
    -- per epoch, the index finds a live instance at once
    set local enable_seqscan = off;
    -- enable_seqscan = off inflates cost estimates, and would trigger a JIT compilation that takes longer than the query
    set local jit = off;
    select m.current_epoch::text, coalesce(m.updated_at, now()) into old_name, old_at from cluster_metadata m;
    if old_name is null then
        old_name := 'epoch-1';
        old_at := now();
    end if;
    insert into seedcore_adopting.cluster_epoch (epoch, number, staged_at)
    values (old_name, (select coalesce(max(e.number), 0) + 1 from seedcore_adopting.cluster_epoch e), old_at)
    on conflict (epoch) do nothing;
    -- free the positive numbers first: the unique constraint is checked for each row
    update seedcore_adopting.cluster_epoch set number = -number;
    with kinds as (
        select e.epoch, e.staged_at,
               case when e.epoch = old_name then 1
                    when e.staged_at > old_at and l.lives then 2
                    else 0 end as kind
          from seedcore_adopting.cluster_epoch e
          left join lateral (
              select true as lives from seedcore_adopting.registry_instance r
               where r.cluster_epoch = e.epoch and r.status <> 'dead' limit 1) as l on true
    ), ranked as (
        -- at most 64 epochs may be staged: keep the newest 32 and leave room for new ones
        select k.epoch, k.staged_at,
               case when k.kind = 2 and row_number() over (partition by k.kind order by k.staged_at desc) > 32
                    then 0 else k.kind end as kind
          from kinds k
    ), placed as (
        select r.epoch, r.kind, row_number() over (order by r.kind, r.staged_at, r.epoch) as place from ranked r
    )
    update seedcore_adopting.cluster_epoch e
       set number = p.place,
           current_at = case p.kind when 1 then old_at when 0 then e.staged_at end,
           retired_at = case p.kind when 0 then now() end
      from placed p
     where p.epoch = e.epoch;
    -- leases are judged by the beats of the old table
    update seedcore_adopting.cluster_metadata m
       set current_epoch = old_name,
           epoch_number = (select e.number from seedcore_adopting.cluster_epoch e where e.epoch = old_name),
           updated_at = old_at, beats_seen_at = now(), leases_from = now() - interval '1 day'
     where m.id = 1;
end
$$;

-- swap: move the old objects out and the new ones in. The old functions are not dropped: waiting calls still use them
do $$
declare
    home     regnamespace := current_schema()::regnamespace;
    owner    text;
    r        record;
begin
    select quote_ident(pg_get_userbyid(c.relowner)) into owner from pg_class c where c.oid = 'registry_instance'::regclass;
    drop trigger seedcore_adoption on registry_instance;
    alter table seedcore_adopting.registry_instance enable trigger user;
    for r in select c.oid::regclass as name from pg_class c
              where c.relnamespace = home
                and c.relname in ('cluster_metadata', 'registry_instance', 'active_instances', 'active_instance') loop
        execute format('alter table %s set schema seedcore_adopted', r.name);
    end loop;
    for r in select p.oid::regprocedure as name from pg_proc p
              where p.pronamespace = home
                and p.proname in ('set_current_epoch', 'register_instance', 'set_instance_status', 'beat',
                                  'expire_stale_instances', 'expire_old_epoch_instances') loop
        execute format('alter function %s set schema seedcore_adopted', r.name);
    end loop;
    for r in select c.oid::regclass as name, case c.relkind when 'S' then 'sequence' when 'v' then 'view' else 'table' end as kind
               from pg_class c
              where c.relnamespace = 'seedcore_adopting'::regnamespace and c.relkind in ('r', 'v', 'S')
                and not exists (select from pg_depend d
                                 where d.classid = 'pg_class'::regclass and d.objid = c.oid
                                   and d.refobjsubid > 0 and d.deptype in ('a', 'i')) loop
        execute format('alter %s %s owner to %s', r.kind, r.name, owner);
        execute format('alter %s %s set schema %s', r.kind, r.name, home);
    end loop;
    for r in select p.oid::regprocedure as name from pg_proc p
              where p.pronamespace = 'seedcore_adopting'::regnamespace
                and p.oid <> 'seedcore_adopting.beat(uuid)'::regprocedure loop
        execute format('alter function %s owner to %s', r.name, owner);
        execute format('alter function %s set schema %s', r.name, home);
    end loop;
    for r in select t.oid::regtype as name from pg_type t
              where t.typnamespace = 'seedcore_adopting'::regnamespace
                and (t.typtype in ('e', 'd')
                     or exists (select from pg_class c where c.oid = t.typrelid and c.relkind = 'c')) loop
        execute format('alter type %s owner to %s', r.name, owner);
        execute format('alter type %s set schema %s', r.name, home);
    end loop;
end
$$;

-- keep_calls: create the functions of old clients, with the same names, arguments and results, on top of ours.
-- Another result type would break prepared statements of these clients. If one of our functions could be called with the same
-- arguments, the call would be ambiguous: our function then loses a default, so that calls to it must pass one more argument
do $$
declare
    r       record;
    text    text;
    comment text;
begin
    for r in select p.oid::regprocedure::text as name, k.missing, p.oid
               from (values ('set_instance_status', ' DEFAULT NULL::bigint'),
                            ('expire_stale_instances', ' DEFAULT NULL::double precision'),
                            ('expire_old_epoch_instances', ' DEFAULT 1000')) as k (name, missing)
               join pg_proc p on p.proname = k.name and p.pronamespace = current_schema()::regnamespace loop
        text := pg_get_functiondef(r.oid);
        comment := obj_description(r.oid, 'pg_proc');
        execute format('drop function %s', r.name);
        execute overlay(text placing '' from position(r.missing in text) for length(r.missing));
        execute format('comment on function %s is %L', r.name, comment);
    end loop;
    for r in
        select p.oid, p.proname, p.prosecdef, p.proowner, p.proacl, k.body,
               pg_get_function_arguments(p.oid) as arguments, pg_get_function_result(p.oid) as result
          from (values
            ('set_current_epoch(uuid)', 'begin perform set_current_epoch($1::text); end'),
            ('register_instance(uuid, text, uuid, text, text, text, inet, integer)',
             'begin perform register_instance($1, $2, $3::text, nullif($4, ''''), nullif($5, ''''), nullif($6, ''''), $7,'
             ' case when $8 > 0 then $8 end); end'),
            ('set_instance_status(uuid, instancestatus)',
             'begin perform set_instance_status($1, $2, null::bigint); end'),
            ('beat(uuid)', 'begin perform beat_many(array[$1]); end'),
            ('expire_stale_instances(integer)',
             'declare ended bigint; total bigint := 0; begin loop'
             ' select count(*) into ended from expire_stale_instances($1::double precision, 10000);'
             ' total := total + ended; exit when ended < 10000; end loop; return total; end'),
            ('expire_old_epoch_instances()',
             'declare ended bigint; total bigint := 0; begin loop'
             ' select count(*) into ended from expire_old_epoch_instances(10000);'
             ' total := total + ended; exit when ended < 10000; end loop; return total; end')) as k (call, body)
          join pg_proc p on p.oid = to_regprocedure('seedcore_adopted.' || k.call)
    loop
        execute format('create function %I(%s) returns %s language plpgsql %s as %L', r.proname, r.arguments, r.result,
                       case when r.prosecdef then format('security definer set search_path = %I, pg_temp', current_schema())
                            else '' end,
                       r.body);
        execute format('comment on function %I(%s) is %L', r.proname, pg_get_function_identity_arguments(r.oid),
                       'kept for clients of the earlier SeedCore');
        execute format('alter function %I(%s) owner to %I', r.proname, pg_get_function_identity_arguments(r.oid),
                       pg_get_userbyid(r.proowner));
    end loop;
end
$$;

-- keep_grants: copy the grants on the old tables, views and functions, with the rights that the new ones need to write
do $$
declare
    r record;
begin
    for r in
        select c.relname, a.privilege_type,
               case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end as grantee,
               c.relname = 'registry_instance' and a.privilege_type in ('INSERT', 'UPDATE') as writes
          from pg_class c, aclexplode(c.relacl) a
         where c.relnamespace = 'seedcore_adopted'::regnamespace and c.relkind in ('r', 'v') and a.grantee <> c.relowner
           and c.relname in ('cluster_metadata', 'registry_instance', 'active_instances', 'active_instance')
    loop
        execute format('grant %s on %I to %s', r.privilege_type, r.relname, r.grantee);
        if r.writes then
            execute format('grant select, insert, update on registry_instance, cluster_epoch to %s', r.grantee);
            execute format('grant select, insert on registry_transition to %s', r.grantee);
            execute format('grant select, update on cluster_metadata to %s', r.grantee);
            execute format('grant usage on sequence registry_version to %s', r.grantee);
        end if;
    end loop;
    for r in
        select n.oid::regprocedure as name, a.privilege_type,
               case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end as grantee
          from pg_proc o
          join pg_proc n on n.proname = o.proname and n.proargtypes = o.proargtypes
                        and n.pronamespace = current_schema()::regnamespace,
               lateral aclexplode(o.proacl) a
         where o.pronamespace = 'seedcore_adopted'::regnamespace
    loop
        execute format('revoke execute on function %s from public', r.name);
    end loop;
    for r in
        select n.oid::regprocedure as name,
               case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end as grantee
          from pg_proc o
          join pg_proc n on n.proname = o.proname and n.proargtypes = o.proargtypes
                        and n.pronamespace = current_schema()::regnamespace,
               lateral aclexplode(o.proacl) a
         where o.pronamespace = 'seedcore_adopted'::regnamespace
    loop
        execute format('grant execute on function %s to %s', r.name, r.grantee);
    end loop;
end
$$;

-- help_late_calls: a call that waited for the swap continues in its old function; these triggers complete what it writes
create function seedcore_adopted.late_registration() returns trigger
language plpgsql set search_path from current as $$
begin
    if not exists (select from cluster_epoch e where e.epoch = new.cluster_epoch) then
        perform record_epoch(new.cluster_epoch, false);
    end if;
    return new;
end
$$;
create trigger seedcore_adoption before insert on registry_instance
    for each row execute function seedcore_adopted.late_registration();

create function seedcore_adopted.late_epoch() returns trigger
language plpgsql set search_path from current as $$
begin
    if tg_op = 'INSERT' then
        -- the row exists, so the insert continues as an update (on conflict)
        new.epoch_number := coalesce(new.epoch_number, 0);
        return new;
    end if;
    insert into cluster_epoch (epoch, number)
    values (new.current_epoch, (select max(e.number) + 1 from cluster_epoch e)) on conflict (epoch) do nothing;
    update cluster_epoch set retired_at = now() where epoch = old.current_epoch;
    update cluster_epoch set current_at = now(), retired_at = null where epoch = new.current_epoch
    returning number into new.epoch_number;
    return new;
end
$$;
create trigger seedcore_adoption_insert before insert on cluster_metadata
    for each row execute function seedcore_adopted.late_epoch();
create trigger seedcore_adoption before update of current_epoch on cluster_metadata
    for each row when (new.current_epoch <> old.current_epoch and new.epoch_number = old.epoch_number)
    execute function seedcore_adopted.late_epoch();

-- drop_calls: drop the kept functions, and those of ours that are created again
do $$
declare
    r record;
begin
    for r in select p.oid::regprocedure as name from pg_proc p
              where p.pronamespace = current_schema()::regnamespace
                and (obj_description(p.oid, 'pg_proc') = 'kept for clients of the earlier SeedCore'
                     or p.proname in ('set_instance_status', 'expire_stale_instances', 'expire_old_epoch_instances')) loop
        execute format('drop function %s', r.name);
    end loop;
end
$$;

-- has_kept_calls: whether functions for old clients exist
select exists (select from pg_proc p
                where p.pronamespace = current_schema()::regnamespace
                  and obj_description(p.oid, 'pg_proc') = 'kept for clients of the earlier SeedCore');

-- take_own_calls: create our functions in the home schema as they are in a new database
do $$
declare
    owner text;
    r     record;
begin
    select quote_ident(pg_get_userbyid(c.relowner)) into owner from pg_class c where c.oid = 'registry_instance'::regclass;
    for r in select replace(p.oid::regprocedure::text, 'seedcore_adopting.', '') as name,
                    replace(pg_get_functiondef(p.oid), 'seedcore_adopting.', '') as text,
                    obj_description(p.oid, 'pg_proc') as comment
               from pg_proc p
              where p.pronamespace = 'seedcore_adopting'::regnamespace
                and p.proname in ('beat', 'set_instance_status', 'expire_stale_instances', 'expire_old_epoch_instances') loop
        execute r.text;
        execute format('comment on function %s is %L', r.name, r.comment);
        execute format('alter function %s owner to %s', r.name, owner);
    end loop;
end
$$;
drop schema seedcore_adopting cascade;

-- at_work: the running transactions
select coalesce(array_agg(distinct l.virtualtransaction), '{}')
  from pg_locks l join pg_stat_activity a on a.pid = l.pid
 where l.locktype = 'virtualxid' and l.granted and l.pid <> pg_backend_pid() and a.datname = current_database();

-- still_at_work: the number of these transactions that still run
select count(distinct l.virtualtransaction)
  from pg_locks l
 where l.locktype = 'virtualxid' and l.granted and l.virtualtransaction = any(%(transactions)s);

-- end_help: drop the trigger for late calls: none is in an old function any more
drop trigger if exists seedcore_adoption on registry_instance;

-- end_help_of_epochs: the same for the other table
drop trigger if exists seedcore_adoption on cluster_metadata;
drop trigger if exists seedcore_adoption_insert on cluster_metadata;

-- drop_schemas: drop the old tables and the adoption's own tables
drop schema if exists seedcore_adopting cascade;
drop schema if exists seedcore_adopted cascade;

-- has_leftovers: whether an adoption has begun and not finished
select to_regnamespace('seedcore_adopted') is not null;
