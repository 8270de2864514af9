-- The registry's tables, views and functions. Forward only: later files change what this one made.
--
-- Errors raised here carry their own SQLSTATE:
--   SC001 unknown instance   SC002 forbidden transition   SC003 instance id belongs to another agent
--   SC004 retired epoch      SC005 too many staged epochs

create type instancestatus as enum ('starting', 'alive', 'draining', 'dead');

create sequence registry_version;

-- One row: what the fleet agrees on.
create table cluster_metadata (
    id             smallint primary key default 1 check (id = 1),
    current_epoch  text not null,
    epoch_number   bigint not null,
    ray_cluster    text,
    lease_s        double precision not null default 15 check (lease_s > 0 and lease_s <= 86400),
    beats_seen_at  timestamptz not null default now(),
    updated_at     timestamptz not null default now()
);
comment on column cluster_metadata.lease_s is 'seconds of silence that a lease tolerates';
comment on column cluster_metadata.beats_seen_at is
    'when any beat was last recorded, to the second: leases are judged against it, so that an absent registry does not make the living look late';
comment on column cluster_metadata.ray_cluster is 'the Ray cluster (session) whose registry wrote last';

create table cluster_epoch (
    epoch       text primary key check (length(epoch) between 1 and 128),
    number      bigint not null unique,
    staged_at   timestamptz not null default now(),
    current_at  timestamptz,
    retired_at  timestamptz
);

insert into cluster_epoch (epoch, number, current_at) values ('epoch-1', 1, now());
insert into cluster_metadata (current_epoch, epoch_number) values ('epoch-1', 1);

create table registry_instance (
    instance_id        uuid primary key,
    logical_id         text collate "C" not null check (length(logical_id) between 1 and 255),
    cluster_epoch      text not null references cluster_epoch (epoch),
    status             instancestatus not null default 'starting',
    seq                bigint not null default 0,
    actor_name         text check (length(actor_name) between 1 and 255),
    namespace          text check (length(namespace) between 1 and 255),
    actor_id           text check (length(actor_id) between 1 and 255),
    serve_route        text check (length(serve_route) <= 1024),
    organ_id           text check (length(organ_id) between 1 and 255),
    labels             jsonb not null default '{}' check (jsonb_typeof(labels) = 'object'),
    metadata           jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
    node_id            text check (length(node_id) between 1 and 255),
    ip_address         inet,
    pid                integer check (pid > 0),
    started_at         timestamptz not null default now(),
    status_changed_at  timestamptz not null default now(),
    last_heartbeat     timestamptz not null default now(),
    stopped_at         timestamptz,
    cause              text check (length(cause) <= 1024),
    version            bigint not null default nextval('registry_version'),
    check ((status = 'dead') = (stopped_at is not null))
) with (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0
);
comment on column registry_instance.seq is 'sequence number of the last change the agent itself sent';
comment on column registry_instance.last_heartbeat is 'in no index, on purpose: beats stay HOT updates';

create index registry_instance_history on registry_instance (logical_id, started_at desc);
create index registry_instance_live on registry_instance (logical_id, instance_id) where status <> 'dead';
create index registry_instance_live_epoch on registry_instance (cluster_epoch) where status <> 'dead';

-- Lifecycle ---------------------------------------------------------------------------------------------

create function status_may_become(p_from instancestatus, p_to instancestatus) returns boolean
language sql immutable parallel safe as $$
    select case p_from
        when 'starting' then p_to in ('alive', 'draining', 'dead')
        when 'alive'    then p_to in ('draining', 'dead')
        when 'draining' then p_to in ('alive', 'dead')
        else false
    end
$$;

create function registry_instance_guard() returns trigger
language plpgsql as $$
begin
    if new.instance_id <> old.instance_id or new.logical_id <> old.logical_id then
        raise exception 'instance % is fixed to agent %; register a new instance', old.instance_id, old.logical_id
            using errcode = 'SC003';
    end if;
    if new.status <> old.status then
        if not status_may_become(old.status, new.status) then
            raise exception 'instance % is % and cannot become %', old.instance_id, old.status, new.status
                using errcode = 'SC002';
        end if;
        new.status_changed_at := now();
        new.version := nextval('registry_version');
        if new.status = 'dead' then
            new.stopped_at := now();
        end if;
    end if;
    return new;
