-- The types and tables of the registry: the fleet, its epochs, the instances of agents, and the history of their statuses.
--
-- The functions of the files after this one raise errors with a SQLSTATE of their own:
--   SC001 the instance is not registered             SC002 the change of status is not allowed
--   SC003 the instance id belongs to another agent   SC004 the epoch is retired
--   SC005 too many epochs are staged                 SC006 the registry is superseded (detail: the term in force)
-- A value that is missing raises 22004, a value that is wrong 22023.

create type instancestatus as enum ('starting', 'alive', 'draining', 'dead');
comment on type instancestatus is 'Only an alive instance is routable. No status follows dead.';

create type causekind as enum (
    'unknown', 'agent', 'operator', 'drain_ended', 'process_exited', 'process_killed', 'out_of_memory', 'start_failed',
    'actor_died', 'node_died', 'lease_expired', 'epoch_retired', 'superseded', 'restored');
comment on type causekind is 'Why an instance has its status. Programs read the kind; the detail beside it is for people.';

create type holdkind as enum ('operator', 'readiness', 'process', 'node');
comment on type holdkind is
    'Why an instance is not routable although it reports alive: an operator drains it, it is not ready, a process that it '
    'depends on has ended, or its node is drained.';

create sequence registry_version;
comment on sequence registry_version is 'Grows with each change of a status, a hold or endpoints.';

create table cluster_metadata (
    id             smallint primary key default 1 check (id = 1),
    current_epoch  text not null,
    epoch_number   bigint not null,
    ray_cluster    text,
    lease_s        double precision not null default 15 check (lease_s > 0 and lease_s <= 86400),
    beats_seen_at  timestamptz not null default now(),
    leases_from    timestamptz not null default now(),
    term           bigint not null default 0,
    term_seen_at   timestamptz not null default now(),
    updated_at     timestamptz not null default now()
);
comment on table cluster_metadata is 'One row: the state of the fleet.';
comment on column cluster_metadata.id is 'Always 1.';
comment on column cluster_metadata.current_epoch is 'The epoch that discovery shows.';
comment on column cluster_metadata.epoch_number is 'The number of the current epoch.';
comment on column cluster_metadata.ray_cluster is 'The Ray cluster (session) whose registry started last.';
comment on column cluster_metadata.lease_s is 'The seconds without a beat after which a lease expires.';
comment on column cluster_metadata.beats_seen_at is
    'When a beat was last recorded, to the second. Leases are judged at this time, or at term_seen_at if that is earlier and there is '
    'a registry, so no lease expires while the registry is down.';
comment on column cluster_metadata.leases_from is 'When every lease was renewed last, after the registry had been down.';
comment on column cluster_metadata.term is 'The number of the registry that may write.';
comment on column cluster_metadata.term_seen_at is 'When the registry of this term was last seen at work, to a few seconds.';
comment on column cluster_metadata.updated_at is 'When a registry started or the current epoch changed.';

create table registry_writer (
    id          smallint primary key default 1 check (id = 1),
    writer_id   text,
    commits     bigint not null default 0,
    database_id uuid not null default gen_random_uuid()
);
comment on table registry_writer is
    'One row: which registry process writes, and how often registries have committed. A table of its own, so that no other session '
    'waits for the row.';
comment on column registry_writer.id is 'Always 1.';
comment on column registry_writer.database_id is 'Identifies this database, also after a failover or a restore.';
comment on column registry_writer.writer_id is 'The registry process that took the term last.';
comment on column registry_writer.commits is
    'The number of the last commit of a registry. A registry that finds a lower number than it remembers knows that the database '
    'has lost commits.';

create table cluster_epoch (
    epoch         text primary key check (length(epoch) between 1 and 128),
    number        bigint not null unique,
    staged_at     timestamptz not null default now(),
    current_at    timestamptz,
    retired_at    timestamptz,
    continued_by  text
);
comment on table cluster_epoch is 'The epochs (generations) of the fleet.';
comment on column cluster_epoch.epoch is 'The name of the epoch.';
comment on column cluster_epoch.number is 'Its number: a later epoch has a greater one.';
comment on column cluster_epoch.staged_at is 'When it was first named.';
comment on column cluster_epoch.current_at is 'When it became current; null while it is staged.';
comment on column cluster_epoch.retired_at is 'When another epoch became current; null until then.';
comment on column cluster_epoch.continued_by is
    'The epoch that its agents belong to since a registry took over the database; null where a flip retired them.';

