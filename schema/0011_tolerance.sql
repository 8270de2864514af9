-- Calls by hand and of old clients keep the tolerance of the earlier SeedCore, whose client sends an empty text for what it
-- does not know: an empty text is none. Batches, which only registries send, are judged as before.

create or replace function register_instance(
    p_instance_id uuid, p_logical_id text, p_cluster_epoch text default null, p_actor_name text default null,
    p_serve_route text default null, p_node_id text default null, p_ip_address inet default null,
    p_pid integer default null, p_namespace text default null, p_actor_id text default null,
    p_organ_id text default null, p_labels jsonb default '{}', p_metadata jsonb default '{}',
    p_seq bigint default 0)
returns text
language plpgsql as $$
declare
    r record;
begin
    if p_instance_id is null or p_logical_id is null then
        raise exception 'instance id and logical id must be given' using errcode = '22004';
    end if;
    select * into strict r from register_instances(jsonb_build_array(jsonb_build_object(
        'instance_id', p_instance_id, 'logical_id', p_logical_id, 'cluster_epoch', nullif(p_cluster_epoch, ''),
        'seq', p_seq, 'actor_name', nullif(p_actor_name, ''), 'namespace', nullif(p_namespace, ''),
        'actor_id', nullif(p_actor_id, ''), 'serve_route', nullif(p_serve_route, ''),
        'organ_id', nullif(p_organ_id, ''), 'labels', p_labels, 'metadata', p_metadata,
        'node_id', nullif(p_node_id, ''), 'ip_address', p_ip_address,
        'pid', p_pid)));
    case r.outcome
        when 'applied', 'unchanged' then return r.cluster_epoch;
        when 'dead' then
            raise exception 'instance % is dead; dead is final, register a new instance', p_instance_id
                using errcode = 'SC002';
        when 'conflict' then
            raise exception 'instance % already belongs to another agent than %', p_instance_id, p_logical_id
                using errcode = 'SC003';
        when 'retired_epoch' then
            raise exception 'epoch % is retired and cannot come back', p_cluster_epoch using errcode = 'SC004';
        when 'epoch_limit' then
            raise exception 'epoch % cannot be staged: 64 are staged already', p_cluster_epoch
                using errcode = 'SC005';
    end case;
end
$$;

-- Changed where it stands: on an adopted database one of its defaults is gone, and must not come back.
do $$
declare
    call regprocedure := 'set_instance_status(uuid, instancestatus, bigint, text, timestamptz)';
begin
    execute replace(pg_get_functiondef(call), 'array[p_cause]', 'array[nullif(p_cause, '''')]');
end
$$;
