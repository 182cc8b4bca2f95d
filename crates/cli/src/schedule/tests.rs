use super::*;
use crate::fake::Fake;
use berth_api::manager::Page;
use berth_model::schedule::reserve::PoolRoom;
use berth_model::schedule::{Part, ScheduleStatus};
use berth_model::snapshot::SnapshotExtent;
use berth_model::{SegmentId, SnapshotId, Timestamp, UserId, VmId};
use clap::Parser as _;

const NOW: Timestamp = Timestamp::from_millis(1_795_352_752_007);

fn schedule(name: &str, segment: u8) -> Schedule {
    Schedule {
        id: ScheduleId::from_entropy([segment; 10]),
        segment: SegmentId::from_entropy([segment; 10]),
        name: name.parse().expect("a name"),
        vm: None,
        cron: "0 2 * * *".parse().expect("a cron"),
        timezone: Zone::UTC,
        keep: "daily=7,weekly=4".parse().expect("a rule"),
        extent: SnapshotExtent::Machine,
        paused: false,
        owner: UserId::from_entropy([1; 10]),
        created_at: NOW,
        status: ScheduleStatus::new(NOW),
    }
}

fn report(schedule: Schedule) -> ScheduleReport {
    let vm = VmId::from_entropy([1; 10]);
    let part = Part {
        schedule: schedule.id.clone(),
        vm: vm.clone(),
        due_at: NOW,
        at: NOW,
        outcome: Outcome::Failed,
        why: Some("pool default of host h1 is full".to_owned()),
        snapshot: None,
        operation: None,
        deleted: 0,
        stored_bytes: 0,
        freed_bytes: 0,
        in_a_row: 3,
    };
    ScheduleReport {
        next_runs: schedule.cron.next(&schedule.timezone, NOW, 5),
        vms: vec![ScheduledVm { vm: vm.clone(), name: "accounting/books".to_owned(), last: Some(part) }],
        would_delete: vec![Doomed {
            vm,
            vm_name: "accounting/books".to_owned(),
            snapshot: SnapshotId::from_entropy([1; 10]),
            name: "nightly-2026-11-20-0200".parse().expect("a name"),
            taken_at: NOW,
            stored_bytes: 3 << 20,
        }],
        snapshots: 8,
        stored_bytes: 24 << 20,
        held: None,
        pools: vec![PoolRoom {
            host: "h1".parse().expect("a name"),
            pool: "default".parse().expect("a name"),
            room: Room::Below,
            free_bytes: 3 << 30,
            reserve_bytes: 10 << 30,
            missing_bytes: 7 << 30,
            reached_at: None,
        }],
        schedule,
    }
}

fn verb(line: &str) -> Result<Verb, clap::Error> {
    let words = line.split(' ').map(|word| word.replace('_', " "));
    match crate::arguments::Cli::try_parse_from(words)?.command {
        crate::arguments::Command::Noun(crate::arguments::Noun::Schedule { verb }) => Ok(verb),
        _ => panic!("{line}"),
    }
}

#[tokio::test]
async fn a_trial_says_the_next_five_runs_and_which_vms() {
    let fake = Fake::new().answer("POST /v1/schedules", &report(schedule("nightly", 1)));
    let line = "berth schedule create nightly --segment accounting --cron 0_2_*_*_* --keep daily=7 --dry-run";
    run(&fake.session(), verb(line).expect(line)).await.expect("tried");
    assert_eq!(fake.asked()[0].line, "POST /v1/schedules?dry_run=true");
    let said = fake.said();
    assert!(said.contains("2026-11-23 02:00:00Z, 2026-11-24 02:00:00Z"), "{said}");
    assert!(said.contains("2026-11-27 02:00:00Z\nVMs: accounting/books"), "{said}");
}

#[test]
fn nonsense_is_refused_before_anybody_is_asked() {
    for line in [
        "berth schedule create nightly --cron 0_2_*_*_* --keep daily=7",
        "berth schedule create nightly --segment a --vm a/b --cron 0_2_*_*_* --keep daily=7",
        "berth schedule create nightly --segment a --cron 0_2_*_* --keep daily=7",
        "berth schedule create nightly --segment a --cron 0_2_*_*_* --keep daily",
        "berth schedule create nightly --segment a --cron 0_2_*_*_* --keep daily=7 --timezone Berlin",
    ] {
        assert!(verb(line).is_err(), "{line}");
    }
}

#[tokio::test]
async fn a_name_alone_is_enough_when_only_one_segment_has_it() {
    let all = vec![schedule("nightly", 1), schedule("hourly", 2), schedule("nightly", 3)];
    let page = Page { items: all, next_cursor: None };
    let path = format!("GET /v1/schedules/{}", ScheduleId::from_entropy([2; 10]));
    let fake = Fake::new().answer("GET /v1/schedules", &page).answer(&path, &report(schedule("hourly", 2)));
    run(&fake.session(), verb("berth schedule show hourly").expect("a line")).await.expect("shown");
    let said = fake.said();
    assert!(said.contains("failed (3 in a row)  pool default of host h1 is full"), "{said}");
    assert!(said.contains("8, 24 MiB"), "{said}");
    assert!(said.contains("below: 7.0 GiB missing to 10 GiB"), "{said}");
    let several = run(&fake.session(), verb("berth schedule show nightly").expect("a line")).await;
    assert_eq!(several.expect_err("several").code(), 2);
    let none = run(&fake.session(), verb("berth schedule show monthly").expect("a line")).await;
    assert_eq!(none.expect_err("none").code(), 4);
}

#[tokio::test]
async fn a_trial_of_another_rule_says_what_would_go() {
    let fake = Fake::new().answer("PATCH /v1/schedules/a%2Fnightly", &report(schedule("nightly", 1)));
    let line = "berth schedule update a/nightly --keep last=1 --dry-run";
    run(&fake.session(), verb(line).expect(line)).await.expect("tried");
    let said = fake.said();
    assert!(said.contains("would delete 1 snapshots, up to 3.0 MiB:"), "{said}");
    let nothing = run(&fake.session(), verb("berth schedule update a/nightly").expect("a line")).await;
    assert_eq!(nothing.expect_err("nothing to change").code(), 2);
}
