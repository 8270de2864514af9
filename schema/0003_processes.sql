-- Which process an instance lives in, so that its end can be watched for: a process id alone is used again.

alter table registry_instance add column process_key text check (length(process_key) between 1 and 255);
comment on column registry_instance.process_key is
    'the process: its PID namespace, id and start time, as Linux names them; null where that is not known';

create or replace function register_instances(p_rows jsonb)
returns table (ord bigint, outcome text, status instancestatus, cluster_epoch text, cause text)
language plpgsql as $$
declare
    r       record;
    existing registry_instance;
    current_name text;
begin
    -- staging an epoch takes this lock; taken behind a row's it could deadlock with a beat or another batch
    if exists (
        select from jsonb_array_elements(p_rows) as e (element)
         where e.element ->> 'cluster_epoch' is not null
           and not exists (select from cluster_epoch c where c.epoch = e.element ->> 'cluster_epoch')
    ) then
        perform 1 from cluster_metadata m where m.id = 1 for update;
    end if;
    select m.current_epoch into strict current_name from cluster_metadata m where m.id = 1;
    for r in
        select e.ord as position, d.*
          from jsonb_array_elements(p_rows) with ordinality as e (element, ord),
               jsonb_to_record(e.element) as d (
                   instance_id uuid, logical_id text, cluster_epoch text, seq bigint, actor_name text,
                   namespace text, actor_id text, serve_route text, organ_id text, labels jsonb,
                   metadata jsonb, node_id text, ip_address inet, pid integer,
                   process_key text)
         order by d.instance_id, e.ord
    loop
        ord := r.position;
        cluster_epoch := coalesce(r.cluster_epoch, current_name);
        cause := null;
        select * into existing from registry_instance i where i.instance_id = r.instance_id for update;
        if not found then
            outcome := case when cluster_epoch = current_name then null else stage_epoch(cluster_epoch) end;
            if outcome is not null then
                status := null;
                return next;
                continue;
            end if;
            insert into registry_instance (
                instance_id, logical_id, cluster_epoch, seq, actor_name, namespace, actor_id, serve_route,
                organ_id, labels, metadata, node_id, ip_address, pid,
                process_key)
            values (
                r.instance_id, r.logical_id, cluster_epoch, coalesce(r.seq, 0), r.actor_name, r.namespace,
                r.actor_id, r.serve_route, r.organ_id, coalesce(r.labels, '{}'), coalesce(r.metadata, '{}'),
                r.node_id, r.ip_address, r.pid, r.process_key)
            on conflict (instance_id) do nothing;
            if found then
                outcome := 'applied';
                status := 'starting';
                return next;
                continue;
            end if;
            select * into existing from registry_instance i where i.instance_id = r.instance_id for update;
        end if;
        status := existing.status;
        cluster_epoch := existing.cluster_epoch;
        cause := existing.cause;
        if existing.logical_id <> r.logical_id then
            outcome := 'conflict';
        elsif existing.status = 'dead' then
            outcome := 'dead';
        elsif coalesce(r.seq, 0) < existing.seq then
            outcome := 'unchanged';
        else
            update registry_instance i
               set seq = coalesce(r.seq, 0), actor_name = r.actor_name, namespace = r.namespace,
                   actor_id = r.actor_id, serve_route = r.serve_route, organ_id = r.organ_id,
                   labels = coalesce(r.labels, '{}'), metadata = coalesce(r.metadata, '{}'),
                   node_id = r.node_id, ip_address = r.ip_address, pid = r.pid,
                   process_key = r.process_key, last_heartbeat = now()
             where i.instance_id = r.instance_id;
            outcome := 'unchanged';
        end if;
        return next;
    end loop;
end
$$;

create or replace view active_instances as
select r.instance_id, r.logical_id, r.cluster_epoch, r.status, r.seq, r.actor_name, r.namespace, r.actor_id,
       r.serve_route, r.organ_id, r.labels, r.metadata, r.node_id, r.ip_address, r.pid, r.started_at,
       r.status_changed_at, r.last_heartbeat, r.stopped_at, r.cause, r.version, r.process_key
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
       a.status_changed_at, a.last_heartbeat, a.stopped_at, a.cause, a.version, a.process_key
  from active_instances a
 order by a.logical_id, a.actor_name is null, a.started_at desc, a.instance_id;
