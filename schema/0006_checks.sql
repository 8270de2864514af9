-- What the functions refuse, for every hand that calls them: names that are blank or cannot be shown, labels beyond
-- their bounds, ages, leases and limits that make no sense. The package refuses the same before it sends anything
-- (seedcore/core/limits.py). The errors are 22004 where a value is missing and 22023 where it is wrong.
--
-- Not constraints of the table: those are checked again at every update, so that a beat of a row that is there already
-- and breaks one would be refused, and with it the beats of everybody in its batch.

-- Why a text cannot be a name; null where it can. The spaces are Unicode's, whatever the database's locale.
create function name_problem(p_value text) returns text
language sql immutable parallel safe as $$
    select case
        when p_value !~ '[^ \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]' then 'must not be empty'
        when p_value ~ '[\u0001-\u001f\u007f]' then 'must not contain control characters'
    end
$$;

-- Why labels cannot be kept; null where they can.
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

-- Why metadata cannot be kept; null where it can. 16 KiB of JSON take less than 128 KiB in the database's own form.
-- Python cannot read back what is nested too deeply, or a number of more than 4300 digits.
create function metadata_problem(p_metadata jsonb) returns text
language sql stable parallel safe as $$
    select case
        when pg_column_size(p_metadata) > 131072 then 'metadata must be at most 16384 bytes of JSON'
        when p_metadata @? 'strict $.**{32} ? (@.type() == "object" || @.type() == "array")' then
            'metadata must not be nested deeper than 32 levels'
        when p_metadata @? 'strict $.** ? (@.type() == "number" && (@ >= 1e4300 || @ <= -1e4300))' then
            'metadata must not hold numbers of more than 4300 digits'
    end
$$;

-- The first problem of a batch of registrations, or null. What the table's own constraints refuse is left to them.
create function registrations_problem(p_rows jsonb) returns text
language sql stable as $$
    select format('instance %s: %s', d.instance_id, found.problem)
      from jsonb_array_elements(p_rows) with ordinality as e (element, ord),
           jsonb_to_record(e.element) as d (
               instance_id text, logical_id text, cluster_epoch text, seq bigint, actor_name text, namespace text,
               actor_id text, serve_route text, organ_id text, labels jsonb, metadata jsonb, node_id text,
               process_key text),
           lateral (select coalesce(
               'logical_id ' || name_problem(d.logical_id),
               'cluster_epoch ' || name_problem(d.cluster_epoch),
               'actor_name ' || name_problem(d.actor_name),
               'namespace ' || name_problem(d.namespace),
               'actor_id ' || name_problem(d.actor_id),
               'serve_route ' || name_problem(d.serve_route),
               'organ_id ' || name_problem(d.organ_id),
               'node_id ' || name_problem(d.node_id),
               'process_key ' || name_problem(d.process_key),
               case when d.seq < 0 then 'seq must not be negative' end,
               case when d.labels <> '{}' then labels_problem(d.labels) end,
               case when d.metadata <> '{}' then metadata_problem(d.metadata) end) as problem
           ) as found
     where found.problem is not null
     order by e.ord
     limit 1
$$;

create or replace function register_instances(p_rows jsonb)
returns table (ord bigint, outcome text, status instancestatus, cluster_epoch text, cause text)
language plpgsql as $$
declare
    r       record;
    existing registry_instance;
    current_name text;
    problem text;
begin
    if p_rows is null or exists (
        select from jsonb_array_elements(p_rows) as e (element)
         where e.element ->> 'instance_id' is null or e.element ->> 'logical_id' is null
    ) then
        raise exception 'instance_id and logical_id must be given' using errcode = '22004';
    end if;
    problem := registrations_problem(p_rows);
    if problem is not null then
        raise exception '%', problem using errcode = '22023';
    end if;
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
                   metadata jsonb, node_id text, ip_address inet, pid integer,
                   process_key text)
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
                organ_id, labels, metadata, node_id, ip_address, pid,
                process_key)
            values (
                r.instance_id, r.logical_id, cluster_epoch, coalesce(r.seq, 0), r.actor_name, r.namespace,
                r.actor_id, r.serve_route, r.organ_id, coalesce(r.labels, '{}'), coalesce(r.metadata, '{}'),
                r.node_id, r.ip_address, r.pid, r.process_key)
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
                   node_id = r.node_id, ip_address = r.ip_address, pid = r.pid,
                   process_key = r.process_key, last_heartbeat = now()
             where i.instance_id = r.instance_id;
            outcome := 'unchanged';
        end if;
        return next;
    end loop;
end
$$;

-- An epoch's name is judged where it is first heard of.
create or replace function stage_epoch(p_epoch text, p_will_wait boolean default true) returns text
language plpgsql as $$
declare
    known cluster_epoch;
