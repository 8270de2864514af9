-- History: every change of a status with its cause, in the order it was committed. No row for a beat.

create table registry_transition (
    id           bigint generated always as identity primary key,
    instance_id  uuid not null,
    logical_id   text collate "C" not null,
    from_status  instancestatus,
    to_status    instancestatus not null,
    seq          bigint,
    cause        text,
    at           timestamptz not null default now()
);
comment on column registry_transition.from_status is 'null: the instance was registered';
comment on column registry_transition.seq is 'the agent''s own number of the change; null where another hand made it';

create index registry_transition_agent on registry_transition (logical_id, id);

create function registry_instance_remember() returns trigger
language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        insert into registry_transition (instance_id, logical_id, to_status, seq, cause)
        values (new.instance_id, new.logical_id, new.status, new.seq, new.cause);
    elsif new.status <> old.status then
        insert into registry_transition (instance_id, logical_id, from_status, to_status, seq, cause)
        values (new.instance_id, new.logical_id, old.status, new.status, nullif(new.seq, old.seq), new.cause);
    end if;
    return null;
end
$$;

-- Names only the status, so that a beat does not run it.
create trigger registry_instance_remember
    after insert or update of status on registry_instance
    for each row execute function registry_instance_remember();

-- what lives already came to its status somehow
insert into registry_transition (instance_id, logical_id, to_status, cause, at)
select r.instance_id, r.logical_id, r.status, r.cause, r.status_changed_at
  from registry_instance r
 order by r.status_changed_at, r.instance_id;
