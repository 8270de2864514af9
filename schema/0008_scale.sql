-- Beats at size: one pass over the rows where there were two, and a lease that follows the registry's beat rate.

-- Batch form: renews leases, each heard p_ages_s seconds ago; the newest time wins. Answers only those that renewed
-- nothing, as 'unknown' or 'dead'. Rows are locked in key order, so that two writers cannot deadlock: the ordered ids
-- drive a nested loop, which the settings of the function leave as the only plan.
create or replace function beat_many(p_ids uuid[], p_ages_s double precision[] default null)
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

drop function renew_term(bigint);

-- The registry of a term is at work, with a lease of so many seconds (null: as before).
create function renew_term(p_term bigint, p_lease_s double precision default null) returns boolean
language plpgsql as $$
begin
    perform fenced(p_term, true);
    update cluster_metadata set term_seen_at = now(), lease_s = coalesce(p_lease_s, lease_s) where id = 1;
    return true;
end
$$;

-- History is kept for as long as the registry is told to, and pruned a bounded number of rows at a time.

create index registry_instance_ended on registry_instance (stopped_at) where status = 'dead';

alter table registry_transition set (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_insert_scale_factor = 0.1
);

-- Forgets transitions, and instances that are dead, of more than p_keep_s seconds ago: at most p_limit of each, the
-- oldest first. Answers how many it forgot.
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
    -- only the oldest are looked at, whether they are old enough or not
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
