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

-- A Ray cluster that was replaced does not take the database back while the registry that replaced it is at work; once
-- that has not been seen for p_idle_s seconds, it does, with a new epoch: two clusters that started while the database
-- was away may have come in either order. Answers also the lease that was in force, by which agents still beat; null
-- where no registry was here before.
drop function begin_registry(text, text, double precision, double precision);

create function begin_registry(
    p_ray_cluster text, p_epoch text, p_lease_s double precision, p_idle_s double precision default null)
returns table (epoch text, number bigint, term bigint, lease_before_s double precision)
language plpgsql as $$
declare
    meta       cluster_metadata;
    wanted     text := p_epoch;
    serial     bigint;
    is_at_work boolean;
begin
    perform pg_advisory_xact_lock(1592639711);
    select * into strict meta from cluster_metadata where id = 1 for update;
    -- without p_idle_s nobody is asked whether the other still works
    is_at_work := coalesce(meta.term_seen_at > clock_timestamp() - make_interval(secs => p_idle_s), true);
    if is_at_work and exists (select from superseded_cluster c where c.ray_cluster = p_ray_cluster) then
        raise exception 'the Ray cluster % was replaced by % and cannot take the registry back',
            p_ray_cluster, meta.ray_cluster using errcode = 'SC006', detail = meta.term::text;
    end if;
    if is_at_work and p_idle_s is not null then
        raise exception 'the registry of term % is at work', meta.term
            using errcode = 'SC006', detail = meta.term::text;
    end if;
    if meta.ray_cluster <> p_ray_cluster then
        delete from superseded_cluster c
         where c.ray_cluster = p_ray_cluster or c.superseded_at < now() - interval '90 days';
        insert into superseded_cluster (ray_cluster) values (meta.ray_cluster) on conflict do nothing;
        if wanted is null then
            select max(e.number) + 1 into serial from cluster_epoch e;
            loop
                wanted := 'epoch-' || serial;
                exit when not exists (select from cluster_epoch e where e.epoch = wanted);
                serial := serial + 1;
            end loop;
        end if;
    end if;
    if wanted is not null then
        perform set_current_epoch(wanted);
    end if;
    update cluster_metadata m
       set ray_cluster = p_ray_cluster, lease_s = p_lease_s, term = m.term + 1, leases_from = now(),
           term_seen_at = now(), updated_at = now()
     where m.id = 1;
    return query
        select m.current_epoch, m.epoch_number, m.term,
               case when meta.ray_cluster is not null then meta.lease_s end
          from cluster_metadata m where m.id = 1;
end
$$;
