-- Every statement the store sends, one name each. Parsed by seedcore/store/queries.py.

-- begin_registry: a registry starts; answers the epoch it works in, its term, and the lease before
select epoch, number, term, lease_before_s from begin_registry(%(ray_cluster)s, %(epoch)s, %(lease_s)s, %(idle_s)s);

-- renew_term: the registry of this term is at work, with this lease
select renew_term(%(term)s, %(lease_s)s);

-- set_current_epoch: flip discovery in one step
select set_current_epoch(fenced(%(term)s::bigint, %(epoch)s::text));

-- prepare_epoch: stage an epoch by name
select prepare_epoch(fenced(%(term)s::bigint, %(epoch)s::text));

-- list_epochs: the newest epochs with who lives in each
select e.epoch, e.number, e.staged_at, e.current_at, e.retired_at,
       (select count(*) from registry_instance r where r.cluster_epoch = e.epoch and r.status <> 'dead')
  from cluster_epoch e
 order by e.number desc
 limit %(limit)s;

-- renew_every_lease: our absence was nobody's silence
select renew_every_lease(%(term)s);

-- stamp: what a reader says about its answer
select now(), (select case when is_called then last_value else 0 end from registry_version), m.current_epoch, m.epoch_number
  from cluster_metadata m where m.id = 1;

-- epochs_of: where registrations belong that insist on no epoch; no row for those of the current one
with recursive asked as materialized (
    select a.ord, coalesce(a.epoch, (select r.cluster_epoch
                                       from registry_instance r
                                      where r.logical_id = a.logical_id and r.actor_id = a.actor_id
                                      order by r.started_at desc, r.instance_id
                                      limit 1)) as epoch
      from unnest(%(logical_ids)s::text[], %(actor_ids)s::text[], %(epochs)s::text[])
           with ordinality as a (logical_id, actor_id, epoch, ord)
), line as (
    select a.ord, e.epoch, e.retired_at, e.continued_by
      from asked a join cluster_epoch e on e.epoch = a.epoch
    union all
    select l.ord, e.epoch, e.retired_at, e.continued_by
      from line l join cluster_epoch e on e.epoch = l.continued_by
     where l.retired_at is not null
)
select ord, epoch from line where retired_at is null or continued_by is null;

-- register_many: one batch of registrations
select outcome, status::text, cluster_epoch, cause from register_instances(fenced(%(term)s::bigint, %(rows)s::jsonb)) order by ord;

-- set_status_many: one batch of status changes
select outcome, status::text, cluster_epoch, cause
  from set_instance_statuses(
      fenced(%(term)s::bigint, %(ids)s::uuid[]), %(statuses)s::instancestatus[], %(seqs)s::bigint[], %(causes)s::text[],
      %(hand)s::text, %(numbers)s::bigint[], %(untils)s::timestamptz[],
      %(ages_s)s::double precision[])
 order by ord;

-- refine_causes: tell better why these died
select explained::text
  from refine_causes(fenced(%(term)s::bigint, %(ids)s::uuid[]), %(causes)s::text[]) as explained;

-- beat_many: one batch of beats
select instance_id::text, outcome from beat_many(fenced(%(term)s::bigint, %(ids)s::uuid[]), %(ages_s)b::double precision[]);

-- expire_stale: declare dead whose lease is over
select instance_id::text from expire_stale_instances(%(lease_s)s, fenced(%(term)s::bigint, %(limit)s::integer));

-- expire_old_epochs: declare dead what belongs to a retired epoch
select instance_id::text from expire_old_epoch_instances(fenced(%(term)s::bigint, %(limit)s::integer));

-- prune_history: forget what ended long ago
select prune_history(%(keep_s)s::double precision, fenced(%(term)s::bigint, %(limit)s::integer));

-- list_instances: a page in key order; a lease is judged against the last beat anybody recorded
-- (no join: the planner misjudges its size and then sorts the whole table for each page)
select r.instance_id::text, r.logical_id, r.status::text, r.cluster_epoch, r.started_at, r.status_changed_at,
       r.last_heartbeat, r.seq, r.actor_name, r.namespace, r.actor_id, r.serve_route, r.organ_id, r.labels,
       r.metadata, r.node_id, host(r.ip_address), r.pid, r.stopped_at, r.cause,
       r.process_key, r.drain_until, r.held::text
  from registry_instance r
 where (%(statuses)s::instancestatus[] is null or r.status = any(%(statuses)s::instancestatus[]))
   and r.cluster_epoch = coalesce(%(epoch)s, (select m.current_epoch from cluster_metadata m where m.id = 1))
   and (%(organ_id)s::text is null or r.organ_id = %(organ_id)s)
   and (%(logical_id)s::text is null or r.logical_id = %(logical_id)s)
   and (%(node_id)s::text is null or r.node_id = %(node_id)s)
   and r.labels @> %(labels)s::jsonb
   and (%(selector)s = '[]' or labels_match(r.labels, %(selector)s::jsonb))
   and (not %(fresh_only)s or r.status = 'dead'
        or r.last_heartbeat >= (select least(now(), m.beats_seen_at) - make_interval(secs => m.lease_s)
                                  from cluster_metadata m where m.id = 1)
        or (select m.leases_from >= least(now(), m.beats_seen_at) - make_interval(secs => m.lease_s)
              from cluster_metadata m where m.id = 1))
   and (r.logical_id, r.instance_id) > (%(after_logical_id)s, %(after_instance_id)s::uuid)
 order by r.logical_id, r.instance_id
 limit %(limit)s;

