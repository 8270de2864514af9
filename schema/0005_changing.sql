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

create function set_instance_statuses(
    p_ids uuid[], p_statuses instancestatus[], p_seqs bigint[], p_cause_kinds causekind[], p_cause_details text[],
    p_cause_by text[], p_writer_id text default null, p_writer_seqs bigint[] default null,
    p_ages_s double precision[] default null)
returns setof change_outcome
language plpgsql
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
as $$
declare
    pending  bigint[];
    outcomes change_outcome[];
begin
    if p_statuses is null or array_position(p_statuses, null) is not null then
        raise exception 'statuses must be given' using errcode = '22004';
    end if;
    perform check_batch(
        p_ids, array[cardinality(p_statuses), cardinality(p_cause_kinds), cardinality(p_cause_details),
                     cardinality(p_cause_by), cardinality(p_writer_seqs)], p_seqs, p_ages_s);
    select array_agg(o.ord) into pending from generate_series(1, cardinality(p_ids)) as o (ord);
    while cardinality(pending) > 0 loop
        with given as materialized (
            select distinct on (c.id) c.*, now() - make_interval(secs => coalesce(c.age_s, 0)) as happened_at
              from unnest(p_ids, p_statuses, p_seqs, p_cause_kinds, p_cause_details, p_cause_by, p_writer_seqs, p_ages_s)
                   with ordinality as c (id, wanted, seq, cause_kind, cause_detail, cause_by, writer_seq, age_s, ord)
             where c.ord = any (pending)
             order by c.id, c.ord
        ), judged as materialized (
            select g.*, i as existing, effective_status(g.wanted, i.holds) as becomes,
                   case
                       when g.seq <= i.seq then 'repeated'
                       when g.seq is null and i.writer_id = p_writer_id and g.writer_seq <= i.writer_seq then 'repeated'
                       when i.reported_status = g.wanted then 'same'
                       when i.reported_status = 'dead' then 'dead'
                       when not status_may_become(i.reported_status, g.wanted) then 'forbidden'
                       when effective_status(g.wanted, i.holds) = i.status then 'hidden'
                       else 'applied'
                   end as verdict
              from given g
              join registry_instance i on i.instance_id = g.id
             order by g.id
               for update of i
        ), written as (
            update registry_instance i
               set reported_status = j.wanted,
                   seq = coalesce(j.seq, i.seq),
                   status_changed_at = case when j.verdict <> 'applied' then i.status_changed_at
                                            else greatest(i.status_changed_at + interval '1 microsecond', j.happened_at) end,
                   cause_kind = case when j.verdict = 'applied' then j.cause_kind else i.cause_kind end,
                   cause_detail = case when j.verdict = 'applied' then j.cause_detail else i.cause_detail end,
                   cause_by = case when j.verdict = 'applied' then j.cause_by else i.cause_by end,
                   last_heartbeat = case when j.verdict = 'same' or j.seq is null then i.last_heartbeat else now() end,
                   writer_id = case when j.seq is null and j.writer_seq is not null then p_writer_id else i.writer_id end,
                   writer_seq = case when j.seq is null and j.writer_seq is not null then j.writer_seq else i.writer_seq end
              from judged j
             where i.instance_id = j.id
               and (j.verdict in ('applied', 'hidden') or (j.verdict = 'same' and j.seq is not null))
        ), answer as (
            select case
                       when j.verdict = 'applied' then
                           row(j.ord, 'applied', j.becomes, (j.existing).cluster_epoch, j.cause_kind, j.cause_detail,
                               j.cause_by)::change_outcome
                       else outcome_of(
                           j.ord, case when j.verdict in ('dead', 'forbidden') then j.verdict else 'unchanged' end, j.existing)
                   end as outcome
              from judged j
            union all
            select outcome_of(g.ord, 'unknown', null)
              from given g
             where not exists (select from registry_instance i where i.instance_id = g.id)
        )
        select array_agg(a.outcome) into outcomes from answer a;
        return query select o.* from unnest(outcomes) as o;
        pending := without_answered(pending, outcomes);
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
language plpgsql
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
as $$
declare
    pending  bigint[];
    outcomes change_outcome[];