end
$$;

-- Names only the guarded columns, so that a beat does not run it.
create trigger registry_instance_guard
    before update of instance_id, logical_id, status, stopped_at on registry_instance
    for each row execute function registry_instance_guard();

-- Epochs ------------------------------------------------------------------------------------------------

-- Records an epoch that nobody named before. Answers null where it is usable, else why it is not. Only what
-- waits is bounded: an epoch that becomes current at once is not.
create function stage_epoch(p_epoch text, p_will_wait boolean default true) returns text
language plpgsql as $$
declare
    known cluster_epoch;
begin
    select * into known from cluster_epoch where epoch = p_epoch;
    if not found then
        perform 1 from cluster_metadata where id = 1 for update;
        -- whoever held the lock may have staged it
        select * into known from cluster_epoch where epoch = p_epoch;
    end if;
    if found then
        return case when known.retired_at is not null then 'retired_epoch' end;
    end if;
    if p_will_wait and (select count(*) from cluster_epoch where current_at is null) >= 64 then
        return 'epoch_limit';
    end if;
    insert into cluster_epoch (epoch, number) values (p_epoch, (select max(number) + 1 from cluster_epoch));
    return null;
end
$$;

-- Flips discovery to an epoch in one step and retires the one before. Answers its number.
create function set_current_epoch(p_epoch text) returns bigint
language plpgsql as $$
declare
    meta    cluster_metadata;
    result  bigint;
begin
    if p_epoch is null or length(p_epoch) not between 1 and 128 then
        raise exception 'an epoch must have 1 to 128 characters' using errcode = '22023';
    end if;
    select * into strict meta from cluster_metadata where id = 1 for update;
    if meta.current_epoch = p_epoch then
        return meta.epoch_number;
    end if;
    if stage_epoch(p_epoch, p_will_wait => false) is not null then
        raise exception 'epoch % is retired and cannot come back', p_epoch using errcode = 'SC004';
    end if;
    update cluster_epoch set retired_at = now() where epoch = meta.current_epoch;
    update cluster_epoch set current_at = now() where epoch = p_epoch returning number into result;
    update cluster_metadata
       set current_epoch = p_epoch, epoch_number = result, updated_at = now() where id = 1;
    return result;
end
$$;

-- A registry starts: the same Ray cluster keeps the epoch, a new one rotates it (or takes the one insisted on).
create function begin_registry(p_ray_cluster text, p_epoch text, p_lease_s double precision)
returns table (epoch text, number bigint)
language plpgsql as $$
declare
    meta   cluster_metadata;
    wanted text := p_epoch;
    serial bigint;
begin
    select * into strict meta from cluster_metadata where id = 1 for update;
    if wanted is null and meta.ray_cluster is distinct from p_ray_cluster and meta.ray_cluster is not null then
        select max(e.number) + 1 into serial from cluster_epoch e;
        loop
            wanted := 'epoch-' || serial;
            exit when not exists (select from cluster_epoch e where e.epoch = wanted);
            serial := serial + 1;
        end loop;
    end if;
    if wanted is not null then
        perform set_current_epoch(wanted);
    end if;
    update cluster_metadata
       set ray_cluster = p_ray_cluster, lease_s = p_lease_s, updated_at = now() where id = 1;
    return query select m.current_epoch, m.epoch_number from cluster_metadata m where m.id = 1;
end
$$;

-- Registering -------------------------------------------------------------------------------------------

-- Batch form: a JSON array of objects with the columns' names; instance_id and logical_id are required.
-- Answers one row for each element, in the array's order. Rows are written in key order, so that two
-- batches cannot deadlock.
create function register_instances(p_rows jsonb)
returns table (ord bigint, outcome text, status instancestatus, cluster_epoch text, cause text)
language plpgsql as $$
declare
    r       record;
    existing registry_instance;
    current_name text;
