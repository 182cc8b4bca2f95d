use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().expect(text)
}

fn schedule(cron: &str, made: &str) -> Schedule {
    Schedule {
        id: ScheduleId::from_entropy([1; 10]),
        segment: SegmentId::from_entropy([1; 10]),
        name: "nightly".parse().expect("a name"),
        vm: None,
        cron: cron.parse().expect("a cron"),
        timezone: "Europe/Berlin".parse().expect("a zone"),
        keep: "daily=7".parse().expect("a rule"),
        extent: SnapshotExtent::Machine,
        paused: false,
        owner: UserId::from_entropy([1; 10]),
        created_at: at(made),
        status: ScheduleStatus::new(at(made)),
    }
}

fn begin(schedule: &mut Schedule, now: &str) -> ScheduleRun {
    let Due::Begin(run) = schedule.due(at(now)) else { panic!("not due at {now}") };
    schedule.begin(run.clone()).expect("none goes");
    run
}

#[test]
fn what_was_missed_is_made_up_for_once() {
    let mut hourly = schedule("0 * * * *", "2026-11-24T23:30:00Z");
    assert_eq!(hourly.due(at("2026-11-24T23:59:59Z")), Due::Wait(Some(at("2026-11-25T00:00:00Z"))));
    // Three days without a manager: one run, that of the last hour.
    let run = begin(&mut hourly, "2026-11-28T00:20:00Z");
    assert_eq!((run.due_at, run.missed), (at("2026-11-28T00:00:00Z"), 72));
    assert_eq!(hourly.due(at("2026-11-28T00:21:00Z")), Due::GoOn);
    hourly.finish(run.due_at, Tally { taken: 3, ..Tally::default() }, at("2026-11-28T00:22:00Z"));
    assert_eq!(hourly.due(at("2026-11-28T00:22:00Z")), Due::Wait(Some(at("2026-11-28T01:00:00Z"))));
    assert_eq!((hourly.status.runs, hourly.status.missed), (1, 72));
    let run = begin(&mut hourly, "2026-11-28T01:00:00Z");
    assert_eq!((run.due_at, run.missed), (at("2026-11-28T01:00:00Z"), 0));
}

#[test]
fn what_comes_due_while_a_run_goes_is_not_made_up_for() {
    let mut minutely = schedule("* * * * *", "2026-11-28T00:00:00Z");
    let run = begin(&mut minutely, "2026-11-28T00:01:02Z");
    minutely.finish(run.due_at, Tally::default(), at("2026-11-28T00:04:30Z"));
    assert_eq!(minutely.status.missed, 3);
    assert_eq!(minutely.due(at("2026-11-28T00:04:31Z")), Due::Wait(Some(at("2026-11-28T00:05:00Z"))));
    // The end of a run that is not the one that goes changes nothing.
    let before = minutely.clone();
    minutely.finish(run.due_at, Tally { failed: 9, ..Tally::default() }, at("2026-11-28T00:09:00Z"));
    assert_eq!(minutely, before);
}

#[test]
fn one_run_goes_at_a_time_and_what_is_asked_for_leaves_the_clocks_runs_alone() {
    let mut nightly = schedule("0 2 * * *", "2026-11-27T12:00:00Z");
    let asked = nightly.asked("ada".to_owned(), at("2026-11-27T13:00:00Z"));
    nightly.begin(asked.clone()).expect("none goes");
    let second = nightly.asked("eve".to_owned(), at("2026-11-27T13:00:01Z"));
    assert_eq!(nightly.begin(second), Err(asked.clone()));
    nightly.finish(asked.due_at, Tally::default(), at("2026-11-27T13:01:00Z"));
    assert_eq!(begin(&mut nightly, "2026-11-28T01:00:00Z").due_at, at("2026-11-28T01:00:00Z"));
}

#[test]
fn a_paused_schedule_does_nothing_and_a_clock_that_was_set_back_does_not_silence_it() {
    let mut nightly = schedule("0 2 * * *", "2026-11-27T12:00:00Z");
    nightly.paused = true;
    assert_eq!(nightly.due(at("2026-11-30T12:00:00Z")), Due::Wait(None));
    nightly.paused = false;
    nightly.status.seen_until = at("2036-11-27T12:00:00Z");
    assert_eq!(nightly.due(at("2026-11-27T12:00:00Z")), Due::Wait(Some(at("2026-11-28T01:00:00Z"))));
}

#[test]
fn snapshots_are_called_after_schedule_and_time_whatever_the_schedule_is_called() {
    let zone: Zone = "Europe/Berlin".parse().expect("a zone");
    let due = at("2026-11-28T01:00:00Z");
    let name = |text: &str| snapshot_name(&text.parse().expect("a name"), &zone, due).expect("a name");
    assert_eq!(name("nightly").as_str(), "nightly-2026-11-28-0200");
    assert_eq!(name(&"x".repeat(63)).as_str().len(), NAME_CHARS_MAX);
    let dashed = format!("{}-{}", "x".repeat(46), "y".repeat(10));
    assert_eq!(name(&dashed).as_str(), format!("{}-2026-11-28-0200", "x".repeat(46)));
}

#[test]
fn a_tally_is_the_sum_of_the_parts() {
    let part = |outcome, deleted| Part {
        schedule: ScheduleId::from_entropy([1; 10]),
        vm: VmId::from_entropy([1; 10]),
        due_at: Timestamp::default(),
        at: Timestamp::default(),
        outcome,
        why: None,
        snapshot: None,
        operation: None,
        deleted,
        stored_bytes: 0,
        freed_bytes: 0,
        in_a_row: 0,
    };
    let parts = [
        part(Outcome::Taken, 2),
        part(Outcome::Taken, 1),
        part(Outcome::Failed, 0),
        part(Outcome::Skipped, 4),
    ];
    assert_eq!(Tally::of(&parts), Tally { taken: 2, skipped: 1, failed: 1, deleted: 7 });
}
