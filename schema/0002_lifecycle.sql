-- The life of an instance: which status may follow another, what a hold makes of it, and the triggers that enforce both.

create function status_may_become(p_from instancestatus, p_to instancestatus) returns boolean
language sql immutable parallel safe as $$
    select case p_from
        when 'starting' then p_to in ('alive', 'draining', 'dead')
        when 'alive'    then p_to in ('draining', 'dead')
        when 'draining' then p_to in ('alive', 'dead')
        else false
    end
$$;
comment on function status_may_become(instancestatus, instancestatus) is
    'Whether a reported status may follow another. The effective status may also go back when a hold is released.';

create function effective_status(p_reported instancestatus, p_holds jsonb) returns instancestatus
language sql immutable parallel safe as $$
    select case
        when p_reported = 'dead' then 'dead'
        when p_reported = 'draining' or p_holds ?| array['operator', 'process', 'node'] then 'draining'
        when p_reported = 'starting' or p_holds ? 'readiness' then 'starting'
        else p_reported
    end
$$;
comment on function effective_status(instancestatus, jsonb) is
    'The status of an instance that reports p_reported and has these holds, as core/holds.py derives it.';

create function utc_text(p_at timestamptz) returns text
language sql immutable parallel safe as $$
    select to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')
$$;
comment on function utc_text(timestamptz) is 'A time as JSON keeps it, whatever the time zone of the session.';

create function checked_hold(p_hold jsonb, p_since timestamptz) returns jsonb
language plpgsql stable as $$
declare
    since      timestamptz := coalesce((p_hold ->> 'since')::timestamptz, p_since);
    expires_at timestamptz := (p_hold ->> 'expires_at')::timestamptz;
begin
    if p_hold - array['reason', 'by', 'since', 'expires_at'] <> '{}' then
        raise exception 'a hold must have no keys but reason, by, since and expires_at' using errcode = '22023';
    elsif length(p_hold ->> 'reason') > 1024 or length(p_hold ->> 'by') > 255 then
        raise exception 'a hold must have a reason of at most 1024 characters and a "by" of at most 255' using errcode = '22023';
    elsif not (since between '0001-01-02' and '9999-12-30' and coalesce(expires_at, since) between '0001-01-02' and '9999-12-30') then
        raise exception 'a hold must begin and expire in the years 1 to 9999' using errcode = '22023';
    end if;
    return jsonb_build_object('reason', p_hold ->> 'reason', 'by', p_hold ->> 'by', 'since', utc_text(since),
                              'expires_at', utc_text(expires_at));
end
$$;
comment on function checked_hold(jsonb, timestamptz) is
    'A hold in the form in which it is stored; one that does not name its begin begins at p_since. Raises 22023.';

create function registry_instance_guard() returns trigger
language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        new.reported_status := coalesce(new.reported_status, new.status);
    elsif new.instance_id <> old.instance_id or new.logical_id <> old.logical_id then
        raise exception 'instance % is fixed to agent %; register a new instance', old.instance_id, old.logical_id
            using errcode = 'SC003';
    elsif new.status is distinct from old.status and new.reported_status = old.reported_status then
        -- the effective status is derived: a statement that sets it means the reported one
        new.reported_status := new.status;
    end if;
    if new.reported_status <> old.reported_status and not status_may_become(old.reported_status, new.reported_status) then
        raise exception 'instance % is % and cannot become %', old.instance_id, old.reported_status, new.reported_status
            using errcode = 'SC002';
    end if;
    if new.reported_status = 'dead' then
        new.holds := '{}';
    elsif new.holds <> '{}' and new.holds is distinct from old.holds then
        select jsonb_object_agg(h.key::holdkind, checked_hold(h.value, now())) into new.holds from jsonb_each(new.holds) as h;
    end if;
    new.status := effective_status(new.reported_status, new.holds);
    if new.status <> old.status then
        if new.status_changed_at = old.status_changed_at then
            new.status_changed_at := now();
        end if;
        if new.status = 'dead' then
            new.stopped_at := new.status_changed_at;
        end if;
    end if;
    if new.status <> old.status or new.holds <> old.holds then
        new.version := nextval('registry_version');
    end if;
    return new;
end
$$;
comment on function registry_instance_guard() is 'Derives the effective status, and refuses what the transition table forbids.';

-- names only the columns that it guards, so that a beat does not run it
create trigger registry_instance_guard
    before update of instance_id, logical_id, status, reported_status, holds, stopped_at on registry_instance
    for each row execute function registry_instance_guard();
comment on trigger registry_instance_guard on registry_instance is 'Derives the effective status; a beat does not run it.';

create trigger registry_instance_derive
    before insert on registry_instance
    for each row when (new.reported_status is distinct from new.status or new.holds <> '{}')
    execute function registry_instance_guard();
comment on trigger registry_instance_derive on registry_instance is 'Derives the effective status of a row that is not as registered.';

create function registry_instance_remember() returns trigger
language plpgsql as $$
declare
    changed holdkind;
begin
    if new.status = old.status and new.holds = old.holds then
        return null;
    end if;
    if new.reported_status = old.reported_status then
        select coalesce(n.key, o.key)::holdkind into changed
          from jsonb_each(new.holds) n full join jsonb_each(old.holds) o on o.key = n.key
         where n.value is distinct from o.value
         order by 1
         limit 1;
    end if;
    insert into registry_transition (
        instance_id, logical_id, from_status, to_status, seq, cause_kind, cause_detail, cause_by, hold, expires_at, at)
    values (
        new.instance_id, new.logical_id, old.status, new.status, nullif(new.seq, old.seq), new.cause_kind, new.cause_detail,
        new.cause_by, changed, (new.holds -> changed::text ->> 'expires_at')::timestamptz,
        case when new.status is distinct from old.status then new.status_changed_at else now() end);
    return null;
end
$$;
comment on function registry_instance_remember() is 'Writes the history.';

create trigger registry_instance_remember
    after update of status, reported_status, holds on registry_instance
    for each row execute function registry_instance_remember();
comment on trigger registry_instance_remember on registry_instance is 'Writes the history; a beat does not run it.';

create function registry_instance_begin() returns trigger
language plpgsql as $$
begin
    insert into registry_transition (instance_id, logical_id, to_status, seq, cause_kind, cause_detail, cause_by, at)
    select n.instance_id, n.logical_id, n.status, n.seq, n.cause_kind, n.cause_detail, n.cause_by, n.status_changed_at
      from new_instance n
     order by n.logical_id;
    return null;
end
$$;
comment on function registry_instance_begin() is 'Writes the history of a batch of registrations.';

create trigger registry_instance_begin
    after insert on registry_instance referencing new table as new_instance
    for each statement execute function registry_instance_begin();
comment on trigger registry_instance_begin on registry_instance is 'Writes where the history of an instance begins.';
