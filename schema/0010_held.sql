-- Who drains by an operator's order stays so until the order ends: what the agent itself says meanwhile is noted, and counts
-- from then on. And what a database that was away is told late keeps the time at which it happened.

alter table registry_instance add column held instancestatus;
comment on column registry_instance.held is
    'draining by another hand than the agent''s: what it says itself meanwhile, and is again once that has ended';

alter table registry_transition add column until timestamptz;
comment on column registry_transition.until is 'when the draining that begins here ends by itself';

update registry_instance set held = 'alive' where drain_until is not null;

drop function set_instance_statuses(uuid[], instancestatus[], bigint[], text[], text, bigint[], timestamptz[]);

-- Batch form. A null seq is a change that did not come from the agent: it is guarded by the transition table, and, where
-- p_hand and its number are given, applied once. Such a draining holds: what the agent says meanwhile is kept in `held`,
-- and is what ends it gives back. p_untils says when a draining ends by itself; one that lasts already can be given another
-- end, and another cause. p_ages says how many seconds ago it happened. Answers one row for each change, in their order.
create function set_instance_statuses(
    p_ids uuid[], p_statuses instancestatus[], p_seqs bigint[], p_causes text[],
    p_hand text default null, p_numbers bigint[] default null, p_untils timestamptz[] default null,
    p_ages double precision[] default null)
returns table (ord bigint, outcome text, status instancestatus, cluster_epoch text, cause text)
language plpgsql as $$
declare
    r        record;
    existing registry_instance;
    becomes  instancestatus;
    keeps    instancestatus;
begin
    if p_ids is null or p_statuses is null
       or array_position(p_ids, null) is not null or array_position(p_statuses, null) is not null then
        raise exception 'instance ids and statuses must be given' using errcode = '22004';
    end if;
    if cardinality(p_statuses) <> cardinality(p_ids) or cardinality(p_seqs) <> cardinality(p_ids)
       or cardinality(p_causes) <> cardinality(p_ids) or cardinality(p_numbers) <> cardinality(p_ids)
       or cardinality(p_untils) <> cardinality(p_ids) or cardinality(p_ages) <> cardinality(p_ids) then
        raise exception 'there must be as many statuses, seqs, causes, numbers, ends and ages as instance ids'
            using errcode = '22023';
    end if;
    if exists (select from unnest(p_seqs) as s (seq) where s.seq < 0) then
        raise exception 'seq must not be negative' using errcode = '22023';
    end if;
    if exists (select from unnest(p_ages) as a (age) where not a.age between 0 and 1e9) then
        raise exception 'ages must be from 0 to 1e9 seconds' using errcode = '22023';
    end if;
    if exists (select from unnest(p_statuses, p_untils) as u (wanted, ends_at)
                where u.ends_at is not null and (u.wanted <> 'draining' or not isfinite(u.ends_at))) then
        raise exception 'only draining ends by itself, at a time that comes' using errcode = '22023';
    end if;
    for r in
        select c.id, c.wanted, c.seq, c.why, c.number, c.ends_at, c.ord as position,
               now() - make_interval(secs => coalesce(c.age, 0)) as happened_at
          from unnest(p_ids, p_statuses, p_seqs, p_causes, p_numbers, p_untils, p_ages)
               with ordinality as c (id, wanted, seq, why, number, ends_at, age, ord)
         order by c.id, c.ord
    loop
        ord := r.position;
        select * into existing from registry_instance i where i.instance_id = r.id for update;
        status := existing.status;
        cluster_epoch := existing.cluster_epoch;
        cause := existing.cause;
        becomes := r.wanted;
        keeps := null;
        if r.seq is null and r.wanted = 'draining' then
            keeps := coalesce(existing.held, existing.status);
        elsif r.seq is null and r.wanted = 'alive' then
            becomes := coalesce(existing.held, 'alive');
        end if;
        if existing.instance_id is null then
            outcome := 'unknown';
        elsif r.seq is not null and r.seq <= existing.seq then
            outcome := 'unchanged';
        elsif r.seq is null and existing.hand = p_hand and r.number <= existing.hand_number then
            outcome := 'unchanged';
        elsif existing.held is not null and r.seq is not null and r.wanted in ('alive', 'draining') then
            update registry_instance i set seq = r.seq, held = r.wanted where i.instance_id = r.id;
            outcome := 'unchanged';
        elsif existing.status = becomes and existing.drain_until is not distinct from r.ends_at
              and existing.held is not distinct from keeps
              and (keeps is null or existing.cause is not distinct from r.why) then
            if r.seq is not null then
                update registry_instance i set seq = r.seq where i.instance_id = r.id;
            end if;
            outcome := 'unchanged';
        elsif existing.status = 'dead' then
            outcome := 'dead';
        elsif existing.status <> becomes and becomes = r.wanted and not status_may_become(existing.status, becomes) then
            outcome := 'forbidden';
        else
            update registry_instance i
               set status = becomes, seq = coalesce(r.seq, i.seq), cause = r.why, drain_until = r.ends_at, held = keeps,
                   status_changed_at = case when i.status = becomes then i.status_changed_at
                                            else greatest(i.status_changed_at + interval '1 microsecond', r.happened_at) end,
                   last_heartbeat = case when r.seq is null then i.last_heartbeat else now() end,
                   hand = case when r.seq is null and r.number is not null then p_hand else i.hand end,
                   hand_number = case when r.seq is null and r.number is not null then r.number else i.hand_number end
             where i.instance_id = r.id;
            outcome := 'applied';
            status := becomes;
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
              and ((new.held is null) <> (old.held is null)
                   or (new.drain_until, new.cause) is distinct from (old.drain_until, old.cause))) then
        insert into registry_transition (instance_id, logical_id, from_status, to_status, seq, cause, until, at)
        values (new.instance_id, new.logical_id, old.status, new.status, nullif(new.seq, old.seq), new.cause,
                new.drain_until, case when new.status = old.status then now() else new.status_changed_at end);
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
        -- whoever had not said that it is ready when it was held is not handed out once that ends
        if not status_may_become(old.status, new.status)
           and not (old.status = 'draining' and new.status = 'starting' and old.held = 'starting') then
            raise exception 'instance % is % and cannot become %', old.instance_id, old.status, new.status
                using errcode = 'SC002';
        end if;
        if new.status_changed_at = old.status_changed_at then
            new.status_changed_at := now();
        end if;
        new.version := nextval('registry_version');
        if new.status = 'dead' then
            new.stopped_at := new.status_changed_at;
        end if;
        if new.status <> 'draining' then
            new.drain_until := null;
            new.held := null;
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
