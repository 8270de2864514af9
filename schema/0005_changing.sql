-- Changing instances: the statuses that agents report, the holds that are placed beside them, and the causes of deaths.

create function check_batch(p_ids uuid[], p_lengths integer[], p_seqs bigint[], p_ages_s double precision[]) returns void
language plpgsql immutable as $$
begin
    if p_ids is null or array_position(p_ids, null) is not null then
        raise exception 'instance ids must be given' using errcode = '22004';
    elsif exists (select from unnest(p_lengths || cardinality(p_seqs) || cardinality(p_ages_s)) as l (length)
                   where l.length <> cardinality(p_ids)) then
        raise exception 'every array must be as long as that of the instance ids' using errcode = '22023';
    elsif exists (select from unnest(p_seqs) as s (seq) where s.seq < 0) then
        raise exception 'seq must not be negative' using errcode = '22023';
    elsif exists (select from unnest(p_ages_s) as a (age_s) where not a.age_s between 0 and 1e9) then
        raise exception 'ages must be from 0 to 1e9 seconds' using errcode = '22023';
    end if;
end
$$;
comment on function check_batch(uuid[], integer[], bigint[], double precision[]) is
    'Raises 22004 or 22023 where the arrays of a batch do not fit together.';

create function write_change(p_row registry_instance) returns void
language plpgsql as $$
begin
    update registry_instance i
       set reported_status = p_row.reported_status, holds = p_row.holds, cause_kind = p_row.cause_kind,
           cause_detail = p_row.cause_detail, cause_by = p_row.cause_by, status_changed_at = p_row.status_changed_at,
           last_heartbeat = p_row.last_heartbeat, seq = p_row.seq, writer_id = p_row.writer_id,
           writer_seq = p_row.writer_seq
     where i.instance_id = p_row.instance_id;
end
$$;
comment on function write_change(registry_instance) is 'Writes what a change of a status or a hold may change of a row.';

create function set_instance_statuses(
    p_ids uuid[], p_statuses instancestatus[], p_seqs bigint[], p_cause_kinds causekind[], p_cause_details text[],
    p_cause_by text[], p_writer_id text default null, p_writer_seqs bigint[] default null,
    p_ages_s double precision[] default null)
returns setof change_outcome
language plpgsql as $$
declare
    r       record;
    i       registry_instance;
    becomes instancestatus;
    outcome text;
begin
    if p_statuses is null or array_position(p_statuses, null) is not null then
        raise exception 'statuses must be given' using errcode = '22004';
    end if;
    perform check_batch(
        p_ids, array[cardinality(p_statuses), cardinality(p_cause_kinds), cardinality(p_cause_details),
                     cardinality(p_cause_by), cardinality(p_writer_seqs)], p_seqs, p_ages_s);
    for r in
        select c.*, now() - make_interval(secs => coalesce(c.age_s, 0)) as happened_at
          from unnest(p_ids, p_statuses, p_seqs, p_cause_kinds, p_cause_details, p_cause_by, p_writer_seqs, p_ages_s)
               with ordinality as c (id, wanted, seq, cause_kind, cause_detail, cause_by, writer_seq, age_s, ord)
         order by c.id, c.ord
    loop
        select * into i from registry_instance t where t.instance_id = r.id for update;
        outcome := 'unchanged';
        if not found then
            outcome := 'unknown';
        elsif r.seq <= i.seq or (r.seq is null and i.writer_id = p_writer_id and r.writer_seq <= i.writer_seq) then
            null; -- it was applied before
        elsif i.reported_status = r.wanted then
            update registry_instance t set seq = coalesce(r.seq, t.seq) where t.instance_id = r.id and t.seq < r.seq;
        elsif i.reported_status = 'dead' then
            outcome := 'dead';
        elsif not status_may_become(i.reported_status, r.wanted) then
            outcome := 'forbidden';
        else
            becomes := effective_status(r.wanted, i.holds);
            i.reported_status := r.wanted;
            i.seq := coalesce(r.seq, i.seq);
            if becomes <> i.status then
                outcome := 'applied';
                i.status := becomes;
                i.status_changed_at := greatest(i.status_changed_at + interval '1 microsecond', r.happened_at);
                i.cause_kind := r.cause_kind;
                i.cause_detail := r.cause_detail;
                i.cause_by := r.cause_by;
            end if;
            if r.seq is not null then
                i.last_heartbeat := now();
            elsif r.writer_seq is not null then
                i.writer_id := p_writer_id;
                i.writer_seq := r.writer_seq;
            end if;
            perform write_change(i);
        end if;
        return next outcome_of(r.ord, outcome, i);
    end loop;
