-- Every statement that the store sends, by name. Parsed by seedcore/store/queries.py.

-- begin_registry: a registry starts; returns its epoch, its term, the lease before, its commit, the one before, whether the last term was its own, and the database
select epoch, number, term, lease_before_s, commits, found_commits, found_own, database_id
  from begin_registry(%(ray_cluster)s, %(epoch)s, %(lease_s)s, %(seen_term)s, %(seen_at)s, %(writer_id)s, %(term)s,
                      %(commits)s, %(new_epoch)s);

-- term_seen: the term in force, and when its registry was last seen at work
select term, term_seen_at from cluster_metadata where id = 1;

-- begin_write: the first statement of each transaction of a registry; returns the number of the commit
select begin_write(%(term)s, %(writer_id)s, %(commits)s, %(counts)s);

-- renew_term: the registry of this term is at work, with this lease
select renew_term(%(lease_s)s);

-- set_current_epoch: flip discovery in one step
select set_current_epoch(%(epoch)s::text, %(above)s::bigint);

-- stage_epoch: name an epoch that will become current later
select stage_epoch(%(epoch)s::text);

-- list_epochs: the newest epochs with the number of their live instances
select e.epoch, e.number, e.staged_at, e.current_at, e.retired_at,
       (select count(*) from registry_instance r where r.cluster_epoch = e.epoch and r.status <> 'dead')
  from cluster_epoch e
 order by e.number desc
 limit %(limit)s;

-- renew_every_lease: renew every lease, because the registry was down
select renew_every_lease();

-- stamp: the time, the version and the epoch of an answer
select now(), f.version, f.current_epoch, f.epoch_number from fleet f;

-- epochs_of: the epochs of registrations that require none; no row for those of the current one
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
select o.* from register_instances(%(rows)s::jsonb) as o order by o.ord;

-- set_status_many: one batch of reported statuses
select o.*
  from set_instance_statuses(
      %(ids)s::uuid[], %(statuses)s::instancestatus[], %(seqs)s::bigint[],
      %(cause_kinds)s::causekind[], %(cause_details)s::text[], %(cause_by)s::text[],
      %(writer_id)s::text, %(writer_seqs)s::bigint[], %(ages_s)s::double precision[]) as o
 order by o.ord;

-- hold_many: one batch of holds that are placed, replaced or released
select o.*
  from hold_instances(
      %(ids)s::uuid[], %(kinds)s::holdkind[], %(holds)s::text[]::jsonb[], %(seqs)s::bigint[],
      %(cause_kinds)s::causekind[], %(cause_details)s::text[], %(cause_by)s::text[],
      %(writer_id)s::text, %(writer_seqs)s::bigint[], %(ages_s)s::double precision[]) as o
 order by o.ord;

-- refine_causes: store better known causes of deaths
select refined
  from refine_causes(%(ids)s::uuid[], %(cause_kinds)s::causekind[], %(cause_details)s::text[])
       as refined;

-- beat_many: one batch of beats
select instance_id, outcome from beat_many(%(ids)s::uuid[], %(ages_s)s::double precision[]);

-- expire_stale: declare instances dead whose lease has expired
select instance_id from expire_stale_instances(%(lease_s)s, %(limit)s::integer);

-- expire_old_epochs: declare instances of retired epochs dead
select instance_id from expire_old_epoch_instances(%(limit)s::integer);

-- prune_history: delete what ended long ago
select prune_history(%(keep_s)s::double precision, %(limit)s::integer);

-- list_instances: a page in the order of the keys
-- (no join with the fleet: the planner misjudges its size and then sorts the whole table for each page)
select i.*
  from instance_row i
 where (%(statuses)s::instancestatus[] is null or i.status = any(%(statuses)s::instancestatus[]))
   and i.cluster_epoch = coalesce(%(epoch)s, (select f.current_epoch from fleet f))
   and (%(organ_id)s::text is null or i.organ_id = %(organ_id)s)
   and (%(logical_id)s::text is null or i.logical_id = %(logical_id)s)
   and (%(node_id)s::text is null or i.node_id = %(node_id)s)
   and (%(endpoint)s::text is null or jsonb_typeof(i.endpoints -> %(endpoint)s::text) = 'string')
   and i.labels @> %(labels)s::jsonb
   and (%(selector)s = '[]' or labels_match(i.labels, %(selector)s::jsonb))
   and (not %(fresh_only)s or i.status = 'dead' or i.last_heartbeat >= (select f.renewed_since from fleet f))
   and (i.logical_id, i.instance_id) > (%(after_logical_id)s, %(after_instance_id)s::uuid)
 order by i.logical_id, i.instance_id
 limit %(limit)s;

-- load_live: a page of everything that is not dead
select i.*
  from instance_row i
 where i.status <> 'dead'
   and (i.logical_id, i.instance_id) > (%(after_logical_id)s, %(after_instance_id)s::uuid)
 order by i.logical_id, i.instance_id
 limit %(limit)s;

-- live_states: a page of what must be the same in memory
select i.logical_id, i.instance_id, i.status, i.seq, i.cluster_epoch, i.reported_status, i.holds, i.endpoints,
       i.dependencies
  from instance_row i
 where i.status <> 'dead'
   and (i.logical_id, i.instance_id) > (%(after_logical_id)s, %(after_instance_id)s::uuid)
 order by i.logical_id, i.instance_id
 limit %(limit)s;

-- last_beats: the last recorded beats of these
select i.instance_id, i.last_heartbeat
  from instance_row i
 where i.instance_id = any(%(ids)s::uuid[]) and i.status <> 'dead';

-- best_instances: the best routable instance of each of these agents
select i.*
  from instance_row i
 where i.instance_id in (select a.instance_id from active_instance a where a.logical_id = any(%(logical_ids)s));

-- get_instance: one instance, dead or not
select i.* from instance_row i where i.instance_id = %(instance_id)s::uuid;

-- instances: the newest instances of an agent
select i.*
  from instance_row i
 where i.logical_id = %(logical_id)s
 order by i.started_at desc, i.instance_id
 limit %(limit)s;

-- deaths: dead instances, the last death first
select i.*
  from instance_row i
 where i.status = 'dead'
   and (i.stopped_at, i.instance_id) < (%(before)s::timestamptz, %(before_id)s::uuid)
   and (%(within_s)s::double precision is null
        or i.stopped_at >= now() - make_interval(secs => %(within_s)s::double precision))
 order by i.stopped_at desc, i.instance_id desc
 limit %(limit)s;

-- transitions: the newest transitions of an agent's instances
select t.instance_id, t.logical_id, t.from_status, t.to_status, t.seq, t.cause_kind, t.cause_detail, t.cause_by, t.hold,
       t.expires_at, t.at
  from registry_transition t
 where t.logical_id = %(logical_id)s
 order by t.id desc
 limit %(limit)s;
