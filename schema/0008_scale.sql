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
