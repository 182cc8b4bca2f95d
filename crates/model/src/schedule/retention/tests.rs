use proptest::prelude::*;

use super::*;

const HOUR_MS: u64 = 3600 * 1000;
const DAY_MS: u64 = 24 * HOUR_MS;

fn id(number: u32) -> SnapshotId {
    let mut entropy = [0; 10];
    entropy[..4].copy_from_slice(&number.to_be_bytes());
    SnapshotId::from_entropy(entropy)
}

fn schedule(number: u8) -> ScheduleId {
    ScheduleId::from_entropy([number; 10])
}

fn keep(text: &str) -> Keep {
    text.parse().expect(text)
}

fn at(text: &str) -> Timestamp {
    text.parse().expect(text)
}

fn own(number: u32, taken_at: Timestamp) -> Candidate {
    Candidate {
        id: id(number),
        schedule: Some(schedule(1)),
        taken_at,
        is_held: false,
        is_used: false,
        verdict: Verdict::Good,
    }
}

/// What stays of snapshots that were taken at these times, by the times.
fn staying(rule: &str, zone: &str, times: &[&str], now: &str) -> Vec<String> {
    let all: Vec<Candidate> = (0..).zip(times).map(|(number, text)| own(number, at(text))).collect();
    let gone = to_delete(&schedule(1), &keep(rule), &zone.parse().expect(zone), &all, at(now));
    let stay = all.iter().zip(times).filter(|(one, _)| !gone.contains(&one.id));
    stay.map(|(_, text)| (*text).to_owned()).collect()
}

#[test]
fn rules_keep_what_they_say() {
    let times = [
        "2026-10-01T02:00:00Z",
        "2026-10-31T23:30:00Z",
        "2026-11-14T02:00:00Z",
        "2026-11-22T22:00:00Z",
        "2026-11-22T23:30:00Z",
        "2026-11-27T01:00:00Z",
        "2026-11-27T02:00:00Z",
        "2026-11-28T01:10:00Z",
        "2026-11-28T01:50:00Z",
        "2026-11-28T02:00:00Z",
    ];
    let now = "2026-11-28T03:00:00Z";
    for (rule, zone, expected) in [
        ("last=1", "UTC", &times[9..]),
        ("last=3", "UTC", &times[7..]),
        ("last=100", "UTC", &times[..]),
        // Of the hour from one to two the newest, and hours without any don't count.
        ("hourly=3", "UTC", &[times[6], times[8], times[9]][..]),
        ("daily=3", "UTC", &[times[4], times[6], times[9]][..]),
        // In Berlin the one at 23:30 is of the next day, and of the next week, and that of 31 October of November.
        ("daily=4", "Europe/Berlin", &[times[3], times[4], times[6], times[9]][..]),
        ("weekly=2", "UTC", &[times[4], times[9]][..]),
        ("weekly=2", "Europe/Berlin", &[times[3], times[9]][..]),
        ("monthly=2", "UTC", &[times[1], times[9]][..]),
        ("monthly=2", "Europe/Berlin", &[times[0], times[9]][..]),
        // What one part keeps, is kept.
        ("last=1,daily=2,monthly=3", "UTC", &[times[1], times[6], times[9]][..]),
        // What is of no period any more still counts for nothing else.
        ("hourly=1,weekly=3", "UTC", &[times[2], times[4], times[9]][..]),
    ] {
        assert_eq!(staying(rule, zone, &times, now), expected, "{rule} in {zone}");
    }
}

#[test]
fn the_hour_that_comes_twice_is_two_hours() {
    let times = ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:30:00Z"];
    let stay = staying("hourly=2", "Europe/Berlin", &times, "2026-10-25T03:00:00Z");
    assert_eq!(stay, times[1..]);
}

#[test]
fn what_is_broken_fills_no_place_and_is_the_last_to_be_kept_for_nothing() {
    let now = at("2026-11-28T00:00:00Z");
    let times = ["2026-11-25T00:00:00Z", "2026-11-26T00:00:00Z", "2026-11-27T00:00:00Z"];
    let mut all: Vec<Candidate> = (0..).zip(times).map(|(number, text)| own(number, at(text))).collect();
    let gone = |all: &[Candidate]| to_delete(&schedule(1), &keep("last=1"), &Zone::UTC, all, now);
    all[2].verdict = Verdict::Broken;
    assert_eq!(gone(&all), [id(0), id(2)], "the newest good one stays, the broken one above it goes");
    all[1].verdict = Verdict::Broken;
    assert_eq!(gone(&all), [id(1), id(2)]);
    all[0].verdict = Verdict::Broken;
    assert_eq!(gone(&all), [], "when nothing is good, nothing is deleted");
}