begin
    if p_kinds is null or array_position(p_kinds, null) is not null then
        raise exception 'kinds of holds must be given' using errcode = '22004';
    end if;
    perform check_batch(
        p_ids, array[cardinality(p_kinds), cardinality(p_holds), cardinality(p_cause_kinds), cardinality(p_cause_details),
                     cardinality(p_cause_by), cardinality(p_writer_seqs)], p_seqs, p_ages_s);
    select array_agg(o.ord) into pending from generate_series(1, cardinality(p_ids)) as o (ord);
    while cardinality(pending) > 0 loop
        with given as materialized (
            select distinct on (c.id) c.*, t.happened_at,
                   case when c.hold is not null then checked_hold(c.hold, t.happened_at) end as wanted
              from unnest(p_ids, p_kinds::text[], p_holds, p_seqs, p_cause_kinds, p_cause_details, p_cause_by, p_writer_seqs,
                          p_ages_s)
                   with ordinality as c (id, kind, hold, seq, cause_kind, cause_detail, cause_by, writer_seq, age_s, ord),
                   lateral (select now() - make_interval(secs => coalesce(c.age_s, 0)) as happened_at) as t
             where c.ord = any (pending)
             order by c.id, c.ord
        ), found as materialized (
            select g.*, i as existing,
                   case when g.wanted is null then i.holds - g.kind
                        else i.holds || jsonb_build_object(g.kind, g.wanted) end as holds
              from given g
              join registry_instance i on i.instance_id = g.id
             order by g.id
               for update of i
        ), judged as materialized (
            select f.*, effective_status((f.existing).reported_status, f.holds) as becomes,
                   case
                       when f.seq <= (f.existing).seq then 'repeated'
                       when f.seq is null and (f.existing).writer_id = p_writer_id
                            and f.writer_seq <= (f.existing).writer_seq then 'repeated'
                       -- it is held for this already, or not held
                       when f.wanted - 'since' is not distinct from ((f.existing).holds -> f.kind) - 'since' then 'same'
                       when (f.existing).reported_status = 'dead' then 'dead'
                       else 'applied'
                   end as verdict
              from found f
        ), written as (
            update registry_instance i
               set holds = case when j.verdict = 'applied' then j.holds else i.holds end,
                   seq = coalesce(j.seq, i.seq),
                   status_changed_at = case when j.verdict <> 'applied' or j.becomes = i.status then i.status_changed_at
                                            else greatest(i.status_changed_at + interval '1 microsecond', j.happened_at) end,
                   cause_kind = case when j.verdict = 'applied' then j.cause_kind else i.cause_kind end,
                   cause_detail = case when j.verdict = 'applied' then j.cause_detail else i.cause_detail end,
                   cause_by = case when j.verdict = 'applied' then j.cause_by else i.cause_by end,
                   last_heartbeat = case when j.verdict = 'same' or j.seq is null then i.last_heartbeat else now() end,
                   writer_id = case when j.seq is null and j.writer_seq is not null then p_writer_id else i.writer_id end,
                   writer_seq = case when j.seq is null and j.writer_seq is not null then j.writer_seq else i.writer_seq end
              from judged j
             where i.instance_id = j.id and (j.verdict = 'applied' or (j.verdict = 'same' and j.seq is not null))
        ), answer as (
            select case
                       when j.verdict = 'applied' then
                           row(j.ord, 'applied', j.becomes, (j.existing).cluster_epoch, j.cause_kind, j.cause_detail,
                               j.cause_by)::change_outcome
                       else outcome_of(j.ord, case when j.verdict = 'dead' then 'dead' else 'unchanged' end, j.existing)
                   end as outcome
              from judged j
            union all
            select outcome_of(g.ord, 'unknown', null)
              from given g
             where not exists (select from registry_instance i where i.instance_id = g.id)
        )
        select array_agg(a.outcome) into outcomes from answer a;
        return query select o.* from unnest(outcomes) as o;
        pending := without_answered(pending, outcomes);
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
language plpgsql
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
as $$
begin
    if p_cause_kinds is null or array_position(p_cause_kinds, null) is not null then
        raise exception 'kinds of causes must be given' using errcode = '22004';
    end if;
    perform check_batch(p_ids, array[cardinality(p_cause_kinds), cardinality(p_cause_details)], null, null);
    -- once, unless an instance comes more than once
    for turn in 1 .. coalesce((select max(c.times) from (select count(*) from unnest(p_ids) as e (id) group by e.id) as c (times)), 0)
    loop
        return query
        with given as materialized (
            select e.id, e.kind, e.detail, row_number() over (partition by e.id order by e.ord) as occurrence
              from unnest(p_ids, p_cause_kinds, p_cause_details) with ordinality as e (id, kind, detail, ord)
        ), refined as materialized (
            select g.*, i.logical_id
              from given g
              join registry_instance i on i.instance_id = g.id
             where g.occurrence = turn and i.status = 'dead' and i.cause_by is null
               and (cause_may_become(i.cause_kind, g.kind)
                    or (i.cause_kind = g.kind and i.cause_detail is not distinct from g.detail))
             order by g.id
               for update of i
        ), written as (
            update registry_instance i
               set cause_kind = r.kind, cause_detail = r.detail
              from refined r
             where i.instance_id = r.id
        ), remembered as (
            update registry_transition t
               set cause_kind = r.kind, cause_detail = r.detail
              from refined r
             where t.logical_id = r.logical_id and t.instance_id = r.id and t.to_status = 'dead'
        )
        select r.id from refined r;
    end loop;
end
$$;
comment on function refine_causes(uuid[], causekind[], text[]) is
    'Stores better known causes of deaths, in the instances and in their history. Returns the ids of those that have this cause now.';
