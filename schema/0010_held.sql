-- Who drains by an operator's order stays so until the order ends: what the agent itself says of being ready is noted, and
-- counts from then on. An agent that drains on its own account ends that by itself.

alter table registry_instance add column held boolean not null default false;
comment on column registry_instance.held is
    'draining by another hand than the agent''s: its own word of being alive is noted and does not end that';

update registry_instance set held = true where drain_until is not null;

-- Batch form. A null seq is a change that did not come from the agent: it is guarded by the transition table, and, where
-- p_hand and its number are given, applied once. p_untils says when a draining ends by itself; one that lasts already
-- can be given another end, and another cause. Answers one row for each change, in their order.
create or replace function set_instance_statuses(
    p_ids uuid[], p_statuses instancestatus[], p_seqs bigint[], p_causes text[],
    p_hand text default null, p_numbers bigint[] default null, p_untils timestamptz[] default null)
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
       or cardinality(p_causes) <> cardinality(p_ids) or cardinality(p_numbers) <> cardinality(p_ids)
       or cardinality(p_untils) <> cardinality(p_ids) then
        raise exception 'there must be as many statuses, seqs, causes, numbers and ends as instance ids'
            using errcode = '22023';
    end if;
    if exists (select from unnest(p_seqs) as s (seq) where s.seq < 0) then
        raise exception 'seq must not be negative' using errcode = '22023';
    end if;
    if exists (select from unnest(p_statuses, p_untils) as u (wanted, ends_at)
                where u.ends_at is not null and (u.wanted <> 'draining' or not isfinite(u.ends_at))) then
        raise exception 'only draining ends by itself, at a time that comes' using errcode = '22023';
    end if;
    for r in
        select c.id, c.wanted, c.seq, c.why, c.number, c.ends_at, c.ord as position,
               c.seq is null and c.wanted = 'draining' as holds
          from unnest(p_ids, p_statuses, p_seqs, p_causes, p_numbers, p_untils)
               with ordinality as c (id, wanted, seq, why, number, ends_at, ord)
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
        elsif r.seq is null and existing.hand = p_hand and r.number <= existing.hand_number then
            outcome := 'unchanged';
        elsif (existing.held and r.seq is not null and r.wanted = 'alive')
              or (existing.status = r.wanted and existing.drain_until is not distinct from r.ends_at
                  and existing.held = r.holds and (not r.holds or existing.cause is not distinct from r.why)) then
            if r.seq is not null then
                update registry_instance i set seq = r.seq where i.instance_id = r.id;
            end if;
            outcome := 'unchanged';
        elsif existing.status = 'dead' then
            outcome := 'dead';
        elsif existing.status <> r.wanted and not status_may_become(existing.status, r.wanted) then
            outcome := 'forbidden';
        else
            update registry_instance i
               set status = r.wanted, seq = coalesce(r.seq, i.seq), cause = r.why, drain_until = r.ends_at,
                   held = r.holds,
                   last_heartbeat = case when r.seq is null then i.last_heartbeat else now() end,
                   hand = case when r.seq is null and r.number is not null then p_hand else i.hand end,
                   hand_number = case when r.seq is null and r.number is not null then r.number else i.hand_number end
             where i.instance_id = r.id;
            outcome := 'applied';
            status := r.wanted;
            cause := r.why;
        end if;
        return next;
    end loop;
end
$$;

-- Another end or another reason of a draining is a step of its own in the history.
create or replace function registry_instance_remember() returns trigger
language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        insert into registry_transition (instance_id, logical_id, to_status, seq, cause)
        values (new.instance_id, new.logical_id, new.status, new.seq, new.cause);
    elsif new.status <> old.status
          or (new.status = 'draining'
              and (new.drain_until, new.held, new.cause) is distinct from (old.drain_until, old.held, old.cause)) then
        insert into registry_transition (instance_id, logical_id, from_status, to_status, seq, cause)
        values (new.instance_id, new.logical_id, old.status, new.status, nullif(new.seq, old.seq), new.cause);
    end if;
    return null;
end
$$;

create or replace function registry_instance_guard() returns trigger
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
        if new.status <> 'draining' then
            new.drain_until := null;
            new.held := false;
        end if;
    end if;
    return new;
end
$$;

create or replace view active_instances as
select r.instance_id, r.logical_id, r.cluster_epoch, r.status, r.seq, r.actor_name, r.namespace, r.actor_id,
       r.serve_route, r.organ_id, r.labels, r.metadata, r.node_id, r.ip_address, r.pid, r.started_at,
       r.status_changed_at, r.last_heartbeat, r.stopped_at, r.cause, r.version, r.process_key, r.hand,
       r.hand_number, r.drain_until, r.held
  from registry_instance r
  join cluster_metadata m on m.id = 1
 where r.cluster_epoch = m.current_epoch
   and r.status = 'alive'
   and greatest(r.last_heartbeat, m.leases_from)
       >= least(now(), m.beats_seen_at) - make_interval(secs => m.lease_s);

create or replace view active_instance as
select distinct on (a.logical_id)
       a.instance_id, a.logical_id, a.cluster_epoch, a.status, a.seq, a.actor_name, a.namespace, a.actor_id,
       a.serve_route, a.organ_id, a.labels, a.metadata, a.node_id, a.ip_address, a.pid, a.started_at,
       a.status_changed_at, a.last_heartbeat, a.stopped_at, a.cause, a.version, a.process_key, a.hand,
       a.hand_number, a.drain_until, a.held
  from active_instances a
 order by a.logical_id, a.actor_name is null, a.started_at desc, a.instance_id;
