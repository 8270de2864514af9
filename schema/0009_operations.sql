-- What operators do: an agent is drained for a while, and the cause of a death is told better once it is known.

alter table registry_instance add column drain_until timestamptz;
comment on column registry_instance.drain_until is
    'when its draining ends by itself: the registry at work makes it alive again; null: not by itself';

drop function set_instance_statuses(uuid[], instancestatus[], bigint[], text[], text, bigint[]);

-- Batch form. A null seq is a change that did not come from the agent: it is guarded by the transition table, and, where
-- p_hand and its number are given, applied once. p_untils says when a draining ends by itself; one that lasts already
-- can be given another end, and then another cause. Answers one row for each change, in their order.
create function set_instance_statuses(
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
        select c.id, c.wanted, c.seq, c.why, c.number, c.ends_at, c.ord as position
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
        elsif existing.status = r.wanted and existing.drain_until is not distinct from r.ends_at then
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

drop function set_instance_status(uuid, instancestatus, bigint, text);

-- For psql and other programs: answers 'applied' or 'unchanged', or raises.
create function set_instance_status(
    p_instance_id uuid, p_status instancestatus, p_seq bigint default null, p_cause text default null,
    p_until timestamptz default null)
returns text
language plpgsql as $$
declare
    r record;
begin
    if p_instance_id is null or p_status is null then
        raise exception 'instance id and status must be given' using errcode = '22004';
    end if;
    select * into strict r
      from set_instance_statuses(
          array[p_instance_id], array[p_status], array[p_seq], array[p_cause], p_untils => array[p_until]);
    case r.outcome
        when 'applied', 'unchanged' then return r.outcome;
        when 'unknown' then
            raise exception 'instance % is not registered', p_instance_id using errcode = 'SC001';
        when 'dead', 'forbidden' then
            raise exception 'instance % is % and cannot become %', p_instance_id, r.status, p_status
                using errcode = 'SC002';
    end case;
end
$$;

-- Another end of a draining is a step of its own in the history.
create or replace function registry_instance_remember() returns trigger
language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        insert into registry_transition (instance_id, logical_id, to_status, seq, cause)
        values (new.instance_id, new.logical_id, new.status, new.seq, new.cause);
    elsif new.status <> old.status or new.drain_until is distinct from old.drain_until then
        insert into registry_transition (instance_id, logical_id, from_status, to_status, seq, cause)
        values (new.instance_id, new.logical_id, old.status, new.status, nullif(new.seq, old.seq), new.cause);
    end if;
    return null;
end
$$;

-- Tells better why instances died: what is known of a death at once (a process ended) is not all that is known a moment
-- later (why Ray ended it). It only adds to the cause that is there. Answers the ids of those whose cause it is now.
create function refine_causes(p_ids uuid[], p_causes text[]) returns setof uuid
language plpgsql as $$
declare
    r record;
begin
    if p_ids is null or p_causes is null
       or array_position(p_ids, null) is not null or array_position(p_causes, null) is not null then
        raise exception 'instance ids and causes must be given' using errcode = '22004';
    end if;
    if cardinality(p_causes) <> cardinality(p_ids) then
        raise exception 'there must be as many causes as instance ids' using errcode = '22023';
    end if;
    for r in select e.id, e.cause from unnest(p_ids, p_causes) as e (id, cause) order by e.id loop
        update registry_instance i set cause = r.cause where i.instance_id = r.id and i.status = 'dead' and starts_with(r.cause, i.cause);
        if found then
            update registry_transition t
               set cause = r.cause
             where t.logical_id = (select i.logical_id from registry_instance i where i.instance_id = r.id)
               and t.instance_id = r.id and t.to_status = 'dead';
            return next r.id;
        end if;
    end loop;
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
        end if;
    end if;
    return new;
end
$$;

-- Whether labels fulfil every requirement of a selector: [{"key": ..., "op": "in|notin|exists|absent", "values": [...]}].
-- One that names values it does not want also takes labels without the key.
create function labels_match(p_labels jsonb, p_requirements jsonb) returns boolean
language sql immutable parallel safe as $$
    select not exists (
        select from jsonb_to_recordset(p_requirements) as q (key text, op text, "values" jsonb)
         where not case q.op
                   when 'in' then p_labels ? q.key and q.values ? (p_labels ->> q.key)
                   when 'notin' then not (p_labels ? q.key and q.values ? (p_labels ->> q.key))
                   when 'exists' then p_labels ? q.key
                   when 'absent' then not p_labels ? q.key
                   end)
$$;

create or replace view active_instances as
select r.instance_id, r.logical_id, r.cluster_epoch, r.status, r.seq, r.actor_name, r.namespace, r.actor_id,
       r.serve_route, r.organ_id, r.labels, r.metadata, r.node_id, r.ip_address, r.pid, r.started_at,
       r.status_changed_at, r.last_heartbeat, r.stopped_at, r.cause, r.version, r.process_key, r.hand,
       r.hand_number, r.drain_until
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
       a.hand_number, a.drain_until
  from active_instances a
 order by a.logical_id, a.actor_name is null, a.started_at desc, a.instance_id;
