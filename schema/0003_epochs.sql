-- Epochs and terms: which generation of the fleet is current, and which registry may write.

create function record_epoch(p_epoch text, p_will_wait boolean default true) returns text
language plpgsql as $$
declare
    known cluster_epoch;
begin
    if p_epoch is null or length(p_epoch) not between 1 and 128 then
        raise exception 'an epoch must have 1 to 128 characters' using errcode = '22023';
    elsif name_problem(p_epoch) is not null then
        raise exception 'an epoch %', name_problem(p_epoch) using errcode = '22023';
    end if;
    select * into known from cluster_epoch where epoch = p_epoch;
    if not found then
        perform 1 from cluster_metadata where id = 1 for update;
        -- the session that held the lock may have recorded it
        select * into known from cluster_epoch where epoch = p_epoch;
    end if;
    if found then
        return case when known.retired_at is not null then 'retired_epoch' end;
    end if;
    if p_will_wait and (select count(*) from cluster_epoch where current_at is null) >= 64 then
        return 'epoch_limit';
    end if;
    insert into cluster_epoch (epoch, number) values (p_epoch, (select max(number) + 1 from cluster_epoch));
    return null;
end
$$;
comment on function record_epoch(text, boolean) is
    'Records an epoch that is not known yet. Returns null where it is usable, else retired_epoch or epoch_limit. The limit counts '
    'staged epochs; one that becomes current at once (p_will_wait false) does not count.';

create function raise_for_epoch(p_epoch text, p_problem text) returns void
language plpgsql immutable as $$
begin
    if p_problem = 'retired_epoch' then
        raise exception 'epoch % is retired and cannot become current again', p_epoch using errcode = 'SC004';
    elsif p_problem = 'epoch_limit' then
        raise exception 'epoch % cannot be staged: 64 are staged already', p_epoch using errcode = 'SC005';
    end if;
end
$$;
comment on function raise_for_epoch(text, text) is 'Raises SC004 or SC005 where record_epoch returned a problem.';

create function stage_epoch(p_epoch text) returns boolean
language plpgsql as $$
declare
    was_known boolean;
begin
    perform 1 from cluster_metadata where id = 1 for update;
    select exists (select from cluster_epoch where epoch = p_epoch) into was_known;
    perform raise_for_epoch(p_epoch, record_epoch(p_epoch));
    return not was_known;
end
$$;
comment on function stage_epoch(text) is 'Names an epoch that will become current later. Returns whether it is new. Raises SC004, SC005.';

create function set_current_epoch(p_epoch text, p_above bigint default 0) returns bigint
language plpgsql as $$
declare
    meta         cluster_metadata;
    floor_number bigint := p_above;
    result       bigint;
begin
    select * into strict meta from cluster_metadata where id = 1 for update;
    if meta.current_epoch = p_epoch and meta.epoch_number > p_above then
        return meta.epoch_number;
    end if;
    if meta.current_epoch is distinct from p_epoch then
        -- also of an epoch that was staged before the current one: readers keep the higher of two numbers
        floor_number := greatest(p_above, meta.epoch_number);
        perform raise_for_epoch(p_epoch, record_epoch(p_epoch, p_will_wait => false));
        update cluster_epoch set retired_at = now() where epoch = meta.current_epoch;
        update cluster_epoch set current_at = now() where epoch = p_epoch;
    end if;
    update cluster_epoch
       set number = case when number > floor_number then number
                         else greatest(floor_number, (select max(e.number) from cluster_epoch e)) + 1 end
     where epoch = p_epoch returning number into result;
    update cluster_metadata
       set current_epoch = p_epoch, epoch_number = result, updated_at = now() where id = 1;
    return result;
end
$$;
comment on function set_current_epoch(text, bigint) is
    'Flips discovery to an epoch in one step and retires the one before. Its number becomes higher than that one''s and p_above. '
    'Returns the number. Raises SC004.';

create function begin_write(p_term bigint, p_writer_id text, p_commits bigint, p_counts boolean) returns bigint
language plpgsql as $$
declare
    in_force bigint;
    writer   registry_writer;
begin
    -- held to the end of the transaction: a registry that starts waits for writes that have passed here
    perform pg_advisory_xact_lock_shared(1592639711);
    -- statements of their own, so that they see what was committed during the wait for the lock
    select m.term into strict in_force from cluster_metadata m where m.id = 1;
    select * into strict writer from registry_writer w where w.id = 1;
    if in_force > p_term or (in_force = p_term and writer.writer_id is distinct from p_writer_id) then
        raise exception 'the registry of term % is superseded by that of term %', p_term, in_force
            using errcode = 'SC006', detail = in_force::text;
    elsif writer.commits < p_commits then
        raise exception 'the database has lost commits: it has % and had %', writer.commits, p_commits
            using errcode = 'SC007', detail = writer.commits::text;
    elsif in_force < p_term then
        -- more commits under a lower term: of another history, of which this registry knows nothing
        raise exception 'another database answers: it has term %, and had term %', in_force, p_term
            using errcode = 'SC007', detail = '0';
    end if;
    if p_counts then
        update registry_writer w set commits = w.commits + 1 where w.id = 1 returning w.commits into writer.commits;
    end if;
    return writer.commits;
end
$$;
comment on function begin_write(bigint, text, bigint, boolean) is
    'The first statement of each transaction of a registry. p_commits is the last commit that it knows; p_counts: this transaction '
    'is another one. Returns its number. Raises SC006 where a newer registry has started, and SC007 where the database has lost '
    'commits that this registry knows.';