begin
    -- staging an epoch takes this lock; taken behind a row's it could deadlock with a beat or another batch
    if exists (
        select from jsonb_array_elements(p_rows) as e (element)
         where e.element ->> 'cluster_epoch' is not null
           and not exists (select from cluster_epoch c where c.epoch = e.element ->> 'cluster_epoch')
    ) then
        perform 1 from cluster_metadata m where m.id = 1 for update;
    end if;
    select m.current_epoch into strict current_name from cluster_metadata m where m.id = 1;
    for r in
        select e.ord as position, d.*
          from jsonb_array_elements(p_rows) with ordinality as e (element, ord),
               jsonb_to_record(e.element) as d (
                   instance_id uuid, logical_id text, cluster_epoch text, seq bigint, actor_name text,
                   namespace text, actor_id text, serve_route text, organ_id text, labels jsonb,
                   metadata jsonb, node_id text, ip_address inet, pid integer)
         order by d.instance_id, e.ord
    loop
        ord := r.position;
        cluster_epoch := coalesce(r.cluster_epoch, current_name);
        cause := null;
        select * into existing from registry_instance i where i.instance_id = r.instance_id for update;
        if not found then
            outcome := case when cluster_epoch = current_name then null else stage_epoch(cluster_epoch) end;
            if outcome is not null then
                status := null;
                return next;
                continue;
            end if;
            insert into registry_instance (
                instance_id, logical_id, cluster_epoch, seq, actor_name, namespace, actor_id, serve_route,
                organ_id, labels, metadata, node_id, ip_address, pid)
            values (
                r.instance_id, r.logical_id, cluster_epoch, coalesce(r.seq, 0), r.actor_name, r.namespace,
                r.actor_id, r.serve_route, r.organ_id, coalesce(r.labels, '{}'), coalesce(r.metadata, '{}'),
                r.node_id, r.ip_address, r.pid)
            on conflict (instance_id) do nothing;
            if found then
                outcome := 'applied';
                status := 'starting';
                return next;
                continue;
            end if;
            select * into existing from registry_instance i where i.instance_id = r.instance_id for update;
        end if;
        status := existing.status;
        cluster_epoch := existing.cluster_epoch;
        cause := existing.cause;
        if existing.logical_id <> r.logical_id then
            outcome := 'conflict';
        elsif existing.status = 'dead' then
            outcome := 'dead';
        elsif coalesce(r.seq, 0) < existing.seq then
            outcome := 'unchanged';
        else
            update registry_instance i
               set seq = coalesce(r.seq, 0), actor_name = r.actor_name, namespace = r.namespace,
                   actor_id = r.actor_id, serve_route = r.serve_route, organ_id = r.organ_id,
                   labels = coalesce(r.labels, '{}'), metadata = coalesce(r.metadata, '{}'),
                   node_id = r.node_id, ip_address = r.ip_address, pid = r.pid, last_heartbeat = now()
             where i.instance_id = r.instance_id;
            outcome := 'unchanged';
        end if;
        return next;
    end loop;
end
$$;
comment on function register_instances(jsonb) is
    'outcomes: applied, unchanged (was there already; details refreshed), dead, conflict, retired_epoch, epoch_limit';

-- For psql and other programs: answers the epoch registered in, or raises.
create function register_instance(
    p_instance_id uuid, p_logical_id text, p_cluster_epoch text default null, p_actor_name text default null,
    p_serve_route text default null, p_node_id text default null, p_ip_address inet default null,
    p_pid integer default null, p_namespace text default null, p_actor_id text default null,
    p_organ_id text default null, p_labels jsonb default '{}', p_metadata jsonb default '{}',
    p_seq bigint default 0)
returns text
language plpgsql as $$
declare
    r record;
begin
    if p_instance_id is null or p_logical_id is null then
        raise exception 'instance id and logical id must be given' using errcode = '22004';
    end if;
    select * into strict r from register_instances(jsonb_build_array(jsonb_build_object(
        'instance_id', p_instance_id, 'logical_id', p_logical_id, 'cluster_epoch', p_cluster_epoch,
        'seq', p_seq, 'actor_name', p_actor_name, 'namespace', p_namespace, 'actor_id', p_actor_id,
        'serve_route', p_serve_route, 'organ_id', p_organ_id, 'labels', p_labels, 'metadata', p_metadata,
        'node_id', p_node_id, 'ip_address', p_ip_address, 'pid', p_pid)));
    case r.outcome
        when 'applied', 'unchanged' then return r.cluster_epoch;
        when 'dead' then
            raise exception 'instance % is dead; dead is final, register a new instance', p_instance_id
                using errcode = 'SC002';
        when 'conflict' then
            raise exception 'instance % already belongs to another agent than %', p_instance_id, p_logical_id
                using errcode = 'SC003';
        when 'retired_epoch' then
            raise exception 'epoch % is retired and cannot come back', p_cluster_epoch using errcode = 'SC004';
        when 'epoch_limit' then
            raise exception 'epoch % cannot be staged: 64 are staged already', p_cluster_epoch
                using errcode = 'SC005';
    end case;