insert into cluster_epoch (epoch, number, current_at) values ('epoch-1', 1, now());
insert into cluster_metadata (current_epoch, epoch_number) values ('epoch-1', 1);
insert into registry_writer default values;

create table superseded_cluster (
    ray_cluster    text primary key,
    superseded_at  timestamptz not null default now()
);
comment on table superseded_cluster is
    'Ray clusters whose registry lost the database to another cluster. They do not take it back while that one is at work.';
comment on column superseded_cluster.ray_cluster is 'The Ray cluster (session).';
comment on column superseded_cluster.superseded_at is 'When the registry of another cluster started.';

-- last_heartbeat is in no index and no trigger, so that a beat stays a HOT update that runs no trigger
create table registry_instance (
    instance_id        uuid primary key,
    logical_id         text collate "C" not null check (length(logical_id) between 1 and 255),
    cluster_epoch      text not null references cluster_epoch (epoch),
    status             instancestatus not null default 'starting',
    reported_status    instancestatus not null,
    holds              jsonb not null default '{}' check (jsonb_typeof(holds) = 'object'),
    cause_kind         causekind,
    cause_detail       text check (length(cause_detail) <= 1024),
    cause_by           text check (length(cause_by) <= 255),
    actor_name         text check (length(actor_name) between 1 and 255),
    namespace          text check (length(namespace) between 1 and 255),
    actor_id           text check (length(actor_id) between 1 and 255),
    serve_route        text check (length(serve_route) <= 1024),
    organ_id           text check (length(organ_id) between 1 and 255),
    labels             jsonb not null default '{}' check (jsonb_typeof(labels) = 'object'),
    metadata           jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
    endpoints          jsonb not null default '{}' check (jsonb_typeof(endpoints) = 'object'),
    node_id            text check (length(node_id) between 1 and 255),
    ip_address         inet,
    pid                integer check (pid > 0),
    process_key        text check (length(process_key) between 1 and 255),
    dependencies       jsonb not null default '[]' check (jsonb_typeof(dependencies) = 'array'),
    started_at         timestamptz not null default now(),
    status_changed_at  timestamptz not null default now(),
    last_heartbeat     timestamptz not null default now(),
    stopped_at         timestamptz,
    seq                bigint not null default 0,
    writer_id          text check (length(writer_id) between 1 and 64),
    writer_seq         bigint,
    version            bigint not null default nextval('registry_version'),
    check ((status = 'dead') = (stopped_at is not null))
) with (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0
);
comment on table registry_instance is 'One row for each incarnation of an agent. A row of a dead instance stays until it is pruned.';
comment on column registry_instance.instance_id is 'The incarnation. A restarted agent registers another one.';
comment on column registry_instance.logical_id is 'The agent, by its stable name.';
comment on column registry_instance.cluster_epoch is 'The epoch in which it is registered.';
comment on column registry_instance.status is 'The effective status, derived from reported_status and holds.';
comment on column registry_instance.reported_status is 'The status that the agent reported last; dead once the instance is dead.';
comment on column registry_instance.holds is
    'Why it is not routable although it reports alive: {kind: {reason, by, since, expires_at}}, at most one hold of a kind.';
comment on column registry_instance.cause_kind is 'Why the status is what it is; null where no cause was given.';
comment on column registry_instance.cause_detail is 'The cause in words, for people.';
comment on column registry_instance.cause_by is 'The operator who caused it.';
comment on column registry_instance.actor_name is 'The name of its Ray actor.';
comment on column registry_instance.namespace is 'The Ray namespace of its actor.';
comment on column registry_instance.actor_id is 'The Ray id of its actor.';
comment on column registry_instance.serve_route is 'The Ray Serve route that reaches it.';
comment on column registry_instance.organ_id is 'The group of agents that it belongs to.';
comment on column registry_instance.labels is 'Text by key, which selectors match.';
comment on column registry_instance.metadata is 'Any JSON object of the agent.';
comment on column registry_instance.endpoints is 'URLs by name, at which other programs reach the agent.';
comment on column registry_instance.node_id is 'The Ray node that it runs on.';
comment on column registry_instance.ip_address is 'The address of that node.';
comment on column registry_instance.pid is 'Its process id on that node.';
comment on column registry_instance.process_key is
    'Its process for good: PID namespace, process id and start time as Linux names them. A process id alone is reused.';