-- load_live: a page of everything that is not dead
select r.instance_id::text, r.logical_id, r.status::text, r.cluster_epoch, r.started_at, r.status_changed_at,
       r.last_heartbeat, r.seq, r.actor_name, r.namespace, r.actor_id, r.serve_route, r.organ_id, r.labels,
       r.metadata, r.node_id, host(r.ip_address), r.pid, r.stopped_at, r.cause,
       r.process_key, r.drain_until, r.held::text
  from registry_instance r
 where r.status <> 'dead'
   and (r.logical_id, r.instance_id) > (%(after_logical_id)s, %(after_instance_id)s::uuid)
 order by r.logical_id, r.instance_id
 limit %(limit)s;

-- live_states: a page of what must be the same in memory
select r.logical_id, r.instance_id::text, r.status::text, r.seq, r.cluster_epoch
  from registry_instance r
 where r.status <> 'dead'
   and (r.logical_id, r.instance_id) > (%(after_logical_id)s, %(after_instance_id)s::uuid)
 order by r.logical_id, r.instance_id
 limit %(limit)s;

-- last_beats: when these were last heard by anybody
select r.instance_id::text, r.last_heartbeat
  from registry_instance r
 where r.instance_id = any(%(ids)s::uuid[]) and r.status <> 'dead';

-- best_instances: the best active instance of each of these agents
select r.instance_id::text, r.logical_id, r.status::text, r.cluster_epoch, r.started_at, r.status_changed_at,
       r.last_heartbeat, r.seq, r.actor_name, r.namespace, r.actor_id, r.serve_route, r.organ_id, r.labels,
       r.metadata, r.node_id, host(r.ip_address), r.pid, r.stopped_at, r.cause,
       r.process_key, r.drain_until, r.held::text
  from active_instance r
 where r.logical_id = any(%(logical_ids)s);

-- get_instance: one instance, dead or alive
select r.instance_id::text, r.logical_id, r.status::text, r.cluster_epoch, r.started_at, r.status_changed_at,
       r.last_heartbeat, r.seq, r.actor_name, r.namespace, r.actor_id, r.serve_route, r.organ_id, r.labels,
       r.metadata, r.node_id, host(r.ip_address), r.pid, r.stopped_at, r.cause,
       r.process_key, r.drain_until, r.held::text
  from registry_instance r
 where r.instance_id = %(instance_id)s::uuid;

-- history: the newest instances of an agent
select r.instance_id::text, r.logical_id, r.status::text, r.cluster_epoch, r.started_at, r.status_changed_at,
       r.last_heartbeat, r.seq, r.actor_name, r.namespace, r.actor_id, r.serve_route, r.organ_id, r.labels,
       r.metadata, r.node_id, host(r.ip_address), r.pid, r.stopped_at, r.cause,
       r.process_key, r.drain_until, r.held::text
  from registry_instance r
 where r.logical_id = %(logical_id)s
 order by r.started_at desc, r.instance_id
 limit %(limit)s;

-- deaths: who died, the last first
select r.instance_id::text, r.logical_id, r.status::text, r.cluster_epoch, r.started_at, r.status_changed_at,
       r.last_heartbeat, r.seq, r.actor_name, r.namespace, r.actor_id, r.serve_route, r.organ_id, r.labels,
       r.metadata, r.node_id, host(r.ip_address), r.pid, r.stopped_at, r.cause,
       r.process_key, r.drain_until, r.held::text
  from registry_instance r
 where r.status = 'dead'
   and (r.stopped_at, r.instance_id) < (%(before)s::timestamptz, %(before_id)s::uuid)
   and (%(within_s)s::double precision is null
        or r.stopped_at >= now() - make_interval(secs => %(within_s)s::double precision))
 order by r.stopped_at desc, r.instance_id desc
 limit %(limit)s;

-- transitions: the newest steps of an agent's instances
select t.instance_id::text, t.logical_id, t.from_status::text, t.to_status::text, t.seq, t.cause, t.at, t.until
  from registry_transition t
 where t.logical_id = %(logical_id)s
 order by t.id desc
 limit %(limit)s;