end
$$;

-- Status changes ----------------------------------------------------------------------------------------

-- Batch form. A null seq is a change that did not come from the agent: it is guarded by the transition
-- table alone and does not use up the agent's numbers. Answers one row for each change, in their order.
create function set_instance_statuses(
    p_ids uuid[], p_statuses instancestatus[], p_seqs bigint[], p_causes text[])
returns table (ord bigint, outcome text, status instancestatus, cluster_epoch text, cause text)
language plpgsql as $$
declare
    r        record;
    existing registry_instance;
begin
    for r in
        select c.id, c.wanted, c.seq, c.why, c.ord as position
          from unnest(p_ids, p_statuses, p_seqs, p_causes) with ordinality as c (id, wanted, seq, why, ord)
         order by c.id, c.ord
    loop
        ord := r.position;
        select * into existing from registry_instance i where i.instance_id = r.id for update;
        status := existing.status;
        cluster_epoch := existing.cluster_epoch;
        cause := existing.cause;
        if existing.instance_id is null then
            outcome := 'unknown';
        elsif r.seq is not null and r.seq <= existing.seq then
            outcome := 'unchanged';
        elsif existing.status = r.wanted then
            if r.seq is not null then
                update registry_instance i set seq = r.seq where i.instance_id = r.id;
            end if;
            outcome := 'unchanged';
        elsif existing.status = 'dead' then
            outcome := 'dead';
        elsif not status_may_become(existing.status, r.wanted) then
            outcome := 'forbidden';
        else
            update registry_instance i
               set status = r.wanted, seq = coalesce(r.seq, i.seq), cause = r.why,
                   last_heartbeat = case when r.seq is null then i.last_heartbeat else now() end
             where i.instance_id = r.id;
            outcome := 'applied';
            status := r.wanted;
            cause := r.why;
        end if;
        return next;
    end loop;
end
$$;
comment on function set_instance_statuses(uuid[], instancestatus[], bigint[], text[]) is
    'outcomes: applied, unchanged (already so, or already applied by sequence number), unknown, dead, forbidden';

-- For psql and other programs: answers 'applied' or 'unchanged', or raises.
create function set_instance_status(
    p_instance_id uuid, p_status instancestatus, p_seq bigint default null, p_cause text default null)
returns text
language plpgsql as $$
declare
    r record;
begin
    if p_instance_id is null or p_status is null then
        raise exception 'instance id and status must be given' using errcode = '22004';
    end if;
    select * into strict r
      from set_instance_statuses(array[p_instance_id], array[p_status], array[p_seq], array[p_cause]);
    case r.outcome
        when 'applied', 'unchanged' then return r.outcome;
        when 'unknown' then
            raise exception 'instance % is not registered', p_instance_id using errcode = 'SC001';
        when 'dead', 'forbidden' then
            raise exception 'instance % is % and cannot become %', p_instance_id, r.status, p_status
                using errcode = 'SC002';
    end case;
end
$$;

-- Beats -------------------------------------------------------------------------------------------------

-- Batch form: renews leases, each heard p_ages_s seconds ago; the newest time wins. Answers only those that
-- renewed nothing, as 'unknown' or 'dead'. Rows are locked in key order, so that two writers cannot deadlock.
create function beat_many(p_ids uuid[], p_ages_s double precision[] default null)
returns table (instance_id uuid, outcome text)
language sql as $$
    with heard as (
        select b.id, min(coalesce(b.age_s, 0)) as age_s
          from unnest(p_ids, coalesce(p_ages_s, array[]::double precision[])) as b (id, age_s)
         group by b.id
    ), locked as (
        select r.instance_id as id, r.status, h.age_s
          from registry_instance r join heard h on r.instance_id = h.id
         order by r.instance_id
           for no key update of r
    ), renewed as (
        update registry_instance r
           set last_heartbeat = greatest(r.last_heartbeat, now() - make_interval(secs => l.age_s))
          from locked l
         where r.instance_id = l.id and l.status <> 'dead'
    ), seen as (
        update cluster_metadata m
           set beats_seen_at = now()
          from (select id from cluster_metadata
                 where id = 1 and beats_seen_at < now() - interval '1 second'
                   for update skip locked) due
         where m.id = due.id and exists (select from locked)
    )
    select h.id, case when l.id is null then 'unknown' else 'dead' end
      from heard h left join locked l on l.id = h.id
     where l.id is null or l.status = 'dead'
