use super::*;

fn cron(text: &str) -> Cron {
    text.parse().expect(text)
}

fn zone(text: &str) -> Zone {
    text.parse().expect(text)
}

fn at(text: &str) -> Timestamp {
    text.parse().expect(text)
}

/// Expression, zone, after this instant, and the next ones.
const TABLE: &[(&str, &str, &str, &[&str])] = &[
    (
        "0 2 * * *",
        "UTC",
        "2026-11-28T02:00:00Z",
        &["2026-11-29T02:00:00Z", "2026-11-30T02:00:00Z", "2026-12-01T02:00:00Z"],
    ),
    // A fraction of a second does not bring the same minute back, nor hide the next.
    ("* * * * *", "UTC", "2026-11-28T01:59:59.999Z", &["2026-11-28T02:00:00Z", "2026-11-28T02:01:00Z"]),
    ("* * * * *", "UTC", "2026-11-28T02:00:00.001Z", &["2026-11-28T02:01:00Z"]),
    // Lists, ranges, steps, names.
    (
        "15,45 8-9 * * mon-fri",
        "UTC",
        "2026-11-27T09:00:00Z",
        &["2026-11-27T09:15:00Z", "2026-11-27T09:45:00Z", "2026-11-30T08:15:00Z"],
    ),
    // Of two restricted days either suffices.
    ("0 0 1 * sun", "UTC", "2026-11-28T00:00:00Z", &["2026-11-29T00:00:00Z", "2026-12-01T00:00:00Z"]),
    ("0 0 L * *", "UTC", "2027-02-01T00:00:00Z", &["2027-02-28T00:00:00Z", "2027-03-31T00:00:00Z"]),
    ("0 0 29 2 *", "UTC", "2026-11-28T00:00:00Z", &["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]),
    ("@daily", "Europe/Berlin", "2026-11-28T00:00:00Z", &["2026-11-28T23:00:00Z"]),
    // Berlin, clocks go forward: 2:30 is not there on 29 March 2026, and is made up for at 3:00.
    (
        "30 2 * * *",
        "Europe/Berlin",
        "2026-03-28T00:00:00Z",
        &["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"],
    ),
    // Repeating ones leave out what is not there.
    (
        "*/30 * * * *",
        "Europe/Berlin",
        "2026-03-29T00:00:00Z",
        &["2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z"],
    ),
    // Berlin, clocks go back: 2:30 comes twice on 25 October 2026, and the first counts.
    (
        "30 2 * * *",
        "Europe/Berlin",
        "2026-10-24T12:00:00Z",
        &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"],
    ),
    ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30:00Z", &["2026-10-26T01:30:00Z"]),
    ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:15:00Z", &["2026-10-26T01:30:00Z"]),
    // Repeating ones run in both hours.
    (
        "0 * * * *",
        "Europe/Berlin",
        "2026-10-24T23:30:00Z",
        &["2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z"],
    ),
    // New York, the same two days there.
    (
        "30 2 * * *",
        "America/New_York",
        "2026-03-08T00:00:00Z",
        &["2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"],
    ),
    (
        "30 1 * * *",
        "America/New_York",
        "2026-11-01T00:00:00Z",
        &["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"],
    ),
    // Lord Howe, where clocks move by half an hour.
    (
        "15 2 * * *",
        "Australia/Lord_Howe",
        "2026-10-03T12:00:00Z",
        &["2026-10-03T15:30:00Z", "2026-10-04T15:15:00Z"],
    ),
    // A zone that is off by 45 minutes and has no such days.
    ("0 0 * * *", "Asia/Kathmandu", "2026-11-28T00:00:00Z", &["2026-11-28T18:15:00Z"]),
];

#[test]
fn every_line_of_the_table_holds() {
    for (text, zone_name, after, expected) in TABLE {
        let found = cron(text).next(&zone(zone_name), at(after), expected.len());
        let expected: Vec<Timestamp> = expected.iter().map(|text| at(text)).collect();
        assert_eq!(found, expected, "'{text}' in {zone_name} after {after}");
    }
}

#[test]
fn each_occasion_is_found_from_either_side() {
    for (text, zone_name, after, expected) in TABLE {
        let (cron, zone) = (cron(text), zone(zone_name));
        for instant in expected.iter().map(|text| at(text)) {
            let back = cron.latest_until(&zone, instant.plus_millis(999));
            assert_eq!(back, Some(instant), "'{text}' in {zone_name}");
            let passed = occasions_between(&cron, &zone, at(after), instant);
            assert_eq!(passed.latest, Some(instant), "'{text}' in {zone_name} after {after}");
        }
    }
}

#[test]
fn what_passed_is_counted_but_not_for_ever() {
    let zone = Zone::UTC;
    let count = |text: &str, after: &str, until: &str| {
        occasions_between(&cron(text), &zone, at(after), at(until)).count
    };
    assert_eq!(count("0 * * * *", "2026-11-25T00:00:00Z", "2026-11-28T00:00:00Z"), 72);
    assert_eq!(count("0 * * * *", "2026-11-28T00:00:00Z", "2026-11-28T00:59:59Z"), 0);
    assert_eq!(count("* * * * *", "2025-11-28T00:00:00Z", "2026-11-28T00:00:00Z"), COUNT_MAX);
}

#[test]
fn nonsense_is_refused_with_what_is_wrong() {
    for text in [
        "",
        "* * * *",
        "* * * * * *",
        "0 0 2 * * * 2027",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * 30 2 *",
        "*/0 * * * *",
        "5-1 * * * x",
        "every night",
        "@reboot",
        "\u{0}",
    ] {
        let error = text.parse::<Cron>().expect_err(text);
        assert!(error.to_string().contains("five fields of cron"), "{error}");
    }
    assert!("1,".repeat(200).parse::<Cron>().is_err());
    for text in ["", "Berlin", "CEST+1", "../etc/passwd", "Europe/Berlin\n"] {
        assert!(text.parse::<Zone>().is_err(), "{text}");
    }
}

#[test]
fn an_expression_and_a_zone_survive_their_text() {
    for text in ["0 2 * * *", "@hourly", "*/5 8-18 * * mon-fri"] {
        let json = serde_json::to_string(&cron(text)).expect("json");
        assert_eq!(serde_json::from_str::<Cron>(&json).expect("own json"), cron(text));
        assert_eq!(cron(text).to_string(), text);
    }
    assert_eq!(zone("europe/berlin").to_string(), "Europe/Berlin");
    assert_eq!(zone("UTC").to_string(), "UTC");
    assert!(serde_json::from_str::<Cron>("\"61 * * * *\"").is_err());
}
