-- An epoch ends in one of two ways. A flip retires its fleet. A registry that takes the database over for its own Ray
-- cluster names another epoch, and decides nothing about agents that live and can reach it: they go on in the new one.

alter table cluster_epoch add column continued_by text;
comment on column cluster_epoch.continued_by is
    'the epoch in which its agents go on, after a registry took the database over; null: a flip retired them';

-- A registry starts and takes the next term: the same Ray cluster keeps the epoch, a new one names another that
-- continues it (or flips to the one insisted on). A cluster that was superseded takes the database back only with
-- p_idle_s, where the registry in force was not seen at work for so long.
create or replace function begin_registry(
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
    -- without p_idle_s the other counts as at work
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
    if p_epoch is null and wanted is not null then
        update cluster_epoch e set continued_by = wanted where e.epoch = meta.current_epoch;
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