end
$$;
comment on function set_instance_statuses(
    uuid[], instancestatus[], bigint[], causekind[], text[], text[], text, bigint[], double precision[]) is
    'Changes reported statuses, in a batch. A change with a seq is the agent''s; one without is the registry''s, and counts once '
    'per p_writer_id and its number. p_ages_s: how many seconds ago each happened. Outcomes: applied, unchanged (the effective '
    'status is as before), unknown, dead, forbidden.';

create function hold_instances(
    p_ids uuid[], p_kinds holdkind[], p_holds jsonb[], p_seqs bigint[], p_cause_kinds causekind[], p_cause_details text[],
    p_cause_by text[], p_writer_id text default null, p_writer_seqs bigint[] default null,
    p_ages_s double precision[] default null)
returns setof change_outcome
language plpgsql as $$
declare
    r       record;
    i       registry_instance;
    wanted  jsonb;
    becomes instancestatus;
    outcome text;
begin
    if p_kinds is null or array_position(p_kinds, null) is not null then
        raise exception 'kinds of holds must be given' using errcode = '22004';
    end if;
    perform check_batch(
        p_ids, array[cardinality(p_kinds), cardinality(p_holds), cardinality(p_cause_kinds), cardinality(p_cause_details),
                     cardinality(p_cause_by), cardinality(p_writer_seqs)], p_seqs, p_ages_s);
    for r in
        select c.*, now() - make_interval(secs => coalesce(c.age_s, 0)) as happened_at
          from unnest(p_ids, p_kinds::text[], p_holds, p_seqs, p_cause_kinds, p_cause_details, p_cause_by, p_writer_seqs,
                      p_ages_s)
               with ordinality as c (id, kind, hold, seq, cause_kind, cause_detail, cause_by, writer_seq, age_s, ord)
         order by c.id, c.ord
    loop
        wanted := case when r.hold is not null then checked_hold(r.hold, r.happened_at) end;
        select * into i from registry_instance t where t.instance_id = r.id for update;
        outcome := 'unchanged';
        if not found then
            outcome := 'unknown';
        elsif r.seq <= i.seq or (r.seq is null and i.writer_id = p_writer_id and r.writer_seq <= i.writer_seq) then
            null; -- it was applied before
        elsif wanted - 'since' is not distinct from (i.holds -> r.kind) - 'since' then
            -- it is held for this already, or not held
            update registry_instance t set seq = coalesce(r.seq, t.seq) where t.instance_id = r.id and t.seq < r.seq;
        elsif i.reported_status = 'dead' then
            outcome := 'dead';
        else
            outcome := 'applied';
            i.holds := case when wanted is null then i.holds - r.kind else i.holds || jsonb_build_object(r.kind, wanted) end;
            becomes := effective_status(i.reported_status, i.holds);
            if becomes <> i.status then
                i.status := becomes;
                i.status_changed_at := greatest(i.status_changed_at + interval '1 microsecond', r.happened_at);
            end if;
            i.cause_kind := r.cause_kind;
            i.cause_detail := r.cause_detail;
            i.cause_by := r.cause_by;
            i.seq := coalesce(r.seq, i.seq);
            if r.seq is not null then
                i.last_heartbeat := now();
            elsif r.writer_seq is not null then
                i.writer_id := p_writer_id;
                i.writer_seq := r.writer_seq;
            end if;
            perform write_change(i);
        end if;
        return next outcome_of(r.ord, outcome, i);
    end loop;
end
$$;
comment on function hold_instances(
    uuid[], holdkind[], jsonb[], bigint[], causekind[], text[], text[], text, bigint[], double precision[]) is
    'Places or replaces holds {reason, by, since, expires_at}, and releases those that are null, in a batch. A change with a seq is '
    'the agent''s; one without counts once per p_writer_id and its number. Outcomes: applied, unchanged (it was held for this '
    'already, or is not held), unknown, dead.';

create function applied_or_raise(p_result change_outcome, p_instance_id uuid, p_what text) returns text
language plpgsql immutable as $$
begin
    if p_result.outcome = 'unknown' then
        raise exception 'instance % is not registered', p_instance_id using errcode = 'SC001';
    elsif p_result.outcome in ('dead', 'forbidden') then
        raise exception 'instance % is % and cannot %', p_instance_id, p_result.status, p_what using errcode = 'SC002';
    end if;
    return p_result.outcome;
end
$$;
comment on function applied_or_raise(change_outcome, uuid, text) is 'The outcome applied or unchanged; else raises SC001 or SC002.';

create function set_instance_status(
    p_instance_id uuid, p_status instancestatus, p_seq bigint default null, p_cause text default null,
    p_cause_kind causekind default 'agent', p_cause_by text default null)
