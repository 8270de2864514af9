-- Fencing: a registry that starts takes the next term, and writes of an older one are refused. Grace: every lease
-- may be started again in one step, after an absence of the registry.
--
-- Errors raised here carry their own SQLSTATE:
--   SC006 superseded (the detail is the term in force)

alter table cluster_metadata
    add column term         bigint not null default 0,
    add column leases_from  timestamptz not null default now();
comment on column cluster_metadata.term is 'the number of the registry that may write';
comment on column cluster_metadata.leases_from is
    'silence counts from here at the earliest: an absence of the registry is nobody''s silence';

-- Ray clusters whose registry lost the database to that of a newer cluster. They do not take it back.
create table superseded_cluster (
    ray_cluster    text primary key,
    superseded_at  timestamptz not null default now()
);

-- Hands its value on unless a newer registry has started; null is a hand without a term, and not checked. The
-- lock, held to the end of the transaction, makes a starting registry wait for writes that passed.
create function fenced(p_term bigint, p_value anyelement) returns anyelement
language plpgsql as $$
declare
    in_force bigint;
begin
    if p_term is null then
        return p_value;
    end if;
    perform pg_advisory_xact_lock_shared(1592639711);
    -- a statement of its own, so that it sees what was committed while the lock was waited for
    select m.term into strict in_force from cluster_metadata m where m.id = 1;
    if p_term <> in_force then
        raise exception 'the registry of term % is superseded by that of term %', p_term, in_force
            using errcode = 'SC006', detail = in_force::text;
    end if;
    return p_value;
end
$$;

drop function begin_registry(text, text, double precision);

-- A registry starts and takes the next term: the same Ray cluster keeps the epoch, a new one rotates it (or takes
-- the one insisted on). Every lease starts again: nobody listened so far.
create function begin_registry(p_ray_cluster text, p_epoch text, p_lease_s double precision)
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
           updated_at = now()
     where m.id = 1;
    return query select m.current_epoch, m.epoch_number, m.term from cluster_metadata m where m.id = 1;
end
$$;

-- Every lease starts again, after an absence of ours; answers when.
create function renew_every_lease(p_term bigint default null) returns timestamptz
language plpgsql as $$
declare
    since timestamptz;
begin
    perform fenced(p_term, true);
    update cluster_metadata set leases_from = now() where id = 1 returning leases_from into since;
    return since;
end
$$;

-- Names an epoch that shall become current later; answers whether it is new. Refused for a retired one.
create function prepare_epoch(p_epoch text) returns boolean
language plpgsql as $$
declare
    was_known boolean;
    problem   text;
begin
    if p_epoch is null or length(p_epoch) not between 1 and 128 then
        raise exception 'an epoch must have 1 to 128 characters' using errcode = '22023';
    end if;
    perform 1 from cluster_metadata where id = 1 for update;
    select exists (select from cluster_epoch where epoch = p_epoch) into was_known;
    problem := stage_epoch(p_epoch);
    if problem = 'retired_epoch' then
        raise exception 'epoch % is retired and cannot come back', p_epoch using errcode = 'SC004';
    elsif problem is not null then
        raise exception 'epoch % cannot be staged: 64 are staged already', p_epoch using errcode = 'SC005';
    end if;
    return not was_known;
end
$$;

create or replace view active_instances as
select r.instance_id, r.logical_id, r.cluster_epoch, r.status, r.seq, r.actor_name, r.namespace, r.actor_id,
       r.serve_route, r.organ_id, r.labels, r.metadata, r.node_id, r.ip_address, r.pid, r.started_at,
       r.status_changed_at, r.last_heartbeat, r.stopped_at, r.cause, r.version
  from registry_instance r
  join cluster_metadata m on m.id = 1
 where r.cluster_epoch = m.current_epoch
   and r.status = 'alive'
   and greatest(r.last_heartbeat, m.leases_from)
       >= least(now(), m.beats_seen_at) - make_interval(secs => m.lease_s);

-- Declares dead whose lease is over, at most p_limit of them; answers whom. Without p_lease_s the fleet's
-- lease counts. Silence is judged as in the views: nobody dies of the registry's absence.
create or replace function expire_stale_instances(
    p_lease_s double precision default null, p_limit integer default 1000)
returns table (instance_id uuid, logical_id text)
language sql as $$
    with stale as (
        select r.instance_id as id,
               extract(epoch from least(now(), m.beats_seen_at) - r.last_heartbeat) as silence_s
          from registry_instance r
          join cluster_metadata m on m.id = 1
         where r.status <> 'dead'
           and greatest(r.last_heartbeat, m.leases_from)
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