begin
    if name_problem(p_epoch) is not null then
        raise exception 'an epoch %', name_problem(p_epoch) using errcode = '22023';
    end if;
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

create or replace function set_instance_statuses(
    p_ids uuid[], p_statuses instancestatus[], p_seqs bigint[], p_causes text[])
returns table (ord bigint, outcome text, status instancestatus, cluster_epoch text, cause text)
language plpgsql as $$
declare
    r        record;
    existing registry_instance;
begin
    if p_ids is null or p_statuses is null
       or array_position(p_ids, null) is not null or array_position(p_statuses, null) is not null then
        raise exception 'instance ids and statuses must be given' using errcode = '22004';
    end if;
    if cardinality(p_statuses) <> cardinality(p_ids) or cardinality(p_seqs) <> cardinality(p_ids)
       or cardinality(p_causes) <> cardinality(p_ids) then
        raise exception 'there must be as many statuses, seqs and causes as instance ids' using errcode = '22023';
    end if;
    if exists (select from unnest(p_seqs) as s (seq) where s.seq < 0) then
        raise exception 'seq must not be negative' using errcode = '22023';
    end if;
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

-- The ages of a batch of beats, judged once for the whole batch. A beat from the future would outlive its agent, and
-- is refused; up to a second is what two readings of a clock may differ by, and counts as none.
create function checked_ages(p_ids uuid[], p_ages_s double precision[]) returns double precision[]
language plpgsql immutable as $$
begin
    if p_ids is null or array_position(p_ids, null) is not null then
        raise exception 'instance ids must be given' using errcode = '22004';
    end if;
    if p_ages_s is null then
        return '{}';
    end if;
    if cardinality(p_ages_s) <> cardinality(p_ids) then
        raise exception 'there must be as many ages as instance ids' using errcode = '22023';
    end if;
    -- to PostgreSQL, NaN is above every number
    if exists (select from unnest(p_ages_s) as a (age_s) where a.age_s not between -1 and 1e9) then
        raise exception 'ages of beats must be from 0 to 1e9 seconds' using errcode = '22023';
    end if;
    return p_ages_s;
end
$$;

create or replace function beat_many(p_ids uuid[], p_ages_s double precision[] default null)
returns table (instance_id uuid, outcome text)
language sql as $$
    with heard as (
        select b.id, min(greatest(coalesce(b.age_s, 0), 0)) as age_s
          from unnest(p_ids, checked_ages(p_ids, p_ages_s)) as b (id, age_s)
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

-- Refuses a sweep without a bound, or with a lease that everybody has outlived.
create function check_sweep(p_limit integer, p_lease_s double precision default null) returns void
language plpgsql immutable as $$
begin
    if p_limit is null then
        raise exception 'p_limit must be given' using errcode = '22004';
    elsif p_limit < 0 then
        raise exception 'p_limit must not be negative, as % is', p_limit using errcode = '22023';
    end if;
    -- to PostgreSQL, NaN is above infinity
    if p_lease_s <= 0 or p_lease_s >= 'infinity' then
        raise exception 'a lease must be a number of seconds above 0, not %', p_lease_s using errcode = '22023';
    end if;
end
$$;

create or replace function expire_stale_instances(
    p_lease_s double precision default null, p_limit integer default 1000)
returns table (instance_id uuid, logical_id text)
language plpgsql as $$
begin
    perform check_sweep(p_limit, p_lease_s);
    return query
    with stale as (
        select r.instance_id as id,
               extract(epoch from least(now(), m.beats_seen_at) - r.last_heartbeat) as silence_s
          from registry_instance r
          join cluster_metadata m on m.id = 1
         where r.status <> 'dead'
           and greatest(r.last_heartbeat, m.leases_from)
               < least(now(), m.beats_seen_at) - make_interval(secs => coalesce(p_lease_s, m.lease_s))
         order by r.instance_id
         limit p_limit
           for update of r skip locked
    )
    update registry_instance r
       set status = 'dead', cause = format('lease expired: silent for %s s', round(s.silence_s))
      from stale s
     where r.instance_id = s.id
    returning r.instance_id, r.logical_id;
end
$$;

create or replace function expire_old_epoch_instances(p_limit integer default 1000)
returns table (instance_id uuid, logical_id text)
language plpgsql as $$
begin
    perform check_sweep(p_limit);
    return query
    with old as (
        select r.instance_id as id, r.cluster_epoch as epoch
          from registry_instance r
          join cluster_epoch e on e.epoch = r.cluster_epoch
         where r.status <> 'dead' and e.retired_at is not null
         order by r.instance_id
         limit p_limit
           for update of r skip locked
    )
    update registry_instance r
       set status = 'dead', cause = format('epoch %s retired', o.epoch)
      from old o
     where r.instance_id = o.id
    returning r.instance_id, r.logical_id;
end
$$;
