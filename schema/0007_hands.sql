-- A change that has no number of its agent's (an operator's, by way of a registry) is numbered by the registry that takes
-- it, so that a batch whose answer was lost can be sent again: what was applied is not applied twice.

alter table registry_instance
    add column hand         text check (length(hand) between 1 and 64),
    add column hand_number  bigint;
comment on column registry_instance.hand is
    'the registry process by whose way a change without a number of the agent''s was applied last; null: none was';
comment on column registry_instance.hand_number is 'that process''s own number of the change';

drop function set_instance_statuses(uuid[], instancestatus[], bigint[], text[]);

-- Batch form. A null seq is a change that did not come from the agent: it is guarded by the transition table, and, where
-- p_hand and its number are given, applied once. Answers one row for each change, in their order.
create function set_instance_statuses(
    p_ids uuid[], p_statuses instancestatus[], p_seqs bigint[], p_causes text[],
    p_hand text default null, p_numbers bigint[] default null)
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
       or cardinality(p_causes) <> cardinality(p_ids) or cardinality(p_numbers) <> cardinality(p_ids) then
        raise exception 'there must be as many statuses, seqs, causes and numbers as instance ids'
            using errcode = '22023';
    end if;
    if exists (select from unnest(p_seqs) as s (seq) where s.seq < 0) then
        raise exception 'seq must not be negative' using errcode = '22023';
    end if;
    for r in
        select c.id, c.wanted, c.seq, c.why, c.number, c.ord as position
          from unnest(p_ids, p_statuses, p_seqs, p_causes, p_numbers)
               with ordinality as c (id, wanted, seq, why, number, ord)
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
        elsif existing.status = r.wanted then
            if r.seq is not null then
                update registry_instance i set seq = r.seq where i.instance_id = r.id;
            end if;
            outcome := 'unchanged';
        elsif existing.status = 'dead' then
            outcome := 'dead';
        elsif not status_may_become(existing.status, r.wanted) then
            outcome := 'forbidden';
        else
            update registry_instance i
               set status = r.wanted, seq = coalesce(r.seq, i.seq), cause = r.why,
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

create or replace view active_instances as
select r.instance_id, r.logical_id, r.cluster_epoch, r.status, r.seq, r.actor_name, r.namespace, r.actor_id,
       r.serve_route, r.organ_id, r.labels, r.metadata, r.node_id, r.ip_address, r.pid, r.started_at,
       r.status_changed_at, r.last_heartbeat, r.stopped_at, r.cause, r.version, r.process_key, r.hand,
       r.hand_number
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
       a.hand_number
  from active_instances a
 order by a.logical_id, a.actor_name is null, a.started_at desc, a.instance_id;
