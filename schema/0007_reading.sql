-- Reading: the row that the registry reads, and the views for other programs.

create view instance_row as
select r.instance_id, r.logical_id, r.status, r.reported_status, r.holds, r.cluster_epoch, r.started_at, r.status_changed_at,
       r.last_heartbeat, r.stopped_at, r.seq, r.cause_kind, r.cause_detail, r.cause_by, r.actor_name, r.namespace, r.actor_id,
       r.serve_route, r.organ_id, r.labels, r.metadata, r.endpoints, r.node_id, host(r.ip_address) as ip_address, r.pid,
       r.process_key, r.dependencies
  from registry_instance r;
comment on view instance_row is 'An instance as seedcore/store/rows.py reads it. Later columns are appended.';

create view fleet as
select m.current_epoch, m.epoch_number, v.version, m.lease_s, m.term,
       case when m.leases_from < c.renewed_since then c.renewed_since else '-infinity' end as renewed_since, j.judged_at
  from cluster_metadata m
 -- a registry takes most beats: where it is away, a beat by SQL does not make the others silent
 cross join lateral (select least(now(), m.beats_seen_at, case when m.term > 0 then m.term_seen_at end) as judged_at) j
 cross join lateral (select j.judged_at - make_interval(secs => m.lease_s) as renewed_since) c
 cross join (select case when is_called then last_value else 0 end as version from registry_version) v
 where m.id = 1;
comment on view fleet is
    'One row: the current epoch, the version of the data, judged_at, the time at which leases are judged, and renewed_since: a '
    'lease is valid where last_heartbeat is not earlier.';

create view active_instances as
select r.*
  from registry_instance r
  join fleet f on f.current_epoch = r.cluster_epoch
 where r.status = 'alive' and r.last_heartbeat >= f.renewed_since;
comment on view active_instances is 'The routable instances: alive, in the current epoch, with a valid lease.';

create view active_instance as
select distinct on (a.logical_id) a.*
  from active_instances a
 order by a.logical_id, a.actor_name is null, a.started_at desc, a.instance_id;
comment on view active_instance is
    'The best routable instance of each agent: one with an actor to call, then the newest, then by id.';

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
comment on function labels_match(jsonb, jsonb) is
    'Whether labels fulfil every requirement of a selector: [{"key": ..., "op": "in|notin|exists|absent", "values": [...]}]. '
    'notin also matches labels without the key.';