#[test]
fn rules_are_read_and_nonsense_is_refused() {
    let rule = keep("hourly=24,daily=7,weekly=4");
    assert_eq!((rule.hourly, rule.daily, rule.weekly, rule.last), (24, 7, 4, 0));
    assert_eq!(rule.to_string(), "hourly=24,daily=7,weekly=4");
    assert_eq!(keep("last=3,monthly=0").to_string(), "last=3");
    let many = format!("last={}", KEEP_MAX + 1);
    for text in [
        "",
        "24",
        "daily",
        "daily=",
        "daily=x",
        "daily=-1",
        "yearly=1",
        "daily=1;last=1",
        "daily=0",
        "daily=1,daily=2",
        &many,
    ] {
        assert!(text.parse::<Keep>().is_err(), "{text}");
    }
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let one = (
        0..40 * DAY_MS,
        0..3u8,
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.2),
    );
    prop::collection::vec(one, 0..60).prop_map(|all| {
        let begin = at("2026-10-10T00:00:00Z");
        (0..)
            .zip(all)
            .map(|(number, (after_ms, by, is_held, is_used, is_broken))| Candidate {
                schedule: (by > 0).then(|| schedule(by)),
                is_held,
                is_used,
                verdict: if is_broken { Verdict::Broken } else { Verdict::Good },
                ..own(number, begin.plus_millis(after_ms))
            })
            .collect()
    })
}

fn rules() -> impl Strategy<Value = Keep> {
    (0..5u32, 0..30u32, 0..9u32, 0..5u32, 0..4u32).prop_map(|(last, hourly, daily, weekly, monthly)| Keep {
        last,
        hourly,
        daily,
        weekly,
        monthly,
    })
}

proptest! {
    #[test]
    fn nothing_goes_that_must_stay(all in candidates(), rule in rules(), zone in prop::sample::select(vec!["UTC", "Europe/Berlin", "America/New_York"])) {
        let (zone, now): (Zone, _) = (zone.parse().expect(zone), at("2026-11-10T00:00:00Z"));
        let gone = to_delete(&schedule(1), &rule, &zone, &all, now);
        let find = |id: &SnapshotId| all.iter().find(|one| one.id == *id).expect("one of them");
        for one in gone.iter().map(find) {
            prop_assert!(!one.is_held && !one.is_used, "{one:?}");
            prop_assert_eq!(one.schedule.as_ref(), Some(&schedule(1)));
            prop_assert!(one.taken_at <= now);
        }
        let ours = |one: &&Candidate| one.schedule == Some(schedule(1)) && one.taken_at <= now;
        let order = |one: &&Candidate| (one.taken_at, one.id.clone());
        let good = |one: &&Candidate| one.verdict == Verdict::Good;
        if let Some(newest) = all.iter().filter(ours).filter(good).max_by_key(order) {
            prop_assert!(!gone.contains(&newest.id), "the newest good one");
            // Among what the rule may decide on, the newest that is kept is a good one.
            let free = |one: &&Candidate| !one.is_held && !one.is_used;
            let kept = all.iter().filter(ours).filter(free).filter(|one| !gone.contains(&one.id));
            prop_assert!(kept.max_by_key(order).is_none_or(|one| good(&one)));
        } else {
            prop_assert_eq!(gone.len(), 0, "nothing good is left");
        }
    }

    /// What was decided once is not decided otherwise when it has been carried out.
    #[test]
    fn what_stays_stays_when_the_others_are_gone(all in candidates(), rule in rules()) {
        let now = at("2026-12-01T00:00:00Z");
        let gone = to_delete(&schedule(1), &rule, &Zone::UTC, &all, now);
        let left: Vec<Candidate> = all.iter().filter(|one| !gone.contains(&one.id)).cloned().collect();
        prop_assert_eq!(to_delete(&schedule(1), &rule, &Zone::UTC, &left, now), Vec::<SnapshotId>::new());
    }

    /// Deleting one that would go anyway changes nothing for the others: the order does not matter.
    #[test]
    fn the_order_of_deletion_does_not_matter(all in candidates(), rule in rules(), which in any::<prop::sample::Index>()) {
        let now = at("2026-12-01T00:00:00Z");
        let gone = to_delete(&schedule(1), &rule, &Zone::UTC, &all, now);
        prop_assume!(!gone.is_empty());
        let first = which.get(&gone).clone();
        let left: Vec<Candidate> = all.iter().filter(|one| one.id != first).cloned().collect();
        let then: Vec<SnapshotId> = gone.into_iter().filter(|id| *id != first).collect();
        prop_assert_eq!(to_delete(&schedule(1), &rule, &Zone::UTC, &left, now), then);
    }

    /// Taking a snapshot each hour and pruning, there are never more than the rule has places for.
    #[test]
    fn an_hourly_schedule_never_holds_more_than_its_places(rule in rules(), hours in 1..120u32) {
        let begin = at("2026-10-10T00:00:00Z");
        let mut all: Vec<Candidate> = Vec::new();
        for number in 0..hours {
            let now = begin.plus_millis(u64::from(number) * HOUR_MS);
            all.push(own(number, now));
            let gone = to_delete(&schedule(1), &rule, &Zone::UTC, &all, now);
            all.retain(|one| !gone.contains(&one.id));
        }
        let places: u32 = rule.parts().iter().map(|(_, number)| *number).sum();
        prop_assert!(all.len() <= places.max(1) as usize, "{} of {places}", all.len());
    }
}