comment on column registry_instance.dependencies is
    'The processes that it depends on: [{name, pid, process_key, is_fatal, stderr_path}], at most 8.';
comment on column registry_instance.started_at is 'When it registered first.';
comment on column registry_instance.status_changed_at is 'When the effective status changed last.';
comment on column registry_instance.last_heartbeat is 'When its last beat was received.';
comment on column registry_instance.stopped_at is 'When it died; null while it is not dead.';
comment on column registry_instance.seq is 'The sequence number of the last change that the agent sent.';
comment on column registry_instance.writer_id is 'The registry process that applied the last change which the agent did not send.';
comment on column registry_instance.writer_seq is 'The number that this process gave to that change, so that a repeated one counts once.';
comment on column registry_instance.version is 'The value of registry_version at the last change of its status, holds or endpoints.';

create index registry_instance_history on registry_instance (logical_id, started_at desc);
create index registry_instance_live on registry_instance (logical_id, instance_id) where status <> 'dead';
create index registry_instance_live_epoch on registry_instance (cluster_epoch) where status <> 'dead';
create index registry_instance_ended on registry_instance (stopped_at) where status = 'dead';

create table registry_transition (
    id            bigint generated always as identity primary key,
    instance_id   uuid not null,
    logical_id    text collate "C" not null,
    from_status   instancestatus,
    to_status     instancestatus not null,
    seq           bigint,
    cause_kind    causekind,
    cause_detail  text,
    cause_by      text,
    hold          holdkind,
    expires_at    timestamptz,
    at            timestamptz not null default now()
) with (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_insert_scale_factor = 0.1
);
comment on table registry_transition is
    'The history: one row for each registration, each change of an effective status, and each change of a hold, in the order of '
    'their commits.';
comment on column registry_transition.id is 'Its place in the history.';
comment on column registry_transition.instance_id is 'The incarnation.';
comment on column registry_transition.logical_id is 'The agent.';
comment on column registry_transition.from_status is 'The effective status before; null for a registration.';
comment on column registry_transition.to_status is 'The effective status after. The same as before where only a hold changed.';
comment on column registry_transition.seq is 'The agent''s sequence number of the change; null where the agent did not send it.';
comment on column registry_transition.cause_kind is 'Why; null where no cause was given.';
comment on column registry_transition.cause_detail is 'The cause in words, for people.';
comment on column registry_transition.cause_by is 'The operator who caused it.';
comment on column registry_transition.hold is 'The hold that was placed or released; null where the reported status changed.';
comment on column registry_transition.expires_at is 'When the hold that was placed expires; null: not by itself, or none was placed.';
comment on column registry_transition.at is 'When it happened.';

create index registry_transition_agent on registry_transition (logical_id, id);

create type change_outcome as (
    ord            bigint,
    outcome        text,
    status         instancestatus,
    cluster_epoch  text,
    cause_kind     causekind,
    cause_detail   text,
    cause_by       text
);
comment on type change_outcome is
    'What became of one change of a batch: its place in the batch, the outcome, and the instance as it is after that.';

create function outcome_of(p_ord bigint, p_outcome text, p_row registry_instance) returns change_outcome
language sql immutable as $$
    select row(p_ord, p_outcome, p_row.status, p_row.cluster_epoch, p_row.cause_kind, p_row.cause_detail, p_row.cause_by)::change_outcome
$$;
comment on function outcome_of(bigint, text, registry_instance) is 'An outcome with the instance as it is in p_row.';

create function without_answered(p_pending bigint[], p_outcomes change_outcome[]) returns bigint[]
language sql immutable as $$
    select case when coalesce(cardinality(p_outcomes), 0) < cardinality(p_pending) then array(
        select p.ord from unnest(p_pending) as p (ord) except select o.ord from unnest(p_outcomes) as o) end
$$;
comment on function without_answered(bigint[], change_outcome[]) is
    'The places of a batch that have no outcome yet; null where all have one.';