returns text
language plpgsql as $$
declare
    detail text := nullif(p_cause, '');
    kind   causekind := case when coalesce(detail, p_cause_by) is not null or p_cause_kind <> 'agent' then p_cause_kind end;
    r      change_outcome;
begin
    if p_instance_id is null or p_status is null then
        raise exception 'instance id and status must be given' using errcode = '22004';
    end if;
    select * into strict r from set_instance_statuses(
        array[p_instance_id], array[p_status], array[p_seq], array[kind], array[detail], array[p_cause_by]);
    return applied_or_raise(r, p_instance_id, 'become ' || p_status);
end
$$;
comment on function set_instance_status(uuid, instancestatus, bigint, text, causekind, text) is
    'Changes the reported status of one instance, for psql and other programs; an empty cause is null. Returns applied or '
    'unchanged. Raises SC001, SC002.';

create function hold_instance(
    p_instance_id uuid, p_reason text default null, p_by text default null, p_expires_at timestamptz default null,
    p_kind holdkind default 'operator')
returns text
language plpgsql as $$
declare
    hold jsonb := jsonb_build_object(
        'reason', nullif(p_reason, ''), 'by', nullif(p_by, ''), 'expires_at', utc_text(p_expires_at));
    r    change_outcome;
begin
    if p_instance_id is null or p_kind is null then
        raise exception 'instance id and kind must be given' using errcode = '22004';
    elsif not isfinite(p_expires_at) then
        raise exception 'a hold must expire at a finite time' using errcode = '22023';
    end if;
    select * into strict r from hold_instances(
        array[p_instance_id], array[p_kind], array[hold], null, array['operator'::causekind], array[hold ->> 'reason'],
        array[hold ->> 'by']);
    return applied_or_raise(r, p_instance_id, 'be held');
end
$$;
comment on function hold_instance(uuid, text, text, timestamptz, holdkind) is
    'Drains one instance until the hold is released or expires, for psql and other programs. Returns applied or unchanged. '
    'Raises SC001, SC002.';

create function release_instance(
    p_instance_id uuid, p_reason text default null, p_by text default null, p_kind holdkind default 'operator')
returns text
language plpgsql as $$
declare
    r change_outcome;
begin
    if p_instance_id is null or p_kind is null then
        raise exception 'instance id and kind must be given' using errcode = '22004';
    end if;
    select * into strict r from hold_instances(
        array[p_instance_id], array[p_kind], array[null]::jsonb[], null, array['operator'::causekind],
        array[nullif(p_reason, '')], array[nullif(p_by, '')]);
    return applied_or_raise(r, p_instance_id, 'be released');
end
$$;
comment on function release_instance(uuid, text, text, holdkind) is
    'Releases the hold of one instance, which then has the status that it reports. Returns applied, or unchanged where it is not '
    'held. Raises SC001.';

create function cause_may_become(p_from causekind, p_to causekind) returns boolean
language sql immutable parallel safe as $$
    select p_from in ('unknown', 'process_exited', 'process_killed', 'actor_died')
       and p_to in ('process_exited', 'process_killed', 'out_of_memory', 'start_failed', 'actor_died', 'node_died')
$$;
comment on function cause_may_become(causekind, causekind) is
    'Whether the cause of a death may be refined: the end of a process was observed, and Ray explains it later.';

create function refine_causes(p_ids uuid[], p_cause_kinds causekind[], p_cause_details text[]) returns setof uuid
language plpgsql as $$
declare
    r record;
begin
    if p_cause_kinds is null or array_position(p_cause_kinds, null) is not null then
        raise exception 'kinds of causes must be given' using errcode = '22004';
    end if;
    perform check_batch(p_ids, array[cardinality(p_cause_kinds), cardinality(p_cause_details)], null, null);
    for r in
        select e.id, e.kind, e.detail
          from unnest(p_ids, p_cause_kinds, p_cause_details) as e (id, kind, detail)
         order by e.id
    loop
        update registry_instance i
           set cause_kind = r.kind, cause_detail = r.detail
         where i.instance_id = r.id and i.status = 'dead' and i.cause_by is null
           and (cause_may_become(i.cause_kind, r.kind)
                or (i.cause_kind = r.kind and i.cause_detail is not distinct from r.detail));
        if found then
            update registry_transition t
               set cause_kind = r.kind, cause_detail = r.detail
             where t.logical_id = (select i.logical_id from registry_instance i where i.instance_id = r.id)
               and t.instance_id = r.id and t.to_status = 'dead';
            return next r.id;
        end if;
    end loop;
end
$$;
comment on function refine_causes(uuid[], causekind[], text[]) is
    'Stores better known causes of deaths, in the instances and in their history. Returns the ids of those that have this cause now.';
