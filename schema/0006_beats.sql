-- Beats and what follows from their absence: renewing leases, expiring instances, and pruning the history.

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
    -- to PostgreSQL, NaN is greater than every number
    if exists (select from unnest(p_ages_s) as a (age_s) where a.age_s not between -1 and 1e9) then
        raise exception 'ages of beats must be from 0 to 1e9 seconds' using errcode = '22023';
    end if;
    return p_ages_s;
end
$$;
comment on function checked_ages(uuid[], double precision[]) is
    'The ages of a batch of beats. Raises 22023 for a beat from the future, which would outlive its agent; two readings of a clock '
    'may differ by a second.';

-- the ordered ids drive a nested loop, which these settings leave as the only plan: rows are locked in the order of their
-- keys, so that two batches cannot deadlock
create function beat_many(p_ids uuid[], p_ages_s double precision[] default null)
returns table (instance_id uuid, outcome text)
language plpgsql
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
    renewed bigint;
begin
    update registry_instance r
       set last_heartbeat = greatest(r.last_heartbeat, now() - make_interval(secs => h.age_s))
      from (select b.id, greatest(coalesce(b.age_s, 0), 0) as age_s
              from unnest(p_ids, checked_ages(p_ids, p_ages_s)) as b (id, age_s)
             order by b.id, 2) h
     where r.instance_id = h.id and r.status <> 'dead';
    get diagnostics renewed = row_count;
    if renewed > 0 or exists (select from registry_instance r where r.instance_id = any(p_ids)) then
        update cluster_metadata m
           set beats_seen_at = now()
          from (select id from cluster_metadata
                 where id = 1 and beats_seen_at < now() - interval '1 second'
                   for update skip locked) due
         where m.id = due.id;
    end if;
    if renewed < cardinality(p_ids) then
        return query
            select distinct b.id, case when r.instance_id is null then 'unknown' else 'dead' end
              from unnest(p_ids) as b (id)
              left join registry_instance r on r.instance_id = b.id
             where r.instance_id is null or r.status = 'dead';
    end if;
end
$$;
comment on function beat_many(uuid[], double precision[]) is
    'Renews the leases of a batch; p_ages_s: how many seconds ago each beat was received. The newest beat counts. Returns only '
    'those that renewed nothing, as unknown or dead.';

create function beat(p_instance_id uuid) returns text
language sql as $$
    select coalesce((select outcome from beat_many(array[p_instance_id])), 'renewed')
$$;
comment on function beat(uuid) is 'Renews the lease of one instance. Returns renewed, unknown or dead.';

create function check_sweep(p_limit integer, p_lease_s double precision default null) returns void
language plpgsql immutable as $$
begin
    if p_limit is null then
        raise exception 'p_limit must be given' using errcode = '22004';
    elsif p_limit < 0 then
        raise exception 'p_limit must not be negative, as % is', p_limit using errcode = '22023';
    end if;
    -- to PostgreSQL, NaN is greater than infinity
    if p_lease_s <= 0 or p_lease_s >= 'infinity' then
        raise exception 'a lease must be a number of seconds above 0, not %', p_lease_s using errcode = '22023';
    end if;
end
$$;
comment on function check_sweep(integer, double precision) is 'Raises 22004 or 22023 for a sweep without a sensible bound or lease.';

create function expire_stale_instances(p_lease_s double precision default null, p_limit integer default 1000)
returns table (instance_id uuid, logical_id text)
language plpgsql as $$
begin
    perform check_sweep(p_limit, p_lease_s);
    return query
    with judged as materialized (
        select f.judged_at as at from fleet f
    ), stale as (
        select r.instance_id as id,
               extract(epoch from j.at - r.last_heartbeat) as silence_s
          from registry_instance r
          join cluster_metadata m on m.id = 1
         cross join judged j
         where r.status <> 'dead'
           and greatest(r.last_heartbeat, m.leases_from)
               < j.at - make_interval(secs => coalesce(p_lease_s, m.lease_s))
         order by r.instance_id
         limit p_limit
           for update of r skip locked
    )
    update registry_instance r
       set reported_status = 'dead', cause_kind = 'lease_expired', cause_by = null,
           cause_detail = format('no beat for %s s', round(s.silence_s))
      from stale s
     where r.instance_id = s.id
    returning r.instance_id, r.logical_id;
end
$$;
comment on function expire_stale_instances(double precision, integer) is
    'Declares instances dead whose lease has expired, at most p_limit of them; p_lease_s null: the lease of the fleet. Leases are '
    'judged at the time of the last recorded beat, and not after the registry was last seen at work, so none expires while the '
    'registry is down.';

create function expire_old_epoch_instances(p_limit integer default 1000)
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
       set reported_status = 'dead', cause_kind = 'epoch_retired', cause_by = null, cause_detail = o.epoch
      from old o
     where r.instance_id = o.id
    returning r.instance_id, r.logical_id;
end
$$;
comment on function expire_old_epoch_instances(integer) is
    'Declares instances of retired epochs dead, at most p_limit of them.';

create function prune_history(p_keep_s double precision, p_limit integer default 5000) returns bigint
language plpgsql as $$
declare
    transitions bigint;
    instances   bigint;
begin
    if p_keep_s is null or p_keep_s < 0 or p_keep_s > 1e11 or p_keep_s = 'NaN' then
        raise exception 'history must be kept for 0 to 1e11 seconds' using errcode = '22023';
    end if;
    if p_limit is null or p_limit < 1 then
        raise exception 'a limit must be at least 1' using errcode = '22023';
    end if;
    -- only the oldest rows are read, whether they are old enough or not
    delete from registry_transition t
     using (select o.id, o.at from registry_transition o order by o.id limit p_limit) oldest
     where t.id = oldest.id and oldest.at < now() - make_interval(secs => p_keep_s);
    get diagnostics transitions = row_count;
    delete from registry_instance r
     where r.instance_id in (
        select o.instance_id from registry_instance o
         where o.status = 'dead' and o.stopped_at < now() - make_interval(secs => p_keep_s)
         order by o.stopped_at
         limit p_limit
           for update skip locked);
    get diagnostics instances = row_count;
    return transitions + instances;
end
$$;
comment on function prune_history(double precision, integer) is
    'Deletes transitions, and dead instances, of more than p_keep_s seconds ago, the oldest first: at most p_limit of each. Returns '
    'how many.';