$$;

-- One beat: answers 'renewed', 'unknown' or 'dead'.
create function beat(p_instance_id uuid) returns text
language sql as $$
    select coalesce((select outcome from beat_many(array[p_instance_id])), 'renewed')
$$;

-- Views -------------------------------------------------------------------------------------------------

-- Alive in the current epoch with a running lease. The lease is judged against the last beat that anybody
-- recorded: when nobody beats, the registry is away and the fleet is not dead for it.
create view active_instances as
select r.instance_id, r.logical_id, r.cluster_epoch, r.status, r.seq, r.actor_name, r.namespace, r.actor_id,
       r.serve_route, r.organ_id, r.labels, r.metadata, r.node_id, r.ip_address, r.pid, r.started_at,
       r.status_changed_at, r.last_heartbeat, r.stopped_at, r.cause, r.version
  from registry_instance r
  join cluster_metadata m on m.id = 1
 where r.cluster_epoch = m.current_epoch
   and r.status = 'alive'
   and r.last_heartbeat >= least(now(), m.beats_seen_at) - make_interval(secs => m.lease_s);

-- The best of them for each logical id: one with an actor to call, then the newest incarnation, ties by id.
create view active_instance as
select distinct on (a.logical_id)
       a.instance_id, a.logical_id, a.cluster_epoch, a.status, a.seq, a.actor_name, a.namespace, a.actor_id,
       a.serve_route, a.organ_id, a.labels, a.metadata, a.node_id, a.ip_address, a.pid, a.started_at,
       a.status_changed_at, a.last_heartbeat, a.stopped_at, a.cause, a.version
  from active_instances a
 order by a.logical_id, a.actor_name is null, a.started_at desc, a.instance_id;

-- Expiry ------------------------------------------------------------------------------------------------

-- Declares dead whose lease is over, at most p_limit of them; answers whom. Without p_lease_s the fleet's
-- lease counts. Silence is judged as in the views: nobody dies of the registry's absence.
create function expire_stale_instances(p_lease_s double precision default null, p_limit integer default 1000)
returns table (instance_id uuid, logical_id text)
language sql as $$
    with stale as (
        select r.instance_id as id,
               extract(epoch from least(now(), m.beats_seen_at) - r.last_heartbeat) as silence_s
          from registry_instance r
          join cluster_metadata m on m.id = 1
         where r.status <> 'dead'
           and r.last_heartbeat
               < least(now(), m.beats_seen_at) - make_interval(secs => coalesce(p_lease_s, m.lease_s))
         order by r.instance_id
         limit greatest(p_limit, 0)
           for update of r skip locked
    )
    update registry_instance r
       set status = 'dead', cause = format('lease expired: silent for %s s', round(s.silence_s))
      from stale s
     where r.instance_id = s.id
    returning r.instance_id, r.logical_id
$$;

-- Declares dead what belongs to a retired epoch, at most p_limit of them; answers whom.
create function expire_old_epoch_instances(p_limit integer default 1000)
returns table (instance_id uuid, logical_id text)
language sql as $$
    with old as (
        select r.instance_id as id, r.cluster_epoch as epoch
          from registry_instance r
          join cluster_epoch e on e.epoch = r.cluster_epoch
         where r.status <> 'dead' and e.retired_at is not null
         order by r.instance_id
         limit greatest(p_limit, 0)
           for update of r skip locked
    )
    update registry_instance r
       set status = 'dead', cause = format('epoch %s retired', o.epoch)
      from old o
     where r.instance_id = o.id
    returning r.instance_id, r.logical_id
$$;
