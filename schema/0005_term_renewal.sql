-- A term is renewed by its registry, so that one whose holder is gone can be told from one that is held: a process
-- that was replaced but still started may take the newest term with it into its grave.

alter table cluster_metadata add column term_seen_at timestamptz not null default now();
comment on column cluster_metadata.term_seen_at is 'when the registry of the term was last seen at work, to a few seconds';

create function renew_term(p_term bigint) returns boolean
language plpgsql as $$
begin
    perform fenced(p_term, true);
    update cluster_metadata set term_seen_at = now() where id = 1;
    return true;
end
$$;

drop function begin_registry(text, text, double precision);

-- A registry starts and takes the next term: the same Ray cluster keeps the epoch, a new one rotates it (or takes
-- the one insisted on). Every lease starts again: nobody listened so far. With p_idle_s the term is taken only from
-- a registry that has not been seen at work for so many seconds.
create function begin_registry(
    p_ray_cluster text, p_epoch text, p_lease_s double precision, p_idle_s double precision default null)
returns table (epoch text, number bigint, term bigint)
language plpgsql as $$
declare
    meta   cluster_metadata;
    wanted text := p_epoch;
    serial bigint;
begin
    perform pg_advisory_xact_lock(1592639711);
    select * into strict meta from cluster_metadata where id = 1 for update;
    if exists (select from superseded_cluster c where c.ray_cluster = p_ray_cluster) then
        raise exception 'the Ray cluster % was replaced by % and cannot take the registry back',
            p_ray_cluster, meta.ray_cluster using errcode = 'SC006', detail = meta.term::text;
    end if;
    if p_idle_s is not null and meta.term_seen_at > clock_timestamp() - make_interval(secs => p_idle_s) then
        raise exception 'the registry of term % is at work', meta.term
            using errcode = 'SC006', detail = meta.term::text;
    end if;
    if meta.ray_cluster <> p_ray_cluster then
        insert into superseded_cluster (ray_cluster) values (meta.ray_cluster);
        delete from superseded_cluster c where c.superseded_at < now() - interval '90 days';
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
    return query select m.current_epoch, m.epoch_number, m.term from cluster_metadata m where m.id = 1;
end
$$;