create function begin_registry(
    p_ray_cluster text, p_epoch text, p_lease_s double precision, p_seen_term bigint default null,
    p_seen_at timestamptz default null, p_writer_id text default null, p_term bigint default null, p_commits bigint default null,
    p_new_epoch text default null)
returns table (
    epoch text, number bigint, term bigint, lease_before_s double precision, commits bigint, found_commits bigint,
    found_own boolean, database_id text)
language plpgsql as $$
declare
    meta       cluster_metadata;
    found      bigint;
    before     registry_writer;
    writer     registry_writer;
    wanted     text := p_epoch;
    serial     bigint;
    is_at_work boolean;
begin
    perform pg_advisory_xact_lock(1592639711);
    select * into strict meta from cluster_metadata where id = 1 for update;
    -- never by the age of a time, because the clock may have jumped; without p_seen_at the other registry counts as at work
    is_at_work := (meta.term, meta.term_seen_at) is distinct from (p_seen_term, p_seen_at);
    select * into strict before from registry_writer w where w.id = 1;
    -- as begin_write: one that has begun before, and another one since, does not take its term
    if is_at_work and p_term <= meta.term and before.writer_id is distinct from p_writer_id then
        raise exception 'the registry of term % is superseded by that of term %', p_term, meta.term
            using errcode = 'SC006', detail = meta.term::text;
    end if;
    -- a registry in force knows its term; a database that has a lower one has lost that it took over
    if is_at_work and coalesce(p_term, 0) <= meta.term and exists (select from superseded_cluster c where c.ray_cluster = p_ray_cluster) then
        raise exception 'the Ray cluster % was replaced by % and cannot take the registry back',
            p_ray_cluster, meta.ray_cluster using errcode = 'SC006', detail = meta.term::text;
    end if;
    if is_at_work and p_seen_at is not null then
        raise exception 'the registry of term % is at work', meta.term using errcode = 'SC006', detail = meta.term::text;
    end if;
    if meta.ray_cluster <> p_ray_cluster then
        delete from superseded_cluster c
         where c.ray_cluster = p_ray_cluster or c.superseded_at < now() - interval '90 days';
        insert into superseded_cluster (ray_cluster) values (meta.ray_cluster) on conflict do nothing;
        if wanted is null and not exists (
            select from cluster_epoch e where e.epoch = p_new_epoch and e.retired_at is not null)
        then
            wanted := p_new_epoch;
        end if;
        if wanted is null then
            select max(e.number) + 1 into serial from cluster_epoch e;
            loop
                wanted := 'epoch-' || serial;
                exit when not exists (select from cluster_epoch e where e.epoch = wanted);
                serial := serial + 1;
            end loop;
        end if;
    elsif meta.ray_cluster is null and p_term > meta.term and wanted is null and p_new_epoch <> meta.current_epoch
        and not exists (select from cluster_epoch e where e.epoch = p_new_epoch and e.retired_at is not null)
    then
        -- it has lost every registry that it had
        wanted := p_new_epoch;
    end if;
    if wanted is not null then
        perform set_current_epoch(wanted);
    end if;
    if p_epoch is null and wanted is not null then
        update cluster_epoch e set continued_by = wanted where e.epoch = meta.current_epoch;
    end if;
    update cluster_metadata m
       set ray_cluster = p_ray_cluster, lease_s = p_lease_s, term = greatest(m.term, p_term) + 1, leases_from = now(),
           term_seen_at = now(), updated_at = now()
     where m.id = 1;
    found := case when meta.term < p_term and before.commits >= p_commits then 0 else before.commits end;
    -- also where commits were lost, so that no number is used twice
    update registry_writer w set writer_id = p_writer_id, commits = greatest(w.commits, p_commits) + 1
     where w.id = 1 returning w.* into writer;
    return query
        select m.current_epoch, m.epoch_number, m.term, case when meta.ray_cluster is not null then meta.lease_s end,
               writer.commits, found, coalesce(before.writer_id = p_writer_id and meta.term = p_term, false),
               writer.database_id::text
          from cluster_metadata m where m.id = 1;
end
$$;
comment on function begin_registry(text, text, double precision, bigint, timestamptz, text, bigint, bigint, text) is
    'A registry starts: it takes the next term and renews every lease. The same Ray cluster keeps the epoch, another one makes a '
    'new epoch that continues it, named p_new_epoch where that is not retired; p_epoch flips to that epoch instead. A replaced cluster, '
    'and a registry that was superseded, takes the database back only with p_seen_term and p_seen_at, where term and term_seen_at are '
    'still these: the registry in force was not at work since. p_term and p_commits are the last ones that this '
    'process knows: terms and commits only grow, also where the database has lost some. Returns also the lease before, the number '
    'of this commit, that of the last one before it, 0 where the database is another one, and the term before. Raises SC004, SC006.';

create function renew_term(p_lease_s double precision default null) returns boolean
language plpgsql as $$
begin
    update cluster_metadata set term_seen_at = now(), lease_s = coalesce(p_lease_s, lease_s) where id = 1;
    return true;
end
$$;
comment on function renew_term(double precision) is
    'The registry in force is at work; p_lease_s is the lease from now on (null: as before).';

create function renew_every_lease() returns timestamptz
language plpgsql as $$
declare
    renewed_at timestamptz;
begin
    update cluster_metadata set leases_from = now() where id = 1 returning leases_from into renewed_at;
    return renewed_at;
end
$$;
comment on function renew_every_lease() is 'Renews every lease after the registry was down. Returns when.';
