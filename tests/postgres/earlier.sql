-- A database as the earlier SeedCore made it.

create type instancestatus as enum ('starting', 'alive', 'draining', 'dead');

create table cluster_metadata (
    id             int primary key default 1,
    current_epoch  uuid,
    updated_at     timestamptz not null default now()
);

create table registry_instance (
    instance_id     uuid primary key,
    logical_id      text not null,
    cluster_epoch   uuid not null,
    status          instancestatus not null default 'starting',
    actor_name      text,
    serve_route     text,
    node_id         text,
    ip_address      inet,
    pid             int,
    started_at      timestamptz default now(),
    stopped_at      timestamptz,
    last_heartbeat  timestamptz default now()
);
create index ix_registry_logical on registry_instance (logical_id);
create index ix_registry_epoch_status on registry_instance (cluster_epoch, status);
create index ix_registry_status_heartbeat on registry_instance (status, last_heartbeat desc);
create index ix_registry_logical_status_epoch on registry_instance (logical_id, status, cluster_epoch);

create view active_instances as
select r.* from registry_instance r join cluster_metadata m on m.id = 1
 where r.cluster_epoch = m.current_epoch and r.status = 'alive' and r.last_heartbeat > now() - interval '15 seconds';

create view active_instance as
select distinct on (logical_id) * from active_instances order by logical_id, started_at desc;

create function set_current_epoch(p_epoch uuid) returns void language sql as $$
    insert into cluster_metadata (id, current_epoch, updated_at) values (1, p_epoch, now())
    on conflict (id) do update set current_epoch = excluded.current_epoch, updated_at = now()
$$;

create function register_instance(
    p_instance_id uuid, p_logical_id text, p_cluster_epoch uuid, p_actor_name text, p_serve_route text, p_node_id text,
    p_ip inet, p_pid int) returns void
language plpgsql as $$
begin
    insert into registry_instance (
        instance_id, logical_id, cluster_epoch, status, actor_name, serve_route, node_id, ip_address, pid, started_at,
        last_heartbeat)
    values (p_instance_id, p_logical_id, p_cluster_epoch, 'starting', p_actor_name, p_serve_route, p_node_id, p_ip,
            p_pid, now(), now())
    on conflict (instance_id) do update
       set logical_id = excluded.logical_id, cluster_epoch = excluded.cluster_epoch, last_heartbeat = now();
end
$$;

create function set_instance_status(p_instance_id uuid, p_status instancestatus) returns void
language plpgsql as $$
begin
    update registry_instance
       set status = p_status, stopped_at = case when p_status = 'dead' then now() else stopped_at end
     where instance_id = p_instance_id;
end
$$;

create function beat(p_instance_id uuid) returns void language sql as $$
    update registry_instance set last_heartbeat = now() where instance_id = p_instance_id
$$;

create function expire_stale_instances(p_seconds int default 15) returns int language plpgsql as $$
declare n int;
begin
    update registry_instance set status = 'dead', stopped_at = now()
     where status in ('starting', 'alive', 'draining') and last_heartbeat < now() - make_interval(secs => p_seconds);
    get diagnostics n = row_count;
    return n;
end
$$;

create function expire_old_epoch_instances() returns int language plpgsql as $$
declare n int;
begin
    update registry_instance set status = 'dead', stopped_at = now()
     where status <> 'dead' and cluster_epoch <> (select current_epoch from cluster_metadata where id = 1);
    get diagnostics n = row_count;
    return n;
end
$$;
